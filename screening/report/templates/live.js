
/** Ask the server that the page came from, and show its answers as a table like the others. */
function ask() {
  const form = byId("ask-form"), failed = byId("ask-error"), answer = byId("ask-answer"), cells = byId("ask-cells");
  const limit = Number(byId("ask").dataset.limit), shown = 8;
  const field = name => form.elements[name];
  const adapt = () => {
    const byFile = field("by").value === "file";
    byId("ask-file").hidden = !byFile;
    byId("ask-name").hidden = byFile;
    field("name").setAttribute("list", field("by").value === "compound" ? "ask-names" : "");
  };
  const question = () => ({
    by: field("by").value,
    name: field("by").value === "file" ? "" : field("name").value.trim(),
    level: field("level").value || null,
    k: Number(field("k").value),
    moa: field("moa").value || null,
    exclude_same_compound: field("exclude").checked,
  });
  const fetchJson = async (path, options) => {
    const response = await fetch(path, {credentials: "same-origin", redirect: "error", ...options});
    const found = await response.json();
    if (!response.ok) throw new Error(found.error);
    return found;
  };
  const send = () => {
    const asked = question();
    if (asked.by !== "file") {
      return fetchJson("ask", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(asked)});
    }
    const file = field("file").files[0];
    if (!file) throw new Error("Choose a file first.");
    if (file.size > limit) throw new Error(`The file has ${file.size} bytes; at most ${limit} are taken.`);
    return fetchJson(`ask-file?question=${encodeURIComponent(JSON.stringify(asked))}`, {method: "POST", body: file});
  };
  const show = ({columns, rows}) => {
    const caption = `What resembles it most: ${rows.length} answers`;
    const head = make("tr", {}, ...columns.map(column => {
      const cell = make("th", {scope: "col"}, column.heading);
      cell.dataset.name = column.name;
      if (column.numeric) { cell.className = "n"; cell.dataset.numeric = ""; }
      return cell;
    }));
    const body = rows.map(row => make("tr", {}, ...row.map(([text, value], i) => {
      const cell = make("td", {className: columns[i].numeric ? "n" : ""}, text);
      cell.dataset.v = value;
      return cell;
    })));
    const table = make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
    const search = make("input", {type: "search", autocomplete: "off", placeholder: "words in a row"});
    search.setAttribute("aria-label", "Filter the answers");
    const output = make("output");
    output.setAttribute("aria-live", "polite");
    const controls = make("div", {className: "controls"}, make("label", {}, "Filter ", search), output,
      make("button", {type: "button"}, "Download rows as CSV"));
    const scroll = make("div", {className: "scroll", tabIndex: 0}, table);
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Answers");
    const block = make("div", {}, controls, scroll);
    block.dataset.table = "answers";
    answer.replaceChildren(block);
    explore(block);
  };
  const showCells = async ({columns, rows}) => {
    const place = columns.findIndex(column => column.name === "id");
    const keys = rows.slice(0, shown).map(row => row[place][1]).filter(key => key.split("/").length === 4);
    cells.replaceChildren();
    for (const key of keys) {
      const strip = await fetchJson(`clip/${key.split("/").map(encodeURIComponent).join("/")}`, {}).catch(() => null);
      if (strip) cells.append(filmStrip(strip, `The answer ${key}: ${strip.frames} frames.`, key));
    }
  };
  field("by").addEventListener("change", adapt);
  form.addEventListener("submit", async event => {
    event.preventDefault();
    failed.textContent = "";
    form.setAttribute("aria-busy", "true");
    try {
      const found = await send();
      show(found);
      await showCells(found);
    } catch (error) {
      answer.replaceChildren();
      cells.replaceChildren();
      failed.textContent = error.message;
    } finally {
      form.removeAttribute("aria-busy");
    }
  });
  adapt();
}
addEventListener("DOMContentLoaded", ask);
