"""The Oobleck autoencoder of stable-audio-open (arXiv 2404.10301), under its layer numbers.

Published weights carry weight norm; `checkpoint.load_audio_vae` folds it, so the convolutions here
are plain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DILATIONS = (1, 3, 9)
F32 = torch.float32


@dataclass(frozen=True)
class OobleckConfig:
    """Sizes, as in `model_config.json`; the defaults are stable-audio-open-1.0's."""

    channels: int = 128
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    strides: tuple[int, ...] = (2, 4, 4, 8, 8)
    latent_channels: int = 64
    audio_channels: int = 2

    @property
    def samples_per_latent(self) -> int:
        """Product of the strides."""
        return math.prod(self.strides)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level, outermost first."""
        return tuple(self.channels * multiple for multiple in (1, *self.multiples))


class Snake(nn.Module):
    """`x + sin(exp(alpha) x)^2 / exp(beta)` per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels, dtype=F32))
        self.beta = nn.Parameter(torch.zeros(channels, dtype=F32))

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + (alpha * x).sin().square() / (beta + 1e-9)


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, snake, pointwise convolution, plus the input."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Snake(channels),
            nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation, dtype=F32),
            Snake(channels),
            nn.Conv1d(channels, channels, 1, dtype=F32),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out


class Stage(nn.Module):
    """One level: residual units and a strided convolution, down or up."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def _encoder(config: OobleckConfig) -> Stage:
    widths = config.widths
    layers: list[nn.Module] = [nn.Conv1d(config.audio_channels, widths[0], 7, padding=3, dtype=F32)]
    for width, out, stride in zip(widths, widths[1:], config.strides, strict=False):
        down = nn.Conv1d(width, out, 2 * stride, stride, (stride + 1) // 2, dtype=F32)
        units = [ResidualUnit(width, dilation) for dilation in DILATIONS]
        layers.append(Stage(*units, Snake(width), down))
    layers += [
        Snake(widths[-1]),
        nn.Conv1d(widths[-1], 2 * config.latent_channels, 3, padding=1, dtype=F32),
    ]
    return Stage(*layers)


def _decoder(config: OobleckConfig) -> Stage:
    widths = config.widths[::-1]
    layers: list[nn.Module] = [
        nn.Conv1d(config.latent_channels, widths[0], 7, padding=3, dtype=F32)
    ]
    for width, out, stride in zip(widths, widths[1:], config.strides[::-1], strict=False):
        up = nn.ConvTranspose1d(width, out, 2 * stride, stride, (stride + 1) // 2, dtype=F32)
        units = [ResidualUnit(out, dilation) for dilation in DILATIONS]
        layers.append(Stage(Snake(width), up, *units))
    layers += [
        Snake(widths[-1]),
        nn.Conv1d(widths[-1], config.audio_channels, 7, padding=3, bias=False, dtype=F32),
    ]
    return Stage(*layers)


class Oobleck(nn.Module):
    """Waveform [B, 2, samples] to latent [B, 64, samples / 2048] and back, fp32."""

    def __init__(self, config: OobleckConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)

    def encode(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of a waveform [B, 2, samples].

        Each is [B, 64, samples // 2048].
        """
        mean, scale = self.encoder(wave).chunk(2, dim=1)
        return mean, F.softplus(scale) + 1e-4

    def decode(self, latent: Tensor) -> Tensor:
        """Latents [B, 64, A] to a waveform [B, 2, 2048 A], about [-1, 1]."""
        out: Tensor = self.decoder(latent)
        return out
