"""Two workers on shares of a batch against one worker on the whole of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from screening.distributed import SyncBatchNorm, gather, synchronise_batchnorm, total
from screening.i3d import ModelConfig
from screening.training import SGD, MislabelRule, Normalisation, TrainConfig, TrainingState

WORKERS = 2
BATCHES, EPOCHS = 3, 2
CONFIG = TrainConfig(
    epochs=EPOCHS,
    optimizer=SGD(lr=2e-4),
    triplet_weight=2.0,
    margin=3.0,
    center_weight=0.01,
    mislabel=MislabelRule(limit=100, after_epochs=1),
)
CONFIGS = {
    "default": CONFIG,
    "accumulate": CONFIG.model_copy(update={"accumulate": 2}),
    "own statistics": CONFIG.model_copy(update={"sync_batchnorm": False}),
    "own triplets": CONFIG.model_copy(update={"triplet_scope": "worker"}),
}


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    label = torch.arange(12) // 3
    clips = torch.randint(0, 120, (12, 2, 4, 16, 16), generator=generator)
    # Brightness tells them apart, so that some are soon taken for the controls and others not.
    return (clips + 30 * label[:, None, None, None, None]).to(torch.uint8), label


def share(x: torch.Tensor, rank: int, workers: int) -> torch.Tensor:
    return x.chunk(workers)[rank]


def trained(config: TrainConfig, rank: int, workers: int) -> dict[str, Any]:
    """A small network after two epochs, and what was reported on the way."""
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel if workers > 1 else lambda module: module
    model = ModelConfig(depth=10, width=4, stem_frames=3)
    normalisation = Normalisation(mean=(0.4, 0.4), std=(0.2, 0.2))
    state = TrainingState.make(
        model, config, normalisation, n_classes=4, steps_per_epoch=BATCHES, seed=0, control=1, wrap=wrap
    )
    reported = []
    while not state.finished:
        for index in range(BATCHES):
            clips, label = (share(x, rank, workers) for x in batch(index))
            reported.append(state.step(clips, label))
        state.end_epoch(None)
    return {"reported": reported, "weights": state.state_dict()["learner"]}


def normalised(norm: nn.Module, rank: int, workers: int) -> dict[str, Any]:
    """Output, running statistics and gradients of a batch normalisation of values far from 0."""
    generator = torch.Generator().manual_seed(0)
    whole = (torch.randn(8, 3, 2, 5, 4, generator=generator) * torch.arange(1, 9)[:, None, None, None, None]) + 30
    x = share(whole, rank, workers).clone().requires_grad_()
    pull = share(torch.randn(whole.shape, generator=generator), rank, workers)
    outer = nn.Sequential(norm)
    if workers > 1:
        synchronise_batchnorm(outer)
    for _ in range(2):
        y = outer(x)
    (y * pull).sum().backward()
    state = {name: tensor.clone() for name, tensor in outer.state_dict().items()}
    gradients = {name: total(p.grad) for name, p in outer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "state": state, "gradients": gradients, "eval": outer.eval()(x).detach()}


def make_norm() -> nn.Module:
    norm = nn.BatchNorm3d(3, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    return norm


def gathered(rank: int) -> dict[str, Any]:
    x = torch.full((2, 1), rank + 1.0, requires_grad=True)
    rows = gather(x)
    (rows.square().sum() * (rank + 1)).backward()
    return {"rows": rows.detach(), "gradient": x.grad, "flags": gather(torch.tensor([rank == 0]))}


def work(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORKERS)
    found = {name: trained(config, rank, WORKERS) for name, config in CONFIGS.items()}
    torch.save(
        {"trained": found, "norm": normalised(make_norm(), rank, WORKERS), "gathered": gathered(rank)},
        folder / f"{rank}.pt",
    )
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("workers")
    multiprocessing.spawn(work, (folder,), WORKERS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORKERS)]


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str = "", tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("name", ["default", "accumulate"])
def test_two_workers_learn_what_one_learns(found: list[dict[str, Any]], name: str) -> None:
    alone = trained(CONFIGS[name], 0, 1)
    for worker in found:
        for one, two in zip(alone["reported"], worker["trained"][name]["reported"], strict=True):
            assert two == pytest.approx(one, rel=2e-4, abs=1e-5)  # as much as another order in memory does
        for tensor, value in alone["weights"].items():
            assert_near(worker["trained"][name]["weights"][tensor], value, tensor)
    left_out = [step["left_out"] for step in alone["reported"][BATCHES:]]
    assert any(0 < value < 1 for value in left_out), "the rule has nothing to do here"


@pytest.mark.parametrize("name", ["own statistics", "own triplets"])
def test_workers_that_look_at_their_own_clips_alone_learn_something_else(
    found: list[dict[str, Any]], name: str
) -> None:
    alone = trained(CONFIGS[name], 0, 1)
    first = [run["reported"][0] for run in (alone, found[0]["trained"][name])]
    assert first[1]["triplet"] != pytest.approx(first[0]["triplet"], rel=1e-3)
    assert found[0]["trained"][name]["reported"] == found[1]["trained"][name]["reported"]


def test_statistics_over_workers_are_those_of_the_whole_batch(found: list[dict[str, Any]]) -> None:
    alone = normalised(make_norm(), 0, 1)
    for part in ("y", "x", "eval"):
        assert_near(torch.cat([worker["norm"][part] for worker in found]), alone[part], part, 1e-5)
    for part in ("state", "gradients"):
        for worker in found:
            assert worker["norm"][part].keys() == alone[part].keys()
            for name, value in alone[part].items():
                assert_near(worker["norm"][part][name], value, name, 1e-5)


def test_one_worker_has_the_plain_statistics() -> None:
    norm = nn.Sequential(make_norm())
    synchronise_batchnorm(norm)
    assert isinstance(norm[0], SyncBatchNorm)
    plain, alone = normalised(make_norm(), 0, 1), normalised(norm[0], 0, 1)
    for part in ("y", "x", "eval"):
        assert torch.equal(plain[part], alone[part])


def test_gathered_rows_take_the_gradients_of_all_workers(found: list[dict[str, Any]]) -> None:
    for rank, worker in enumerate(found):
        assert worker["gathered"]["rows"].flatten().tolist() == [1, 1, 2, 2]
        assert worker["gathered"]["gradient"].flatten().tolist() == [2 * (rank + 1) * (1 + 2)] * 2
        assert worker["gathered"]["flags"].tolist() == [True, False]
