"""Latents to tokens and back, and the coordinates that place each token in time and space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from magihuman.runtime.config import LATENT_CHANNELS, PATCH, CoordinateStyle


@dataclass(frozen=True)
class Layout:
    """Sizes of one sequence: latent frames, rows and columns, audio latents, text tokens."""

    frames: int
    rows: int
    columns: int
    audio: int
    text: int

    @property
    def frame_tokens(self) -> int:
        """Video tokens of one latent frame."""
        return (self.rows // PATCH) * (self.columns // PATCH)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens of each modality, in sequence order."""
        return self.frames * self.frame_tokens, self.audio, self.text

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return sum(self.counts)


def patchify(latent: Tensor) -> Tensor:
    """[1, 48, T, H, W] -> [T H/2 W/2, 192], channels in input order (C, row, column)."""
    x = latent[0].unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [C, T, H', ph, W', pw]
    return x.permute(1, 2, 4, 0, 3, 5).reshape(-1, latent.shape[1] * PATCH * PATCH)


def unpatchify(tokens: Tensor, layout: Layout) -> Tensor:
    """[T H/2 W/2, 192] -> [1, 48, T, H, W], channels in output order (row, column, C)."""
    grid = (layout.frames, layout.rows // PATCH, layout.columns // PATCH)
    x = tokens.view(*grid, PATCH, PATCH, LATENT_CHANNELS)  # [T, H', W', ph, pw, C]
    return x.permute(5, 0, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[None].contiguous()


def coordinates(
    layout: Layout, style: CoordinateStyle, device: torch.device | None = None
) -> Tensor:
    """Coordinates of every token, [N, 9] fp32: (t, h, w), sizes (T, H, W), reference sizes.

    Base models use style "v2" (text comes before the clip and its scale is 0, so it is not
    rotated), the super-resolution models "v1".
    """
    frames = layout.frames
    grid = (frames, layout.rows // PATCH, layout.columns // PATCH)
    if style == "v2":
        audio_reference, text_reference, text_start = (layout.audio - 1) // 4 + 1, 1, -layout.text
    else:
        audio_reference, text_reference, text_start = frames, 2, 0
    return torch.cat(
        (
            _grid(grid, grid, 0, device),
            _grid((layout.audio, 1, 1), (audio_reference, 1, 1), 0, device),
            _grid((layout.text, 1, 1), (text_reference, 1, 1), text_start, device),
        )
    )


def _grid(
    size: tuple[int, int, int],
    reference: tuple[int, int, int],
    start: int,
    device: torch.device | None,
) -> Tensor:
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in size]
    axes[0] = axes[0] + start
    position = torch.cartesian_prod(*axes).view(-1, 3)
    sizes = torch.tensor((*size, *reference), dtype=torch.float32, device=device)
    return torch.cat((position, sizes.expand(len(position), -1)), dim=1)
