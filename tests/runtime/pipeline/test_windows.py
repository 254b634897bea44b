"""Which windows a clip of any length is decoded in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from magihuman.runtime.config import TurboVAEConfig, video_frames
from magihuman.runtime.model.turbo_vae import decode_windows, plan_windows, window_kinds
from magihuman.runtime.weights import random_weights, tiny

CONFIG = TurboVAEConfig()


def stamped(z: Tensor, is_first: bool) -> Tensor:
    """Frames that carry the latent they came from: four each, one of a clip's first."""
    frames = z[:, :1].repeat_interleave(CONFIG.temporal_compression_ratio, dim=2)
    return frames[:, :, 3:] if is_first else frames


@pytest.mark.parametrize("latents", range(1, 60))
def test_every_frame_of_a_clip_comes_from_its_own_latent_once(latents):
    z = torch.arange(latents).view(1, 1, -1, 1, 1).float()
    frames = torch.cat(list(decode_windows(stamped, z, CONFIG)), dim=2).flatten()
    wanted = torch.arange(latents).repeat_interleave(4)[3:]
    assert len(frames) == video_frames(latents)
    torch.testing.assert_close(frames, wanted.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("latents", "sizes"),
    [
        (1, [7]),
        (7, [7]),
        (8, [8, 8]),
        (14, [8, 8]),
        (15, [8, 9, 8]),
        (32, [8, 9, 9, 9, 8]),  # 5 s
    ],
)
def test_windows_have_one_latent_of_context_on_each_inner_side(latents, sizes):
    windows = plan_windows(latents, CONFIG)
    assert [window.latents for window in windows] == sizes
    assert [window.is_first for window in windows] == [True] + [False] * (len(sizes) - 1)


def test_a_window_is_decoded_when_it_is_asked_for():
    calls = []

    def decode(z: Tensor, is_first: bool) -> Tensor:
        calls.append(is_first)
        return stamped(z, is_first)

    windows = decode_windows(decode, torch.zeros(1, 1, 32, 1, 1), CONFIG)
    next(windows)
    next(windows)
    assert calls == [True, False]


def test_clips_of_any_length_are_made_of_four_kinds_of_windows():
    def looks(window):
        return window.latents, window.skip, window.is_first

    kinds = window_kinds(CONFIG)
    assert {name: looks(window) for name, window in kinds.items()} == {
        "single": (7, 0, True),
        "first": (8, 0, True),
        "middle": (9, 4, False),
        "last": (8, 4, False),
    }
    used = {looks(window) for n in range(1, 400) for window in plan_windows(n, CONFIG)}
    assert used == {looks(window) for window in kinds.values()}


def test_a_compiled_decoder_may_stand_in():
    """What torch.compile makes of a module has no truth value."""

    class Compiled:
        def __len__(self) -> int:
            raise TypeError("does not support len()")

        def __call__(self, z: Tensor, is_first: bool) -> Tensor:
            return stamped(z, is_first)

    vae = random_weights.turbo_vae(tiny.TURBO_VAE, 0, torch.device("cpu"), torch.float32)
    frames = torch.cat(list(vae.windows(torch.zeros(1, 48, 15, 1, 1), Compiled())), dim=2)
    assert frames.shape[2] == video_frames(15)
