from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sounds import sine

from magihuman.runtime import config
from magihuman.runtime.model.oobleck import OobleckConfig
from magihuman.runtime.pipeline.audio import (
    AudioVAE,
    merge_overlapping,
    resample,
    whole_frames,
)
from magihuman.runtime.weights import random_weights

RATE = config.LATENT_AUDIO_RATE_HZ
LATENT = 2048  # samples
WINDOW = 29 * RATE  # 725 latents
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> AudioVAE:
    """The published strides one channel wide, so that a minute of sound encodes in a second."""
    return AudioVAE(random_weights.audio_vae(OobleckConfig(channels=1), 0, CPU))


# -- the autoencoder --------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [5 * LATENT, 5 * LATENT + 2047, WINDOW])
def test_one_window_has_whole_latents(vae, samples):
    assert vae.encode(sine(RATE, samples / RATE), torch.zeros_like).shape == (
        1,
        samples // LATENT,
        64,
    )


@pytest.mark.parametrize("samples", [WINDOW + 1, 45 * RATE + 777, 60 * RATE])
def test_windows_cover_the_sound(vae, samples):
    wave = np.random.default_rng(0).normal(0, 0.3, samples).astype(np.float32)
    latents = vae.encode(wave, torch.zeros_like)
    assert latents.shape == (1, math.ceil(samples / LATENT), 64)
    # Up to where the second window starts, half a window in, the first one is heard alone.
    first = vae.encode(wave[:WINDOW], torch.zeros_like)
    assert torch.equal(latents[:, :363], first[:, :363])
    # From the first window's end to the third's start the second is heard alone. Its sound starts
    # at latent 363, where it is placed.
    second = np.zeros(WINDOW, np.float32)
    part = wave[363 * LATENT : 363 * LATENT + WINDOW]
    second[: len(part)] = part
    expected = vae.encode(second, torch.zeros_like)[:, 362:363]
    assert torch.equal(latents[:, 725:726], expected)


def test_a_long_sound_stays_in_step(vae):
    """A minute in windows is what it is at once, but for where a window begins or ends."""
    wave = np.random.default_rng(0).normal(0, 0.3, 60 * RATE).astype(np.float32)
    latents = vae.encode(wave, torch.zeros_like)
    at_once, _ = vae.model.encode(torch.from_numpy(wave).expand(1, 2, -1))
    apart = (latents - at_once.transpose(1, 2)).abs().amax(dim=(0, 2))
    # An end of a window is felt some ten latents into it. Half a latent of lag is as far off as
    # another sound, 0.01 by this model's small weights; sums of floats in another order are not.
    edges = torch.tensor([1500, *(at + side for at in range(0, 1500, 363) for side in (0, 725))])
    inner = (torch.arange(len(apart))[:, None] - edges).abs().amin(dim=1) > 10
    assert inner.sum() > 1200
    assert apart[inner].max() < 1e-5
    shifted = (latents[:, 1:] - at_once.transpose(1, 2)[:, :-1]).abs().amax(dim=(0, 2))
    assert shifted.median() > 5e-3


@pytest.mark.parametrize(
    ("samples", "latents"),
    [
        (1, 1),
        (LATENT, 1),
        (LATENT + 1, 5),
        (5 * LATENT, 5),
        (5 * LATENT + 1, 9),
        (4 * RATE, 101),
        (5 * RATE, 125),
        (60 * RATE, 1501),
    ],
)
def test_a_voice_is_given_whole_frames(samples, latents):
    voice = np.arange(1, samples + 1, dtype=np.float32)
    whole = whole_frames(voice)
    assert whole.dtype == np.float32 and len(whole) == latents * LATENT
    assert np.array_equal(whole[:samples], voice) and not whole[samples:].any()
    # As many frames as the sound is long, none of which is cut.
    assert config.video_frames(config.latent_frames(latents)) == latents


def test_latents_are_sampled_from_mean_and_deviation(vae):
    wave = sine(RATE, 0.4)
    mean, std = vae.model.encode(torch.from_numpy(wave).expand(1, 2, -1))
    latents = vae.encode(wave, lambda like: torch.full_like(like, 2.0))
    assert std.min() > 0
    assert torch.equal(latents, (mean + 2 * std).transpose(1, 2))


def test_windows_are_cross_faded_linearly():
    # Window k holds the constant k, so that the result is a staircase with ramps: windows of 7
    # start every 4 latents and overlap by 3.
    parts = [torch.full((1, 7, 2), float(k)) for k in range(4)]
    expected = []
    for position in range(3 * 4 + 7):
        k, i = min(position // 4, 3), position - 4 * min(position // 4, 3)
        expected.append(k - 1 + i / 3 if k > 0 and i < 3 else k)
    merged = merge_overlapping(parts)
    assert merged.shape == (1, 19, 2)
    # Values up to 3 in fp32 carry roundings of 2.4e-7 each.
    torch.testing.assert_close(merged[0, :, 0], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("latents", [1, 6, 26])
def test_decoding_gives_stereo_at_44100_hz(vae, latents):
    wave = vae.decode(torch.randn(1, latents, 64, generator=torch.Generator().manual_seed(0)))
    assert wave.dtype == np.float32
    assert wave.shape == (int(latents * LATENT * 441 / 512), 2)
    assert np.isfinite(wave).all() and wave.std() > 0


def test_resampling_keeps_pitch_and_level():
    wave = np.stack([sine(RATE, 1.0, 440.0), sine(RATE, 1.0, 1000.0)], axis=1)
    out = resample(wave)
    assert out.shape == (44100, 2) and out.dtype == np.float32
    # Both frequencies are whole in one second, so FFT resampling is exact up to fp32 roundings.
    expected = np.stack([sine(44100, 1.0, 440.0), sine(44100, 1.0, 1000.0)], axis=1)
    assert np.abs(out - expected).max() < 1e-5
