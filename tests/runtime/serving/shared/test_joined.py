"""A Ray cluster that is not there, and figures of engines elsewhere."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter

from magihuman.runtime import DeviceError, InvalidRequestError
from magihuman.runtime.serving.messages import Figures
from magihuman.runtime.serving.metrics import EngineFigures

pytest.importorskip("ray", reason="the extra [serve] is not installed")


def test_a_cluster_that_is_not_there(free_port, monkeypatch):
    """At once: Ray itself would try for many minutes, and could not be told to stop."""
    from magihuman.runtime.serving.cluster.local import joined

    port = free_port()
    with pytest.raises(DeviceError, match=f"127.0.0.1:{port} cannot be reached"):
        joined(f"127.0.0.1:{port}").__enter__()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(DeviceError, match=f"127.0.0.1:{port} cannot be reached"):
        joined("auto").__enter__()


@pytest.mark.parametrize("address", ["", "head", "ray://head:10001", ":6379", "head:x"])
def test_what_is_no_address_of_a_cluster(address):
    from magihuman.runtime.serving.cluster.local import joined

    with pytest.raises(InvalidRequestError, match="must be auto, or HOST:PORT of its head"):
        joined(address).__enter__()


def figures(engine: str, count: int, order: int) -> Figures:
    registry = CollectorRegistry()
    Counter("done", "Done.", registry=registry).inc(count)
    return Figures(engine, 1, order, list(registry.collect()), node="another")


def test_engines_elsewhere_count_once_and_until_nothing_is_heard(monkeypatch):
    sums = EngineFigures()
    sums.note(figures("a", 3, 0))
    sums.note(figures("b", 4, 0))
    assert "done_total 7.0" in sums.text().decode()
    sums.note(figures("a", 5, 1))
    assert "done_total 9.0" in sums.text().decode()
    monkeypatch.setattr("magihuman.runtime.serving.metrics.SILENT_S", -1.0)
    for _ in range(3):
        assert "done_total 9.0" in sums.text().decode()
    sums.note(figures("a", 6, 2))
    assert "done_total 9.0" in sums.text().decode()
