"""Released checkpoints: the same numbers from the same weights, and a clear word on every file that is none."""

from __future__ import annotations

import contextlib
import io
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hara import Hara, fill, release
from hypothesis import given, settings
from hypothesis import strategies as st

from screening.i3d import load_mitoreid
from storage_schemas import store
from storage_schemas.errors import InputError

SMALL = {"width": 4, "frames": 4, "size": 32, "classes": 5}


def small(depth: int = 10, shortcut: str = "A", temporal: str = "retain", **choices: Any) -> Hara:
    return fill(Hara(depth, shortcut, temporal, **{**SMALL, **choices}))


def assert_same_answers(ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        for a, b in zip(ours(x), theirs(x), strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


@pytest.mark.parametrize(
    ("depth", "shortcut", "temporal", "choices"),
    [
        (10, "B", "retain", {}),
        (18, "A", "retain", {}),
        (18, "A", "standard", {}),
        (18, "A", "image", {}),
        (18, "A", "retain", {"neck": None}),
        (18, "A", "standard", {"channels": 2, "stem_frames": 3}),
        (34, "A", "image", {}),
        (50, "B", "retain", {}),
        (50, "B", "standard", {}),
        (50, "B", "image", {}),
        (50, "B", "standard", {"neck": None, "head": "fc"}),
        (50, "A", "retain", {}),
        (50, "B", "retain", {"cardinality": 32, "width": 16}),
        (101, "B", "image", {}),
        (101, "B", "image", {"cardinality": 32, "width": 16}),
    ],
)
def test_a_released_network_answers_as_the_original(
    tmp_path: Path, depth: int, shortcut: str, temporal: str, choices: dict[str, Any]
) -> None:
    frames = 1 if temporal == "image" else 8
    theirs = small(depth, shortcut, temporal, frames=frames, **choices)
    ours = load_mitoreid(release(theirs, tmp_path / "best.pth"), temporal=temporal)
    assert not ours.training
    x = torch.randn(3, choices.get("channels", 3), frames, 32, 32, generator=torch.Generator().manual_seed(1))
    assert_same_answers(ours, theirs.eval(), x)
    # In training batch statistics replace the stored ones, which rounding tells apart less and less clearly.
    assert_same_answers(ours.double().train(), theirs.double().train(), x.double())


@pytest.mark.parametrize(("depth", "shortcut", "temporal"), [(18, "A", "retain"), (50, "B", "standard")])
def test_the_published_networks_answer_as_the_original(
    tmp_path: Path, depth: int, shortcut: str, temporal: str
) -> None:
    theirs = fill(Hara(depth, shortcut, temporal)).eval()
    ours = load_mitoreid(release(theirs, tmp_path / "best.pth"), temporal=temporal)
    assert_same_answers(ours, theirs, torch.randn(1, 3, 16, 112, 112, generator=torch.Generator().manual_seed(1)))
    expected = {18: 33_050_598, 50: 46_280_934}[depth]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == expected


def test_the_shape_is_told_from_the_tensors(tmp_path: Path) -> None:
    theirs = small(50, "B", channels=4, stem_frames=5, classes=7, width=16, cardinality=32, neck=None)
    ours = load_mitoreid(release(theirs, tmp_path / "x.pth"), temporal="standard")
    assert ours.config.model_dump(exclude={"image_frame", "crop"}) == {
        "depth": 50,
        "cardinality": 32,
        "width": 16,
        "temporal": "standard",
        "neck": False,
        "stem_frames": 5,
        "shortcut": "B",
    }
    assert ours.conv1.in_channels == 4
    assert ours.classifier.out_features == 7


@pytest.mark.parametrize("prefix", ["", "module.", "module.base.", "backbone."])
@pytest.mark.parametrize(
    ("neck", "head"), [("bottleneck", "classifier"), ("bnneck", "fc"), ("neck", "fc_cls"), ("bn2", "head")]
)
def test_neck_and_classifier_are_known_by_role(tmp_path: Path, prefix: str, neck: str, head: str) -> None:
    theirs = small(neck=neck, head=head).eval()
    ours = load_mitoreid(release(theirs, tmp_path / "x.pth", prefix))
    assert ours.neck is not None
    assert not ours.neck.bias.requires_grad
    assert_same_answers(ours, theirs, torch.randn(2, 3, 4, 32, 32))


def test_only_the_layers_may_stand_below_a_prefix(tmp_path: Path) -> None:
    theirs = small().eval()
    state = {
        name if name.startswith(("bottleneck", "classifier")) else f"base.{name}": tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    assert_same_answers(load_mitoreid(tmp_path / "x.pth"), theirs, torch.randn(2, 3, 4, 32, 32))


def test_a_classifier_without_bias_loads(tmp_path: Path) -> None:
    theirs = small(head_bias=False).eval()
    ours = load_mitoreid(release(theirs, tmp_path / "x.pth"))
    assert not ours.classifier.bias.any()
    assert_same_answers(ours, theirs, torch.randn(2, 3, 4, 32, 32))


def test_other_forms_of_the_file_load(tmp_path: Path) -> None:
    theirs = small().eval()
    x = torch.randn(2, 3, 4, 32, 32)
    assert_same_answers(load_mitoreid(str(release(theirs, tmp_path / "zip.pth"))), theirs, x)
    old = release(theirs, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_answers(load_mitoreid(old), theirs, x)
    torch.save(theirs.state_dict(), tmp_path / "bare.pth")
    assert_same_answers(load_mitoreid(tmp_path / "bare.pth"), theirs, x)
    counted = {name: t for name, t in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": counted, "centers": torch.zeros(5, 32)}, tmp_path / "uncounted.pth")
    assert_same_answers(load_mitoreid(tmp_path / "uncounted.pth"), theirs, x)
    url = f"memory://{uuid.uuid4().hex}/x.pth"
    store.write_bytes(url, old.read_bytes())
    assert_same_answers(load_mitoreid(url), theirs, x)


@pytest.mark.parametrize("new_form", [True, False])
def test_a_metric_that_is_a_number_of_numpy_is_no_code(tmp_path: Path, new_form: bool) -> None:
    theirs = small().eval()
    checkpoint = {"best_metric": np.float64(0.5), "cmc": np.zeros(3), "state_dict": theirs.state_dict()}
    torch.save(checkpoint, tmp_path / "x.pth", _use_new_zipfile_serialization=new_form)
    assert_same_answers(load_mitoreid(tmp_path / "x.pth"), theirs, torch.randn(2, 3, 4, 32, 32))


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    theirs = small().half()
    ours = load_mitoreid(release(theirs, tmp_path / "x.pth"))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(ours.conv1.weight, theirs.conv1.weight.float())


def refusal(tmp_path: Path, state: object) -> str:
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(InputError) as caught:
        load_mitoreid(tmp_path / "x.pth")
    assert str(caught.value).startswith(str(tmp_path / "x.pth"))
    return str(caught.value)


@pytest.mark.parametrize(("depth", "shortcut", "prefix"), [(10, "B", "module."), (50, "B", "")])
def test_each_tensor_that_is_wrong_is_named(tmp_path: Path, depth: int, shortcut: str, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in small(depth, shortcut).state_dict().items()}
    optional = ("num_batches_tracked", "classifier.bias")
    for name in list(state)[:: 3 if depth == 10 else 59]:
        ours = name.removeprefix(prefix).replace("bottleneck.", "neck.")
        if not name.endswith(optional) and "classifier" not in name:
            told = refusal(tmp_path, {n: t for n, t in state.items() if n != name})
            assert f"missing: {ours}" in told
            assert told.count("\n") == 1
            told = refusal(tmp_path, state | {name: torch.full_like(state[name], torch.nan)})
            assert f"unusable: {name} holds values that are NaN" in told
        if name != prefix + "conv1.weight" and "classifier" not in name:
            bad = torch.zeros(*state[name].shape, 2)
            assert f"misshapen: {name} {tuple(bad.shape)}" in refusal(tmp_path, state | {name: bad})


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    state = small().state_dict()
    del state["layer2.0.bn2.running_var"], state["layer4.0.conv1.weight"], state["classifier.weight"]
    state["conv1.weight"] = torch.zeros(4, 3, 6, 7, 7)
    state["layer1.0.bn1.bias"] = torch.zeros(5)
    state["projection.weight"] = torch.zeros(3)
    state["layer1.0.extra"] = torch.zeros(())
    told = refusal(tmp_path, state)
    for line in (
        "ResNet-10 with shortcut A, a neck and no classes",
        "missing: layer2.0.bn2.running_var (8,)",
        "missing: layer4.0.conv1.weight (32, 16, 3, 3, 3)",
        "missing: classifier.weight, a matrix (classes, 32) by any name",
        "misshapen: conv1.weight (4, 3, 6, 7, 7), expected (4, 3, 7, 7, 7)",
        "misshapen: layer1.0.bn1.bias (5,), expected (4,)",
        "unexpected: projection.weight (3,)",
        "unexpected: layer1.0.extra ()",
    ):
        assert line in told


def test_a_whole_stage_may_be_missing(tmp_path: Path) -> None:
    state = {name: t for name, t in small(18).state_dict().items() if not name.startswith("layer4.1")}
    told = refusal(tmp_path, state)
    assert "ResNet-18" in told
    assert "missing: layer4.1.bn2.running_mean (32,)" in told
    assert "unexpected" not in told


def test_a_second_classifier_is_not_chosen_among(tmp_path: Path) -> None:
    told = refusal(tmp_path, small().state_dict() | {"other.weight": torch.zeros(9, 32)})
    assert "unexpected: other.weight (9, 32)" in told


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({}, "expected a state dict"),
        ([1, 2], "expected a state dict"),
        ({"conv1.weight": 3}, "these are no tensors: conv1.weight"),
        ({"weight": torch.zeros(2)}, "holds no residual network"),
        ({"layer1.0.conv1.weight": torch.zeros(2, 2, 3, 3, 3), "bn1.weight": torch.zeros(2)}, "cannot be built.*width"),
    ],
)
def test_what_is_no_network_is_refused(tmp_path: Path, state: object, told: str) -> None:
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=told):
        load_mitoreid(tmp_path / "x.pth")


def test_deeper_networks_are_told_from_ours(tmp_path: Path) -> None:
    with torch.device("meta"):
        names = Hara(152, "B", **SMALL).state_dict()
    assert "(3, 8, 36, 3) bottlenecks" in refusal(tmp_path, dict.fromkeys(names, torch.zeros(1)))


def test_another_treatment_of_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="standard, retain, image"):
        load_mitoreid(release(small(), tmp_path / "x.pth"), temporal="keep")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


@pytest.mark.parametrize("new_form", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, new_form: bool) -> None:
    checkpoint = {"state_dict": small().state_dict(), "args": Harmful()}
    torch.save(checkpoint, tmp_path / "x.pth", _use_new_zipfile_serialization=new_form)
    with pytest.raises(InputError, match=r"x\.pth: its pickle asks for exec, which is code and is not run"):
        load_mitoreid(tmp_path / "x.pth")


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        load_mitoreid(tmp_path / "x.pth")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pth: no such file"):
        load_mitoreid(tmp_path / "none.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load_mitoreid(tmp_path)


def test_a_classifier_that_is_no_matrix_is_named(tmp_path: Path) -> None:
    told = refusal(tmp_path, small().state_dict() | {"classifier.weight": torch.zeros(5, 32, 2)})
    assert "missing: classifier.weight" in told
    assert "unexpected: classifier.weight (5, 32, 2)" in told


def saved(new_form: bool) -> bytes:
    sink = io.BytesIO()
    torch.save({"state_dict": small().state_dict()}, sink, _use_new_zipfile_serialization=new_form)
    return sink.getvalue()


WHOLE = {form: saved(form) for form in (True, False)}


@given(st.data(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_short_is_refused(data: st.DataObject, new_form: bool) -> None:
    whole = WHOLE[new_form]
    url = "memory://mitoreid-cut.pth"
    store.write_bytes(url, whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(InputError, match=r"cut\.pth: (is not a torch file|its pickle asks for)"):
        load_mitoreid(url)


@given(st.data(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_loads_or_is_refused(data: st.DataObject, new_form: bool) -> None:
    damaged = bytearray(WHOLE[new_form])
    head = 9000  # the pickle lies there; behind it are numbers, of which any are good
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, head), st.integers(0, 255)), min_size=1, max_size=8)
    ):
        damaged[place] = byte
    url = "memory://mitoreid-damaged.pth"
    store.write_bytes(url, bytes(damaged))
    with contextlib.suppress(InputError):
        load_mitoreid(url)


@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda tail: b"PK\x03\x04" + tail))
@settings(max_examples=60, deadline=None)
def test_other_files_are_refused(content: bytes) -> None:
    url = "memory://mitoreid-other.pth"
    store.write_bytes(url, content)
    with pytest.raises(InputError, match=r"other\.pth"):
        load_mitoreid(url)


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(InputError, match="is not a torch file"):
        load_mitoreid(tmp_path / "x.npz")
