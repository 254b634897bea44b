"""Fixtures of the suites, and what their reports say of the machine.

A kernel's report has, beside the seconds that a caller waits, what the device alone takes and how
near that comes to the ceilings measured in the same session.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from harness import environment, measure, sizes

SETS = 3  # of inputs that a kernel's replays take in turn: more than the 50 MB that an H100 caches

Unit = Literal["bytes", "flops"]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What figures depend on, and nothing that names one computer or day: reports are compared."""
    cpu = machine_info["cpu"].get("brand_raw") or machine_info["machine"]
    facts = {key: value for key, value in environment.environment().items() if key != "date"}
    machine_info.clear()
    machine_info.update({"cpu": cpu, "cores": os.cpu_count(), "gpu": None, **facts})


@pytest.fixture(scope="session", params=list(sizes.SIZES))
def size(request: pytest.FixtureRequest) -> sizes.Size:
    """The size that this machine can run; benchmarks of the other one are skipped."""
    reason = sizes.why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    return sizes.SIZES[request.param]


@pytest.fixture(scope="session")
def ceilings(size: sizes.Size) -> dict[Unit, float]:
    """Bytes and FLOP a second that this GPU reaches; nothing on the CPU."""
    if size.device.type != "cuda":
        return {}
    return {"bytes": measure.copy_bandwidth(), "flops": measure.gemm_rate()}


@pytest.fixture
def time_kernel(benchmark: Any, size: sizes.Size, ceilings: dict[Unit, float]) -> Callable:
    """Benchmarks one kernel.

    `build()` returns a call over fresh inputs; `work` is what one call moves or computes; `shape`
    goes into the report.
    """

    def run(build: Callable[[], Callable], work: int, unit: Unit, **shape: int) -> None:
        info: dict[str, Any] = described(size, shape) | {unit: work}
        calls = [build() for _ in range(SETS if ceilings else 1)]
        if ceilings:
            info["device_ms"] = measure.replay_ms(calls)
            info |= rate(work, unit, info["device_ms"], ceilings)
        benchmark.extra_info.update(info)
        benchmark(measure.Timed(calls[0], size.device))

    return run


@pytest.fixture
def time_stage(benchmark: Any, size: sizes.Size, ceilings: dict[Unit, float]) -> Callable:
    """Benchmarks a part of a request: few rounds, each timed by device events too.

    `facts` go into the report, which is returned for more; `flops` among them are what one call
    computes.
    """

    def run(call: Callable[[], object], rounds: int = 3, **facts: Any) -> dict[str, Any]:
        timed = measure.Timed(call, size.device)
        with torch.inference_mode():
            benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
        layout = dataclasses.asdict(size.layout) | {"tokens": size.layout.tokens}
        info: dict[str, Any] = described(size, layout) | facts
        if ceilings:
            info["device_ms"] = statistics.median(timed.times_ms[-rounds:])
        if ceilings and "flops" in facts:
            info |= rate(facts["flops"], "flops", info["device_ms"], ceilings)
        benchmark.extra_info.update(info)
        return benchmark.extra_info

    return run


def described(size: sizes.Size, shape: dict[str, int]) -> dict[str, Any]:
    """What was measured."""
    return {"size": size.name, "device": size.device.type, "shape": shape}


def rate(work: int, unit: Unit, device_ms: float, ceilings: dict[Unit, float]) -> dict[str, float]:
    """Work a second, and beside it what this GPU reaches."""
    per_s = work / device_ms * 1e3
    return {
        f"{unit}_per_s": per_s,
        "ceiling_per_s": ceilings[unit],
        "of_ceiling": per_s / ceilings[unit],
    }
