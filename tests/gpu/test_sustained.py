"""Energy counters of a real GPU."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from harness import measure, nvml, sustained


@pytest.fixture
def gpu() -> nvml.Gpu:
    gpu = nvml.Gpu(torch.device("cuda"))
    if gpu.why_not is not None or gpu.energy_j() is None:
        pytest.skip(f"needs an energy counter: {gpu.why_not}")
    return gpu


def test_a_busy_gpu_draws_power(gpu):
    """Less than any GPU may draw, and more than one at rest needs."""
    a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    run = measure.replay([lambda: a @ b] * 4, keeps_outputs=True)
    reading = sustained.sustained(run, gpu, calls=4, seconds=1.0)
    assert reading.watts is not None and 50 < reading.watts < 2000
    assert reading.mhz is not None and 100 < reading.mhz < 5000
    assert reading.throttle is not None
    assert reading.joules == pytest.approx(reading.watts * reading.ms / 1e3)
    before = gpu.energy_j()
    _, joules = sustained.after_rest(run, gpu, torch.device("cuda"), repeats=1)
    after = gpu.energy_j()
    assert joules is not None and 0 < joules <= after - before
