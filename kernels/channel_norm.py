"""The steps between two convolutions of the video decoder in one pass: bias, residual addition,
channel norm, activation, frames repeated in time.

Videos are [B, C, T, H, W] in `channels_last_3d`, so a pixel's channels are one row of memory. Each
input is read once and each output written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a program: four vectors of 16 bytes for each of its 128 threads
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
    pixels,  # of a frame
    x_batch,  # elements from one clip of the batch to the next
    delta_batch,
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
    SHORTCUT: tl.constexpr,
    KEEP: tl.constexpr,
):
    clip = tl.program_id(1) // frames
    frame = tl.program_id(1) % frames
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < pixels) & (column < C)
    place = row * C + column  # within a frame
    frame_elements = pixels.to(tl.int64) * C
    source = frame * frame_elements + place
    value = tl.load(x + clip.to(tl.int64) * x_batch + source, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        at = delta + clip.to(tl.int64) * delta_batch + source
        value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=column < C, other=0.0)
    if KEEP:
        at = total + tl.program_id(1) * frame_elements + place
        tl.store(at, value.to(total.dtype.element_ty), mask=mask)
    result = value
    if NORM:
        mean = tl.sum(value * value, axis=1)[:, None] / C
        result = value * tl.rsqrt(mean + eps)
        if SHORTCUT:
            other = value * tl.rsqrt(mean + shortcut_eps)
            at = shortcut + tl.program_id(1) * frame_elements + place
            tl.store(at, other.to(shortcut.dtype.element_ty), mask=mask)
    if ACTIVATION == "silu":
        result = result * tl.sigmoid(result)
    elif ACTIVATION == "relu":
        result = tl.maximum(result, 0.0)
    result = result.to(out.dtype.element_ty)
    first = clip.to(tl.int64) * (frames + BEFORE + AFTER)
    at = out + (first + frame + BEFORE) * frame_elements + place
    tl.store(at, result, mask=mask)
    if frame < BEFORE:
        tl.store(out + first * frame_elements + place, result, mask=mask)
    if frame >= frames - AFTER:
        tl.store(at + frame_elements, result, mask=mask)


def channel_norm(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    shortcut_eps: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`reference.join_norm`.

    Args:
        x: [B, C, T, H, W] in `channels_last_3d` or frames of such a video.
        delta: like x, or None.
        bias: [C] fp32, or None.
        eps: of the norm, or None for no norm.
        activation: "silu", "relu" or "none".
        before, after: 1 to repeat the first or the last frame of the result.
        shortcut_eps: of a second norm of the sum, without activation or repetition; or None.
        keep: whether the sum itself is wanted.

    Returns:
        The result [B, C, T + before + after, H, W], the second norm and the sum, in x's dtype and
        `channels_last_3d`; sums and norms are fp32, rounded once.
    """
    batch, channels, frames, height, width = x.shape

    def empty(length: int) -> Tensor:
        shape = (batch, channels, length, height, width)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)

    out = empty(frames + before + after)
    shortcut = empty(frames) if shortcut_eps is not None else None
    total = empty(frames) if keep else None
    columns = triton.next_power_of_2(channels)
    rows = max(1, TILE // columns)
    pixels = height * width
    _channel_norm[(triton.cdiv(pixels, rows), batch * frames)](
        frames_together(x), None if delta is None else frames_together(delta), bias,
        out, shortcut, total, frames, pixels, x.stride(0), 0 if delta is None else delta.stride(0),
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
        SHORTCUT=shortcut is not None,
        KEEP=keep,
        num_warps=4,
    )  # fmt: skip
    return out, shortcut, total


def frames_together(x: Tensor) -> Tensor:
    """The video itself, once its strides are known to be those of whole frames in a row."""
    _, channels, frames, height, width = x.shape
    wanted = (1, height * width * channels, width * channels, channels)
    found = x.stride()[1:]
    sizes = (channels, frames, height, width)
    if any(size > 1 and a != b for size, a, b in zip(sizes, found, wanted, strict=True)):
        raise ValueError(f"a video must be in channels_last_3d, got strides {x.stride()}")
    return x
