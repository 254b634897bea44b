"""Patch orders, which differ between input and output, and coordinates."""

from __future__ import annotations

import itertools

import pytest
import torch

from magihuman.kernels.reference import rope_table
from magihuman.runtime.model import tokens

LAYOUT = tokens.Layout(frames=3, rows=4, columns=6, audio=9, text=5)
GRID = list(itertools.product(range(3), range(2), range(3)))  # (frame, row, column) of each token


def test_layout_of_the_default_request() -> None:
    layout = tokens.Layout(frames=32, rows=16, columns=30, audio=126, text=300)
    assert layout.frame_tokens == 120
    assert layout.counts == (3840, 126, 300)
    assert layout.tokens == 4266


def test_input_patches_are_channel_row_column() -> None:
    latent = torch.randn(1, 48, 3, 4, 6)
    out = tokens.patchify(latent)
    assert out.shape == (LAYOUT.counts[0], 192)
    for token, (t, h, w) in enumerate(
        (t, h, w) for t in range(3) for h in range(2) for w in range(3)
    ):
        patch = latent[0, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]  # [C, row, column]
        assert (out[token] == patch.flatten()).all()


def test_output_patches_are_row_column_channel() -> None:
    flat = torch.randn(LAYOUT.counts[0], 192)
    latent = tokens.unpatchify(flat, LAYOUT)
    assert latent.shape == (1, 48, 3, 4, 6)
    for token, (t, h, w) in enumerate(
        (t, h, w) for t in range(3) for h in range(2) for w in range(3)
    ):
        patch = latent[0, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
        assert (flat[token] == patch.permute(1, 2, 0).flatten()).all()


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_coordinates(style: str) -> None:
    coords = tokens.coordinates(LAYOUT, style)
    video, audio, text = coords.split(LAYOUT.counts)
    assert coords.dtype == torch.float32
    assert video[7].tolist() == [1, 0, 1, 3, 2, 3, 3, 2, 3]  # token 7: frame 1, row 0, column 1
    reference = 3  # nine audio latents make three latent frames in either style
    assert audio[4].tolist() == [4, 0, 0, 9, 1, 1, reference, 1, 1]
    start, text_reference = (-5, 1) if style == "v2" else (0, 2)
    assert text[:, 0].tolist() == list(range(start, start + 5))
    assert text[2].tolist()[3:] == [5, 1, 1, text_reference, 1, 1]


def test_audio_reference_follows_the_audio_in_v2_and_the_video_in_v1() -> None:
    layout = tokens.Layout(frames=3, rows=2, columns=2, audio=17, text=1)
    first_audio = layout.counts[0]
    assert tokens.coordinates(layout, "v2")[first_audio, 6] == 5
    assert tokens.coordinates(layout, "v1")[first_audio, 6] == 3


@pytest.mark.parametrize("style", ["v1", "v2"])
@pytest.mark.parametrize("sizes", [(3, 4, 6, 9, 1), (1, 2, 2, 1, 1), (3, 4, 6, 1, 5)])
def test_one_token_alone_on_an_axis_has_a_place(style: str, sizes: tuple[int, ...]) -> None:
    """With v1 the text's reference size is 2: of one token, (2 - 1) / (1 - 1) is no scale."""
    layout = tokens.Layout(*sizes)
    table = rope_table(tokens.coordinates(layout, style), torch.tensor([1.0, 0.5]))
    assert table.isfinite().all()
    if style == "v1" and layout.text == 1:
        assert torch.equal(table[-1], torch.tensor([0.0] * 6 + [1.0] * 6))
