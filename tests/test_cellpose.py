from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import dask.array
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from screening import cellpose_model
from screening.cellpose_model import CellposeConfig, segment_cells, segment_nuclei
from screening.clips import ClipsConfig, FixedWindow
from screening.illumination import NoIllumination, calibrate
from screening.site import ChannelsConfig, SegmentConfig, process_site
from storage_schemas.errors import InputError

Image = NDArray[np.float32]
Labels = NDArray[np.int32]

DIAMETER = 15.0
WIDTHS = [8, 16]  # channels of the network's levels, where the published ones have 32 to 256


def field(rng: np.random.Generator, side: int, n: int, scale: int = 1) -> tuple[Image, Labels]:
    """Ellipses of about 15 px that do not touch, blurred and noisy, and their labels."""
    labels = np.zeros((side, side), np.int32)
    for number in range(1, n + 1):
        ellipse = np.zeros((side, side), np.uint8)
        centre, axes = rng.integers(6 * scale, side - 6 * scale, 2), scale * rng.integers(6, 10, 2)
        cv2.ellipse(ellipse, centre.tolist(), axes.tolist(), rng.uniform(0, 180), 0, 360, 1, -1)
        if not labels[cv2.dilate(ellipse, np.ones((3, 3), np.uint8)) > 0].any():
            labels[ellipse > 0] = number
    light = cv2.GaussianBlur((labels > 0).astype(np.float32), (0, 0), scale)
    return rng.poisson(20 + 80 * light).astype(np.float32), labels


def found_again(truth: Labels, found: Labels) -> float:
    """Share of the true objects that one found object covers with an IoU over 0.5."""
    ids = np.unique(truth)[1:]
    hits = 0
    for i in ids:
        other = np.bincount(found[truth == i]).argmax()
        both = ((truth == i) & (found == other)).sum()
        hits += other > 0 and 2 * both > ((truth == i) | (found == other)).sum()
    return hits / len(ids)


@pytest.fixture(scope="module")
def small_networks() -> Iterator[None]:
    """The library builds networks as narrow as ours here, and is not kept from building others elsewhere."""
    models = pytest.importorskip("cellpose.models", reason="the extra cellpose is not installed")
    with pytest.MonkeyPatch.context() as patch:
        wide = models.CPnet
        patch.setattr(models, "CPnet", lambda nbase, *rest, **named: wide([nbase[0], *WIDTHS], *rest, **named))
        yield
    cellpose_model._network.cache_clear()


@pytest.fixture(scope="module")
def model(small_networks: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a network of 30 thousand weights that a few seconds have taught ellipses."""
    from cellpose.dynamics import labels_to_flows
    from cellpose.resnet_torch import CPnet

    rng = np.random.default_rng(0)
    fields = [field(rng, 64, 9) for _ in range(32)]
    inputs = np.zeros((32, 2, 64, 64), np.float32)
    for channels, (image, _) in zip(inputs, fields, strict=True):
        low, high = np.percentile(image, (1, 99))
        channels[0] = (image - low) / (high - low)
    _, inside, *flows = np.moveaxis(np.stack(labels_to_flows([labels for _, labels in fields])), 1, 0)
    targets = torch.tensor(np.stack(flows, axis=1)), torch.tensor(inside > 0.5).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CPnet([2, *WIDTHS], 3, 3, diam_mean=DIAMETER).train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.2  # the statistics must keep up with so few steps
        steps = 120
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
        for _ in range(steps):
            pick = torch.randperm(32)[:4]
            out = network(torch.tensor(inputs)[pick])[0]
            # The library's loss: five times the flows, and the log odds of being inside.
            loss = torch.nn.functional.mse_loss(out[:, :2], 5 * targets[0][pick])
            loss += torch.nn.functional.binary_cross_entropy_with_logits(out[:, 2], targets[1][pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    path = tmp_path_factory.mktemp("cellpose") / "tiny"
    network.save_model(path)
    return str(path)


def test_a_trained_network_finds_nuclei(model: str) -> None:
    image, truth = field(np.random.default_rng(1), 160, 40)
    labels = segment_nuclei(image.astype(np.uint16), CellposeConfig(model=model))
    assert labels.dtype == np.int32
    assert np.unique(labels).tolist() == list(range(labels.max() + 1))
    assert found_again(truth, labels) > 0.9
    assert found_again(labels, truth) > 0.9


def test_the_diameter_scales_the_image(model: str) -> None:
    image, truth = field(np.random.default_rng(2), 240, 20, scale=3)
    told = segment_nuclei(image, CellposeConfig(model=model, diameter=3 * DIAMETER))
    assert found_again(truth, told) > 0.9
    assert found_again(truth, segment_nuclei(image, CellposeConfig(model=model))) < 0.5


def test_thresholds_reach_the_library(model: str) -> None:
    image, _ = field(np.random.default_rng(3), 96, 14)
    usual = segment_nuclei(image, CellposeConfig(model=model))
    strict = segment_nuclei(image, CellposeConfig(model=model, cellprob_threshold=2.0))
    assert 0 < np.count_nonzero(strict) < np.count_nonzero(usual)
    assert not segment_nuclei(image, CellposeConfig(model=model, flow_threshold=1e-6)).any()


def test_a_network_is_loaded_once_a_process(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellpose import models

    image, _ = field(np.random.default_rng(4), 96, 14)
    config = CellposeConfig(model=model)
    first = segment_nuclei(image, config)
    monkeypatch.setattr(models, "CellposeModel", None)
    np.testing.assert_array_equal(segment_nuclei(image, config), first)


def test_an_image_without_contrast_has_no_nuclei(model: str) -> None:
    assert not segment_nuclei(np.full((64, 64), 7, np.uint16), CellposeConfig(model=model)).any()


def test_pixels_that_are_no_numbers_are_refused(model: str) -> None:
    with pytest.raises(InputError, match="NaN"):
        segment_nuclei(np.full((64, 64), np.nan, np.float32), CellposeConfig(model=model))


def test_objects_are_numbered_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library leaves a gap where it fills the hole of a ring over the object in it."""
    masks = np.zeros((8, 8), np.uint16)
    masks[1:3], masks[5:7] = 2, 5
    network = SimpleNamespace(eval=lambda *_, **__: (masks, None, None))
    monkeypatch.setattr(cellpose_model, "_network", lambda _: network)
    labels = segment_nuclei(np.eye(8), CellposeConfig(model="/model"))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.where(masks == 5, 2, np.where(masks == 2, 1, 0)))


def test_cells_have_the_ids_of_their_nuclei_and_contain_them(model: str) -> None:
    # The network's own objects stand for cytoplasm; nuclei are their cores, under other numbers.
    image, truth = field(np.random.default_rng(5), 160, 40)
    cores = cv2.erode((truth > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    nuclei = np.where(cores, 100 - truth, 0)
    cells = segment_cells(image, np.zeros_like(image), nuclei, CellposeConfig(model=model))
    np.testing.assert_array_equal(cells[cores], nuclei[cores])
    assert set(np.unique(cells)) == set(np.unique(nuclei))
    assert found_again(np.where(np.isin(100 - truth, nuclei), truth, 0), cells) > 0.9


def test_objects_are_shared_as_a_loop_over_pixels_shares_them() -> None:
    rng = np.random.default_rng(6)
    objects = np.kron(rng.integers(0, 6, (4, 4)), np.ones((8, 8), int)).astype(np.int32)
    objects = np.unique(objects, return_inverse=True)[1].astype(np.int32).reshape(32, 32)
    nuclei = np.where(rng.random((32, 32)) < 0.02, rng.integers(1, 9, (32, 32)), 0)
    expected = nuclei.copy()
    home = {}
    for nucleus in range(1, 9):
        held = np.bincount(objects[nuclei == nucleus], minlength=objects.max() + 1)
        held[0] = 0
        home[nucleus] = held.argmax() if held.any() else 0
    for y, x in zip(*np.nonzero((objects > 0) & (nuclei == 0)), strict=True):
        box = [slice(i.min(), i.max() + 1) for i in np.nonzero(objects == objects[y, x])]
        seeds = [
            (np.hypot(v - y, u - x), nuclei[v, u])
            for v, u in zip(*np.nonzero(nuclei), strict=True)
            if home[nuclei[v, u]] == objects[y, x]
            and box[0].start <= v < box[0].stop
            and box[1].start <= u < box[1].stop
        ]
        if seeds:
            nearest = min(seeds)[0]
            tied = {int(nucleus) for distance, nucleus in seeds if distance == nearest}
            shared = cellpose_model._share(objects, nuclei)[y, x]
            assert shared in tied
            expected[y, x] = shared
    np.testing.assert_array_equal(cellpose_model._share(objects, nuclei), expected)


def test_process_site_takes_nuclei_and_cells_of_networks(model: str) -> None:
    image, truth = field(np.random.default_rng(7), 160, 20)
    stack = np.stack([np.stack([image, image])] * 3).astype(np.uint16)
    config = SegmentConfig.model_validate(
        {
            "channels": {"nucleus": "a", "cytoplasm": "b"},
            "illumination": {"method": "none"},
            "nuclei": {"method": "cellpose", "model": model},
            "cells": {"method": "cellpose", "model": model},
            "clips": ClipsConfig(frames=3, size=32, window=FixedWindow(size=32)).model_dump(),
        }
    )
    site = process_site(
        stack, ("a", "b"), calibrate([dask.array.from_array(stack)], NoIllumination(), (1.0, 99.8)), config
    )
    for nuclei, cells in zip(site.nuclei, site.cells, strict=True):
        assert found_again(truth, nuclei) > 0.9
        np.testing.assert_array_equal(cells[nuclei > 0], nuclei[nuclei > 0])


def test_cells_of_networks_need_an_image_of_them() -> None:
    cells = CellposeConfig(model="/model")
    with pytest.raises(ValidationError, match=re.escape("set channels.cytoplasm")):
        SegmentConfig(channels=ChannelsConfig(nucleus="a"), cells=cells)
    SegmentConfig(channels=ChannelsConfig(nucleus="a", cytoplasm="b"), cells=cells)


@pytest.mark.parametrize("content", [b"", b"weights", None], ids=["empty", "text", "other network"])
def test_what_is_no_model_is_refused(small_networks: None, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model"
    if content is None:
        torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path}: is .* Cellpose 1, 2 or 3"):
        segment_nuclei(np.zeros((32, 32), np.uint8), CellposeConfig(model=str(path)))


def test_weights_of_another_width_are_refused(model: str, tmp_path: Path) -> None:
    weights = torch.load(model)
    weights["output.2.weight"] = weights["output.2.weight"][:2]
    torch.save(weights, tmp_path / "model")
    with pytest.raises(InputError, match="of another kind"):
        segment_nuclei(np.zeros((32, 32), np.uint8), CellposeConfig(model=str(tmp_path / "model")))


def test_a_missing_model_is_not_downloaded(small_networks: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        segment_nuclei(np.zeros((32, 32), np.uint8), CellposeConfig(model=str(tmp_path / "cyto3")))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cellpose_model._network.cache_clear()
    for module in ("cellpose", "cellpose.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=re.escape("screening[cellpose]")):
        segment_nuclei(np.zeros((32, 32), np.uint8), CellposeConfig(model="/model"))


def test_a_model_is_named_by_an_absolute_path() -> None:
    with pytest.raises(ValueError, match="absolute path"):
        CellposeConfig(model="cyto3")
