"""Reading the tensors of a torch file from elsewhere, without running anything that it holds."""

from __future__ import annotations

import io
import re
import zipfile
from typing import Any

import torch
from torch import Tensor

from storage_schemas import store
from storage_schemas.errors import SchemaError


def read_state_dict(url: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that ``torch.save`` wrote, in its zip form or the one before.

    Args:
        url: a file whose ``state_dict`` holds the tensors, beside anything else, or that is a state dict itself.

    Returns:
        Tensors on the CPU by their names in the file.

    Raises:
        SchemaError: if the file is missing, cut short, no torch file, holds code or objects, or holds no state dict.
    """
    document = _load(url)
    state = document.get("state_dict", document) if isinstance(document, dict) else document
    if not isinstance(state, dict) or not state:
        raise SchemaError(url, f"expected a state dict, alone or as 'state_dict' of a dict; found {_kind(state)}")
    others = [f"{name} ({_kind(value)})" for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise SchemaError(
            url, f"expected a state dict, alone or as 'state_dict' of a dict; these are no tensors: {', '.join(others)}"
        )
    for name, tensor in state.items():
        # A tensor may show a few numbers as many, without memory until somebody copies it.
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise SchemaError(url, f"{name} is a {tensor.layout} tensor on {tensor.device}; expected plain ones")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise SchemaError(url, f"{name} claims the shape {tuple(tensor.shape)} and holds fewer numbers")
    return {str(name): tensor.detach() for name, tensor in state.items()}


class _Unread:
    """Stands in for a number of NumPy's, such as the best metric, which nobody here asks for."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# A checkpoint whose metric is a NumPy number is not refused for it, and yet none of NumPy's code sees the file.
_STAND_INS: list[Any] = [
    (_Unread, name)
    for name in (
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.ndarray",
    )
]


def _load(url: str) -> Any:
    data = store.read_bytes(url)
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            _check_archive(data)
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip and torch's own reader each have errors of their own
        code = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        if code:
            raise SchemaError(
                url,
                f"its pickle asks for {code[1]}, which is code and is not run; expected tensors, numbers and text "
                "only: save the network's state_dict() again, without other objects",
            ) from error
        raise SchemaError(url, "is not a torch file, or it is cut short or damaged") from error


def _check_archive(data: bytes) -> None:
    """Refuse a zip whose parts are compressed, as torch writes none: they may become any size."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("its parts are compressed")


def _kind(value: object) -> str:
    return "an empty dict" if value == {} else f"an object of type {type(value).__name__}"
