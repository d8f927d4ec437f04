"""What a running screen tells: its log, its metrics, how far it is; and what its actors ask the cluster for."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import yaml
from conftest import Command
from hypothesis import given
from hypothesis import strategies as st
from machines import machines
from prometheus_client.parser import text_string_to_metric_families
from runs import eventually
from s3_server import S3Server

from pipelines import events
from pipelines.cluster import ActorCpus, check_room, embedding_actors, one_pass_actors, training_cpus
from pipelines.config import ResourcesConfig
from pipelines.metrics import StageMetrics, names, set_counts
from pipelines.progress import progress
from pipelines.status import glance, rate_of, stage_table, watch
from pipelines.units import Work, run_units
from storage_schemas import store
from storage_schemas.errors import InputError, StoreError
from storage_schemas.keys import WellKey
from storage_schemas.screen import Failure, Manifest, Screen, Stage, StageRecord

SECRET = "s3://AKIA0:se/cr3t@store:9000/bucket/screen"


@pytest.fixture(autouse=True)
def words() -> Iterator[None]:
    """Whatever a test chooses, the next one starts with words."""
    yield
    events.use("text")


def lines(text: str) -> list[dict[str, Any]]:
    """Every line, which must be an object."""
    return [dict(json.loads(line)) for line in text.splitlines()]


# --- logs ------------------------------------------------------------------------------------


def test_words_are_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    events.info("stage_done", "segment: wells [2] (3 s)", stage="segment")
    events.info("stage_begun", stage="segment")
    events.error("command_failed", "no such file", exit_code=1)
    said = capsys.readouterr()
    assert said.err == "segment: wells [2] (3 s)\nerror: no such file\n"
    assert said.out == ""


def test_in_json_every_event_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    events.use("json")
    with events.about(screen="s3://bucket/first"):
        events.info("stage_begun", stage="segment")
        events.warning("unit_failed", "  failed: p/B02: dark\nand torn", unit="p/B02", kind="SiteError", error="dark")
    events.note("one plate only")
    begun, failed, note = lines(capsys.readouterr().err)
    assert datetime.fromisoformat(begun["time"]).utcoffset() == timedelta(0)
    assert abs(datetime.fromisoformat(begun["time"]).timestamp() - time.time()) < 10
    assert {**begun, "time": ""} == {
        "time": "",
        "level": "info",
        "event": "stage_begun",
        "screen": "s3://bucket/first",
        "stage": "segment",
    }
    assert (failed["level"], failed["unit"], failed["kind"], failed["error"]) == (
        "warning",
        "p/B02",
        "SiteError",
        "dark",
    )
    assert failed["message"] == "failed: p/B02: dark\nand torn"
    assert "screen" not in note


def test_libraries_are_put_into_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    events.use("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old\nand grey", UserWarning, stacklevel=1)
    try:
        raise OSError("gone")
    except OSError:
        logging.getLogger("somebody.else").exception("could not")
    warned, logged = lines(capsys.readouterr().err)
    assert "old\nand grey" in warned["message"]
    assert (logged["logger"], logged["level"], logged["message"]) == ("somebody.else", "error", "could not")
    assert logged["traceback"].endswith("OSError: gone")
    events.use("text")
    logging.getLogger("somebody.else").warning("as ever")
    assert "{" not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_of_a_url_is_told(form: events.LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    events.use(form)
    signed = "https://store/x?X-Amz-Credential=AKIA0&X-Amz-Signature=cr3t&part=1"
    events.info("cells_taken", f"cells of {SECRET} and {signed}", url=SECRET, given=[SECRET, signed])
    said = capsys.readouterr().err
    assert "cr3t" not in said
    assert "AKIA0" not in said
    assert "s3://***@store:9000/bucket/screen" in said
    assert "part=1" in said
    if form == "json":
        assert lines(said)[0]["given"][1].endswith("X-Amz-Signature=***&part=1")


@given(st.dictionaries(st.sampled_from("abc"), st.text()), st.text())
def test_masking_keeps_a_line_whole(fields: dict[str, str], message: str) -> None:
    record = logging.makeLogRecord({"msg": message, "event": "x", "fields": fields, "levelname": "INFO"})
    formatter = events._JsonFormatter()
    document = json.loads(formatter.format(record))
    assert document.keys() >= fields.keys()
    assert "\n" not in formatter.format(record)


def test_progress_in_json_counts(capsys: pytest.CaptureFixture[str]) -> None:
    events.use("json")
    with progress("segment", 3, "wells") as advance:
        advance()
        advance(failed=1)
        advance("B04", failed=1)
    (last,) = lines(capsys.readouterr().err)
    assert last["event"] == "progress"
    assert (last["stage"], last["done"], last["total"], last["failed"]) == ("segment", 3, 3, 1)
    assert last["message"].startswith("segment: 3/3 wells, 0 s 1 failed")


def test_failure_of_a_command_is_a_line_and_its_exit_code(command: Command, tmp_path: Path) -> None:
    done = command("--log-format", "json", "status", tmp_path)
    (failed,) = lines(done.err)
    assert done.code == failed["exit_code"] == 1
    assert (failed["event"], failed["level"], failed["kind"]) == ("command_failed", "error", "SchemaError")
    assert failed["message"] == f"{tmp_path}: is not a screen: there is nothing at that place"


def test_form_comes_from_the_environment_too(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(events.VARIABLE, "json")
    (failed,) = lines(command("run", tmp_path / "absent.yaml", "--out", tmp_path / "out").err)
    assert failed["exit_code"] == 2
    monkeypatch.setenv(events.VARIABLE, "xml")
    assert command("status", tmp_path).code == 2


def test_mistake_of_ours_is_one_line_with_its_traceback(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(url: str) -> Screen:
        raise ZeroDivisionError("by us")

    monkeypatch.setattr(Screen, "open", broken)
    (failed,) = lines(command("--log-format", "json", "status", tmp_path).err)
    assert failed["kind"] == "ZeroDivisionError"
    assert "broken" in failed["traceback"]
    with pytest.raises(ZeroDivisionError):
        command("status", tmp_path)


def test_docs_name_every_event_and_every_metric() -> None:
    root = Path(__file__).resolve().parents[1]
    docs = (root / "docs" / "operations.md").read_text(encoding="utf-8")
    said = set()
    for folder in ("pipelines", "tune", "screening"):
        for source in (root / folder).glob("*.py"):
            call = r'events\.(?:info|warning|error)\(\s*"(\w+)"|line\(logging\.\w+, "(\w+)"'
            said |= {name for names_ in re.findall(call, source.read_text(encoding="utf-8")) for name in names_ if name}
    assert {"stage_done", "unit_done", "command_failed"} <= said
    assert {name for name in said if f"`{name}`" not in docs} == set()
    families = {re.sub(r"_(bucket|count|sum)$", "", name) if "seconds" in name else name for name in names()}
    assert {name for name in families if f"`{name}`" not in docs} == set()


WELLS = [WellKey("p", f"{row}{column:02}") for row in "AB" for column in (1, 2, 3)]


# --- metrics ---------------------------------------------------------------------------------


def samples(text: str, **tags: str) -> dict[str, float]:
    """Name and remaining tags -> value of the samples that have these tags."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if tags.items() <= sample.labels.items():
                which = [sample.labels[tag] for tag in ("outcome", "what", "le") if tag in sample.labels]
                found[" ".join([sample.name, *which])] = sample.value
    return found


def scraped(port: int, wanted: Callable[[dict[str, float]], bool], **tags: str) -> dict[str, float]:
    """The samples that have these tags, once they are as wanted."""

    def look() -> dict[str, float]:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        return samples(text, **tags)

    found: dict[str, float] = eventually(look, wanted)
    return found


def sleeping() -> Callable[[WellKey], float]:
    """Does units as their wells say: column 1 fails, column 2 in part. Ray's workers need not find this file."""

    def stage(well: WellKey) -> float:
        time.sleep(0.15)
        if well.well.endswith("01"):
            raise ValueError("first column")
        return 0.5 if well.well.endswith("02") else 0.0

    return stage


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    made = Screen(str(tmp_path / "counted"))
    made.write_manifest(Manifest(software={}, config={}, inputs=""))
    return made


def test_prometheus_is_told_what_the_run_counted_and_workers_log_each_unit(local_ray: None, screen: Screen) -> None:
    run_units(screen, "embed", WELLS, Work(sleeping(), num_cpus=0.5), max_failed_share=1)
    set_counts(screen.url, "embed", {"cells": 7})
    port = ray.nodes()[0]["MetricsExportPort"]
    counted = "ray_screening_stage_count cells"  # the last that is told
    found = scraped(port, lambda seen: seen.get(counted) == 7, screen="counted", stage="embed")
    assert {name: found[name] for name in found if name.startswith("ray_screening_units")} == {
        "ray_screening_units_total done": 2,
        "ray_screening_units_total part": 2,
        "ray_screening_units_total failed": 2,
        "ray_screening_units_left": 0,
    }
    assert found["ray_screening_unit_seconds_count"] == 6
    assert found["ray_screening_unit_seconds_bucket 0.1"] == 0
    assert found["ray_screening_unit_seconds_bucket +Inf"] == 6
    assert found["ray_screening_unit_busy_seconds_total"] >= 6 * 0.15
    assert {name.split()[0] for name in found} <= names()

    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    logged = [
        dict(json.loads(line))
        for log in session.glob("logs/worker-*.err")
        for line in log.read_text().splitlines()
        if '"event": "unit_' in line and '"stage": "embed"' in line
    ]
    logged = [line for line in logged if line["unit"] in map(str, WELLS)]  # the Ray is that of other tests, too
    ended = {line["unit"]: line["event"] for line in logged}
    assert ended == {str(well): f"unit_{'failed' if well.well.endswith('01') else 'done'}" for well in WELLS}
    (first, _) = [line for line in logged if line["event"] == "unit_failed"]
    assert (first["kind"], first["error"]) == ("ValueError", "first column")
    assert 'raise ValueError("first column")' in first["traceback"]
    assert first["seconds"] >= 0.15


def test_metrics_name_no_secret_and_need_no_ray() -> None:
    with StageMetrics("/screens/größer", "segment", 1) as counted:
        counted.ended("part", 1.0)
    set_counts("/screens/größer", "segment", {"cells of größer": 1})
    with StageMetrics("s3://AKIA0:cr3t@bucket", "segment", 2) as counted:
        counted.ended("done", 1.0)  # of a process without Ray
        assert counted._left == 1
    assert counted._left == 0, "a stage that has stopped does not stand still"
    assert counted._tags == {"screen": "***@bucket", "stage": "segment"}


@pytest.mark.slow
def test_prometheus_scrapes_a_cluster_and_a_job_logs_lines(
    small_screen: Path, small_settings: list[str], tmp_path: Path
) -> None:
    """As on a cluster: Ray tells Prometheus where to ask, and what it is answered is what the screen has counted."""
    out = tmp_path / "scraped"
    with machines(tmp_path, "head") as (head,):
        head.check("ray", "get-auth-token", "--generate")
        where = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": f"{head.address}:6379"}
        options = ("--num-cpus=2", "--object-store-memory=200000000", "--metrics-export-port=9090")
        head.check("ray", "start", "--head", "--port=6379", *options, RAY_AUTH_MODE="token")
        command = ("run", small_screen / "run.yaml", "--out", out, "--stages", "segment", *small_settings)
        done = head.run("screening", *command, timeout=600, **where, SCREENING_LOG_FORMAT="json")
        assert done.returncode == 0, done.stderr
        ask = f"import urllib.request as r; print(r.urlopen('http://{head.address}:9090/metrics').read().decode())"

        def scrape() -> dict[str, float]:
            return samples(head.check("python", "-c", ask), screen="scraped", stage="segment")

        found = eventually(scrape, lambda seen: seen.get("ray_screening_stage_count wells") == 16)
        listed = eventually(lambda: head.run("cat", "/tmp/ray/prom_metrics_service_discovery.json").stdout, bool)
        assert f"{head.address}:9090" in json.loads(listed)[0]["targets"]

    (row,) = [row for row in stage_table(Screen(str(out))).to_dict("records") if row["stage"] == "segment"]
    assert found["ray_screening_units_total done"] == row["done"] == 16
    assert found["ray_screening_units_left"] == row["left"] == 0
    assert found["ray_screening_unit_seconds_count"] == 16
    counts = Screen(str(out)).read_manifest().stages["segment"].counts
    assert {name: found[f"ray_screening_stage_count {name}"] for name in counts} == counts

    said = lines(done.stderr)
    (ended,) = [line for line in said if line["event"] == "stage_done"]
    assert said[0]["event"] == "stage_begun"
    assert {line["screen"] for line in said} == {str(out)}
    assert {line["stage"] for line in said} == {"segment"}
    assert ended["counts"] == counts
    last = [line for line in said if line["event"] == "progress"][-1]
    assert (last["done"], last["total"], last["failed"]) == (16, 16, 0)


_WITHOUT_AGENT = """
import sys
import ray
from pipelines.cluster import cluster
from pipelines.config import ResourcesConfig
from pipelines.units import Work, run_units
from storage_schemas.keys import WellKey
from storage_schemas.screen import Screen

screen = Screen(sys.argv[1])
def stage(well):
    screen.write_failures("segment", well, [])
    return 0.0
with cluster(ResourcesConfig(cpus=1, object_store_mb=100)):
    assert ray._private.utils.get_dashboard_dependency_error() is not None
    run_units(screen, "segment", [WellKey("p", "A01"), WellKey("p", "A02")], Work(stage), 0.0)
"""


@pytest.mark.slow
def test_without_the_extra_cluster_nobody_is_told_and_the_run_is_the_same(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("aiohttp_cors", "opencensus", "opentelemetry", "prometheus_client"):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
    path = os.pathsep.join([str(absent), str(Path(__file__).resolve().parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_AGENT, str(tmp_path / "screen")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^segment: 2/2 wells, \d+ s$", done.stderr, re.MULTILINE)


def test_dashboard_and_alerts_name_metrics_that_there_are() -> None:
    folder = Path(__file__).resolve().parents[1] / "examples" / "monitoring"
    dashboard = json.loads((folder / "dashboard.json").read_text())
    rules = yaml.safe_load((folder / "rules.yaml").read_text())
    settings = yaml.safe_load((folder / "prometheus.yaml").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert len(shown) >= 7
    assert len(alerts) == 3
    for expression in [*shown, *alerts]:
        asked = set(re.findall(r"ray_\w+", expression))
        assert asked, expression
        assert asked <= names(), expression
        for tags in re.findall(r"by \(([\w, ]+)\)", expression):
            assert set(tags.split(", ")) <= {"screen", "stage", "outcome", "what", "le"}, expression
    # Each metric is looked at by somebody.
    asked = set(re.findall(r"ray_\w+", " ".join([*shown, *alerts])))
    assert names() - asked == {"ray_screening_unit_seconds_sum", "ray_screening_unit_seconds_count"}
    assert settings["rule_files"] == ["rules.yaml"]
    (job,) = settings["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]


# --- how far it is ---------------------------------------------------------------------------


def begin(screen: Screen, stage: Stage, **record: Any) -> None:
    screen.write_record(stage, StageRecord.model_validate({"fingerprint": "x", "counts": {"wells": 6}, **record}))


def commit(screen: Screen, wells: Sequence[WellKey], written: float | None = None) -> None:
    for well in wells:
        store.write_bytes(screen.cells(well), b"cells")
        if written is not None:
            os.utime(screen.cells(well), (written, written))


def row_of(screen: Screen, stage: str, now: float) -> dict[str, Any]:
    seen = glance(screen, now)
    (row,) = seen[seen["stage"] == stage].to_dict("records")
    return {str(name): None if pd.isna(value) else value for name, value in row.items()}


def test_rate_is_of_the_commits_of_late(screen: Screen) -> None:
    begin(screen, "segment")
    now = time.time()
    commit(screen, WELLS[:1], now - 4000)  # of an earlier run
    assert row_of(screen, "segment", now)["per_minute"] is None
    commit(screen, WELLS[1:2], now - 120)
    commit(screen, WELLS[2:4], now - 60)
    screen.write_failures("segment", WELLS[3], [Failure(f"{WELLS[3]}/1", "dark", "is")])
    screen.write_failures("segment", WELLS[4], [Failure(str(WELLS[4]), "dark", "is")])
    seen = row_of(screen, "segment", now)
    assert (seen["state"], seen["done"], seen["failed"], seen["left"]) == ("begun", 4, 2, 1)
    assert seen["per_minute"] == pytest.approx(2 / 2)
    assert seen["minutes_left"] == pytest.approx(1.0)
    assert seen["idle_minutes"] == pytest.approx(1.0, abs=0.05)
    assert row_of(screen, "train", now)["state"] == "not begun"


@given(st.lists(st.floats(0, 1e4), max_size=20), st.floats(0, 1e4))
def test_rate_against_a_loop(times: list[float], now: float) -> None:
    recent = sorted(moment for moment in times if now - moment <= 300)
    rate = rate_of(times, now)
    if len(recent) < 2 or max(now, recent[-1]) == recent[0]:
        assert rate is None
    else:
        expected = 0.0
        for _ in recent[1:]:
            expected += 60 / (max(now, recent[-1]) - recent[0])
        assert rate == pytest.approx(expected)


def test_a_glance_reads_no_table_and_lists_what_is_at_work_alone(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(screen, "segment", done=True, counts={"wells": 6, "done": 5, "failed": 1, "cells": 1234})
    begin(screen, "embed")
    asked: list[str] = []
    for name in ("read_bytes", "list_names", "list_times"):
        true = getattr(store, name)
        monkeypatch.setattr(store, name, lambda url, true=true: asked.append(url) or true(url))
    seen = row_of(screen, "segment", time.time())
    assert (seen["done"], seen["failed"], seen["left"], seen["counts"]) == (5, 1, 0, "cells 1,234")
    below = [url.removeprefix(f"{screen.url}/") for url in asked]
    assert sorted(below) == ["embeddings", "failures/embed", "manifest.json"]


def test_watching_goes_on_over_a_store_that_does_not_answer(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[pd.DataFrame] = []
    looks = 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        assert seconds >= 0.5
        if looks == 3:
            monkeypatch.undo()
            begin(screen, "report", done=True, counts={})

    true = Screen.read_manifest

    def read_manifest(self: Screen) -> Manifest:
        if looks == 1:
            raise StoreError(self.manifest_url, "503 SlowDown")
        return true(self)

    monkeypatch.setattr(Screen, "read_manifest", read_manifest)
    watch(screen, "report", 0.5, seen.append, sleep=sleep)
    assert len(seen) == 3  # before the trouble, after it, and at the end
    assert "503 SlowDown" in capsys.readouterr().err

    def refused(self: Screen) -> Manifest:
        raise StoreError(self.manifest_url, "access denied", lasting=True)

    monkeypatch.setattr(Screen, "read_manifest", refused)
    with pytest.raises(StoreError, match="access denied"):
        watch(screen, "report", 0.5, seen.append, sleep=sleep)


@pytest.mark.parametrize("output", ["table", "json", "csv"])
def test_watched_from_another_process_until_it_is_done(output: str, screen: Screen) -> None:
    begin(screen, "segment")
    command = "from screening.cli import main; main()"
    watching = subprocess.Popen(
        [sys.executable, "-c", command, "status", screen.url, "--watch", "--every", "0.1", "--format", output],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    said = [watching.stdout.readline()]  # it looks
    if output == "csv":
        said.append(watching.stdout.readline())
    for number in range(1, 4):
        commit(screen, WELLS[:number])
        said.append(watching.stdout.readline())
    screen.write_failures("segment", WELLS[5], [Failure(str(WELLS[5]), "dark", "no light")])
    said.append(watching.stdout.readline())
    begin(screen, "segment", done=True, counts={"wells": 6, "done": 5, "failed": 1, "cells": 70})
    begin(screen, "report", done=True, counts={})
    rest, _ = watching.communicate(timeout=30)
    said += rest.splitlines()
    assert watching.returncode == 0
    if output == "json":
        rows = [json.loads(line) for line in said]
        assert [row["done"] for row in rows if row["stage"] == "segment"] == [0, 1, 2, 3, 3, 5]
        assert rows[-1]["stage"] == "report"
        assert rows[3]["per_minute"] > 0
    elif output == "csv":
        rows = list(csv.DictReader(said))
        assert [row["done"] for row in rows if row["stage"] == "segment"] == ["0", "1", "2", "3", "3", "5"]
    else:
        assert said[1] == "segment: begun, 1 wells done, 5 left\n"
        assert any("wells a minute, about" in line for line in said)
        assert any(line.startswith("segment: done, 5 wells done, 0 left, 1 failed, cells 70") for line in said)
        assert any("no light" in line for line in said)


def test_watching_a_screen_that_is_run_again_does_not_end_before_it(screen: Screen) -> None:
    begin(screen, "segment")
    begin(screen, "report", done=True, counts={})  # of the run before
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        begin(screen, "segment", done=True, counts={"wells": 6, "done": 6, "failed": 0})

    watch(screen, "report", 0.5, lambda seen: None, sleep=sleep)
    assert len(looks) == 1


def test_what_a_screen_says_reaches_no_terminal_as_a_command(screen: Screen, command: Command) -> None:
    said = "\x1b[2J=HYPERLINK(1)"
    screen.write_failures("segment", WELLS[0], [Failure(str(WELLS[0]), said, said)])
    begin(screen, "segment", done=True, counts={"wells": 6, "done": 5, "failed": 1, said: 1})
    begin(screen, "report", done=True, counts={said: 1})
    for options in ((), ("--watch",), ("--watch", "--format", "csv"), ("--format", "csv")):
        done = command("status", screen.url, *options)
        assert done.code == 0, done.err
        assert "HYPERLINK" in done.out
        if "csv" not in options:
            assert "\x1b" not in done.out, options
    events.note(said)


def test_watching_ends_at_the_stage_that_it_is_told(command: Command, screen: Screen) -> None:
    begin(screen, "segment", done=True, counts={"wells": 6, "done": 6, "failed": 0})
    done = command("status", screen.url, "--watch", "--until", "segment")
    assert done.code == 0
    assert done.out == "segment: done, 6 wells done, 0 left\n"
    assert command("status", screen.url, "--watch", "--until", "cutting").code == 2


def test_a_screen_on_object_storage_is_watched_as_any_other() -> None:
    with S3Server() as server, server.used_here():
        screen = Screen(server.url("watched"))
        screen.write_manifest(Manifest(software={}, config={}, inputs=""))
        begin(screen, "segment")
        assert row_of(screen, "segment", time.time())["done"] == 0
        commit(screen, WELLS[:3])
        # S3 knows whole seconds only.
        seen = row_of(screen, "segment", time.time() + 5)
        assert (seen["done"], seen["left"]) == (3, 3)
        assert seen["per_minute"] > 0
        assert screen.commit_times("segment").keys() == set(WELLS[:3])


# --- what actors ask for ---------------------------------------------------------------------


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a cluster of that address have these CPUs up."""

    def told(cpus: float, address: str = "", gpus: float = 0) -> None:
        there = {"CPU": cpus, "GPU": gpus, "memory": 2.0**30}
        monkeypatch.setattr(ray, "cluster_resources", lambda: {name: n for name, n in there.items() if n})
        monkeypatch.setenv("RAY_ADDRESS", address)

    return told


@pytest.mark.parametrize("cpus", [0, 1, 2, 64])
def test_actors_of_a_cluster_ask_for_the_same_whatever_is_up(cpus: float, up: Callable[..., None]) -> None:
    up(cpus, "head:6379")
    resources = ResourcesConfig(embed_actors=4, train_workers=4, embed_cpus=2.0)
    actors, embedding = embedding_actors(resources)
    assert (actors, embedding.asked) == (4, 2.0)
    assert training_cpus(resources).asked == 0.5
    assert embedding.threads == max(2, cpus // 4)
    told = ResourcesConfig(cpus=2, embed_actors=4, train_workers=4)
    assert embedding_actors(told) == (4, ActorCpus(0.5, 1))
    assert training_cpus(told) == ActorCpus(0.125, 1)
    assert embedding_actors(ResourcesConfig(embed_cpus=2.0)) == (None, ActorCpus(2.0, 2))
    assert embedding_actors(ResourcesConfig(embed_gpus=0.5)) == (None, ActorCpus(1.0, 1))
    assert embedding_actors(ResourcesConfig(cpus=2)) == (1, ActorCpus(1.0, 2))


@pytest.mark.parametrize(
    ("cpus", "actors", "embedding", "training"),
    [
        (1, 1, ActorCpus(1.0, 1), ActorCpus(0.25, 1)),
        (2, 1, ActorCpus(1.0, 2), ActorCpus(0.5, 2)),
        (2, 4, ActorCpus(0.5, 1), ActorCpus(0.125, 1)),
        (64, 2, ActorCpus(1.0, 32), ActorCpus(0.5, 32)),
    ],
)
def test_actors_of_one_machine_share_it(
    cpus: float, actors: int, embedding: ActorCpus, training: ActorCpus, up: Callable[..., None]
) -> None:
    up(cpus)
    resources = ResourcesConfig(embed_actors=actors, train_workers=actors)
    assert embedding_actors(resources) == (actors, embedding)
    assert training_cpus(resources) == training


@pytest.mark.parametrize(("gpus", "asked", "actors"), [(1, 1.0, 1), (4, 1.0, 4), (2, 0.25, 8), (1, 0.6, 1)])
def test_each_gpu_of_a_machine_has_its_actors(gpus: float, asked: float, actors: int, up: Callable[..., None]) -> None:
    up(16, gpus=gpus)
    resources = ResourcesConfig(embed_gpus=asked)
    assert embedding_actors(resources) == (actors, ActorCpus(1.0, 16 // actors))
    assert one_pass_actors(resources)[0] == actors


@pytest.mark.parametrize("segment_cpus", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("embed_cpus", [1.0, 2.0])
@pytest.mark.parametrize("cpus", [2, 3, 4, 16])
def test_embedding_beside_segmentation_leaves_room_for_a_well_and_for_small_reads(
    cpus: float, embed_cpus: float, segment_cpus: float, up: Callable[..., None]
) -> None:
    up(cpus)
    actors, each = one_pass_actors(ResourcesConfig(segment_cpus=segment_cpus, embed_cpus=embed_cpus))
    assert cpus - actors * each.asked >= min(cpus, max(1.0, segment_cpus))


def test_what_a_cluster_must_grow_for_is_said(up: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    up(4, "head:6379")
    check_room(ResourcesConfig(segment_gpus=1))
    assert (
        "resources.segment_gpus asks for 1 GPUs and 0 are up: waiting for the cluster to grow"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["segment_memory_mb", "embed_memory_mb"])
def test_memory_that_a_machine_has_not_is_refused(name: str, local_ray: None) -> None:
    check_room(ResourcesConfig.model_validate({name: 16}))
    with pytest.raises(InputError, match=f"resources.{name} asks for 1e.*MiB"):
        check_room(ResourcesConfig.model_validate({name: 10**8}))
