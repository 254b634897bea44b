"""What is captured, kept and given up, with capturing itself left out: that needs a GPU."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import golden
from magihuman.graphs.cuda_graphs import pool
from magihuman.graphs.cuda_graphs.pool import DRIVER_BYTES
from magihuman.graphs.transformer.options import ReplayOptions
from magihuman.graphs.transformer.replay import CompiledForward

CPU = torch.device("cpu")
SMALL, MIDDLE, LARGE = (24, 5, 64), (72, 9, 64), (240, 9, 64)


class Device:
    """Counts captures and says how large the pool is, 1000 bytes a token of the largest size."""

    def __init__(self) -> None:
        self.captured: list[tuple[int, int, int]] = []
        self.failures = 0

    def capture(self, counts: tuple[int, int, int]) -> Any:
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        self.captured.append(counts)
        return SimpleNamespace(report=counts)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(
        pool, "pool_bytes", lambda pool: 1000 * max(sum(counts) for counts in made.captured)
    )
    monkeypatch.setattr(
        CompiledForward, "_capture", lambda self, size: made.capture(size.modality_rows)
    )
    return made


def forward_of(budget_bytes: int, **options: Any) -> CompiledForward:
    model = golden.dit(local=False)
    given = ReplayOptions(budget_bytes=budget_bytes, **options)
    return CompiledForward(model, model.config, torch.bfloat16, CPU, given)


def test_sizes_are_kept_by_text_bucket_until_the_budget_is_full(device: Device) -> None:
    forward = forward_of(3 * DRIVER_BYTES)  # room for two with their inputs and the pool
    for counts in (MIDDLE, (*MIDDLE[:2], 1), SMALL, MIDDLE):
        forward.prepare(*counts)
    assert device.captured == [MIDDLE, SMALL]
    forward.prepare(*LARGE)  # grows the pool, and SMALL is the least recently used
    assert [size.modality_rows for size in forward.reports()] == [MIDDLE, LARGE]


def test_out_of_memory_gives_everything_else_up_once(device: Device) -> None:
    forward = forward_of(2**40)
    forward.prepare(*SMALL)
    device.failures = 1
    forward.prepare(*MIDDLE)
    assert [size.modality_rows for size in forward.reports()] == [MIDDLE]
    device.failures = 2
    with pytest.raises(torch.OutOfMemoryError, match=r"no room to capture 313 tokens.* 1 GiB"):
        forward.prepare(*LARGE)
    assert forward.reports() == {}
    forward.prepare(*LARGE)  # it stays usable


def test_everything_is_given_up_on_demand(device: Device) -> None:
    forward = forward_of(2**40)
    forward.prepare(*SMALL)
    forward.prepare(*MIDDLE)
    forward.release()
    assert forward.reports() == {}
    forward.prepare(*SMALL)
    assert device.captured == [SMALL, MIDDLE, SMALL]


def test_nothing_else_runs_while_a_size_is_captured(device: Device) -> None:
    lock, held = threading.Lock(), []
    forward = forward_of(2**40, capturing=lock)
    capture = device.capture
    device.capture = lambda counts: (held.append(lock.locked()), capture(counts))[1]
    forward.prepare(*SMALL)
    forward.prepare(*SMALL)
    assert held == [True] and not lock.locked()
    device.failures = 2
    with pytest.raises(torch.OutOfMemoryError):
        forward.prepare(*LARGE)
    assert not lock.locked()


def test_what_was_captured_is_kept_in_debug_only(device: Device) -> None:
    with pytest.raises(ValueError, match="debug=True"):
        forward_of(0).recorded(*SMALL)
