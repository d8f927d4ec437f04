"""The house stays as drawn: imports go down only, and a floor knows only what it may know."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("screening", "pipelines", "tune", "storage_schemas")
CLI = "screening.cli"

# Which floor may import which. A floor is a package; the command line is a floor of its own, and
# the only one that no other may import.
ALLOWED = {
    CLI: {"tune", "pipelines", "screening", "storage_schemas"},
    "tune": {"tune", "pipelines", "screening", "storage_schemas"},
    "pipelines": {"pipelines", "screening", "storage_schemas"},
    "screening": {"screening", "storage_schemas"},
    "storage_schemas": {"storage_schemas"},
}

# What a floor may never import from outside, and the modules that are let off.
STORAGE = {"fsspec", "s3fs", "zarr"}
NETWORK = {"torch", "torchvision", "safetensors"}
FORBIDDEN: dict[str, set[str]] = {
    CLI: set(),
    "tune": set(),
    "pipelines": set(),
    "screening": {"ray"} | STORAGE | NETWORK,
    "storage_schemas": {"ray", "torch", "torchvision"},
}
LET_OFF = {
    "screening.cellpose_model": NETWORK,
    "screening.i3d": NETWORK,
    "screening.torch_files": NETWORK,
    "screening.initialisation": NETWORK,
    "screening.distributed": NETWORK,
    "screening.losses": NETWORK,
    "screening.augmentation": NETWORK,
    "screening.training": NETWORK,
    "screening.embedding": NETWORK,
}

# What `screening query` and `screening predict` load: they must start in an instant.
QUERY = (
    "screening.similarity",
    "screening.prediction",
    "screening.retrieval",
    "screening.profiles",
)
QUERY_MAY_IMPORT = {"numpy", "pandas", "faiss", "scipy", "pydantic", "storage_schemas", "screening"}


@dataclass(frozen=True)
class Import:
    """One imported name: ``from a.b import c as d`` is module ``a.b``, name ``c``, alias ``d``."""

    module: str
    name: str | None
    alias: str | None
    line: int

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports_of(source: str, package: str) -> list[Import]:
    """Every import of a source, at the top or inside a function; relative ones resolved."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(a.name, None, a.asname, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [Import(module, a.name, a.asname, node.lineno) for a in node.names]
    return found


def floor_of(module: str) -> str:
    return CLI if module == CLI else module.partition(".")[0]


def violations(module: str, source: str) -> list[str]:
    """What a module's imports break of the rules above, each as a sentence."""
    package = module.rpartition(".")[0] or module
    floor = floor_of(module)
    broken = []
    for found in imports_of(source, package):
        where = f"{module}:{found.line}"
        targets = {found.module, f"{found.module}.{found.name}"}
        if CLI in targets:
            broken.append(f"{where} imports the command line")
        if found.package in PACKAGES and found.package not in ALLOWED[floor]:
            broken.append(f"{where} imports {found.module}, which stands above {floor}")
        if found.package in FORBIDDEN[floor] - LET_OFF.get(module, set()):
            broken.append(f"{where} imports {found.package}, which {floor} may not know")
        if found.module == "ray" and found.name == "tune" and found.alias != "ray_tune":
            broken.append(f"{where} imports ray.tune under the name of our own package")
        if module in QUERY and found.package not in QUERY_MAY_IMPORT and found.package not in sys.stdlib_module_names:
            broken.append(f"{where} imports {found.package}, and a query would wait for it")
    return broken


@cache
def our_modules() -> dict[str, str]:
    """The source of every module of the four packages, by its dotted name."""
    sources = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name] = path.read_text(encoding="utf-8")
    return sources


def test_imports_go_down_only() -> None:
    assert [broken for module, source in our_modules().items() for broken in violations(module, source)] == []


def test_every_named_module_exists() -> None:
    assert {CLI, *LET_OFF, *QUERY} - set(our_modules()) == set()


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = [part for name in ("s3", "cellpose", "optuna", "anndata") for part in extras[name]]
    wanted = [*project["dependencies"], *optional]
    declared = {re.split(r"[^A-Za-z0-9-]", requirement)[0].lower() for requirement in wanted}
    libraries = {
        found.package
        for module, source in our_modules().items()
        for found in imports_of(source, module.rpartition(".")[0] or module)
    } - {*PACKAGES, *sys.stdlib_module_names}
    made_by = packages_distributions()
    assert {
        library for library in libraries if not declared & {name.lower() for name in made_by.get(library, [library])}
    } == set()


def test_no_module_imports_itself_by_a_detour() -> None:
    modules = our_modules()
    edges = {
        module: {
            submodule if (submodule := f"{found.module}.{found.name}") in modules else found.module
            for found in imports_of(source, module.rpartition(".")[0] or module)
        }
        for module, source in modules.items()
    }
    # Leaves are taken away until nothing or only circles remain.
    while leaves := {module for module, targets in edges.items() if not targets & set(edges)}:
        edges = {module: targets for module, targets in edges.items() if module not in leaves}
    assert edges == {}


@pytest.mark.parametrize(
    ("module", "source", "told"),
    [
        ("screening.features", "import ray", "*may not know"),
        (
            "screening.features",
            "def f():\n    from ray.data import Dataset",
            "screening.features:2*",
        ),
        ("screening.features", "import torch.nn as nn", "*imports torch*"),
        ("screening.features", "from pipelines.segment import run", "*stands above screening"),
        ("screening.features", "import zarr", "*imports zarr*"),
        ("pipelines.segment", "from screening.cli import main", "*imports the command line"),
        ("pipelines.segment", "from screening import cli", "*imports the command line"),
        ("pipelines.segment", "import tune.search", "*stands above pipelines"),
        ("pipelines.train", "from ray import tune", "*under the name of our own package"),
        (
            "storage_schemas.plate",
            "from screening.clips import cut",
            "*stands above storage_schemas",
        ),
        ("storage_schemas.plate", "import torch", "*may not know"),
        ("screening.similarity", "from sklearn import metrics", "*a query would wait*"),
        ("screening.sub.one", "from .. import cli", "*imports the command line"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str, told: str) -> None:
    (broken,) = violations(module, source)
    assert fnmatchcase(broken, told)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (CLI, "from pipelines.segment import run\nimport ray"),
        ("tune.search", "from ray import tune as ray_tune\nfrom pipelines import train"),
        ("screening.i3d", "import torch"),
        ("screening.similarity", "import faiss, json\nfrom .retrieval import rank"),
        ("pipelines", "from storage_schemas.errors import InputError"),
    ],
)
def test_a_kept_rule_is_left_alone(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ((CLI,), ("torch", "ray", "pandas", "zarr", "numba", "matplotlib")),
        (QUERY, ("torch", "ray", "zarr", "numba", "matplotlib", "sklearn")),
    ],
)
def test_what_starts_fast_loads_little(modules: tuple[str, ...], unwanted: tuple[str, ...]) -> None:
    script = f"import sys, {', '.join(modules)}\nprint(*({set(unwanted)!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ""
