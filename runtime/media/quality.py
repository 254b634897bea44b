"""How far two clips are apart: frames in PSNR and SSIM, sound in SNR."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Frames = npt.NDArray[np.uint8]  # [T, H, W, 3]

PEAK = 255.0
WINDOW_PX = 8
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def psnr_db(frames: Frames, expected: Frames) -> float:
    """Peak signal-to-noise ratio in dB, `10 log10(255^2 / mean squared difference)`.

    frames, expected: uint8 [T, H, W, 3]; the mean is over all frames. Equal ones are inf apart.
    """
    pairs = zip(frames, expected, strict=True)
    squares = [float(np.square(a.astype(np.float32) - b).mean()) for a, b in pairs]
    return _db(PEAK**2, float(np.mean(squares)))


def ssim(frames: Frames, expected: Frames) -> float:
    """Mean structural similarity of the luma of uint8 frames [T, H, W, 3], 1 for equal ones.

    Wang, Bovik, Sheikh and Simoncelli, Image Quality Assessment (2004), equation 13, with K1 =
    0.01, K2 = 0.03 and uniform windows of 8x8 pixels, one at every pixel.
    """
    return float(np.mean([_ssim(a, b) for a, b in zip(frames, expected, strict=True)]))


def _ssim(frame: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> float:
    x, y = _luma(frame), _luma(expected)
    mean_x, mean_y = _mean(x), _mean(y)
    variance_x = _mean(x * x) - mean_x * mean_x
    variance_y = _mean(y * y) - mean_y * mean_y
    covariance = _mean(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    likeness *= (2 * covariance + C2) / (variance_x + variance_y + C2)
    return float(likeness.mean())


def _luma(frame: npt.NDArray[np.uint8]) -> Tensor:
    import torch  # here: whoever only reads files does without

    # fp64: variances are differences of squares.
    return torch.from_numpy(frame.astype(np.float64) @ np.array(LUMA))[None, None]


def _mean(x: Tensor) -> Tensor:
    from torch.nn.functional import avg_pool2d

    return avg_pool2d(x, WINDOW_PX, stride=1)


def snr_db(wave: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Signal-to-noise ratio in dB, `10 log10(sum expected^2 / sum (wave - expected)^2)`.

    wave, expected: float32 of one shape. Equal sounds are inf apart.
    """
    noise = np.square(wave.astype(np.float64) - expected).sum()
    return _db(float(np.square(expected.astype(np.float64)).sum()), float(noise))


def _db(power: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf
