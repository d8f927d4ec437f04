"""The ablations: what is taken away from a configuration, each by name.

The first four are the rows of MitoReID's table (Nature Computational Science 2024); the others take away a part each of
its network and its training.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Ablation(NamedTuple):
    """One row of the table.

    Attributes:
        sentence: what the row is called.
        overrides: settings that it changes, as ``dotted.key=value``.
    """

    sentence: str
    overrides: tuple[str, ...]


ABLATIONS: Mapping[str, Ablation] = MappingProxyType(
    {
        "full": Ablation("full, as configured", ()),
        "no-pretraining": Ablation("minus pretraining", ("pretrain.epochs=0",)),
        "standard-time": Ablation("minus retained temporal dimension", ("model.temporal=standard",)),
        "image": Ablation("minus temporal dimension (image)", ("model.temporal=image",)),
        "no-neck": Ablation("minus neck", ("model.neck=false",)),
        "no-triplet": Ablation("minus triplet loss", ("train.triplet_weight=0",)),
        "no-center": Ablation("minus centre loss", ("train.center_weight=0",)),
        "no-mislabel": Ablation("minus mislabel rule", ("train.mislabel=null",)),
    }
)
