from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import Command

from screening.cli import app

HEAVY = {"torch", "torchvision", "ray", "pandas", "pyarrow", "zarr", "numba", "matplotlib", "sklearn", "cv2"}


def imported_by(*arguments: object) -> set[str]:
    """Top-level modules that a command has imported when it ends."""
    code = (
        "import json, sys\n"
        "from screening.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


# --- what a command imports ------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["query", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    assert imported_by(*arguments) & HEAVY == set()


@pytest.mark.parametrize(
    "arguments",
    [["query", "--compound", "uncoupler-1"], ["predict"], ["predict", "--compound", "uncoupler-1"], ["status"]],
)
def test_answers_need_neither_torch_nor_ray(finished_screen: Path, arguments: list[str]) -> None:
    name, *options = arguments
    imported = imported_by(name, finished_screen, *options)
    assert "pandas" in imported
    assert imported & {"torch", "torchvision", "ray", "numba", "matplotlib", "sklearn", "cv2"} == set()


# --- help and version ------------------------------------------------------------------------


def test_version(command: Command) -> None:
    done = command("--version")
    assert (done.code, done.out) == (0, f"screening {version('screening')}\n")


def test_help_names_every_command_and_the_exit_codes(command: Command) -> None:
    done = command("--help")
    assert done.code == 0
    for name in ("simulate", "ingest", "run", "demo", "query", "predict", "status", "config"):
        assert re.search(rf"\b{name}\b", done.out)
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage" in " ".join(done.out.split())


def test_every_command_says_what_it_does(command: Command) -> None:
    for entry in app.registered_commands:
        assert entry.callback is not None
        name = entry.name or entry.callback.__name__.replace("_", "-")
        done = command(name, "--help")
        assert done.code == 0
        assert (entry.callback.__doc__ or "").split(".")[0].split("?")[0].split("\n")[0] in " ".join(done.out.split())


def test_config_prints_the_default(command: Command) -> None:
    from pipelines.config import commented_default

    done = command("config")
    assert (done.code, done.out) == (0, commented_default())


# --- a user's mistakes -----------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    document = {
        "inputs": {"plates": ["plates/*.zarr"], "plate_map": "plate_map.csv"},
        "segment": {"channels": {"nucleus": "dna"}},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def check_refusal(command: Command, code: int, said: str, *arguments: object) -> None:
    done = command(*arguments)
    # The boxes of usage errors break lines where the terminal ends.
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.err).split())
    assert done.code == code, done.err
    assert said in words
    assert "Traceback" not in done.err
    assert done.out == ""


def test_no_command(command: Command) -> None:
    done = command()
    assert done.code == 2
    assert "Usage" in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qery"], "No such command 'qery'"),
        (["run"], "Missing argument"),
        (["run", "{config}"], "Missing option '--out'"),
        (["run", "{config}", "--out", "{out}", "--colour"], "No such option: --colour"),
        (["run", "{config}", "--out", "{out}", "--stages", "segment,trian"], "unknown ['trian']; there are segment,"),
        (["run", "{config}", "--out", "{out}", "--set", "train.epoch=3"], "did you mean 'epochs'?"),
        (["run", "{config}", "--out", "{out}", "--set", "train.epochs"], "expected key=value"),
        (["run", "{config}", "--out", "{out}", "--set", "train.epochs=many"], "train.epochs: "),
        (["run", "{out}/absent.yaml", "--out", "{out}"], "absent.yaml: no such file"),
        (["simulate", "{out}", "--set", "frames"], "expected key=value"),
        (["simulate", "{out}", "--set", "frame=8"], "frame"),
        (["simulate", "{out}", "--set", "frames=[8"], "not YAML"),
        (["simulate", "{out}", "--set", "moas=[tonic]"], "moas"),
        (["query", "{out}", "--compound", "DMSO", "-k", "0"], "-k"),
        (["query", "{out}", "--compound", "DMSO", "--level", "plate"], "--level"),
        (["query", "{out}", "--compound", "DMSO", "--format", "xml"], "--format"),
        (["query", "{out}"], "give one of --compound"),
    ],
)
def test_wrong_usage_is_code_2(
    command: Command, config_file: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    out = tmp_path / "out"
    filled = [argument.format(config=config_file, out=out) for argument in arguments]
    check_refusal(command, 2, said, *filled)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{config}", "--out", "{out}"], "plate_map.csv: no such file"),
        (["query", "{out}", "--compound", "DMSO"], "is not a screen: there is nothing at that place"),
        (["predict", "{out}"], "is not a screen"),
        (["status", "{out}"], "is not a screen: there is nothing at that place"),
        (["ingest", "{out}/tiffs", "{out}/p.zarr", "--well", "A1"], "no such file or folder"),
        (["status", "nowhere://bucket/screen"], "cannot be opened"),
    ],
)
def test_what_a_user_can_mend_is_code_1(
    command: Command, config_file: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    out = tmp_path / "out"
    filled = [argument.format(config=config_file, out=out) for argument in arguments]
    check_refusal(command, 1, said, *filled)
    assert not out.exists()


def test_mistakes_end_without_a_traceback_in_a_process_of_their_own(
    subprocess_command: Command, tmp_path: Path
) -> None:
    done = subprocess_command("status", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: {tmp_path}: is not a screen: there is nothing at that place\n"
