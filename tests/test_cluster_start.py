"""Which Ray a run uses, and what it says if that cannot be had."""

from __future__ import annotations

import socket
import time

import pytest
import ray

from pipelines.cluster import cluster, cluster_address
from pipelines.config import ResourcesConfig
from storage_schemas.errors import InputError


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had no Ray; other tests may have left one running."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.mark.parametrize(("value", "address"), [(None, ""), ("local", ""), ("auto", "auto"), ("h:1", "h:1")])
def test_address_of_a_running_cluster(value: str | None, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() == address


def test_ray_of_this_process_comes_first_and_is_left_running(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with cluster(ResourcesConfig()):
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()


def test_cluster_that_does_not_answer_is_told_at_once(unconnected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        start = time.monotonic()
        silence = pytest.raises(InputError, match=rf"RAY_ADDRESS={address}: no Ray cluster answers")
        with silence as raised, cluster(ResourcesConfig()):
            raise AssertionError("not to be reached")
    assert "unset RAY_ADDRESS" in str(raised.value)
    assert time.monotonic() - start < 30


def test_runs_through_ray_client_are_refused(unconnected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(InputError, match="ray job submit"), cluster(ResourcesConfig()):
        raise AssertionError("not to be reached")
