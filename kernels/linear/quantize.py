"""Rows to e4m3 or int8 with a scale each, of bf16 rows as they are or of fp32 rows in RMS norm.

A program owns a row: it is read once, kept in registers until its largest magnitude is known, and
written once. Bytes per element: 4 read (norm) or 2 read, 1 written.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.reference import FP8, LIMITS, NORM_EPS, ROW_BYTES, Counts, run_starts

MAX_CHANNELS = 32768  # a row is held in registers
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # the smallest with a finite reciprocal
# An fp32 number of this size has no bits below 1: adding it rounds to a whole number, ties to even.
WHOLE = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _store_rows(
    first, second, largest, out, scales, row, out_stride, limit, inverse_limit, smallest,
    HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A row's scale and its values in 8 bits.

    first, second: fp32 of the row's columns [0, HEAD) and [HEAD, HEAD + TAIL), the latter ignored
    where TAIL is 0; largest: the largest magnitude of both; limit: that of the dtype.
    """
    scale = tl.maximum(largest * inverse_limit, smallest)
    if out.dtype.element_ty == tl.int8:  # has no NaN: the scale says that there is one
        scale += tl.sum(first - first)
        if TAIL > 0:
            scale += tl.sum(second - second)
    tl.store(scales + row, scale)
    inverse = tl.div_rn(1.0, scale)
    _store_piece(first, inverse, limit, out, row, tl.arange(0, HEAD), out_stride)
    if TAIL > 0:
        _store_piece(second, inverse, limit, out, row, HEAD + tl.arange(0, TAIL), out_stride)


@triton.jit
def _store_piece(values, inverse, limit, out, row, columns, out_stride):
    """Store these columns of a row in 8 bits, `values` times `inverse`, up to its stride."""
    # NaN stays NaN: it is to be seen in what follows.
    scaled = tl.clamp(values * inverse, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if out.dtype.element_ty == tl.int8:
        scaled = (scaled + WHOLE) - WHOLE
    target = out + row * out_stride + columns
    tl.store(target, scaled.to(out.dtype.element_ty), mask=columns < out_stride)


@triton.jit
def _norm_piece(value, rms, gain):
    """Values normed; rms: the reciprocal of their row's root mean square; gain: zero-centred."""
    return value * rms * (gain + 1.0)


@triton.jit
def _norm_rows(
    x,
    weight,
    out,
    scales,
    audio_start,
    text_start,
    channels,
    out_stride,
    eps,
    limit,
    inverse_limit,
    smallest,
    HEAD: tl.constexpr,  # largest power of two not above out_stride
    TAIL: tl.constexpr,  # power of two that covers the rest, or 0
):
    """A row, normed, in 8 bits with its scale; programs are [rows]."""
    row = tl.program_id(0).to(tl.int64)
    expert = (row >= audio_start).to(tl.int32) + (row >= text_start).to(tl.int32)
    x += row * channels
    weight += expert * channels
    head = tl.arange(0, HEAD)
    first = tl.load(x + head, mask=head < channels, other=0.0)
    total = tl.sum(first * first)
    second = first
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        second = tl.load(x + tail, mask=tail < channels, other=0.0)
        total += tl.sum(second * second)
    rms = tl.rsqrt(total / channels + eps)
    first = _norm_piece(first, rms, tl.load(weight + head, mask=head < channels, other=0.0))
    largest = tl.max(tl.abs(first))
    if TAIL > 0:
        second = _norm_piece(second, rms, tl.load(weight + tail, mask=tail < channels, other=0.0))
        largest = tl.maximum(largest, tl.max(tl.abs(second)))
    _store_rows(
        first, second, largest, out, scales, row, out_stride, limit, inverse_limit, smallest,
        HEAD, TAIL,
    )  # fmt: skip


@triton.jit
def _quantize_rows(
    x,
    out,
    scales,
    x_groups,  # x's row stride and its columns, in groups of LANES
    groups,
    out_stride,
    limit,
    inverse_limit,
    smallest,
    LANES: tl.constexpr,
    HEAD: tl.constexpr,  # largest power of two not above out_stride
    TAIL: tl.constexpr,  # power of two that covers the rest, or 0
):
    """A row in 8 bits with its scale; programs are [rows]."""
    row = tl.program_id(0).to(tl.int64)
    x += row * (x_groups * LANES)
    head = tl.arange(0, HEAD)
    first = tl.load(x + head, mask=head < groups * LANES, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(first))
    second = first
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        second = tl.load(x + tail, mask=tail < groups * LANES, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(second)))
    _store_rows(
        first, second, largest, out, scales, row, out_stride, limit, inverse_limit, smallest,
        HEAD, TAIL,
    )  # fmt: skip


def norm_rows(
    x: Tensor, weight: Tensor, counts: Counts | None, dtype: torch.dtype = FP8
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` of `reference.rms_norm`, from its fp32 without a rounding between.

    Args:
        x: [N, C] fp32 contiguous, C at most 32768.
        weight: [C], or [3 C] with `counts`, fp32, zero-centred.
        counts: rows of video, audio and text, or None for one set of weights.
        dtype: of the values, float8_e4m3fn or int8.

    Returns:
        Values [N, C], each row followed by zeros up to a multiple of 16 bytes, and scales [N] fp32.
        Of a row that is not finite int8 has no scale: NaN.

    Raises `ValueError` where C is larger. Written for H100 at C = 5120.
    """
    channels = x.shape[1]
    out, scales = _empty(x, dtype)
    if x.shape[0]:
        audio_start, text_start = run_starts(counts, x.shape[0])
        head, tail = _pieces(out.stride(0))
        _norm_rows[(x.shape[0],)](
            x, weight, out, scales, audio_start, text_start, channels, out.stride(0), NORM_EPS,
            LIMITS[dtype], 1 / LIMITS[dtype], SMALLEST_SCALE,
            HEAD=head, TAIL=tail, num_warps=_warps(head),
        )  # fmt: skip
    return out, scales


def quantize_rows(x: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` of finite rows, bit for bit.

    Args:
        x: [N, C] bf16 or fp32, C at most 32768, contiguous but for its rows' stride. Loads are as
            wide as the powers of two, up to 8, that divide both C and that stride.
        dtype: of the values, float8_e4m3fn or int8.

    Returns:
        Values and scales as `norm_rows` does.

    Raises `ValueError` where C is larger or rows are not contiguous. Written for H100 at C = 5120
    and, in padded rows, 13652.
    """
    if x.stride(1) != 1:
        raise ValueError(f"rows must be contiguous, got strides {x.stride()}; pass a copy")
    out, scales = _empty(x, dtype)
    if x.shape[0]:
        lanes = math.gcd(8, x.shape[1], x.stride(0))
        head, tail = _pieces(out.stride(0))
        _quantize_rows[(x.shape[0],)](
            x, out, scales, x.stride(0) // lanes, x.shape[1] // lanes, out.stride(0),
            LIMITS[dtype], 1 / LIMITS[dtype], SMALLEST_SCALE,
            LANES=lanes, HEAD=head, TAIL=tail, num_warps=_warps(head),
        )  # fmt: skip
    return out, scales


def _empty(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and scales of x's rows, not yet written."""
    rows, channels = x.shape
    if channels > MAX_CHANNELS:
        raise ValueError(f"channels must be at most {MAX_CHANNELS}, got {channels}")
    stride = triton.cdiv(channels, ROW_BYTES) * ROW_BYTES
    out = torch.empty((rows, stride), dtype=dtype, device=x.device)
    return out[:, :channels], torch.empty(rows, dtype=torch.float32, device=x.device)


def _pieces(columns: int) -> tuple[int, int]:
    """Two powers of two that cover the columns with little to spare; the second may be 0."""
    head: int = 1 << (columns.bit_length() - 1)
    rest = columns - head
    return head, triton.next_power_of_2(rest) if rest else 0


def _warps(head: int) -> int:
    """Few: at 5120 columns a thread then loads 16 bytes at a time in the second piece too."""
    return {8192: 8, 16384: 16}.get(head, 4)
