"""Residual add and RMS norm in one pass over the row, with per-modality weights by row range.

Bytes per element: 4 read + 2 read (delta) + 4 written + 2 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.reference import NORM_EPS, Counts, run_starts

MAX_CHANNELS = 16384  # a row is held in registers


@triton.jit
def _load_piece(x, delta, row, columns, mask, channels, HAS_DELTA: tl.constexpr):
    value = tl.load(x + row * channels + columns, mask=mask, other=0.0)
    if HAS_DELTA:
        value += tl.load(delta + row * channels + columns, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _store_piece(
    value, scale, weight, x_out, out, row, expert, columns, mask, channels, HAS_DELTA: tl.constexpr
):
    if HAS_DELTA:
        tl.store(x_out + row * channels + columns, value, mask=mask)
    gain = tl.load(weight + expert * channels + columns, mask=mask, other=0.0) + 1.0
    normed = value * scale * gain
    tl.store(out + row * channels + columns, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_rms_norm(
    x,
    delta,
    weight,
    x_out,
    out,
    audio_start,
    text_start,
    channels,
    eps,
    HAS_DELTA: tl.constexpr,
    HEAD: tl.constexpr,  # largest power of two not above channels
    TAIL: tl.constexpr,  # power of two that covers the rest, or 0
):
    row = tl.program_id(0).to(tl.int64)
    expert = (row >= audio_start).to(tl.int32) + (row >= text_start).to(tl.int32)
    head = tl.arange(0, HEAD)
    first = _load_piece(x, delta, row, head, head < channels, channels, HAS_DELTA)
    total = tl.sum(first * first)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        second = _load_piece(x, delta, row, tail, tail < channels, channels, HAS_DELTA)
        total += tl.sum(second * second)
    scale = tl.rsqrt(total / channels + eps)
    _store_piece(
        first, scale, weight, x_out, out, row, expert, head, head < channels, channels, HAS_DELTA
    )
    if TAIL > 0:
        _store_piece(
            second, scale, weight, x_out, out, row, expert, tail, tail < channels, channels,
            HAS_DELTA,
        )  # fmt: skip


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, counts: Counts | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`x + delta`, and `reference.rms_norm` of it in `dtype`.

    Args:
        x: [N, C] fp32 contiguous, the residual stream.
        delta: [N, C] bf16 or fp32 contiguous, or None for no addition.
        weight: [C], or [3 C] with `counts`, fp32, zero-centred.
        counts: rows of video, audio and text.
        dtype: of the normed output.

    Returns:
        The new residual stream (x itself without delta) and the normed rows.

    Tuned on H100 at C = 5120.
    """
    rows, channels = x.shape
    if channels > MAX_CHANNELS:
        raise ValueError(f"channels must be at most {MAX_CHANNELS}, got {channels}")
    out = torch.empty((rows, channels), dtype=dtype, device=x.device)
    total = x if delta is None else torch.empty_like(x)
    if rows == 0:
        return total, out
    audio_start, text_start = run_starts(counts, rows)
    head = 1 << (channels.bit_length() - 1)
    rest = channels - head
    _add_rms_norm[(rows,)](
        x, delta, weight, total, out, audio_start, text_start, channels, NORM_EPS,
        HAS_DELTA=delta is not None,
        HEAD=head,
        TAIL=triton.next_power_of_2(rest) if rest else 0,
        num_warps=8 if head >= 4096 else 4,
    )  # fmt: skip
    return total, out
