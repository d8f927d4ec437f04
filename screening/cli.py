"""The command `screening`: the composition root.

Each command imports what it needs, so that help and queries are fast.
"""

from __future__ import annotations

import csv
import json
import sys
import traceback
from collections.abc import Iterable, Mapping
from enum import IntEnum, StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage_schemas.errors import InputError
from tune.ablations import ABLATIONS

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from storage_schemas.index import Level
    from storage_schemas.screen import Screen, Stage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Phenotypic drug screening: time-lapse plates in, answers about how the drugs act out.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 done with recorded failures.",
)


class Exit(IntEnum):
    """What a command's exit code says."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    SOME_FAILED = 3


class LogForm(StrEnum):
    """How a command tells of its work on standard error."""

    text = "text"
    json = "json"


class Format(StrEnum):
    """How an answer is printed."""

    table = "table"
    json = "json"
    csv = "csv"


class LayoutName(StrEnum):
    """How images are named."""

    pattern = "pattern"
    imagexpress = "imagexpress"
    cv8000 = "cv8000"
    phenix = "phenix"
    mitoreid = "mitoreid"


class ZName(StrEnum):
    """How z is projected."""

    max = "max"
    mean = "mean"
    none = "none"


class LevelName(StrEnum):
    """What is compared."""

    compound = "compound"
    well = "well"
    cell = "cell"


class ConsensusName(StrEnum):
    """How replicates are summed up."""

    mean = "mean"
    median = "median"
    trimmed_mean = "trimmed_mean"
    modz = "modz"


class StatisticsName(StrEnum):
    """Tables of statistics."""

    activity = "activity"
    consistency = "consistency"
    controls = "controls"
    doses = "doses"


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting (`screening config` lists them); repeatable."),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the answer.")]
ConfigArgument = Annotated[str, typer.Argument(help="The configuration (YAML).", show_default=False)]
OutOption = Annotated[str, typer.Option(help="Folder or URL of the screen.", show_default=False)]
UpdateOption = Annotated[
    bool, typer.Option("--update", help="Accept a changed configuration; do again what depends on it.")
]
ScreenArgument = Annotated[str, typer.Argument(help="Folder or URL of a screen.", show_default=False)]


_SHOWN_ROWS = 40  # of a table that may have hundreds


def main() -> None:
    """Entry point; a user's mistake ends in a message, never in a traceback."""
    try:
        app()
    except InputError as error:
        # The class lives beside the configuration, which would load torch; its name is enough here.
        usage = type(error).__name__ == "ConfigError"
        _fail(error, Exit.USAGE if usage else Exit.FAILED)
    except OSError as error:
        _fail(error, Exit.FAILED)
    except Exception as error:  # a mistake of ours, whose traceback a log of lines must hold in one
        from pipelines import events

        if not events.is_json():
            raise
        _fail(error, Exit.FAILED, traceback=traceback.format_exc())


def _fail(error: Exception, code: Exit, **fields: str) -> None:
    from pipelines import events

    events.error("command_failed", str(error), kind=type(error).__name__, exit_code=int(code), **fields)
    sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"screening {version('screening')}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    log_format: Annotated[
        LogForm,
        typer.Option(envvar="SCREENING_LOG_FORMAT", help="What is said on standard error: words, or a JSON line each."),
    ] = LogForm.text,
) -> None:
    from pipelines import events

    events.use(log_format.value)


@app.command()
def simulate(
    out: Annotated[str, typer.Argument(help="New folder.", show_default=False)],
    settings: SetOption = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs to use; all by default.")] = None,
) -> None:
    """Write a simulated screen with its truth and a run.yaml that is ready to run.

    Settings are those of the simulation: seed, replicates, compounds_per_moa, frames, height, width…
    """
    from pydantic import ValidationError

    from pipelines.cluster import cluster
    from pipelines.config import ConfigError, ResourcesConfig, split_override
    from pipelines.simulate import RUN_CONFIG
    from pipelines.simulate import simulate as write
    from screening.simulation import SimulationConfig

    try:
        config = SimulationConfig(**dict(map(split_override, settings or ())))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'together'}: {e['msg']}" for e in error.errors())
        known = ", ".join(SimulationConfig.model_fields)
        raise ConfigError(f"the simulation's settings are not usable: {problems}; there are {known}") from error
    with cluster(ResourcesConfig(cpus=cpus)):
        wells = write(config, out)
    typer.echo(f"{out}: {wells} wells; run it: screening run {out}/{RUN_CONFIG} --out SCREEN")


@app.command()
def ingest(
    source: Annotated[str, typer.Argument(help="Folder of TIFF files, or one file.", show_default=False)],
    plate: Annotated[str, typer.Argument(help="The OME-Zarr plate to write or to add wells to.", show_default=False)],
    layout: Annotated[LayoutName, typer.Option(help="How the images are named.")] = LayoutName.pattern,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Regular expression searched for in each path below SOURCE, with named groups: well, or row and "
            "column; and any of site, time, channel, z. (pattern)",
        ),
    ] = None,
    well: Annotated[
        str | None, typer.Option(help="The well of all files, where names do not say it. (pattern)")
    ] = None,
    site: Annotated[str | None, typer.Option(help="The site of files whose names do not say it. (pattern)")] = None,
    channel: Annotated[
        str | None, typer.Option(help="The channel of files whose names do not say it. (pattern)")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on where planes are missing, with zeros. (pattern)")
    ] = False,
    axes: Annotated[str, typer.Option(help="Axes of one file, out of TCZYX.")] = "YX",
    channel_names: Annotated[
        str | None, typer.Option(help="Names for the channels, with commas, in the order of the files' own.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the plate; by default that of its folder.")] = None,
    z: Annotated[ZName, typer.Option(help="How z is projected; none keeps it.")] = ZName.max,
    pixel_size: Annotated[float | None, typer.Option(help="Micrometres; by default as the metadata says.")] = None,
    time_step: Annotated[float | None, typer.Option(help="Seconds; by default as the metadata says.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace wells that are there.")] = False,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs to use; all by default.")] = None,
) -> None:
    """Write TIFF images as wells of an OME-Zarr plate.

    Wells that are there already, of the same files, are kept, so that an interrupted ingest goes on.
    """
    from pydantic import TypeAdapter

    from pipelines.cluster import cluster
    from pipelines.config import ResourcesConfig
    from pipelines.ingest import IngestOptions, describe
    from pipelines.ingest import ingest as write
    from screening.layouts import Layout

    given = {"pattern": pattern, "well": well, "site": site, "channel": channel}
    settings = {name: value for name, value in given.items() if value is not None}
    if layout is LayoutName.pattern:
        settings.setdefault("pattern", ".*")
    elif settings or allow_missing:
        raise typer.BadParameter(
            f"{', '.join([f'--{name}' for name in settings] or ['--allow-missing'])} is for --layout pattern",
            param_hint="--layout",
        )
    options = IngestOptions(
        layout=TypeAdapter(Layout).validate_python({"method": layout.value, **settings}),
        axes=axes,
        name=name,
        channels=tuple(map(str.strip, channel_names.split(","))) if channel_names else (),
        pixel_size=pixel_size,
        time_step=time_step,
        overwrite=overwrite,
        z=z.value,
        allow_missing=allow_missing,
    )
    with cluster(ResourcesConfig(cpus=cpus)):
        done = write(source, plate, options)
    for line in describe(done):
        typer.echo(line)
    if done.failed:
        raise typer.Exit(Exit.SOME_FAILED)


@app.command("import-cells")
def import_cells(
    source: Annotated[str, typer.Argument(help="Folder that holds l1, l2 and l3.", show_default=False)],
    screen: Annotated[str, typer.Argument(help="Folder or URL of the screen to write.", show_default=False)],
    annotation: Annotated[
        str | None, typer.Option(help="The workbook of drugs; by default annotation.xlsx in SOURCE.")
    ] = None,
    parts: Annotated[
        str, typer.Option(help="Which of train, query, gallery, nc and novel, with commas.")
    ] = "train,query,gallery,nc",
    moas: Annotated[
        str, typer.Option(help="chosen: MOAs of the drugs whose moa_choose is 1; all: of all whose MOA is known.")
    ] = "chosen",
    size: Annotated[int, typer.Option(min=8, help="Side of a clip, px.")] = 128,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 16,
    update: Annotated[
        bool, typer.Option("--update", help="Accept that SCREEN holds another import; do again what has changed.")
    ] = False,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs to use; all by default.")] = None,
) -> None:
    """Write MitoReID's single-cell images as the cells of a screen, to train on without plates (inputs.cells)."""
    from pydantic import ValidationError

    from pipelines.cluster import cluster
    from pipelines.config import ConfigError, ResourcesConfig
    from pipelines.import_cells import ImportConfig
    from pipelines.import_cells import import_cells as bring_in

    try:
        options = {"parts": parts.split(","), "moas": moas, "size": size, "frames": frames}
        config = ImportConfig.model_validate(options)
    except ValidationError as error:
        problems = "; ".join(f"{entry['loc'][0]}: {entry['msg']}, found {entry['input']!r}" for entry in error.errors())
        raise ConfigError(f"the settings of the import are not usable: {problems}") from error
    with cluster(ResourcesConfig(cpus=cpus)):
        counts = bring_in(source, annotation, screen, config, update=update)
    left_out = counts["sequences"] - counts["clips"]
    typer.echo(
        f"{screen}: {counts['clips']:,} clips of {counts['sequences']:,} sequences"
        f"{f'; {left_out:,} left out, see screening status {screen}' if left_out else ''}"
    )
    if left_out:
        raise typer.Exit(Exit.SOME_FAILED)


@app.command()
def run(
    config: Annotated[list[str], typer.Argument(help="The configuration (YAML), or several.", show_default=False)],
    out: Annotated[
        str,
        typer.Option(
            help="Folder or URL of the screen; of several the one that they lie in, named as their configurations are.",
            show_default=False,
        ),
    ],
    settings: SetOption = None,
    stages: Annotated[
        str | None, typer.Option(help="Only these, with commas: segment,train,embed,index,statistics,evaluate,report.")
    ] = None,
    update: UpdateOption = False,
) -> None:
    """Run a screen from plates to report, or go on where it was cut off.

    Several screens run one after the other; what stops one does not stop the others.
    """
    if len(config) == 1:
        _run(config[0], out, settings, _stages(stages), update)
        return
    folders = [f"{out.rstrip('/')}/{Path(url).stem}" for url in config]
    if len(set(folders)) < len(folders):
        raise typer.BadParameter("two have the same name, and so would their screens", param_hint="CONFIG")
    from pipelines import events
    from pipelines.config import load
    from pipelines.run import run_several

    configs = {folder: load(url, settings or ()) for folder, url in zip(folders, config, strict=True)}
    codes = {Exit.DONE}
    for folder, outcome in run_several(configs, _stages(stages), update=update):
        if isinstance(outcome, int):
            codes.add(_tell(folder, outcome))
        else:
            events.error("screen_failed", f"{folder}: {outcome}", kind=type(outcome).__name__, screen=folder)
            codes.add(Exit.FAILED)
    # What failed altogether weighs more than what failed in part.
    code = next(code for code in (Exit.FAILED, Exit.SOME_FAILED, Exit.DONE) if code in codes)
    raise typer.Exit(code)


def _run(config: str, out: str, settings: list[str] | None, stages: tuple[Stage, ...], update: bool) -> None:
    from pipelines.config import load
    from pipelines.run import run as run_screen

    failed = run_screen(load(config, settings or ()), out, stages, update=update)
    raise typer.Exit(_tell(out, failed))


def _tell(out: str, failed: int) -> Exit:
    """Say that a screen has been run, and with which code that ends."""
    typer.echo(f"{out}: done{f'; {failed} site(s) or well(s) failed, see screening status {out}' if failed else ''}")
    return Exit.SOME_FAILED if failed else Exit.DONE


@app.command()
def split(
    config: ConfigArgument,
    out: Annotated[str, typer.Option(help="The table to write, a .csv.", show_default=False)],
    settings: SetOption = None,
) -> None:
    """What would be trained on and what tested? Write the split as a table, to look at or to edit.

    Give the edited table back with --set split.method=table --set inputs.split=TABLE.
    """
    from pipelines.config import load
    from pipelines.split import write_split

    table, notes = write_split(load(config, settings or ()), out)
    for part, rows in table.groupby("split", sort=False):
        names = ", ".join(f"{rows[name].nunique()} {name}s" for name in ("compound", "replicate"))
        typer.echo(f"{part}: {len(rows)} rows, {names}")
    for note in notes:
        typer.echo(f"note: {note}")


def _stage_command(stage: Stage, what: str) -> None:
    def command(
        config: ConfigArgument, out: OutOption, settings: SetOption = None, update: UpdateOption = False
    ) -> None:
        _run(config, out, settings, (stage,), update)

    app.command(stage, help=what, rich_help_panel="One stage of a run")(command)


_stage_command("segment", "Plates in; labels, tracked cells, quality measures and clips out.")
_stage_command("train", "Clips in; a network that embeds cells out.")
_stage_command("embed", "Clips and network in; an embedding a cell out.")
_stage_command("evaluate", "Embeddings in; the held-out tests out.")


@app.command()
def report(
    screen: ScreenArgument,
    out: Annotated[str | None, typer.Option(help="The page to write; by default SCREEN/report.html.")] = None,
) -> None:
    """Write what a screen has found as one page to open in a browser: no network, no server.

    It shows what is there: a run that has not ended, or a screen of imported profiles, has fewer sections.
    """
    from pipelines.report import write_report

    typer.echo(write_report(screen, out))


@app.command()
def serve(
    screen: ScreenArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen at; any that others can reach makes a token be asked for.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="SCREENING_TOKEN", help="What must come with every request; made up where it is needed."),
    ] = None,
    max_upload: Annotated[int, typer.Option(min=1, help="Largest file that is taken, MiB.")] = 64,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name that the server is called by, as behind a proxy; repeatable."),
    ] = None,
) -> None:
    """Show the report of a screen in a browser, with a form to ask it. Ctrl-C stops it.

    It changes nothing in the screen. What is sent is not encrypted.
    """
    from pipelines.serve import open_server
    from pipelines.serve import serve as run_server

    run_server(open_server(screen, host, port, token, max_upload * 2**20, allow_host or ()), typer.echo)


@app.command()
def sweep(
    config: ConfigArgument,
    out: Annotated[str, typer.Option(help="Folder or URL of the sweep.", show_default=False)],
    ablations: Annotated[
        str | None, typer.Option(help=f"Which, with commas; all by default: {', '.join(ABLATIONS)}.")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Each ablation is run with each of these depths of the network, with commas.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="YAML|default", help="Instead of ablations: search the settings that this file says, or the usual."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Each ablation is run with each of these, with commas.")] = "0,1,2",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Trials that train at once; by default as many as there is room for.")
    ] = None,
    settings: SetOption = None,
    update: UpdateOption = False,
) -> None:
    """Train and test again without parts of the method: a table of what each part is worth. Or search its settings.

    Plates are segmented once; a trial that is done is not repeated. A search compares samples on validation compounds,
    the first of --seeds first; the best is tested once and its configuration written.
    """
    from pipelines.config import load
    from storage_schemas import store

    numbers = _whole_numbers(seeds, "--seeds")
    loaded = load(config, settings or ())
    if search is not None:
        from tune.search import TABLE
        from tune.search import search as run_search
        from tune.space import load_search

        if ablations is not None or depths is not None:
            raise typer.BadParameter("is not for --ablations or --depths", param_hint="--search")
        failed = run_search(loaded, out, load_search(search), numbers, concurrency=concurrency, update=update)
    else:
        from tune.sweep import TABLE
        from tune.sweep import sweep as run_sweep

        names = list(ABLATIONS) if ablations is None else ablations.split(",")
        deep = [] if depths is None else _whole_numbers(depths, "--depths")
        failed = run_sweep(loaded, out, names, numbers, deep, concurrency=concurrency, update=update)
    typer.echo(store.read_bytes(store.join(out, TABLE)).decode(), nl=False)
    if failed:
        typer.echo(f"{out}: {failed} site(s), well(s) or trial(s) failed", err=True)
        raise typer.Exit(Exit.SOME_FAILED)


@app.command()
def compare(screen: ScreenArgument, settings: SetOption = None, output: FormatOption = Format.table) -> None:
    """Is the network worth it? Its held-out tests beside those of hand-made features and of a plain classifier.

    MitoReID's table of methods for a screen that has been run; the rivals are kept in SCREEN/compare, and what is done
    is not repeated. Settings are those of the groups baseline and resources.
    """
    from pipelines.compare import compare as run_compare
    from pipelines.compare import heading, table

    found = run_compare(screen, settings or ())
    if output is Format.table:
        for test in found.scores["test"].unique():
            typer.echo(f"\n{heading(test).capitalize()}, % (95 % interval over compounds)\n")
            _print(table(found.scores, test), output)
        typer.echo("\n" + "\n".join(found.notes))
    else:
        _print(found.scores, output)
    if found.failed:
        raise typer.Exit(Exit.SOME_FAILED)


@app.command()
def demo(
    out: Annotated[str, typer.Argument(help="Folder for the simulated plates and the screen.")] = "demo",
    settings: SetOption = None,
) -> None:
    """Simulate a screen, run it, and show what it finds: the whole road in some minutes."""
    from pipelines.cluster import cluster
    from pipelines.config import ResourcesConfig, load
    from pipelines.query import Searcher
    from pipelines.run import run as run_screen
    from pipelines.simulate import RUN_CONFIG
    from pipelines.simulate import simulate as write
    from screening.evaluation import score_table
    from screening.simulation import SimulationConfig
    from storage_schemas import store
    from storage_schemas.screen import Screen

    plates, folder = f"{out}/plates", f"{out}/screen"
    with cluster(ResourcesConfig()):
        write(SimulationConfig(), plates)
    failed = run_screen(load(f"{plates}/{RUN_CONFIG}", settings or ()), folder)
    screen = Screen(folder)
    typer.echo("\nHeld-out tests: a cell's nearest cells, are they of its mechanism of action (MOA)?\n")
    _print(score_table(store.read_json(screen.evaluation)), Format.table)
    compound = "uncoupler-1"
    typer.echo(f"\n$ screening query {folder} --compound {compound} -k 5\n")
    _print(Searcher(screen).query(compound=compound, k=5), Format.table)
    typer.echo(f"\nThe report, to open in a browser: {store.absolute(screen.report)}")
    if failed:
        raise typer.Exit(Exit.SOME_FAILED)


@app.command()
def query(
    screen: ScreenArgument,
    compound: Annotated[str | None, typer.Option(help="Ask by a compound.")] = None,
    well: Annotated[str | None, typer.Option(metavar="PLATE/WELL", help="Ask by a well.")] = None,
    cell: Annotated[str | None, typer.Option(metavar="PLATE/WELL/SITE/TRACK", help="Ask by a cell.")] = None,
    vectors: Annotated[
        str | None, typer.Option(metavar="FILE", help="Ask by the mean of the vectors in a .npy or Parquet file.")
    ] = None,
    clips: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Ask by clips that the screen's network embeds: a Zarr array, or a screen."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many answers.")] = 10,
    level: Annotated[
        LevelName | None, typer.Option(help="What to compare it with; by default what is asked about.")
    ] = None,
    moa: Annotated[list[str] | None, typer.Option(help="Only what has this mechanism; repeatable.")] = None,
    plate: Annotated[list[str] | None, typer.Option(help="Only what is on this plate; repeatable.")] = None,
    exclude_same_compound: Annotated[
        bool, typer.Option("--exclude-same-compound", help="Leave out the compound of the well or cell.")
    ] = False,
    each: Annotated[bool, typer.Option("--each", help="Ask by each vector of the file, not by their mean.")] = False,
    enriched: Annotated[
        bool, typer.Option("--enrichment", help="Which mechanisms are frequent among the nearest compounds?")
    ] = False,
    output: FormatOption = Format.table,
) -> None:
    """Which compounds, wells or cells resemble a compound, a well, a cell or something new most?

    Similarity is the cosine of profiles, or at level cell of embeddings. Nothing is its own answer.
    """
    from pipelines.query import Searcher

    asked = {"--compound": compound, "--well": well, "--cell": cell, "--vectors": vectors, "--clips": clips}
    if sum(value is not None for value in asked.values()) != 1:
        raise typer.BadParameter(f"give one of {', '.join(asked)}", param_hint="query")
    if each and vectors is None:
        raise typer.BadParameter("is for --vectors", param_hint="--each")
    searcher = Searcher(screen)
    at: Level | None = level.value if level else None
    wanted: dict[str, Any] = {
        "k": k,
        "moa": moa or (),
        "plate": plate or (),
        "exclude_same_compound": exclude_same_compound,
    }
    if enriched:
        if (compound is None and well is None) or at not in (None, "compound") or moa or plate:
            raise typer.BadParameter(
                "is of the compounds nearest to a --compound or a --well, without --moa and --plate",
                param_hint="--enrichment",
            )
        found = searcher.enrichment(compound=compound, well=well, k=k, exclude_same_compound=exclude_same_compound)
    elif vectors is not None:
        from pipelines.vector_files import vectors_of

        rows, names = vectors_of(searcher, vectors, at, each=each)
        found = searcher.query(vectors=rows, names=names, level=at, **wanted)
    elif clips is not None:
        from pipelines.adding import ask_clips

        found = ask_clips(searcher, clips, at, **wanted)
    else:
        found = searcher.query(compound=compound, well=well, cell=cell, level=at, **wanted)
    _print(found, output)


@app.command()
def index(
    target: Annotated[
        str, typer.Argument(help="A configuration, with --out; or a screen that has an index.", show_default=False)
    ],
    out: Annotated[str | None, typer.Option(help="Folder or URL of the screen, for a configuration.")] = None,
    add: Annotated[
        str | None,
        typer.Option(metavar="SCREEN", help="Add the plates of this screen, embedded by the network of the first."),
    ] = None,
    settings: SetOption = None,
    update: UpdateOption = False,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs to use for --add; all by default.")] = None,
) -> None:
    """Embeddings in; well and compound profiles and the similarity index out. Or more plates into an index that is.

    With a configuration it is the stage of a run. With a screen alone its index is built anew; what was added stays.
    """
    if out is not None:
        if add is not None:
            raise typer.BadParameter("is for a screen that has an index", param_hint="--add")
        _run(target, out, settings, ("index",), update)
        return
    if settings or update:
        raise typer.BadParameter("is for a configuration and --out", param_hint="--set" if settings else "--update")
    from pipelines.adding import add as add_plates
    from pipelines.adding import rebuild

    counts, notes = rebuild(target) if add is None else add_plates(target, add, cpus)
    typer.echo(f"{target}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    for note in notes:
        typer.echo(f"note: {note}")


@app.command()
def statistics(
    screen: ScreenArgument,
    table: Annotated[StatisticsName, typer.Option(help="What is shown.")] = StatisticsName.activity,
    permutations: Annotated[int | None, typer.Option(min=100, help="Relabelings a p-value.")] = None,
    fdr: Annotated[float | None, typer.Option(help="False discovery rate below which a finding is one.")] = None,
    active_only: Annotated[
        bool | None, typer.Option("--active-only/--all", help="Test consistency among active compounds only.")
    ] = None,
    output: FormatOption = Format.table,
) -> None:
    """Which compounds are active, which mechanisms consistent, how good are the plates, and how sure is that?

    The tables lie in SCREEN/statistics, those of `screening run` or of the options given here; docs/statistics.md
    says what each column means.
    """
    from pipelines.statistics import compute, read_statistics, readable

    asked = {"n_permutations": permutations, "fdr": fdr, "active_only": active_only}
    opened = compute(screen, {name: value for name, value in asked.items() if value is not None})
    found = read_statistics(opened, table.value)
    _print_first(readable(found) if output is Format.table else found, output)


@app.command()
def predict(
    screen: ScreenArgument,
    compound: Annotated[
        str | None, typer.Option(help="All its candidates; without it each compound's first choice.")
    ] = None,
    level: Annotated[
        LevelName | None, typer.Option(help="What votes; by default cells, or compounds where there are no cells.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Neighbours that each votes for: 1 of cells, else 5.")
    ] = None,
    max_cells: Annotated[
        int | None, typer.Option(min=1, help="Cells that vote, at most; by default 100,000. (--level cell)")
    ] = None,
    output: FormatOption = Format.table,
) -> None:
    """Which mechanism of action do a compound's cells or profiles vote for, and how sure is that?

    Share of the votes, mean cosine distance (smaller is nearer), p-value and false discovery rate, and whether the
    network was trained on the compound (split). The call may also be that it is like the negative control, or like
    none of the known mechanisms.
    """
    from pipelines import events
    from pipelines.predict import PredictionConfig, readable
    from pipelines.predict import predict as vote
    from storage_schemas.screen import Screen

    if max_cells is not None and level not in (None, LevelName.cell):
        raise typer.BadParameter("is for --level cell", param_hint="--max-cells")
    opened = Screen.open(screen)
    config = PredictionConfig(k=k) if max_cells is None else PredictionConfig(k=k, max_cells=max_cells)
    found = vote(opened, compound, level.value if level else None, config)
    _print_first(readable(found.table) if output is Format.table else found.table, output)
    for note in found.notes:
        if output is Format.table:
            typer.echo(f"note: {note}")
        else:
            events.note(note)


@app.command()
def status(
    screen: ScreenArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on looking until the screen is done; Ctrl-C ends it.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks. (--watch)")] = 2.0,
    until: Annotated[str, typer.Option(metavar="STAGE", help="The stage that ends it once it is done. (--watch)")] = (
        "report"
    ),
    output: FormatOption = Format.table,
) -> None:
    """How far has a screen come? A row a stage, and what failed.

    With --watch also wells a minute, of the last five minutes, and the time left at that rate. Where it is not shown on
    a terminal it is a line for each change: words, or an object (json) or a row (csv).
    """
    from pipelines.events import visible
    from pipelines.status import stage_table
    from storage_schemas.screen import STAGES, Screen

    opened = Screen.open(screen)
    if watch:
        _watch(opened, _stages(until, "--until")[-1], every, output)
    else:
        _print(stage_table(opened), output)
    if output is Format.table:
        for stage in STAGES:
            for failure in opened.failures(stage):
                typer.echo(visible(f"failed in {stage}: {failure.unit}: {failure.kind}: {failure.message}"))


def _watch(screen: Screen, until: Stage, every: float, output: Format) -> None:
    from rich.live import Live

    from pipelines import status as pipeline
    from pipelines.events import visible
    from screening.spreadsheet import tamed

    if output is Format.table and sys.stdout.isatty():
        with Live(auto_refresh=False) as live:
            pipeline.watch(screen, until, every, lambda seen: live.update(_grid(seen), refresh=True))
        return
    before: pd.DataFrame | None = None

    def tell(seen: pd.DataFrame) -> None:
        nonlocal before
        if output is Format.csv and before is None:
            typer.echo(",".join(seen.columns))
        for row in pipeline.changed_rows(before, seen):
            if output is Format.json:
                typer.echo(json.dumps(row, ensure_ascii=False))
            elif output is Format.csv:
                csv.writer(sys.stdout, lineterminator="\n").writerow(map(tamed, row.values()))
            else:
                typer.echo(visible(pipeline.sentence(row)))
        sys.stdout.flush()
        before = seen

    pipeline.watch(screen, until, every, tell)


@app.command()
def doctor(
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URL]...", help="Folders or URLs to reach; a file is written there and removed."),
    ] = None,
    output: FormatOption = Format.table,
) -> None:
    """What stands in the way of a run here, and how to mend it? Exit code 1 if something is wrong.

    Looks at packages, torch, the machine, GPUs, authentication, the cluster of RAY_ADDRESS, and storage.
    """
    from pipelines.doctor import examine

    found = examine(urls or ())
    _print(found, output)
    if (found["state"] == "wrong").any():
        raise typer.Exit(Exit.FAILED)


@app.command()
def normalisation(screen: ScreenArgument, output: FormatOption = Format.table) -> None:
    """What are clips centred and scaled by in training? Mean and standard deviation of each channel, from 0 to 1.

    Measured on the training clips of a segmented screen; a trained one keeps them in its checkpoint.
    """
    from pipelines.train import normalisation as measure

    _print(measure(screen), output)


@app.command()
def config() -> None:
    """Print the full default configuration, each setting with what it means."""
    from pipelines.config import commented_default

    typer.echo(commented_default(), nl=False)


profiles_app = typer.Typer(no_args_is_help=True, help="Profiles made elsewhere, and which recipe suits profiles best.")
app.add_typer(profiles_app, name="profiles")

RecipeHelp = (
    "raw, standardised, robust, sphered, tvn, contrasted, recentred, or YAML such as '{method: sphered, limit: 4}'"
)
ConsensusOption = Annotated[ConsensusName, typer.Option(help="How wells are summed up to treatments and compounds.")]


@profiles_app.command("import")
def import_profiles(
    tables: Annotated[
        list[str], typer.Argument(help="Tables of one kind: .csv, .csv.gz, .parquet or .h5ad.", show_default=False)
    ],
    screen: Annotated[str, typer.Option(help="Folder or URL of the screen to write.", show_default=False)],
    meanings: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="KEY=COLUMN",
            help="What a column means, of plate, well, compound, concentration, unit, replicate, moa, target, time, "
            "cell_line, batch, smiles, inchikey, cas, name; joined columns are A+B; repeatable. The rest is guessed.",
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="VALUE", help="Negative control: a compound, or COLUMN=VALUE; repeatable."),
    ] = None,
    positive_control: Annotated[
        list[str] | None, typer.Option(metavar="VALUE", help="Positive control likewise.")
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Measurements, * for anything; by default what looks like them."),
    ] = None,
    compounds: Annotated[str | None, typer.Option(help="Table of compounds with their MOA, target, SMILES, …")] = None,
    recipe: Annotated[str, typer.Option(help=f"What is done with the profiles: {RecipeHelp}.")] = "sphered",
    consensus: ConsensusOption = ConsensusName.mean,
    update: Annotated[bool, typer.Option("--update", help="Replace profiles that were imported before.")] = False,
) -> None:
    """Make a screen of tables of profiles that other software wrote, such as CellProfiler and pycytominer.

    Every command on profiles then works on it. What each column was taken for is printed.
    """
    from pipelines.evaluate_recipes import parse_recipe
    from pipelines.import_profiles import ImportProfilesConfig, parse_meanings
    from pipelines.import_profiles import import_profiles as bring_in
    from screening.profiles import ProfilesConfig
    from storage_schemas import store

    config = ImportProfilesConfig(
        tables=tuple(map(store.absolute, tables)),
        columns=parse_meanings(meanings or ()),
        controls=tuple(control or ()),
        positive_controls=tuple(positive_control or ()),
        features=tuple(features or ()),
        compounds=None if compounds is None else store.absolute(compounds),
        profiles=ProfilesConfig.model_validate(
            {"recipe": parse_recipe(recipe), "consensus": {"method": consensus.value}}
        ),
    )
    done = bring_in(screen, config, update=update)
    _print(done.meaning, Format.table)
    _say_counts(screen, done.counts, done.notes)


@profiles_app.command("process")
def process_profiles(
    screen: ScreenArgument,
    recipe: Annotated[str, typer.Option(help=f"{RecipeHelp}.")] = "sphered",
    consensus: ConsensusOption = ConsensusName.mean,
) -> None:
    """Take imported profiles through another recipe, and index them again."""
    from pipelines.evaluate_recipes import parse_recipe
    from pipelines.import_profiles import reprocess
    from screening.profiles import ProfilesConfig

    chosen = {"recipe": parse_recipe(recipe), "consensus": {"method": consensus.value}}
    _say_counts(screen, *reprocess(screen, ProfilesConfig.model_validate(chosen)))


@profiles_app.command("evaluate")
def evaluate_profiles(
    screen: ScreenArgument,
    recipe: Annotated[list[str] | None, typer.Option(help=f"all, {RecipeHelp}; repeatable.")] = None,
    match: Annotated[
        str, typer.Option(help="What replicates share, with commas; of these, what the metadata have.")
    ] = "compound,concentration,unit,time,cell_line",
    across: Annotated[str, typer.Option(help="Replicates are looked up among wells of another one.")] = "plate",
    label: Annotated[str, typer.Option("--class", help="Column with the classes of compounds.")] = "moa",
    linear: Annotated[
        bool, typer.Option("--linear", help="Tell classes by linear discriminants too; slow with many classes.")
    ] = False,
    consensus: ConsensusOption = ConsensusName.mean,
    out: Annotated[str | None, typer.Option(help="Also write the scores here: .parquet or .json.")] = None,
    output: FormatOption = Format.table,
) -> None:
    """Which recipe suits these profiles? Each is followed from the raw profiles on and tested.

    Does a well find its replicates on other plates, and a treatment its class by other compounds? Each number stands
    with its 95 % interval over compounds; the last row is chance.
    """
    from pipelines.evaluate_recipes import evaluate_recipes, parse_recipes, wide, write_scores
    from screening.profiles import ProfilesConfig
    from screening.recipe_evaluation import RecipeEvaluationConfig
    from storage_schemas.screen import Screen

    config = RecipeEvaluationConfig(
        match=tuple(match.split(",")), across=across, label=label, linear_folds=10 if linear else 0
    )
    how = ProfilesConfig.model_validate({"consensus": {"method": consensus.value}}).consensus
    found = evaluate_recipes(Screen.open(screen), parse_recipes(recipe or ["all"]), config, how)
    if out is not None:
        write_scores(out, found)
    if output is not Format.table:
        _print(found.scores, output)
        return
    _print(wide(found.scores), output)
    first = found.scores.drop_duplicates("test")
    for test in first.itertuples():
        typer.echo(f"{test.test}: {test.n_queries:,} looked up, {test.n_left_out:,} had nothing to find")
    for note in found.notes:
        typer.echo(f"note: {note}")


def _say_counts(screen: str, counts: Mapping[str, int], notes: Iterable[str]) -> None:
    typer.echo(f"{screen}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for note in notes:
        typer.echo(f"note: {note}")


def _whole_numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers", param_hint=option) from error


def _stages(text: str | None, option: str = "--stages") -> tuple[Stage, ...]:
    from storage_schemas.screen import STAGES

    wanted = set(text.split(",")) if text else set(STAGES)
    unknown = sorted(wanted - set(STAGES))
    if unknown:
        raise typer.BadParameter(f"unknown {unknown}; there are {', '.join(STAGES)}", param_hint=option)
    return tuple(stage for stage in STAGES if stage in wanted)


def _print(table: pd.DataFrame, output: Format) -> None:
    if output is Format.csv:
        from screening.spreadsheet import as_csv

        typer.echo(as_csv(table), nl=False)
    elif output is Format.json:
        rows = json.loads(table.to_json(orient="records", double_precision=6))
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        typer.echo(_text(table))


def _print_first(table: pd.DataFrame, output: Format) -> None:
    """The whole table for programs; for readers its first rows, where it has a row a compound."""
    if output is not Format.table:
        _print(table, output)
        return
    _print(table.head(_SHOWN_ROWS), output)
    if len(table) > _SHOWN_ROWS:
        typer.echo(f"… and {len(table) - _SHOWN_ROWS:,} more rows: --format csv prints all")


def _text(table: pd.DataFrame) -> str:
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    with console.capture() as capture:
        console.print(_grid(table))
    return capture.get().rstrip()


def _grid(table: pd.DataFrame) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in table.columns:
        number = table[name].dtype.kind in "if"
        grid.add_column(Text(str(name)), justify="right" if number else "left", overflow="fold")
    for row in table.itertuples(index=False):
        grid.add_row(*(Text(_cell(value)) for value in row))
    return grid


def _cell(value: object) -> str:
    import pandas as pd

    from pipelines.events import visible

    if value is None or value is pd.NA or value != value:
        return "–"
    if not isinstance(value, float):
        return visible(str(value))
    return f"{value:.0e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"
