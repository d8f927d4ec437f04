"""torchvision imports and works, also where its operators cannot load."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from screening.torchvision_shim import import_torchvision

pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")

SCRIPT = """
import sys
from screening.torchvision_shim import import_torchvision
functional = import_torchvision("torchvision.transforms.v2.functional")
models = import_torchvision("torchvision.models")
assert import_torchvision() is sys.modules["torchvision"]
import torch, torchvision
image = torch.zeros(1, 9, 9)
image[0, 4, 4] = 1
blurred = functional.gaussian_blur(image, [3, 3], [1.0, 1.0])
assert abs(float(blurred.sum()) - 1) < 1e-5 and 0 < float(blurred[0, 4, 4]) < 1
with torch.device("meta"):
    assert sum(p.numel() for p in models.resnet18().parameters()) == 11_689_512
"""


def test_transforms_and_models_work_in_a_fresh_process() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_module_is_an_import_error() -> None:
    with pytest.raises(ImportError):
        import_torchvision("torchvision.no_such_module")
