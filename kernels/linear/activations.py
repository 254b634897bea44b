"""The clamped activations, with rows padded with zeros to what the next product wants.

A program takes `BLOCK` columns of a row of the result; each value is read and written once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.reference import ACTIVATION_ALPHA, ACTIVATION_LIMIT

BLOCK = 1024


@triton.jit
def _load(x, start, vectors, COUNT: tl.constexpr, LANES: tl.constexpr):
    """COUNT columns of a row in fp32, from `start` on; zeros beyond its `vectors` LANES columns.

    x: pointer to the row; the result is [COUNT / LANES, LANES].
    """
    vector = start // LANES + tl.arange(0, COUNT // LANES)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    exists = (vector < vectors) & (lane >= 0)  # the mask in the shape of the tile
    return tl.load(x + vector * LANES + lane, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _swiglu7(
    x, out, vectors, row_vectors, out_stride, limit, alpha, LANES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK columns of out from 2 BLOCK of x; programs are [rows, blocks]."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    value = _load(x + row * row_vectors * LANES, 2 * start, vectors, 2 * BLOCK, LANES)
    glu, lin = tl.split(tl.reshape(value, (BLOCK, 2)))
    glu = tl.minimum(glu, limit, propagate_nan=tl.PropagateNan.ALL)
    lin = tl.clamp(lin, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    result = (glu * tl.sigmoid(alpha * glu) * (lin + 1.0)).to(out.dtype.element_ty)
    column = start + tl.arange(0, BLOCK)
    tl.store(out + row * out_stride + column, result, mask=column < out_stride)


@triton.jit
def _gelu7(
    x, out, vectors, row_vectors, out_stride, limit, alpha, LANES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK columns of out from as many of x; programs are [rows, blocks]."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    value = _load(x + row * row_vectors * LANES, start, vectors, BLOCK, LANES)
    value = tl.reshape(value, (BLOCK,))
    value = tl.minimum(value, limit, propagate_nan=tl.PropagateNan.ALL)
    result = (value * tl.sigmoid(alpha * value)).to(out.dtype.element_ty)
    column = start + tl.arange(0, BLOCK)
    tl.store(out + row * out_stride + column, result, mask=column < out_stride)


def swiglu7(x: Tensor, padded: int | None = None) -> Tensor:
    """`reference.swiglu7`.

    x: [N, 2 M] bf16 or fp32, glu in the even columns and lin in the odd ones, contiguous but for
    its rows' stride. Returns [N, padded or M] in x's dtype; columns from M on are zeros.
    """
    return _activate(_swiglu7, x, x.shape[1] // 2, padded)


def gelu7(x: Tensor, padded: int | None = None) -> Tensor:
    """`reference.gelu7`.

    x: [N, M] bf16 or fp32, contiguous but for its rows' stride. Returns [N, padded or M] in x's
    dtype; columns from M on are zeros.
    """
    return _activate(_gelu7, x, x.shape[1], padded)


def _activate(kernel: Any, x: Tensor, width: int, padded: int | None) -> Tensor:
    """Launch an activation's kernel; width: columns of the result that are not padding."""
    rows, columns = x.shape
    padded = padded or width
    out = torch.empty((rows, padded), dtype=x.dtype, device=x.device)
    if rows:
        # Sizes go in as counts of vectors: of an integer Triton sees at most that 16 divides it,
        # and for the full size's 27304 columns, a multiple of 8, would load single elements.
        # swiglu7 of that on H100, triton 3.6: 95 % of a copy's bandwidth, 84 % without.
        lanes = math.gcd(8, columns, x.stride(0))
        kernel[(rows, triton.cdiv(padded, BLOCK))](
            x, out, columns // lanes, x.stride(0) // lanes, padded,
            ACTIVATION_LIMIT, ACTIVATION_ALPHA, LANES=lanes, BLOCK=BLOCK,
        )  # fmt: skip
    return out
