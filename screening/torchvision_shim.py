"""Import torchvision also where its compiled operators cannot load.

The torchvision wheel of the registries is a CUDA build. Beside a CPU build of torch its library
does not load, and the import then fails because it registers fakes for operators that were never
declared. Declaring their schemas first lets everything written in Python (transforms, models) work;
the operators themselves stay unusable.
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
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    return library


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """Import torchvision or one of its modules, declaring missing operators if need be.

    Args:
        module: dotted name, such as ``"torchvision.transforms.v2.functional"``.

    Raises:
        ImportError: if torchvision is not installed.
    """
    try:
        return importlib.import_module(module)
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_operators()
        return importlib.import_module(module)
