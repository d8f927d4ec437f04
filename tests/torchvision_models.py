"""torchvision's networks, also where its compiled operators cannot load.

The torchvision wheel of the registries is a CUDA build. Beside a CPU build of torch its library does not load, and the
import then fails because it registers fakes for operators that were never declared. Declaring their schemas first lets
the networks work, which are written in Python.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))


@functools.cache
def _declare_operators() -> torch.library.Library:
    # Cached because the declarations are withdrawn when the library object is collected.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


def import_models() -> ModuleType:
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_operators()
        return importlib.import_module("torchvision.models")
