"""The video decoder's movements of frames: repeated pixels before a convolution, pixels out.

Videos are [B, C, T, H, W] in `channels_last_3d`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.channel_norm import CHANNELS_LAST, TILE, frames_together

BLOCK = 512  # bytes or values of a program of `pixels`


@triton.jit
def _upsample(
    x,
    delta,
    bias,
    out,
    frames,  # that leave
    pixels,
    width,
    x_batch,
    delta_batch,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,  # frames side by side in the channels of one
    DROP: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    clip = tl.program_id(1) // frames
    frame = tl.program_id(1) % frames + DROP
    part = frame % PARTS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < pixels) & (column < C)
    source = ((frame // PARTS).to(tl.int64) * pixels + row) * (PARTS * C) + part * C + column
    value = tl.load(x + clip.to(tl.int64) * x_batch + source, mask=mask, other=0.0)
    if HAS_DELTA or HAS_BIAS:
        wide = value.to(tl.float32)
        if HAS_DELTA:
            at = delta + clip.to(tl.int64) * delta_batch + source
            wide += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            wide += tl.load(bias + part * C + column, mask=column < C, other=0.0)
        value = wide.to(x.dtype.element_ty)
    corner = (row // width) * (4 * width) + row % width * 2
    at = out + (tl.program_id(1).to(tl.int64) * (4 * pixels) + corner) * C + column
    tl.store(at, value, mask=mask)
    tl.store(at + C, value, mask=mask)
    tl.store(at + 2 * width * C, value, mask=mask)
    tl.store(at + (2 * width + 1) * C, value, mask=mask)


def upsample(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, in_time: bool, drop: int
) -> Tensor:
    """`reference.join_upsample`: [B, C, T, H, W] -> [B, C, T', 2 H, 2 W].

    Args:
        x: in `channels_last_3d`; of 2 C channels where `in_time`, which become two frames.
        delta: like x, added first; or None.
        bias: [C] or [2 C] fp32, added too; or None.
        in_time: whether channels become frames.
        drop: frames left out at the start.
    """
    batch, channels, frames, height, width = x.shape
    parts = 2 if in_time else 1
    channels, frames = channels // parts, parts * frames - drop
    shape = (batch, channels, frames, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    columns = triton.next_power_of_2(channels)
    rows = max(1, TILE // columns)
    _upsample[(triton.cdiv(height * width, rows), batch * frames)](
        frames_together(x), None if delta is None else frames_together(delta), bias, out,
        frames, height * width, width, x.stride(0), 0 if delta is None else delta.stride(0),
        C=channels,
        COLUMNS=columns,
        ROWS=rows,
        PARTS=parts,
        DROP=drop,
        HAS_DELTA=delta is not None,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _pixels(
    x,
    bias,
    out,
    frames,
    height,  # of x
    width,
    x_batch,
    CHANNELS: tl.constexpr,  # of x, those beyond the picture's included
    COLORS: tl.constexpr,
    PATCH: tl.constexpr,
    TO_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(1)
    frame, y = line // (height * PATCH), line % (height * PATCH)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width * PATCH * COLORS
    color = at % COLORS
    column = at // COLORS
    channel = (color * PATCH + column % PATCH) * PATCH + y % PATCH
    pixel = (frame % frames * height + y // PATCH).to(tl.int64) * width + column // PATCH
    source = (frame // frames).to(tl.int64) * x_batch + pixel * CHANNELS + channel
    value = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=mask, other=0.0)
    if TO_BYTES:
        value = tl.minimum(tl.maximum(value * 0.5 + 0.5, 0.0), 1.0) * 255.0
    target = out + line.to(tl.int64) * (width * PATCH * COLORS) + at
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)


def pixels(x: Tensor, bias: Tensor, colors: int, patch: int, dtype: torch.dtype) -> Tensor:
    """`reference.join_pixels`.

    Args:
        x: [B, colors patch^2 or more, T, H, W] in `channels_last_3d`; channels beyond are ignored.
        bias: of as many channels as x, fp32.
        colors: of a pixel.
        patch: pixels of a side of what a pixel of x becomes.
        dtype: uint8, or a float dtype for values as they are.

    Returns:
        [B, T, patch H, patch W, colors] contiguous.
    """
    batch, channels, frames, height, width = x.shape
    shape = (batch, frames, patch * height, patch * width, colors)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    grid = (triton.cdiv(patch * width * colors, BLOCK), batch * frames * height * patch)
    _pixels[grid](
        frames_together(x), bias, out, frames, height, width, x.stride(0),
        CHANNELS=channels,
        COLORS=colors,
        PATCH=patch,
        TO_BYTES=dtype == torch.uint8,
        BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out
