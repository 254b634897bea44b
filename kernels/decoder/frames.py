"""The video decoder's movements of frames: channels that become frames, channels that become
pixels, and pixels that become what a video encoder takes.

Videos are [B, C, T, H, W] with a pixel's channels as one row of memory. Each value is read and
written once, but for `yuv420`, whose reads overlap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.decoder import reference as ref
from magihuman.kernels.decoder.channel_norm import CHANNELS_LAST, TILE, strides

Y_RED, Y_GREEN, Y_BLUE = (tl.constexpr(weight) for weight in ref.LUMA)
CB_RED, CB_GREEN, CB_BLUE = (tl.constexpr(weight) for weight in ref.CHROMA[0])
CR_RED, CR_GREEN, CR_BLUE = (tl.constexpr(weight) for weight in ref.CHROMA[1])
BLOCK = 512  # bytes or values of a program of `pixels`, fours of pixels of one of `yuv420`


@triton.jit
def _join_frames(
    x,
    delta,
    bias,
    out,
    frames,  # that leave
    height,
    width,
    x_clip,  # elements from one clip, frame or line to the next
    x_frame,
    x_line,
    delta_clip,
    delta_frame,
    delta_line,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,  # frames side by side in the channels of one
    DROP: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """ROWS pixels of a frame of the result; programs are [pixels / ROWS, clips frames]."""
    clip = (tl.program_id(1) // frames).to(tl.int64)
    frame = (tl.program_id(1) % frames + DROP).to(tl.int64)
    part = (frame % PARTS).to(tl.int32)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, COLUMNS)[None, :]
    exists = (at < height * width) & (channel < C)
    y, z = at // width, at % width
    place = z * (PARTS * C) + part * C + channel
    source = x + clip * x_clip + frame // PARTS * x_frame + y * x_line + place
    value = tl.load(source, mask=exists, other=0.0)
    if HAS_DELTA or HAS_BIAS:
        wide = value.to(tl.float32)
        if HAS_DELTA:
            source = delta + clip * delta_clip + frame // PARTS * delta_frame + y * delta_line
            wide += tl.load(source + place, mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            wide += tl.load(bias + part * C + channel, mask=channel < C, other=0.0)
        value = wide.to(x.dtype.element_ty)
    target = out + tl.program_id(1).to(tl.int64) * (height * width) * C + at * C + channel
    tl.store(target, value, mask=exists)


def join_frames(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, in_time: bool, drop: int
) -> Tensor:
    """`decoder_reference.join_frames`: [B, C, T, H, W], or of 2 C channels where `in_time`, to
    [B, C, T', H, W].

    Args:
        x: [B, C, T, H, W] of a float dtype, pixels of a line one after another.
        delta: like x, added first; or None.
        bias: of as many channels as x, fp32, added too; or None.
        in_time: whether channels become frames, two of one.
        drop: frames left out at the start.

    Returns:
        [B, C, T - drop, H, W], or [B, C, 2 T - drop, H, W] where `in_time`, in x's dtype and
        `channels_last_3d`.

    Raises `ValueError` where pixels are not rows of channels one after another.
    """
    batch, channels, frames, height, width = x.shape
    parts = 2 if in_time else 1
    channels, frames = channels // parts, parts * frames - drop
    shape = (batch, channels, frames, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    columns = triton.next_power_of_2(channels)
    rows = max(1, TILE // columns)
    _join_frames[(triton.cdiv(height * width, rows), batch * frames)](
        x, delta, bias, out, frames, height, width,
        *strides(x), *((0, 0, 0) if delta is None else strides(delta)),
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
    x_clip,
    x_frame,
    x_line,
    CHANNELS: tl.constexpr,  # of x, those beyond the picture's included
    COLORS: tl.constexpr,
    PATCH: tl.constexpr,
    TO_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK values of a line of the picture; programs are [values / BLOCK, lines of all frames]."""
    line = tl.program_id(1)
    frame, y = (line // (height * PATCH)).to(tl.int64), line % (height * PATCH)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width * PATCH * COLORS
    color = at % COLORS
    column = at // COLORS
    channel = (color * PATCH + column % PATCH) * PATCH + y % PATCH
    source = frame // frames * x_clip + frame % frames * x_frame + y // PATCH * x_line
    source = source + column // PATCH * CHANNELS + channel
    value = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=mask, other=0.0)
    if TO_BYTES:
        value = tl.minimum(tl.maximum(value * 0.5 + 0.5, 0.0), 1.0) * 255.0
    target = out + line.to(tl.int64) * (width * PATCH * COLORS) + at
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)


def pixels(x: Tensor, bias: Tensor, colors: int, patch: int, dtype: torch.dtype) -> Tensor:
    """`decoder_reference.join_pixels`.

    Args:
        x: [B, colors patch^2 or more, T, H, W], pixels of a line one after another; channels
            beyond are ignored.
        bias: of as many channels as x, fp32.
        colors: values of a pixel of the picture.
        patch: a pixel of x becomes patch x patch pixels.
        dtype: uint8, or a float dtype for values as they are.

    Returns:
        [B, T, patch H, patch W, colors] contiguous.

    Raises `ValueError` where pixels are not rows of channels one after another.
    """
    batch, channels, frames, height, width = x.shape
    shape = (batch, frames, patch * height, patch * width, colors)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    grid = (triton.cdiv(patch * width * colors, BLOCK), batch * frames * height * patch)
    _pixels[grid](
        x, bias, out, frames, height, width, *strides(x),
        CHANNELS=channels,
        COLORS=colors,
        PATCH=patch,
        TO_BYTES=dtype == torch.uint8,
        BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _yuv420(
    x,
    out,
    height,  # of chroma
    width,
    BLOCK: tl.constexpr,
):
    """BLOCK fours of pixels of a frame; programs are [fours / BLOCK, frames]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < height * width
    row, column = at // width, at % width
    frame = tl.program_id(1).to(tl.int64)
    x += frame * (12 * height * width)
    out += frame * (6 * height * width)
    blue_diff = tl.full((BLOCK,), 257 << 18, tl.int32)
    red_diff = blue_diff
    for line in tl.static_range(2):
        for place in tl.static_range(3):  # left of the four pixels, and their two columns
            source = tl.maximum(2 * column + place - 1, 0) + (2 * row + line) * (2 * width)
            red = tl.load(x + 3 * source, mask=mask, other=0).to(tl.int32)
            green = tl.load(x + 3 * source + 1, mask=mask, other=0).to(tl.int32)
            blue = tl.load(x + 3 * source + 2, mask=mask, other=0).to(tl.int32)
            times = 1 + place % 2
            blue_diff += times * (CB_RED * red + CB_GREEN * green + CB_BLUE * blue)
            red_diff += times * (CR_RED * red + CR_GREEN * green + CR_BLUE * blue)
            if place > 0:
                luma = Y_RED * red + Y_GREEN * green + Y_BLUE * blue + (33 << 15)
                tl.store(out + source, (luma >> 16).to(tl.uint8), mask=mask)
    out += 4 * height * width + at
    tl.store(out, (blue_diff >> 19).to(tl.uint8), mask=mask)
    tl.store(out + height * width, (red_diff >> 19).to(tl.uint8), mask=mask)


def yuv420(frames: Tensor) -> Tensor:
    """`decoder_reference.to_yuv420`, bit for bit.

    frames: uint8 [T, H, W, 3] contiguous, of even H and W. Returns uint8 [T, 3 H / 2, W]. It goes
    byte by byte, which takes little time beside the decoder.
    """
    count, height, width, _ = frames.shape
    out = torch.empty((count, height // 2 * 3, width), dtype=torch.uint8, device=frames.device)
    size = height // 2, width // 2
    _yuv420[(triton.cdiv(size[0] * size[1], BLOCK), count)](
        frames, out, *size, BLOCK=BLOCK, num_warps=4
    )
    return out
