"""Segmentation by a trained Cellpose network (Stringer et al. 2021), the optional alternative to the classical method.

The network and what turns its flows into outlines are the library's, versions 1 to 3, whose networks are small enough
for a CPU. Installed with the extra ``cellpose``.
"""

from __future__ import annotations

import os.path
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field
from scipy.ndimage import distance_transform_edt, find_objects
from skimage.segmentation import relabel_sequential

from storage_schemas.base import Config
from storage_schemas.errors import InputError

Labels = npt.NDArray[np.int32]

# The very first networks were stored without the diameter that they were trained for.
_DIAMETERS = {"diam_mean", "diam_labels"}


def _absolute(path: str) -> str:
    if not os.path.isabs(path):
        raise ValueError("must be an absolute path: workers run in folders of their own")
    return path


class CellposeConfig(Config):
    """Objects found by a trained network."""

    method: Literal["cellpose"] = Field("cellpose", description="a trained Cellpose network")
    model: Annotated[str, AfterValidator(_absolute)] = Field(
        description="absolute path of a Cellpose 1, 2 or 3 model, which every worker can read"
    )
    diameter: float | None = Field(
        None, gt=1, description="typical diameter in the images, px; null is that of the model's training images"
    )
    flow_threshold: float = Field(
        0.4, ge=0, description="largest mean squared error of an object's flows; 0 keeps every object"
    )
    cellprob_threshold: float = Field(0.0, description="least score of an object's pixels, log odds")


def segment_nuclei(image: npt.NDArray[Any], config: CellposeConfig) -> Labels:
    """Label the nuclei of one image.

    Args:
        image: (H, W), any real dtype.
        config: with which network. It runs on a GPU where this process sees one, and is loaded once a process.

    Returns:
        (H, W) int32 labels, 0 background, 1..n without gaps.

    Raises:
        InputError: the library is not installed, the model cannot be used, or the image holds NaN or infinite values.
    """
    return _find([image], config)


def segment_cells(
    cytoplasm: npt.NDArray[Any],
    nucleus: npt.NDArray[Any],
    nuclei: npt.NDArray[np.integer[Any]],
    config: CellposeConfig,
) -> Labels:
    """Give every nucleus the cell that the network sees around it.

    The cell of a nucleus is the object that holds most of it. Nuclei of one object share it, each pixel going to the
    nearest; an object without a nucleus is left out, and a nucleus without an object is its own cell.

    Args:
        cytoplasm: (H, W) of any real dtype, the network's first channel.
        nucleus: (H, W) of any real dtype, its second.
        nuclei: (H, W) integer labels, 0 background.
        config: as for :func:`segment_nuclei`.

    Returns:
        (H, W) int32 labels: the cell of a nucleus has its id and contains it.

    Raises:
        InputError: as for :func:`segment_nuclei`.
    """
    return _share(_find([cytoplasm, nucleus], config), nuclei)


def _find(planes: list[npt.NDArray[Any]], config: CellposeConfig) -> Labels:
    image = np.stack([plane.astype(np.float32) for plane in planes])
    if not np.isfinite(image).all():
        raise InputError("the image holds NaN or infinite values: mask or repair the plane first")
    network = _network(config.model)
    if np.ptp(image[0]) == 0:
        return np.zeros(image.shape[1:], np.int32)
    # The library takes one channel as an image without an axis for it.
    masks, *_ = network.eval(
        image if len(planes) > 1 else image[0],
        channel_axis=0 if len(planes) > 1 else None,
        diameter=config.diameter,
        flow_threshold=config.flow_threshold,
        cellprob_threshold=config.cellprob_threshold,
    )
    # Numbers are missing where the library has filled a hole in which another object lay.
    return np.asarray(relabel_sequential(masks)[0], np.int32)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=2)  # one for nuclei and one for cells
def _network(path: str) -> Any:
    """The library's network with the weights of a file.

    The file is checked here because the library takes the weights that it knows from any file and leaves the others
    random, and in place of a missing file downloads one of its own.
    """
    try:
        from cellpose.models import CellposeModel
    except ImportError as error:
        raise InputError("segmentation by Cellpose needs its extra: pip install 'screening[cellpose]'") from error
    import torch

    gpu = torch.cuda.is_available()
    wanted = CellposeModel(gpu=gpu).net.state_dict()
    expected = "expected the file of a Cellpose 1, 2 or 3 network of two channels"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {expected}") from error
    except Exception as error:  # torch, pickle and zip have errors of their own
        raise InputError(f"{path}: is not a model file ({type(error).__name__}); {expected}") from error
    if not isinstance(found, dict) or any(
        name not in found or found[name].shape != weight.shape
        for name, weight in wanted.items()
        if name not in _DIAMETERS
    ):
        raise InputError(f"{path}: is a model of another kind; {expected}")
    return CellposeModel(gpu=gpu, pretrained_model=path)


def _share(objects: Labels, nuclei: npt.NDArray[np.integer[Any]]) -> Labels:
    """Give the pixels of objects to the nuclei that lie in them."""
    n_objects = int(objects.max(initial=0))
    pairs = nuclei.astype(np.int64) * (n_objects + 1) + objects
    overlap = np.bincount(pairs.ravel(), minlength=(int(nuclei.max(initial=0)) + 1) * (n_objects + 1))
    overlap = overlap.reshape(-1, n_objects + 1)
    overlap[:, 0] = 0
    home = overlap.argmax(axis=1)  # 0 for a nucleus that no object touches
    home[0] = 0
    cells = np.zeros(nuclei.shape, np.int32)
    for number, box in enumerate(find_objects(objects), start=1):
        if box is None:
            continue
        own = np.where(home[nuclei[box]] == number, nuclei[box], 0)
        if own.any():
            nearest = distance_transform_edt(own == 0, return_distances=False, return_indices=True)
            inside = objects[box] == number
            cells[box][inside] = own[tuple(nearest)][inside]
    cells[nuclei > 0] = nuclei[nuclei > 0]
    return cells
