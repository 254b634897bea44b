"""Sound: driving audio to latents, latents to a waveform."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import scipy.signal
import torch
from torch import Tensor

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.media import read_audio
from magihuman.runtime.model import Oobleck

Waveform = npt.NDArray[np.float32]

WINDOW_S = 29  # longest stretch encoded at once
OVERLAP = 0.5
MIN_DRIVING_S = 0.2
MAX_DRIVING_S = 3600.0


def open_driving_audio(
    path: str | os.PathLike[str],
    seconds: float,
    *,
    limit_s: float = MAX_DRIVING_S,
    formats: Sequence[str] | None = None,
) -> tuple[Waveform, str | None]:
    """Mono samples at 51.2 kHz, cut to `seconds`, and a note where lengths differ.

    Any sample rate, mono or stereo. limit_s, formats: see `read_audio`. Raises
    `InvalidRequestError` for what cannot be decoded or is shorter than 0.2 s.
    """
    rate = config.LATENT_AUDIO_RATE_HZ
    samples = read_audio(path, rate, limit_s, formats)
    duration_s = len(samples) / rate
    if duration_s < MIN_DRIVING_S:
        raise InvalidRequestError(
            f"audio must be at least {MIN_DRIVING_S:g} s long, got {duration_s:.3f} s in"
            f" {os.fspath(path)}"
        )
    wanted = int(round(seconds * rate, 6))
    if len(samples) > wanted:
        note = f"the audio is {duration_s:.2f} s long and is cut to the {seconds:g} s asked for"
    elif wanted - len(samples) >= rate // config.FPS:
        note = (
            f"the clip is as long as its audio: {duration_s:.2f} s, not the {seconds:g} s asked for"
        )
    else:
        note = None
    return samples[:wanted], note


class AudioVAE:
    """The audio autoencoder, Oobleck, fed 51.2 kHz so that latents run at 25 Hz."""

    def __init__(self, model: Oobleck) -> None:
        self.model = model

    @torch.inference_mode()
    def encode(self, samples: Waveform, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """Mono samples at 51.2 kHz to latents [1, A, 64], sampled: mean + std * noise(mean).

        Above 29 s, in windows of 29 s with 50 % overlap, cross-faded.
        """
        device = next(self.model.parameters()).device
        window = WINDOW_S * config.LATENT_AUDIO_RATE_HZ
        step = int(window * (1 - OVERLAP))
        wave = torch.from_numpy(np.array(samples, dtype=np.float32)).to(device)

        def encode(part: Tensor) -> Tensor:
            mean, std = self.model.encode(part.expand(1, self.model.config.audio_channels, -1))
            return (mean + std * noise(mean)).transpose(1, 2)

        if len(wave) <= window:
            return encode(wave)
        parts = []
        for start in range(0, len(wave), step):
            part = wave[start : start + window]
            parts.append(encode(torch.nn.functional.pad(part, (0, window - len(part)))))
            if start + window >= len(wave):
                break
        latents = math.ceil(len(wave) * parts[0].shape[1] / window)
        return merge_overlapping(parts)[:, :latents]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Waveform:
        """Latents [1, A, 64] to float32 [samples, 2] at 44.1 kHz."""
        wave = self.model.decode(latents.transpose(1, 2))[0].T
        return resample(wave.cpu().numpy())


def resample(wave: Waveform) -> Waveform:
    """51.2 kHz to 44.1 kHz by FFT: [samples, channels] to [int(samples * 441 / 512), channels]."""
    length = int(len(wave) * (441 / 512))
    return np.asarray(scipy.signal.resample(wave, length), dtype=np.float32)


def merge_overlapping(parts: list[Tensor]) -> Tensor:
    """Join windows [1, n, C], each half over the one before, cross-faded linearly: [1, N, C]."""
    length = parts[0].shape[1]
    overlap = int(length * OVERLAP)
    fade = torch.arange(overlap, device=parts[0].device, dtype=parts[0].dtype) / overlap
    fade = fade[None, :, None]
    merged = parts[0]
    for part in parts[1:]:
        blend = (1 - fade) * merged[:, -overlap:] + fade * part[:, :overlap]
        merged = torch.cat((merged[:, :-overlap], blend, part[:, overlap:]), dim=1)
    return merged
