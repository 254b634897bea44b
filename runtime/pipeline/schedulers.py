"""Noise schedules and solvers of the flow-matching models.

Flow matching (arXiv 2210.02747) along straight paths: x_sigma = (1 - sigma) x0 + sigma noise. The
model predicts the velocity v = noise - x0, so x0 = x_sigma - sigma v.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TRAIN_STEPS = 1000
SHIFT = 5.0


def sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """Noise levels, [steps + 1] fp32 on the CPU, from nearly 1 down to 0.

    `linspace(1 - 1/1000, 0, steps + 1)` without its end, shifted once by `s -> shift s / (1 +
    (shift - 1) s)`, then 0.
    """
    return torch.from_numpy(np.append(_levels(steps, shift), 0.0).astype(np.float32))


def timesteps(steps: int, shift: float = SHIFT) -> list[int]:
    """The time of each step, `sigma * 1000` truncated; guidance switches on it."""
    return [int(level) for level in _levels(steps, shift) * TRAIN_STEPS]


def _levels(steps: int, shift: float) -> NDArray[np.float64]:
    sigma_max = float(np.float32(1.0 - np.linspace(1, 1 / TRAIN_STEPS, TRAIN_STEPS)[-1]))
    level = np.linspace(sigma_max, 0.0, steps + 1)[:-1]
    shifted: NDArray[np.float64] = shift * level / (1 + (shift - 1) * level)
    return shifted


def zero_snr_table() -> Tensor:
    """Square roots of the zero-terminal-SNR schedule's alphas, [1000] fp32, clean to noise.

    Scaled-linear betas 0.00085 to 0.012, shifted and scaled so that the last entry is 0 (arXiv
    2305.08891, alg. 1).
    """
    roots = torch.linspace(
        0.00085**0.5, 0.0120**0.5, TRAIN_STEPS, dtype=torch.float64, device="cpu"
    )
    betas = roots**2
    root = (1 - betas).cumprod(0).float().sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return (root - last) * (first / (first - last))


def renoise_step(
    sample: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor
) -> Tensor:
    """One step of the distilled sampler: predict x0, then noise it afresh to the next level.

    sample, velocity, noise: fp32 of one shape. sigma, sigma_next: noise levels, 1 to 0.
    """
    clean = sample - sigma * velocity
    return sigma_next * noise + (1 - sigma_next) * clean


class UniPC:
    """UniPC solver, order 2, B2(h), predicting x0 (arXiv 2302.04867), for one stream.

    Each `step` first corrects the sample with the new model output, then predicts the next one.
    All coefficients are Python floats, so a step is a handful of fused multiply-adds on the device.
    """

    def __init__(self, levels: Tensor) -> None:
        """Start at the first of `levels`: [steps + 1] noise levels, decreasing, ending in 0."""
        self._sigma = [float(s) for s in levels]
        self._outputs: list[Tensor] = []  # x0 predictions, latest last, at most two
        self._sample: Tensor | None = None  # the corrected sample of the previous step
        self._order = 0
        self._index = 0

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next noise level. velocity, sample: same shape, fp32."""
        i = self._index
        clean = sample - self._sigma[i] * velocity
        if self._sample is not None:
            sample = self._correct(clean)
        self._outputs = [*self._outputs[-1:], clean]
        self._order = min(2, len(self._sigma) - 1 - i, i + 1)
        self._sample = sample
        self._index += 1
        return self._predict(sample)

    def _log_snr(self, i: int) -> float:
        sigma = self._sigma[i]
        return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)

    def _terms(self, i: int) -> tuple[float, float, float, float]:
        """What the formulas have of the move from level i to i + 1.

        Returns:
            h, by which log(alpha / sigma) rises; the ratio of the two sigmas; alpha (e^-h - 1),
            with alpha = 1 - sigma of the next level; and r of the step before, 0 for the first.
        """
        now, then = self._log_snr(i), self._log_snr(i + 1)
        h = then - now
        ratio = self._sigma[i + 1] / self._sigma[i]
        weight = (1 - self._sigma[i + 1]) * math.expm1(-h)
        before = (self._log_snr(i - 1) - now) / h if i > 0 else 0.0
        return h, ratio, weight, before

    def _predict(self, sample: Tensor) -> Tensor:
        _, ratio, weight, before = self._terms(self._index - 1)
        latest = self._outputs[-1]
        out = ratio * sample - weight * latest
        if self._order == 2:
            out = out - (weight * 0.5 / before) * (self._outputs[-2] - latest)
        return out

    def _correct(self, clean: Tensor) -> Tensor:
        assert self._sample is not None
        h, ratio, weight, before = self._terms(self._index - 1)
        latest = self._outputs[-1]
        out = ratio * self._sample - weight * latest
        if self._order == 1:
            return out - (weight * 0.5) * (clean - latest)
        # Order 2: rho solves [[1, 1], [r, 1]] rho = b, with b from the phi functions of -h.
        phi1 = math.expm1(-h)
        phi2 = phi1 / -h - 1
        phi3 = phi2 / -h - 0.5
        b1, b2 = phi2 / phi1, 2 * phi3 / phi1
        rho_before = (b2 - b1) / (before - 1)
        rho_now = b1 - rho_before
        return (
            out
            - (weight * rho_before / before) * (self._outputs[-2] - latest)
            - (weight * rho_now) * (clean - latest)
        )
