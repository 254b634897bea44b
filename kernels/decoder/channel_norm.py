"""The steps between two convolutions of the video decoder in one pass: bias, residual addition,
channel norm, activation, frames repeated in time.

Videos are [B, C, T, H, W] with a pixel's channels as one row of memory and pixels of a line one
after another, as in `channels_last_3d` or in a part of such a video. Each input is read once and
each output written once; a sum that is needed again replaces an input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a program: four vectors of 16 bytes for each thread of its one warp
CHANNELS_LAST = torch.channels_last_3d


class Norm(NamedTuple):
    """What follows the sum of two videos."""

    eps: float | None  # of the norm over channels, or None for no norm
    activation: str  # "silu", "relu" or "none"
    before: int  # 1 to repeat the first frame of the result, else 0
    after: int  # 1 to repeat the last one, else 0
    other_eps: float | None = None  # of the norm of what replaces x, or None for the sum itself


@triton.jit
def pixel(video, clip, frame, row, column, s_clip, s_frame, s_line, PHASES: tl.constexpr, C):
    """A pointer to where a pixel's channels begin.

    video: pointer to [clips, frames, lines, columns, C], of these strides; with PHASES to what
    `decoder_reference.from_phases` takes, [clips, frames, lines / 2 + 1, columns / 2 + 1, 4 C].
    """
    at = video + clip * s_clip + frame * s_frame
    if PHASES:
        phase = row % 2 * 2 + column % 2
        return at + (row + 1) // 2 * s_line + (column + 1) // 2 * (4 * C) + phase * C
    return at + row * s_line + column * C


@triton.jit
def _channel_norm(
    x,
    delta,
    bias,
    out,
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
    other_eps,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,  # power of two that covers C
    ROWS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    X_PHASES: tl.constexpr,
    DELTA_PHASES: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BEFORE: tl.constexpr,  # whether the first frame is written twice
    AFTER: tl.constexpr,  # whether the last one is
    REPLACE: tl.constexpr,  # whether the sum replaces x
    OTHER_NORM: tl.constexpr,  # whether what replaces x is normed, too
):
    """ROWS pixels of a frame; programs are [pixels / ROWS, clips frames]."""
    clip = (tl.program_id(1) // frames).to(tl.int64)
    frame = (tl.program_id(1) % frames).to(tl.int64)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, COLUMNS)[None, :]
    exists = (at < height * width) & (channel < C)
    y, z = at // width, at % width
    source = pixel(x, clip, frame, y, z, x_clip, x_frame, x_line, X_PHASES, C) + channel
    value = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    if HAS_DELTA:
        other = pixel(
            delta, clip, frame, y, z, delta_clip, delta_frame, delta_line, DELTA_PHASES, C
        )
        value += tl.load(other + channel, mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + channel, mask=channel < C, other=0.0)
    result = value
    if NORM:
        mean = tl.sum(value * value, axis=1)[:, None] / C
        result = value * tl.rsqrt(mean + eps)
        if OTHER_NORM:
            value *= tl.rsqrt(mean + other_eps)
    if REPLACE:
        tl.store(source, value.to(x.dtype.element_ty), mask=exists)
    if ACTIVATION == "silu":
        result = result * tl.sigmoid(result)
    elif ACTIVATION == "relu":
        result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
    result = result.to(out.dtype.element_ty)
    frame_elements = height * width * C
    first = out + clip * (frames + BEFORE + AFTER) * frame_elements + at * C + channel
    place = first + (frame + BEFORE) * frame_elements
    tl.store(place, result, mask=exists)
    if frame < BEFORE:
        tl.store(first, result, mask=exists)
    if frame >= frames - AFTER:
        tl.store(place + frame_elements, result, mask=exists)


def channel_norm(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    x_phases: bool = False,
    delta_phases: bool = False,
    replace: bool = False,
) -> Tensor:
    """`decoder_reference.join_norm`.

    Args:
        x: [B, C, T, H, W] of a float dtype, pixels of a line one after another; or, with
            `x_phases`, [B, 4 C, T, H / 2 + 1, W / 2 + 1] as `decoder_reference.from_phases` takes.
        delta: like x, or None; with `delta_phases` as `from_phases` takes it.
        bias: [C] fp32, or None.
        norm: norm, activation and repeated frames; `other_eps` needs `eps` and `replace`.
        x_phases, delta_phases: whether pixels have to be put into their places first.
        replace: whether the sum is to replace x, which is then not of phases.

    Returns:
        [B, C, T + before + after, H, W] in x's dtype and `channels_last_3d`; sums and norms are
        fp32, rounded once.

    Raises `ValueError` where pixels are not rows of channels one after another. On sm_90 a thread
    moves 16 bytes at a time, of 128 and of 512 channels.
    """
    batch, channels, frames, height, width = x.shape
    if x_phases:
        channels, height, width = channels // 4, 2 * (height - 1), 2 * (width - 1)
    shape = (batch, channels, frames + norm.before + norm.after, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    columns = triton.next_power_of_2(channels)
    rows = max(1, TILE // columns)
    _channel_norm[(triton.cdiv(height * width, rows), batch * frames)](
        x, delta, bias, out, frames, height, width,
        *strides(x), *((0, 0, 0) if delta is None else strides(delta)),
        norm.eps or 0.0, norm.other_eps or 0.0,
        C=channels,
        COLUMNS=columns,
        ROWS=rows,
        HAS_DELTA=delta is not None,
        HAS_BIAS=bias is not None,
        X_PHASES=x_phases,
        DELTA_PHASES=delta_phases,
        NORM=norm.eps is not None,
        ACTIVATION=norm.activation,
        BEFORE=norm.before,
        AFTER=norm.after,
        REPLACE=replace,
        OTHER_NORM=norm.other_eps is not None,
        num_warps=1,
    )  # fmt: skip
    return out


def strides(x: Tensor) -> tuple[int, int, int]:
    """Elements from one clip, frame and line of a video [B, C, T, H, W] to the next.

    Raises `ValueError` where pixels are not rows of channels one after another.
    """
    clip, channel, frame, line, pixel = x.stride()
    _, channels, _, _, width = x.shape
    if (channels > 1 and channel != 1) or (width > 1 and pixel != channels):
        raise ValueError(
            f"a pixel's channels must be one row, and pixels follow each other, got strides"
            f" {x.stride()} of {tuple(x.shape)}; use channels_last_3d"
        )
    return clip, frame, line
