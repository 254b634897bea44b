"""Energy counters, and what is made of their readings."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import nvml, sustained
from harness.sustained import Reading

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
UUID = "01234567-89ab-cdef-0123-456789abcdef"
NULL = 0x1234  # a handle

# -- NVML -------------------------------------------------------------------------------------


def c_function(*types: Any) -> Callable[[Callable[..., int]], Any]:
    """A function that C could call, of these arguments."""
    return lambda function: ctypes.CFUNCTYPE(ctypes.c_int, *types)(function)


def library(energy_mj: int = 81_500, reasons: int = 0x4 | 0x20, energy_code: int = 0) -> Any:
    """Stands in for the driver's library, which no machine without a GPU has."""
    handle, number = ctypes.c_void_p, ctypes.POINTER(ctypes.c_ulonglong)

    @c_function()
    def init() -> int:
        return 0

    @c_function(ctypes.c_char_p, ctypes.POINTER(handle))
    def by_uuid(uuid: bytes, found: Any) -> int:
        found[0] = NULL
        return 0 if uuid == f"GPU-{UUID}".encode() else 6

    @c_function(handle, number)
    def energy(device: int, value: Any) -> int:
        value[0] = energy_mj
        return energy_code if device == NULL else 2

    @c_function(handle, ctypes.c_uint, ctypes.POINTER(ctypes.c_uint))
    def clock(device: int, kind: int, value: Any) -> int:
        value[0] = {0: 1, 1: 1680, 2: 2619}[kind]
        return 0 if device == NULL else 2

    @c_function(handle, number)
    def throttle(device: int, value: Any) -> int:
        value[0] = reasons
        return 0 if device == NULL else 2

    return SimpleNamespace(
        nvmlInit_v2=init,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetCurrentClocksThrottleReasons=throttle,
    )


@pytest.fixture
def seen(monkeypatch) -> SimpleNamespace:
    """What CUDA says of the device."""
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


def readings(gpu: nvml.Gpu) -> list[Any]:
    return [gpu.energy_j(), gpu.sm_mhz(), gpu.throttle_reasons()]


def test_readings_in_joules_and_megahertz(seen):
    gpu = nvml.Gpu(CUDA, library())
    assert gpu.why_not is None
    assert readings(gpu) == [81.5, 1680, ["power cap", "thermal, by the driver"]]
    assert readings(nvml.Gpu(CUDA, library(reasons=0)))[2] == []


def test_the_cpu_has_no_energy_counter():
    gpu = nvml.Gpu(CPU)
    assert gpu.why_not == "NVML is about NVIDIA's GPUs, not about cpu"
    assert readings(gpu) == [None, None, None]


def test_without_the_library(seen, monkeypatch):
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-library.so.1")
    gpu = nvml.Gpu(CUDA)
    assert gpu.why_not is not None
    assert gpu.why_not.startswith("libno-such-library.so.1 cannot be loaded: ")
    assert readings(gpu) == [None, None, None]


def test_a_gpu_that_nvml_does_not_know(seen):
    seen.uuid = UUID[::-1]
    gpu = nvml.Gpu(CUDA, library())
    assert gpu.why_not == f"NVML answers 6 when asked for GPU-{UUID[::-1]}"
    assert readings(gpu) == [None, None, None]


def test_a_reading_that_a_gpu_does_not_have(seen):
    assert readings(nvml.Gpu(CUDA, library(energy_code=3)))[:2] == [None, 1680]
    older = library()
    del older.nvmlDeviceGetCurrentClocksThrottleReasons
    assert readings(nvml.Gpu(CUDA, older)) == [81.5, 1680, None]


# -- readings ---------------------------------------------------------------------------------


class Script:
    """A GPU that gives these readings, one after another."""

    def __init__(self, joules: list[float | None]) -> None:
        self._joules, self._clocks = iter(joules), iter([1600, 1700, 1500, 1600, 1600])
        self._reasons = iter([["power cap"], ["power cap"], [], ["power cap"], ["power cap"]])

    def energy_j(self) -> float | None:
        return next(self._joules)

    def sm_mhz(self) -> int:
        return next(self._clocks)

    def throttle_reasons(self) -> list[str]:
        return next(self._reasons)


def test_power_is_the_slope_between_movements_of_the_counter(monkeypatch):
    clock_s = iter([0.0, 0.1, 0.2, 0.3, 0.4])
    monkeypatch.setattr(sustained.time, "perf_counter", lambda: next(clock_s))
    samples = sustained.Samples(Script([5.0, 5.0, 50.0, 50.0, 190.0, 190.0]))
    for _ in range(5):
        samples.take()
    reading = samples.reading(2.0)
    # From 50 J at 0.1 s to 190 J at 0.3 s.
    assert reading.watts == pytest.approx(700)
    assert reading.joules == pytest.approx(1.4)
    assert reading.mhz == 1600
    assert reading.throttle == {"power cap": 0.8}


@pytest.mark.parametrize("joules", [[None] * 6, [5.0] * 6, [5.0, 5.0, 9.0, 9.0, 9.0, 9.0]])
def test_no_power_without_two_movements(joules):
    samples = sustained.Samples(Script(joules))
    for _ in range(5):
        samples.take()
    assert samples.reading(2.0).watts is None
    assert samples.reading(2.0).joules is None


def test_the_median_of_several_turns():
    turns = [
        Reading(3.0, 600.0, 1500.0, {"power cap": 1.0}),
        Reading(1.0, 700.0, None, {"power cap": 0.5, "thermal, by the driver": 0.2}),
        Reading(2.0, None, 1300.0, None),
    ]
    found = sustained.typical(turns)
    assert (found.ms, found.watts, found.mhz) == (2.0, 650.0, 1400.0)
    assert found.throttle == {"power cap": 0.75, "thermal, by the driver": 0.1}
    assert sustained.typical([Reading(1.0)]) == Reading(1.0)
