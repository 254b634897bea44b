"""The solvers on problems with known answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import golden
from magihuman.runtime.pipeline import denoise, schedulers


def exact_velocity(sample: Tensor, sigma: float, clean: Tensor) -> Tensor:
    """Of the straight path from this sample to a known clean one."""
    return (sample - clean) / sigma


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 32])
def test_unipc_follows_straight_paths_exactly(steps: int) -> None:
    levels = schedulers.sigmas(steps)
    solver, clean, sample = schedulers.UniPC(levels), torch.randn(20), torch.randn(20)
    for sigma in levels[:-1]:
        sample = solver.step(exact_velocity(sample, float(sigma), clean), sample)
    assert golden.error(sample, clean) <= 1e-5


@pytest.mark.parametrize("steps", [32, 64, 128])
def test_unipc_beats_first_order_on_a_curved_path(steps: int) -> None:
    """Gaussian data of variance s^2: the probability flow is known in closed form.

    x_sigma has variance (1 - sigma)^2 s^2 + sigma^2, and the flow scales a sample by the ratio of
    standard deviations. The last step, first order in both, is left out.
    """
    spread = 0.3

    def deviation(sigma: float) -> float:
        return float(((1 - sigma) ** 2 * spread**2 + sigma**2) ** 0.5)

    def velocity(sample: Tensor, sigma: float) -> Tensor:
        gain = (1 - sigma) * spread**2 / deviation(sigma) ** 2
        return (sample - gain * sample) / sigma

    levels = [float(s) for s in schedulers.sigmas(steps)][:-1]
    start = torch.randn(50, dtype=torch.float64)
    expected = start * deviation(levels[-1]) / deviation(levels[0])
    solver, high, low = schedulers.UniPC(schedulers.sigmas(steps)), start, start
    for now, then in itertools.pairwise(levels):
        high = solver.step(velocity(high, now), high)
        low = low + (then - now) * velocity(low, now)
    assert golden.error(high, expected) < 0.3 * golden.error(low, expected)


def test_renoising_lands_on_the_next_level() -> None:
    clean, noise, fresh = (torch.randn(1000) for _ in range(3))
    sigma, following = 0.8, 0.5
    sample = (1 - sigma) * clean + sigma * noise
    out = schedulers.renoise_step(sample, noise - clean, sigma, following, fresh)
    torch.testing.assert_close(out, (1 - following) * clean + following * fresh)


def test_distilled_loop_draws_video_first_and_keeps_given_audio() -> None:
    video, audio, image = (
        torch.randn(1, 48, 2, 2, 2),
        torch.randn(1, 5, 64),
        torch.randn(1, 48, 1, 2, 2),
    )
    drawn, seen = [], []

    def noise(like: Tensor) -> Tensor:
        drawn.append(like.shape)
        return torch.randn(like.shape)

    def velocity(v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((v, a))
        return torch.zeros_like(v), torch.ones_like(a)

    out, kept = denoise.distilled(
        velocity, video, audio, steps=3, noise=noise, image=image, keep_audio=True
    )
    assert drawn == [video.shape, audio.shape] * 3
    assert (kept == audio).all()
    assert all((v[:, :, :1] == image).all() and (a == audio).all() for v, a in seen)
    assert (out[:, :, :1] == image).all()
    assert (seen[0][0][:, :, 1:] == video[:, :, 1:]).all()


def test_guidance_switches_at_timestep_500() -> None:
    """Velocities that differ by one: what reaches the solver tells the scale."""
    scales = []

    class Recorder(schedulers.UniPC):
        def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
            scales.append(float(velocity.mean()))
            return sample

    original, schedulers.UniPC = schedulers.UniPC, Recorder
    try:
        denoise.guided(
            lambda v, a: (torch.ones_like(v), torch.ones_like(a)),
            lambda v, a: (torch.zeros_like(v), torch.zeros_like(a)),
            torch.zeros(1, 48, 1, 2, 2),
            torch.zeros(1, 1, 64),
            steps=32,
        )
    finally:
        schedulers.UniPC = original
    expected = [5.0 if time > 500 else 2.0 for time in schedulers.timesteps(32)]
    assert scales[::2] == expected
    assert scales[1::2] == [5.0] * 32
    assert 2.0 in expected
