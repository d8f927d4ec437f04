"""The whole screen: every stage in order, each done once, resumed where it was cut off."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines import embed, evaluate, events, index, report, segment, statistics, train
from pipelines.cluster import check_room, cluster
from pipelines.config import ConfigError, RunConfig, differences
from pipelines.inputs import Inputs, open_inputs
from pipelines.stage import do_stage
from pipelines.units import Counts
from screening.similarity import suggest
from storage_schemas import store
from storage_schemas.errors import InputError
from storage_schemas.screen import STAGES, Manifest, Screen, Stage, StageRecord, fingerprint
from storage_schemas.tables import COMPOUNDS, PLATE_MAP, write_table

_SOFTWARE = ("screening", "ray", "torch", "numpy", "zarr", "scikit-image", "faiss-cpu", "pyarrow")


@dataclass(frozen=True)
class _StageSpec:
    """A stage: what does it, which earlier stages and which parts of the configuration it depends on."""

    function: Callable[..., tuple[Counts, list[str]]]  # of configuration, inputs, screen and fingerprint
    version: int
    after: tuple[Stage, ...]
    settings: tuple[str, ...]
    tables: bool = True  # whether it reads the plate map's and the compounds' annotation


def _segment(config: RunConfig, inputs: Inputs, screen: Screen, mark: str) -> tuple[Counts, list[str]]:
    if not config.one_pass:
        return segment.segment(config, inputs, screen, mark)
    with embed.embedders(config) as made:
        return segment.segment(config, inputs, screen, mark, made)


_SPECS: dict[Stage, _StageSpec] = {
    "segment": _StageSpec(_segment, segment.OUTPUT_VERSION, (), ("segment",), tables=False),
    "train": _StageSpec(
        train.train,
        train.OUTPUT_VERSION,
        ("segment",),
        ("seed", "split", "model", "augment", "initial", "pretrain", "train", "network"),
    ),
    "embed": _StageSpec(embed.embed_screen, embed.OUTPUT_VERSION, ("segment", "train"), (), tables=False),
    "index": _StageSpec(index.index, index.OUTPUT_VERSION, ("embed",), ("profiles", "index")),
    "statistics": _StageSpec(
        statistics.statistics, statistics.OUTPUT_VERSION, ("index",), ("seed", "profiles", "statistics")
    ),
    "evaluate": _StageSpec(evaluate.evaluate, evaluate.OUTPUT_VERSION, ("train", "embed"), ("seed", "evaluation")),
    "report": _StageSpec(
        report.report,
        report.OUTPUT_VERSION,
        ("segment", "train", "embed", "index", "statistics", "evaluate"),
        ("title", "seed"),
    ),
}
assert tuple(_SPECS) == STAGES


def run(
    config: RunConfig,
    out: str,
    stages: Sequence[Stage] = STAGES,
    *,
    update: bool = False,
    on_epoch: train.OnEpoch | None = None,
) -> int:
    """Run stages of a screen, or go on with them.

    Args:
        config: the configuration.
        out: the screen's folder or object-store prefix.
        stages: which; those before them must have been done.
        update: accept that the folder holds a run of another configuration, and do again what depends on the change.
        on_epoch: called with the metrics of every epoch of training, from another thread.

    Returns:
        How many sites and wells failed, and are recorded as failed.

    Raises:
        InputError: whatever the user can mend.
    """
    url = store.absolute(out)
    inputs = open_inputs(config.inputs)
    _check_folder(config, inputs, url)
    screen = Screen(url, inputs.cells)
    _check_settings(config, inputs)
    if "train" in stages:
        train.check_settings(config, url)
    previous = _previous(screen, config, inputs, update)
    store.remove_partial(url)
    _write_start(config, screen, inputs, previous)
    for note in inputs.notes:
        events.note(note, screen=url)
    failed = 0
    with events.about(screen=url), cluster(config.resources):
        for stage in STAGES:
            if stage not in stages:
                continue
            if stage == "segment" and inputs.cells is not None:
                events.info("cells_taken", f"segment: the cells of {inputs.cells.url} are taken", stage=stage)
                continue
            _run_stage(stage, config, inputs, screen, on_epoch)
            failed += len(screen.failures(stage))
    return failed


def run_several(
    configs: Mapping[str, RunConfig], stages: Sequence[Stage] = STAGES, *, update: bool = False
) -> Iterator[tuple[str, int | InputError | OSError]]:
    """Run screens one after the other on one Ray; what stops one does not stop the others.

    Args:
        configs: by the screen's folder or object-store prefix.
        stages: as for :func:`run`.
        update: likewise.

    Returns:
        Of each screen in turn what :func:`run` returns, or what has stopped it.
    """
    asked = [config.resources for config in configs.values()]
    cpus = [resources.cpus for resources in asked]
    most = asked[0].model_copy(
        update={
            "cpus": None if None in cpus else max(number for number in cpus if number),
            "object_store_mb": max(resources.object_store_mb for resources in asked),
        }
    )
    with cluster(most):
        for out, config in configs.items():
            try:
                check_room(config.resources)
                yield out, run(config, out, stages, update=update)
            except (InputError, OSError) as error:
                yield out, error


def is_done(config: RunConfig, out: str, stages: Sequence[Stage]) -> bool:
    """Whether :func:`run` with the same arguments would find all stages done."""
    url = store.absolute(out)
    if not Screen(url).exists():
        return False
    inputs = open_inputs(config.inputs)
    screen = Screen(url, inputs.cells)
    records = _records(screen, screen.read_manifest())
    return all(
        stage in records
        and records[stage].done
        and records[stage].fingerprint == _fingerprint(stage, config, inputs, screen, records)
        and not screen.failures(stage)
        for stage in stages
    )


def _check_folder(config: RunConfig, inputs: Inputs, url: str) -> None:
    if names := Screen(url).foreign_names():
        raise ConfigError(f"{url}: holds {names[:5]} but no screen; choose a new or empty folder for --out")
    # They may lie in this folder though another is named that has taken them from here.
    if inputs.cells is not None and url in (inputs.cells.url, store.absolute(str(config.inputs.cells))):
        raise ConfigError(f"{url}: is the screen whose cells are taken (inputs.cells); choose another folder for --out")


def _check_settings(config: RunConfig, inputs: Inputs) -> None:
    """Find before hours of work what only a late stage would have met."""
    if inputs.cells is not None and inputs.cells.kept_clips != "all":
        raise InputError(
            f"{inputs.cells.url}: has been run with segment.clips.store={inputs.cells.kept_clips}: there are no clips "
            "to train on or to embed; run it with segment.clips.store=all and --update"
        )
    known = set(inputs.compounds["moa"].dropna())
    for moa in {moa for contrast in config.evaluation.contrasts for moa in contrast} - known:
        near = suggest(moa, known)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {sorted(known)[:10]}"
        raise InputError(f"evaluation.contrasts: no compound on these plates has the MOA {moa!r}; {hint}")
    if config.profiles.needs_controls:
        controlled = set(inputs.plate_map.loc[inputs.plate_map["role"] == "negative_control", "plate"])
        without = sorted(set(inputs.plate_map["plate"]) - controlled)
        if without:
            raise InputError(
                f"{inputs.plate_map_url}: plate(s) {without[:5]} have no well of the role negative_control to "
                "normalise profiles to; name them, or set profiles.recipe.reference=plate or profiles.recipe.method=raw"
            )


def _previous(screen: Screen, config: RunConfig, inputs: Inputs, update: bool) -> Manifest | None:
    if not screen.exists():
        return None
    previous = screen.read_manifest()
    own = {stage for stage, record in previous.stages.items() if record.done}
    if previous.cells is not None:
        own -= {"segment"}
    if not own and not Screen(screen.url).done_units("segment"):
        # Nothing has been made yet that another configuration could spoil.
        return previous
    before = {name: value for name, value in previous.config.items() if name != "max_failed_share"}
    changed = differences(before, _identity(config))
    if previous.inputs != _input_identity(config, inputs):
        changed.append("the plates, a table of theirs, or the file of the initial weights")
    if changed and not update:
        shown = "\n".join(f"  {line}" for line in changed[:10])
        raise ConfigError(
            f"{screen.url}: holds a run of another configuration or other inputs:\n{shown}\n"
            "choose another folder for --out, or give --update to do again what depends on the change"
        )
    return previous


def _identity(config: RunConfig) -> dict[str, Any]:
    """The configuration without what changes no result."""
    return config.model_dump(mode="json", exclude={"resources", "max_failed_share", "logging"})


def _write_start(config: RunConfig, screen: Screen, inputs: Inputs, previous: Manifest | None) -> None:
    software = {name: importlib.metadata.version(name) for name in _SOFTWARE}
    if screen.segmented is not None and previous is not None and previous.cells is None:
        # It has cells of its own, which none is going to look at again.
        Screen(screen.url).remove_stage("segment")
    manifest = Manifest(
        software=software,
        # Plates that are added to the screen later may fail as its own may.
        config={**_identity(config), "max_failed_share": config.max_failed_share},
        inputs=_input_identity(config, inputs),
        cells=None if screen.segmented is None else screen.segmented.url,
        stages=_records(screen, previous),
    )
    screen.write_manifest(manifest)
    write_table(screen.plate_map, inputs.plate_map, PLATE_MAP)
    write_table(screen.compounds, inputs.compounds, COMPOUNDS)


def _records(screen: Screen, manifest: Manifest | None) -> dict[str, StageRecord]:
    """What is known of each stage; of a borrowed one, what its owner knows now."""
    records = dict(manifest.stages) if manifest else {}
    if screen.segmented is not None:
        records["segment"] = screen.segmented.read_manifest().stages["segment"]
    elif manifest is not None and manifest.cells is not None:
        del records["segment"]
    return records


def _fingerprint(
    stage: Stage, config: RunConfig, inputs: Inputs, screen: Screen, records: Mapping[str, StageRecord]
) -> str:
    """Of everything that a stage's output depends on."""
    if stage == "segment" and screen.segmented is not None:
        return records["segment"].fingerprint
    spec = _SPECS[stage]
    before = {}
    for name in spec.after:
        record = records.get(name)
        if (
            record is None
            or not record.done
            or record.fingerprint != _fingerprint(name, config, inputs, screen, records)
        ):
            raise InputError(
                f"{screen.url}: stage {stage!r} needs {name!r}, which has not been done here with this configuration "
                "and these inputs; run it first, or leave --stages away to run all"
            )
        before[name] = record.output
    settings = config.model_dump(mode="json", include=set(spec.settings))
    if stage == "segment" and config.one_pass:
        settings["embedded"] = [*train.weights_identity(config), embed.OUTPUT_VERSION]
    # Without tables a stage goes well by well, and which wells are left is told by what is there.
    return fingerprint(stage, spec.version, settings, before, _input_identity(config, inputs) if spec.tables else "")


def _run_stage(stage: Stage, config: RunConfig, inputs: Inputs, screen: Screen, on_epoch: train.OnEpoch | None) -> None:
    more = {"on_epoch": on_epoch} if stage == "train" else {}
    mark = _fingerprint(stage, config, inputs, screen, screen.read_manifest().stages)
    counts, whole = _units(stage, config, inputs, screen)
    do_stage(
        screen,
        stage,
        mark,
        partial(_SPECS[stage].function, config, inputs, screen, mark, **more),
        counts,
        whole=whole,
    )


def _units(stage: Stage, config: RunConfig, inputs: Inputs, screen: Screen) -> tuple[Counts, bool]:
    """What is known beforehand of the wells of a stage that goes well by well, and whether none is left to do.

    Wells may have joined since the stage was done.
    """
    if stage not in ("segment", "embed"):
        return {}, True
    wells, segmented = set(inputs.wells), screen.done_units("segment")
    if stage == "segment":
        done = segmented & screen.done_units("embed") if config.one_pass else segmented
    else:
        wells &= segmented
        done = screen.done_units("embed")
    return {"wells": len(wells)}, wells <= done


def _input_identity(config: RunConfig, inputs: Inputs) -> str:
    """Which images a run sees, what the tables say of them, and what weights it starts from."""
    return fingerprint(inputs.identity, *train.weights_identity(config))
