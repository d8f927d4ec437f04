"use strict";
const byId = id => document.getElementById(id);
const payload = id => JSON.parse(byId(id)?.textContent ?? "null");

/** An element with properties and children; texts are never read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Hand text to the reader as a file. */
function download(name, text) {
  const link = make("a", {href: URL.createObjectURL(new Blob([text], {type: "text/csv"})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function theme() {
  const choice = byId("theme"), key = "screening-theme";
  let kept = null;
  try { kept = localStorage.getItem(key); } catch { /* A page without storage forgets the choice. */ }
  const show = () => {
    document.documentElement.dataset.theme = choice.value;
    document.dispatchEvent(new Event("recolour"));
  };
  if (kept) choice.value = kept;
  choice.addEventListener("change", () => {
    try { localStorage.setItem(key, choice.value); } catch { /* likewise */ }
    show();
  });
  choice.closest("label").hidden = false;
  show();
}

/** Let a table be filtered, sorted by the names of its columns, and downloaded. */
function explore(block) {
  const body = block.querySelector("tbody"), rows = [...body.rows], heads = [...block.querySelectorAll("thead th")];
  const search = block.querySelector("input"), shown = block.querySelector("output");
  const texts = rows.map(row => row.textContent.toLowerCase());
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim();
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => { row.hidden = !words.every(word => texts[i].includes(word)); });
    shown.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} rows`;
  };
  const sort = column => {
    const head = heads[column], sign = head.ariaSort === "ascending" ? -1 : 1, numeric = "numeric" in head.dataset;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "")
      : sign * (numeric ? a - b : a.localeCompare(b, undefined, {numeric: true}));
    body.append(...[...body.rows].sort((a, b) => compare(value(a, column), value(b, column))));
  };
  const save = () => {
    // An apostrophe keeps spreadsheets from running a text as a formula.
    const tame = text => /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
    const quote = text => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const lines = [heads.map(head => head.dataset.name)];
    for (const row of body.rows) if (!row.hidden) lines.push([...row.cells].map((_, i) => value(row, i)));
    download(`${block.dataset.table}.csv`, lines.map(line => line.map(tame).map(quote).join(",") + "\r\n").join(""));
  };
  heads.forEach((head, i) => {
    const button = make("button", {type: "button"}, ...head.childNodes);
    button.addEventListener("click", () => sort(i));
    head.append(button);
  });
  search.addEventListener("input", filter);
  block.querySelector(".controls button").addEventListener("click", save);
  block.querySelector(".controls").hidden = false;
  filter();
}

/** Colour the wells by the measure that is chosen, and let the arrow keys go from well to well. */
function plates() {
  const data = payload("plates-data");
  if (!data) return;
  const choice = byId("measure"), wells = [...document.querySelectorAll("td[data-well]")];
  choice?.addEventListener("change", () => {
    const {label, low, high, texts, shades} = data.measures[choice.value];
    for (const well of wells) {
      const i = well.dataset.well, shade = shades[i];
      well.textContent = texts[i];
      well.classList.toggle("unmeasured", shade === null);
      well.style.background = shade === null ? "" : data.scale[shade];
      well.style.color = shade === null ? "" : data.inks[shade];
    }
    byId("scale-low").textContent = low;
    byId("scale-high").textContent = high;
    for (const name of document.querySelectorAll(".measure-name")) name.textContent = label;
  });
  choice?.closest(".controls").removeAttribute("hidden");
  const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  for (const table of document.querySelectorAll("table.plate")) {
    const said = byId(table.dataset.said), all = table.querySelectorAll("td[title]");
    if (!all.length) continue;
    all[0].tabIndex = 0;
    table.addEventListener("keydown", event => {
      const step = steps[event.key], cell = event.target.closest("td");
      if (!step || !cell) return;
      event.preventDefault();
      let row = cell.parentElement.rowIndex, column = cell.cellIndex;
      for (;;) {
        row += step[0];
        column += step[1];
        const next = table.rows[row]?.cells[column];
        if (!next) return;
        if (!next.title) continue;
        cell.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        return;
      }
    });
    table.addEventListener("focusin", event => { said.textContent = event.target.title; });
    table.addEventListener("pointerover", event => { if (event.target.title) said.textContent = event.target.title; });
  }
}

/** Draw the map; point at a cell, or go from cell to cell by the arrow keys, to hear what it is. */
function atlas(choose) {
  const data = payload("map-data"), canvas = byId("map-canvas");
  if (!data || !canvas) return;
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer;
  const x = new Uint16Array(bytes(data.x)), y = new Uint16Array(bytes(data.y)), well = new Uint32Array(bytes(data.well));
  const tip = byId("map-tip"), said = byId("map-said"), legend = byId("map-legend"), words = byId("map-words");
  const colouring = byId("map-colouring"), context = canvas.getContext("2d"), margin = 12, n = x.length;
  const chosen = new Set();
  let side = 0, current = -1;
  const place = i => [margin + x[i] / 65535 * (side - 2 * margin), margin + y[i] / 65535 * (side - 2 * margin)];
  const draw = () => {
    side = canvas.clientWidth;
    if (!side) return;
    const sharp = devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(side * sharp);
    const {groups, ofWell} = data.colourings[colouring.value];
    const size = Math.min(1, Math.max(.38, 22 / Math.sqrt(n)));
    const shapes = groups.map(group => {
      const path = new Path2D();
      path.addPath(new Path2D(group.marker), {a: size, d: size});
      return path;
    });
    const paint = (wanted, alpha) => {
      context.globalAlpha = alpha;
      for (let i = 0; i < n; i++) {
        const group = ofWell[well[i]];
        if (wanted !== (chosen.size === 0 || chosen.has(group))) continue;
        const [px, py] = place(i);
        context.setTransform(sharp, 0, 0, sharp, px * sharp, py * sharp);
        context.fillStyle = groups[group].colour;
        context.fill(shapes[group]);
      }
    };
    paint(false, .07);
    paint(true, .8);
    context.globalAlpha = 1;
    if (current >= 0) {
      const [px, py] = place(current);
      context.setTransform(sharp, 0, 0, sharp, px * sharp, py * sharp);
      context.strokeStyle = getComputedStyle(canvas).color;
      context.lineWidth = 2;
      context.beginPath();
      context.arc(0, 0, 9, 0, 2 * Math.PI);
      context.stroke();
    }
  };
  const list = () => {
    const {groups, words: sentence} = data.colourings[colouring.value];
    chosen.clear();
    words.textContent = sentence;
    legend.replaceChildren(...groups.map((group, i) => {
      const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
      picture.setAttribute("viewBox", "-7 -7 14 14");
      picture.setAttribute("class", "swatch");
      picture.setAttribute("aria-hidden", "true");
      shape.setAttribute("d", group.marker);
      shape.setAttribute("fill", group.colour);
      picture.append(shape);
      const button = make("button", {type: "button", "aria-pressed": "false"}, picture, group.label);
      button.addEventListener("click", () => {
        if (!chosen.delete(i)) chosen.add(i);
        button.setAttribute("aria-pressed", String(chosen.has(i)));
        draw();
      });
      return make("li", {}, button);
    }));
  };
  const show = (i, speak) => {
    if (i === current && tip.hidden === (i < 0)) return;
    current = i;
    tip.hidden = i < 0;
    if (i >= 0) {
      const [plate, name, compound, mechanism] = data.wells[well[i]], [px, py] = place(i);
      tip.textContent = `${compound || name} · ${mechanism} · ${plate}/${name}`;
      tip.style.left = `${px}px`;
      tip.style.top = `${py}px`;
      if (speak) said.textContent = tip.textContent;
    }
    draw();
  };
  /** The nearest point to a position for which a test holds; -1 if none is nearer than `reach`. */
  const nearest = (px, py, reach, allowed = () => true) => {
    let best = -1, least = reach * reach;
    for (let i = 0; i < n; i++) {
      const [qx, qy] = place(i), d = (qx - px) ** 2 + (qy - py) ** 2;
      if (d < least && allowed(qx - px, qy - py, i)) { best = i; least = d; }
    }
    return best;
  };
  const at = event => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointermove", event => show(nearest(...at(event), 12), false));
  canvas.addEventListener("pointerleave", () => show(-1, false));
  canvas.addEventListener("click", event => {
    const i = nearest(...at(event), 12);
    if (i >= 0) choose(data.wells[well[i]][2]);
  });
  const toward = {
    ArrowLeft: (dx, dy) => dx < 0 && -dx >= Math.abs(dy), ArrowRight: (dx, dy) => dx > 0 && dx >= Math.abs(dy),
    ArrowUp: (dx, dy) => dy < 0 && -dy >= Math.abs(dx), ArrowDown: (dx, dy) => dy > 0 && dy >= Math.abs(dx),
  };
  canvas.addEventListener("keydown", event => {
    if (event.key === "Escape") show(-1, false);
    else if (event.key === "Enter" && current >= 0) choose(data.wells[well[current]][2]);
    else if (event.key in toward) {
      const from = current < 0 ? [side / 2, side / 2] : place(current);
      const allowed = current < 0 ? undefined : toward[event.key];
      const i = nearest(...from, 2 * side, allowed);
      if (i >= 0) show(i, true);
    } else return;
    event.preventDefault();
  });
  canvas.addEventListener("blur", () => show(-1, false));
  colouring.addEventListener("change", () => { list(); draw(); });
  document.addEventListener("recolour", draw);
  new ResizeObserver(draw).observe(canvas);
  byId("map-figure").hidden = false;
  list();
  draw();
}

/** A clip as a picture of all its frames behind a window of one; the gallery moves it on. */
function filmStrip({strip, frames, width, height}, alt, caption) {
  const image = make("img", {src: `data:image/webp;base64,${strip}`, alt});
  image.dataset.frames = frames;
  const view = make("div", {className: "window"}, image);
  view.style.aspectRatio = `${width} / ${height}`;
  return make("figure", {}, view, make("figcaption", {}, caption));
}

/** Show one compound beside controls and neighbours, all clips in step. */
function gallery() {
  const data = payload("gallery-data"), choice = byId("gallery-compound"), shelves = byId("gallery-shelves");
  if (!data || !choice) return () => {};
  const play = byId("gallery-play"), frame = byId("gallery-frame"), told = byId("gallery-told");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const longest = Math.max(1, ...data.clips.map(clip => clip.frames));
  let now = 0, timer = 0;
  const turn = to => {
    now = to % longest;
    frame.value = now;
    frame.setAttribute("aria-valuetext", `frame ${now + 1} of ${longest}`);
    for (const image of document.querySelectorAll(".window img")) {
      const frames = Number(image.dataset.frames);
      image.style.transform = `translateX(${-100 * (now % frames) / frames}%)`;
    }
  };
  const run = moving => {
    clearInterval(timer);
    timer = moving ? setInterval(() => turn(now + 1), 180) : 0;
    play.textContent = moving ? "Pause" : "Play";
  };
  const reel = (compound, numbers) => make("div", {className: "reel"}, ...numbers.map((number, i) => {
    const clip = {...data.clips[number], strip: byId(`clip-${number}`).textContent};
    return filmStrip(clip, `${compound.name}, typical cell ${i + 1}: ${clip.frames} frames. ${clip.caption}`, clip.caption);
  }));
  const shelf = (compound, remark, own) => {
    const about = make("div", {}, make("h3", {}, compound.name), make("p", {}, remark));
    if (!own) {
      const go = make("button", {type: "button"}, "Show its neighbours");
      go.setAttribute("aria-label", `Show the neighbours of ${compound.name}`);
      go.addEventListener("click", () => choose(compound.name));
      about.append(go);
    }
    const cells = compound.clips.length ? reel(compound, compound.clips)
      : make("p", {}, data.clips.length ? "No clip of it is in this page." : "");
    return make("div", {className: "shelf"}, about, cells);
  };
  const show = () => {
    const compound = data.compounds[choice.value];
    const moa = compound.moa || "mechanism unknown";
    const rows = [shelf(compound, compound.control ? compound.moa : moa, true)];
    if (!compound.control) {
      for (const control of data.compounds.filter(other => other.control)) rows.push(shelf(control, control.moa, true));
    }
    compound.near.forEach(([other, similarity], i) => {
      const neighbour = data.compounds[other];
      const same = compound.moa && neighbour.moa ? neighbour.moa === compound.moa ? ", the same" : ", another" : "";
      rows.push(shelf(neighbour, `Neighbour ${i + 1}: similarity ${similarity.toFixed(2)}. `
        + `Mechanism: ${neighbour.moa || "unknown"}${same}.`, false));
    });
    shelves.replaceChildren(...rows);
    told.textContent = `${compound.name}: ${compound.near.length} neighbours shown`;
    turn(now);
  };
  const choose = name => {
    const i = data.compounds.findIndex(compound => compound.name === name);
    if (i < 0) return;
    choice.value = i;
    show();
    byId("examples").scrollIntoView();
    choice.focus({preventScroll: true});
  };
  const step = by => {
    choice.selectedIndex = (choice.selectedIndex + by + choice.options.length) % choice.options.length;
    show();
  };
  choice.addEventListener("change", show);
  byId("gallery-previous").addEventListener("click", () => step(-1));
  byId("gallery-next").addEventListener("click", () => step(1));
  play.addEventListener("click", () => run(!timer));
  frame.max = longest - 1;
  frame.addEventListener("input", () => { run(false); turn(Number(frame.value)); });
  still.addEventListener("change", () => run(!still.matches));
  byId("gallery-controls").hidden = false;
  play.hidden = byId("gallery-frame-label").hidden = data.clips.length === 0;
  show();
  run(data.clips.length > 0 && !still.matches);
  return choose;
}

// The clips stand at the end of the page: all else is ready before they have been read.
document.querySelectorAll(".needs-script").forEach(excuse => excuse.remove());
theme();
document.querySelectorAll("[data-table]").forEach(explore);
plates();
let chooseCompound = () => {};
atlas(name => chooseCompound(name));
addEventListener("DOMContentLoaded", () => { chooseCompound = gallery(); });
