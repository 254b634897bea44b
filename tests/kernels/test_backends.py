"""Which attention kernels can run is a query that never launches one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from magihuman.kernels import attention_backends as backends

pytest.importorskip("triton")
from magihuman.kernels import measured

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_without_a_gpu_there_is_none() -> None:
    assert backends.usable(128, CPU) == []
    assert backends.why_not("gluon", 128, CPU) == "it needs a GPU"
    assert "there are gluon, triton, fa3, cudnn" in str(backends.why_not("flash", 128, CPU))
    with pytest.raises(RuntimeError, match="gluon: it needs a GPU; triton: it needs a GPU"):
        backends.fastest(10, 4, 2, 64, CPU)


@pytest.mark.parametrize(
    ("capability", "dim", "triton", "expected"),
    [
        ((9, 0), 128, "3.6.0", {"gluon": None, "triton": None, "cudnn": None}),
        ((9, 0), 96, "3.6.0", {"gluon": "32, 64 or 128", "triton": "not 96", "cudnn": None}),
        ((9, 0), 128, "3.7.1", {"gluon": "triton 3.6, whose Gluon changes", "triton": None}),
        ((10, 0), 128, "3.6.0", {"gluon": "sm_90, this GPU is sm_100", "triton": None}),
        ((8, 0), 128, "3.6.0", {"gluon": "sm_80", "triton": "sm_80", "cudnn": None}),
        ((7, 5), 128, "3.6.0", {"cudnn": "sm_80"}),
    ],
)
def test_reasons(
    capability: tuple[int, int],
    dim: int,
    triton: str,
    expected: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine is made up; the rules are the real ones."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    for name, reason in expected.items():
        found = backends.why_not(name, dim, GPU)
        assert found is None if reason is None else reason in str(found)
    assert "fa3-fwd is not installed" in str(backends.why_not("fa3", dim, GPU))


def test_measurements_are_kept_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"gpu": "one"}
    monkeypatch.setattr(measured, "machine_key", lambda device: dict(machine))
    kept = measured.Measurements(GPU, tmp_path)
    assert kept.get("a") is None
    kept.put("a", {"x": 1.5, "y": 2.0})
    kept.put("b", {"x": 3.0})
    assert measured.Measurements(GPU, tmp_path).get("a") == {"x": 1.5, "y": 2.0}
    machine["gpu"] = "two"
    assert measured.Measurements(GPU, tmp_path).get("a") is None
    machine["gpu"] = "one"
    (file,) = tmp_path.iterdir()
    file.write_text("{damaged")
    assert measured.Measurements(GPU, tmp_path).get("a") is None
    unwritable = measured.Measurements(GPU, file)  # a file where the folder should be
    unwritable.put("a", {"x": 1.0})
    assert unwritable.get("a") is None
