"""Training: it learns what needs time, resumes exactly, and stops when the loss is no number."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from screening.embedding import embed
from screening.i3d import ModelConfig, frames_seen
from screening.sampling import pk_batches
from screening.training import (
    SGD,
    AdamW,
    CosineSchedule,
    Learner,
    MislabelRule,
    Normalisation,
    PlateauSchedule,
    TrainConfig,
    TrainingError,
    TrainingState,
)
from storage_schemas.clips import white
from storage_schemas.errors import InputError

MODEL = ModelConfig(depth=10, width=4, stem_frames=3)
NORMALISATION = Normalisation(mean=(0.5, 0.5), std=(0.3, 0.3))
N_CLASSES = 3


def make(config: TrainConfig | None = None, seed: int = 0, model: ModelConfig = MODEL, **more: object) -> TrainingState:
    arguments: dict[str, object] = {"n_classes": N_CLASSES, "steps_per_epoch": 3, "control": 0, **more}
    config = config or TrainConfig(epochs=4)
    return TrainingState.make(model, config, NORMALISATION, seed=seed, **arguments)  # type: ignore[arg-type]


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    clips = torch.randint(0, 256, (6, 2, 4, 16, 16), dtype=torch.uint8, generator=generator)
    return clips, torch.arange(6) // 2


def run(state: TrainingState, epochs: int, metrics: tuple[float | None, ...]) -> list[float]:
    losses = []
    while state.epoch < epochs:
        losses += [state.step(*batch(3 * state.epoch + i))["loss"] for i in range(3)]
        state.end_epoch(metrics[state.epoch])
    return losses


def saved_and_loaded(state: TrainingState) -> dict[str, object]:
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("optimizer", [SGD(lr=0.01), AdamW()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("schedule", [CosineSchedule(), PlateauSchedule(patience=0)], ids=["cosine", "plateau"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(optimizer: SGD | AdamW, schedule: CosineSchedule | PlateauSchedule, accumulate: int) -> None:
    config = TrainConfig(
        epochs=4, optimizer=optimizer, schedule=schedule, accumulate=accumulate, mislabel=MislabelRule(after_epochs=2)
    )
    metrics = (0.5, 0.4, 0.3, 0.45)
    whole = make(config)
    losses = run(whole, 4, metrics)

    half = make(config)
    first = run(half, 2, metrics)
    resumed = make(config, seed=99)  # whatever it began with is replaced
    resumed.load_state_dict(saved_and_loaded(half))
    assert first + run(resumed, 4, metrics) == losses
    expected, found = whole.state_dict(), resumed.state_dict()
    assert found["best"] == expected["best"] == 0.5
    assert found["best_epoch"] == expected["best_epoch"] == 1
    assert found["schedule"] == expected["schedule"]
    for part in ("optimizer", "center_optimizer"):
        assert found[part]["param_groups"] == expected[part]["param_groups"]
    for part in ("learner", "best_weights"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            assert torch.equal(found[part][name], tensor), name


def test_the_seed_alone_decides_the_start_and_the_global_state_is_left() -> None:
    state = torch.get_rng_state()
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.network.conv1.weight, again.network.conv1.weight)
    assert not torch.equal(first.network.conv1.weight, other.network.conv1.weight)


def moving_blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Spots that brighten at once (0), steadily (1) or late (2), to the same end."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n)
    time = np.linspace(0, 1, 4)
    curves = np.stack([1 - np.exp(-8 * time), time, time**4]) / np.array([1 - np.exp(-8), 1, 1])[:, None]
    y, x = np.mgrid[:16, :16]
    center = rng.uniform(5, 10, (n, 2, 1, 1))
    spot = np.exp(-((y - center[:, 0]) ** 2 + (x - center[:, 1]) ** 2) / 18)
    gain = rng.uniform(0.9, 1.1, (n, 1))
    movie = 200 * (curves[label] * gain)[:, :, None, None] * spot[:, None]
    movie = movie + rng.normal(20, 5, movie.shape)
    clips = np.stack([movie, rng.normal(20, 5, movie.shape)], axis=1)
    return clips.clip(0, 255).astype(np.uint8), label


def rank_1(model: ModelConfig) -> float:
    clips, label = moving_blobs(120, 0)
    normalisation = Normalisation.measure([clips])
    config = TrainConfig(epochs=6, optimizer=AdamW(lr=5e-3))
    state = TrainingState.make(model, config, normalisation, n_classes=3, steps_per_epoch=8, seed=0)
    for epoch in range(config.epochs):
        for positions in pk_batches(label, 3, 5, np.random.default_rng([0, epoch])):
            state.step(torch.from_numpy(clips[positions]), torch.from_numpy(label[positions]))
        state.end_epoch(None)
    frames = frames_seen(model, 4)
    query, query_label = moving_blobs(60, 1)
    q, g = (embed(state.network, c, normalisation, frames) for c in (query, clips))
    q, g = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (q, g))
    return float((label[(q @ g.T).argmax(axis=1)] == query_label).mean())


def test_kinetics_are_learnt_by_the_network_that_sees_time_only() -> None:
    assert rank_1(MODEL) > 0.9
    assert rank_1(MODEL.model_copy(update={"temporal": "image"})) < 0.6


def test_each_loss_can_be_left_out() -> None:
    identity_only = TrainConfig(triplet_weight=0, center_weight=0)
    state = make(identity_only, model=MODEL.model_copy(update={"neck": False}))
    centers = state.state_dict()["learner"]["centers"].clone()
    values = state.step(*batch(0))
    assert values.keys() == {"loss", "identity", "accuracy", "lr"}
    assert values["loss"] == values["identity"]
    assert torch.equal(centers, state.state_dict()["learner"]["centers"])


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    values = make(TrainConfig(triplet_weight=0.5, center_weight=0.01)).step(*batch(0))
    expected = values["identity"] + 0.5 * values["triplet"] + 0.01 * values["center"]
    assert values["loss"] == pytest.approx(expected, rel=1e-6)


def test_centers_move_at_their_own_rate_whatever_the_weight() -> None:
    moved = []
    for weight in (0.01, 0.1):
        state = make(TrainConfig(center_weight=weight, center_lr=0.05))
        before = state.state_dict()["learner"]["centers"].clone()
        state.step(*batch(0))
        moved.append(state.state_dict()["learner"]["centers"] - before)
    torch.testing.assert_close(moved[0], moved[1])
    assert bool(moved[0].any())


def test_cosine_schedule_warms_up_and_comes_down() -> None:
    config = TrainConfig(epochs=4, optimizer=AdamW(lr=1.0), schedule=CosineSchedule(warmup_epochs=1, floor=0.1))
    state = make(config)
    rates = []
    while not state.finished:
        rates += [state.step(*batch(i))["lr"] for i in range(3)]
        state.end_epoch(None)
    expected = [1 / 4, 2 / 4, 3 / 4] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    assert rates == pytest.approx(expected)


def test_plateau_schedule_follows_the_metric() -> None:
    config = TrainConfig(optimizer=SGD(lr=1.0), schedule=PlateauSchedule(factor=0.5, patience=1))
    state = make(config)
    rates = []
    for metric in (0.5, 0.6, 0.6, 0.6, 0.7):
        rates.append(state._optimizer.param_groups[0]["lr"])
        state.end_epoch(metric)
    assert rates == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_best_epoch_is_kept_and_patience_stops() -> None:
    state = make(TrainConfig(epochs=50, patience=2))
    improved = []
    for metric in (0.2, 0.5, 0.4, 0.5):
        assert not state.finished
        state.step(*batch(0))
        improved.append(state.end_epoch(metric))
        if improved[-1]:
            best = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    assert improved == [True, True, False, False]
    assert (state.best, state.best_epoch, state.finished) == (0.5, 2, True)
    for name, tensor in best.items():
        assert torch.equal(state.best_weights[name], tensor)


@pytest.mark.parametrize("metric", [None, math.nan])
def test_without_validation_the_last_epoch_is_the_best(metric: float | None) -> None:
    state = make()
    assert [state.end_epoch(metric) for _ in range(4)] == [True] * 4
    assert (state.best, state.best_epoch, state.finished) == (None, 4, True)


def test_wrapper_holds_the_network_and_the_centers() -> None:
    class Counted(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, x: torch.Tensor, label: torch.Tensor, leave_out: bool) -> dict[str, torch.Tensor]:
            self.calls += 1
            result = self.module(x, label, leave_out)
            assert isinstance(result, dict)
            return result

    wrappers: list[Counted] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrappers.append(Counted(module))
        return wrappers[0]

    state, bare = make(wrap=wrap), make()
    assert state.step(*batch(0)) == bare.step(*batch(0))
    assert wrappers[0].calls == 1
    assert "module.centers" in dict(wrappers[0].named_parameters())
    assert state.state_dict()["learner"].keys() == bare.state_dict()["learner"].keys()


PLAIN_SGD = SGD(lr=0.1, momentum=0.5, weight_decay=0)


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.state_dict()["learner"].items()}


def test_gradients_are_averaged_over_the_batches_of_a_step() -> None:
    # Three batches an epoch in steps of two: the same batch twice counts as once, the third alone.
    single = make(TrainConfig(optimizer=PLAIN_SGD), steps_per_epoch=2)
    double = make(TrainConfig(optimizer=PLAIN_SGD, accumulate=2))
    start = weights(double)
    for index, moves in ((0, False), (0, True), (1, True)):
        double.step(*batch(index))
        assert torch.equal(start["network.conv1.weight"], double.network.conv1.weight) != moves
        if moves:
            single.step(*batch(index))
            for name, parameter in double.network.named_parameters():
                torch.testing.assert_close(parameter, single.network.get_parameter(name), msg=name)
        start = weights(double)
    torch.testing.assert_close(weights(double)["centers"], weights(single)["centers"])
    assert double.state_dict()["schedule"]["last_epoch"] == 2


def test_the_gradient_is_clipped_to_its_norm() -> None:
    state = make(TrainConfig(optimizer=PLAIN_SGD, clip_norm=0.01, schedule=CosineSchedule(warmup_epochs=0)))
    start = {name: p.detach().clone() for name, p in state.network.named_parameters()}
    state.step(*batch(0))
    moved = sum(float((p.detach() - start[name]).square().sum()) for name, p in state.network.named_parameters())
    # The first step of Nesterov's momentum is (1 + momentum) times the gradient.
    assert math.sqrt(moved) == pytest.approx(0.1 * 1.5 * 0.01, rel=1e-3)


def test_frozen_parts_stay_as_they_start() -> None:
    state = make(TrainConfig(freeze=("stem", "layer2")))
    start = weights(state)
    state.step(*batch(0))
    frozen = ("network.conv1.", "network.bn1.", "network.layer2.")
    for name, tensor in weights(state).items():
        if name != "network.neck.bias":  # never learnt
            assert torch.equal(tensor, start[name]) == name.startswith(frozen), name


def test_the_order_in_memory_does_not_matter_and_half_precision_little() -> None:
    first, second, half = (
        make(TrainConfig(**settings)) for settings in ({}, {"channels_last": False}, {"precision": "bf16"})
    )
    losses = [state.step(*batch(0))["loss"] for state in (first, second, half)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.03)
    assert losses[2] != losses[0]
    assert half.network.conv1.weight.dtype == torch.float32


@pytest.mark.slow
def test_the_compiled_network_learns_alike_and_is_stored_alike() -> None:
    compiled, plain = make(TrainConfig(compile=True)), make()
    for index in range(3):
        assert compiled.step(*batch(index))["loss"] == pytest.approx(plain.step(*batch(index))["loss"], rel=1e-3)
    assert compiled.state_dict()["learner"].keys() == plain.state_dict()["learner"].keys()


class Answers(nn.Module):
    """A network whose answers are given."""

    embedding_dim = 4

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.embedding = torch.randn(len(logits), 4, generator=torch.Generator().manual_seed(0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = x.long().flatten()
        return self.logits[chosen], self.embedding[chosen]


@pytest.mark.parametrize(("limit", "left_out"), [(5, [1, 4]), (3, [1, 4]), (2, [])])
def test_clips_that_look_like_controls_count_nowhere(limit: int, left_out: list[int]) -> None:
    label = torch.tensor([0, 1, 1, 1, 2, 2, 2])
    logits = nn.functional.one_hot(torch.tensor([0, 0, 1, 2, 0, 2, 2]), 3) * 2.0
    config = TrainConfig(mislabel=MislabelRule(limit=limit))
    learner = Learner(Answers(logits), 3, config, control=0)  # type: ignore[arg-type]
    learner.requires_grad_(False)
    found = learner(torch.arange(7.0), label, True)
    rest = torch.tensor([i for i in range(7) if i not in left_out])
    expected = learner(rest.float(), label[rest])
    for name in ("loss", "identity", "triplet", "center"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
    assert float(found["left_out"]) == pytest.approx(len(left_out) / 7)
    assert float(found["accuracy"]) == pytest.approx(4 / 7)


def test_clips_are_left_out_after_the_first_epochs_only() -> None:
    state = make(TrainConfig(mislabel=MislabelRule(after_epochs=1)))
    assert "left_out" not in state.step(*batch(0))
    state.end_epoch(None)
    assert "left_out" in state.step(*batch(0))


def test_a_body_is_carried_into_a_training_of_other_classes() -> None:
    first = make(n_classes=5)
    run(first, 1, (None,))
    body = {name: tensor for name, tensor in first.network.state_dict().items() if "classifier" not in name}
    second = make(n_classes=3, initial=lambda network: network.load_state_dict(body, strict=False))
    drawn = make(n_classes=3)
    for name, tensor in second.network.state_dict().items():
        assert torch.equal(tensor, body.get(name, drawn.network.state_dict()[name])), name
    assert torch.equal(weights(second)["centers"], weights(drawn)["centers"])
    second.step(*batch(0))


def test_image_model_is_fed_its_one_frame() -> None:
    state = make(model=MODEL.model_copy(update={"temporal": "image", "image_frame": 1}))
    clips, label = batch(0)
    other = clips.clone()
    other[:, :, [0, 2, 3]] = 0
    again = make(model=state.network.config)
    assert state.step(clips, label) == again.step(other, label)


def test_the_network_is_fed_the_middle_of_clips_in_training_and_after() -> None:
    whole, cropping = make(), make(model=MODEL.model_copy(update={"crop": 12}))
    clips, label = batch(0)
    middle = clips[..., 2:14, 2:14]
    assert cropping.step(clips, label) == whole.step(middle, label)
    embedded = (embed(state.network, x, NORMALISATION, range(4)) for state, x in ((cropping, clips), (whole, middle)))
    np.testing.assert_array_equal(*embedded)
    with pytest.raises(InputError, match=r"model\.crop is 12 but clips are 8 × 8 px: choose 8"):
        cropping.step(clips[..., :8, :8], label)


def test_loss_that_is_not_a_number_names_the_clips_and_leaves_the_weights() -> None:
    state = make()
    with torch.no_grad():
        state.network.classifier.weight.fill_(math.nan)
    stem = state.network.conv1.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"nan in epoch 1 .*p/B02/0/7"):
        state.step(*batch(0), names=["p/B02/0/7"])
    assert torch.equal(stem, state.network.conv1.weight)


def test_bad_input_is_refused() -> None:
    with pytest.raises(TrainingError, match="at least two identities"):
        make(n_classes=1)
    with pytest.raises(TrainingError, match="role is negative_control"):
        make(TrainConfig(mislabel=MislabelRule()), control=None)
    with pytest.raises(InputError, match="3 channels"):
        make().step(torch.zeros(4, 3, 4, 16, 16, dtype=torch.uint8), torch.arange(4) // 2)
    with pytest.raises(TrainingError, match="another network"):
        make(model=MODEL.model_copy(update={"width": 8})).load_state_dict(make().state_dict())
    with pytest.raises(TrainingError, match="no clips"):
        Normalisation.measure([])


def test_normalisation_is_that_of_all_clips() -> None:
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (5, 2, 3, 8, 8), dtype=np.uint8)
    clips[:, 1] = 7
    normalisation = Normalisation.measure([clips[:2], clips[2:]])
    assert normalisation.mean == pytest.approx((clips[:, 0].mean() / 255, 7 / 255))
    assert normalisation.std == pytest.approx((clips[:, 0].std() / 255, 1 / 255))
    x = normalisation.apply(torch.from_numpy(clips))
    expected = (clips[:, 0] / 255 - normalisation.mean[0]) / normalisation.std[0]
    np.testing.assert_allclose(x[:, 0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x[:, 1], 0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["uint16", "float16"])
def test_clips_of_more_bits_are_normalised_like_those_of_eight(dtype: str) -> None:
    clips = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 8, 8), dtype=np.uint8)
    finer = (clips / np.float32(255) * np.float32(white(np.dtype(dtype)))).astype(dtype)
    coarse, fine = Normalisation.measure([clips]), Normalisation.measure([finer[:2], finer[2:]])
    np.testing.assert_allclose([*fine.mean, *fine.std], [*coarse.mean, *coarse.std], rtol=1e-3)
    exact = finer[:, 0].astype(float) / white(np.dtype(dtype))
    assert (fine.mean[0], fine.std[0]) == pytest.approx((exact.mean(), exact.std()), rel=1e-9)
    x = coarse.apply(torch.from_numpy(clips))
    np.testing.assert_allclose(coarse.apply(torch.from_numpy(finer)), x, atol=2e-3)


def test_config_survives_json() -> None:
    config = TrainConfig(optimizer=SGD(lr=0.1), schedule=PlateauSchedule())
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
