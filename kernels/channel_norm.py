"""The steps between two convolutions of the video decoder in one pass: bias, residual addition,
channel norm, activation, frames repeated in time, zeros around them.

Videos are [B, C, T, H, W] with a pixel's channels as one row of memory and pixels of a line one
after another, as in `channels_last_3d` or in a part of such a video. Each input is read once and
each output written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a program: four vectors of 16 bytes for each thread of its one warp
CHANNELS_LAST = torch.channels_last_3d


@triton.jit
def _channel_norm(
    x,
    delta,
    bias,
    out,
    shortcut,
    total,
    frames,
    height,
    width,
    x_clip,  # elements from one clip, frame or line to the next
    x_frame,
    x_line,
    delta_clip,
    delta_frame,
    delta_line,
    eps,
    shortcut_eps,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,  # power of two that covers C
    ROWS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BEFORE: tl.constexpr,  # whether the first frame is written twice
    AFTER: tl.constexpr,  # whether the last one is
    BORDER: tl.constexpr,  # pixels of zeros around a frame of the result
    SHORTCUT: tl.constexpr,
    KEEP: tl.constexpr,
):
    clip = (tl.program_id(1) // frames).to(tl.int64)
    frame = (tl.program_id(1) % frames).to(tl.int64)
    out_width = width + 2 * BORDER
    out_pixels = out_width * (height + 2 * BORDER)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    exists = (row < out_pixels) & (column < C)
    y = row // out_width - BORDER
    z = row % out_width - BORDER
    inside = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
    at = x + clip * x_clip + frame * x_frame + y * x_line + z * C + column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        at = delta + clip * delta_clip + frame * delta_frame + y * delta_line + z * C + column
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=column < C, other=0.0)
    dense = tl.program_id(1).to(tl.int64) * height * width * C + (y * width + z) * C + column
    if KEEP:
        tl.store(total + dense, value.to(total.dtype.element_ty), mask=inside)
    result = value
    if NORM:
        mean = tl.sum(value * value, axis=1)[:, None] / C
        result = value * tl.rsqrt(mean + eps)
        if SHORTCUT:
            other = value * tl.rsqrt(mean + shortcut_eps)
            tl.store(shortcut + dense, other.to(shortcut.dtype.element_ty), mask=inside)
    if ACTIVATION == "silu":
        result = result * tl.sigmoid(result)
    elif ACTIVATION == "relu":
        result = tl.maximum(result, 0.0)
    if BORDER > 0:
        result = tl.where(inside, result, 0.0)
    result = result.to(out.dtype.element_ty)
    frame_elements = out_pixels.to(tl.int64) * C
    first = out + clip * (frames + BEFORE + AFTER) * frame_elements + row * C + column
    at = first + (frame + BEFORE) * frame_elements
    tl.store(at, result, mask=exists)
    if frame < BEFORE:
        tl.store(first, result, mask=exists)
    if frame >= frames - AFTER:
        tl.store(at + frame_elements, result, mask=exists)


def channel_norm(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    border: int,
    shortcut_eps: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`reference.join_norm`.

    Args:
        x: [B, C, T, H, W], pixels of a line one after another.
        delta: like x, or None.
        bias: [C] fp32, or None.
        eps: of the norm, or None for no norm.
        activation: "silu", "relu" or "none".
        before, after: 1 to repeat the first or the last frame of the result.
        border: pixels of zeros around each frame of the result.
        shortcut_eps: of a second norm of the sum, without activation or padding; or None.
        keep: whether the sum itself is wanted.

    Returns:
        The result [B, C, T + before + after, H + 2 border, W + 2 border], the second norm and the
        sum, in x's dtype and `channels_last_3d`; sums and norms are fp32, rounded once.
    """
    batch, channels, frames, height, width = x.shape

    def empty(frames: int, border: int) -> Tensor:
        shape = (batch, channels, frames, height + 2 * border, width + 2 * border)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)

    out = empty(frames + before + after, border)
    shortcut = empty(frames, 0) if shortcut_eps is not None else None
    total = empty(frames, 0) if keep else None
    columns = triton.next_power_of_2(channels)
    rows = max(1, TILE // columns)
    grid = (triton.cdiv(out.shape[3] * out.shape[4], rows), batch * frames)
    _channel_norm[grid](
        x, delta, bias, out, shortcut, total, frames, height, width,
        *strides(x), *((0, 0, 0) if delta is None else strides(delta)),
        eps or 0.0, shortcut_eps or 0.0,
        C=channels,
        COLUMNS=columns,
        ROWS=rows,
        HAS_DELTA=delta is not None,
        HAS_BIAS=bias is not None,
        NORM=eps is not None,
        ACTIVATION=activation,
        BEFORE=before,
        AFTER=after,
        BORDER=border,
        SHORTCUT=shortcut is not None,
        KEEP=keep,
        num_warps=1,
    )  # fmt: skip
    return out, shortcut, total


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of clips, frames and lines, once pixels are known to be rows one after another."""
    clip, channel, frame, line, pixel = x.stride()
    _, channels, _, _, width = x.shape
    if (channels > 1 and channel != 1) or (width > 1 and pixel != channels):
        raise ValueError(
            f"a pixel's channels must be one row, and pixels follow each other, got strides"
            f" {x.stride()} of {tuple(x.shape)}; use channels_last_3d"
        )
    return clip, frame, line
