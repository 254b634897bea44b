"""Sound: driving audio to latents, latents to a waveform."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import scipy.signal
import torch
from torch import Tensor

from magihuman.runtime import config
from magihuman.runtime.model import Oobleck
from magihuman.runtime.pipeline.finite import AUDIO_DECODER, check, largest

Waveform = npt.NDArray[np.float32]

WINDOW_S = 29  # longest stretch encoded at once
OVERLAP = 0.5
LATENT_SAMPLES = config.LATENT_AUDIO_RATE_HZ // config.FPS  # a latent for each video frame


def whole_frames(samples: Waveform) -> Waveform:
    """A driving voice with silence at its end, so that none of it is lost between latents.

    samples: mono at 51.2 kHz. A clip has 4 n + 1 frames, each as long as a latent of sound, and
    what is left over would be cut. At most 0.16 s are added.
    """
    latents = math.ceil(len(samples) / LATENT_SAMPLES)
    stride = config.VIDEO_STRIDE[0]
    latents = math.ceil((latents - 1) / stride) * stride + 1
    return np.pad(samples, (0, latents * LATENT_SAMPLES - len(samples)))


class AudioVAE:
    """The audio autoencoder, Oobleck, fed 51.2 kHz so that latents run at 25 Hz."""

    def __init__(self, model: Oobleck) -> None:
        self.model = model

    @torch.inference_mode()
    def encode(self, samples: Waveform, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """Mono samples at 51.2 kHz to latents [1, A, 64], sampled: mean + std * noise(mean).

        Above 29 s, in windows of 29 s, 725 latents, cross-faded over 362 of them. Each is 363 whole
        latents after the one before, so that it is placed where its sound is. The published code
        steps by half a window of sound, 362.5 latents, and lags half a latent more with each.
        """
        device = next(self.model.parameters()).device
        window = WINDOW_S * config.LATENT_AUDIO_RATE_HZ
        length = window // LATENT_SAMPLES
        step = (length - int(length * OVERLAP)) * LATENT_SAMPLES
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
        latents = math.ceil(len(wave) / LATENT_SAMPLES)
        return merge_overlapping(parts)[:, :latents]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Waveform:
        """Latents [1, A, 64] to float32 [samples, 2] at 44.1 kHz.

        Raises:
            NonFiniteError: the model made NaN or infinity.
        """
        wave = self.model.decode(latents.transpose(1, 2))[0].T
        magnitude = largest(wave)
        samples = wave.cpu().numpy()
        check(float(magnitude), AUDIO_DECODER, "decode_audio")  # it is there: the samples are
        return resample(samples)


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
