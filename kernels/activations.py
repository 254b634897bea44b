"""The clamped activations, with rows padded with zeros to what the next product wants."""

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
def _load(x, start, width, COUNT: tl.constexpr, LANES: tl.constexpr):
    """COUNT columns from `start` on, zero beyond `width`, a multiple of LANES: whole vectors."""
    group = start // LANES + tl.arange(0, COUNT // LANES)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    exists = (group < width // LANES) & (lane >= 0)  # the mask in the shape of the tile
    return tl.load(x + group * LANES + lane, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _swiglu7(
    x, out, width, x_stride, out_stride, limit, alpha, LANES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    value = _load(x + row * x_stride, 2 * start, width, 2 * BLOCK, LANES)
    glu, lin = tl.split(tl.reshape(value, (BLOCK, 2)))
    glu = tl.minimum(glu, limit)
    lin = tl.minimum(tl.maximum(lin, -limit), limit)
    result = (glu * tl.sigmoid(alpha * glu) * (lin + 1.0)).to(out.dtype.element_ty)
    column = start + tl.arange(0, BLOCK)
    tl.store(out + row * out_stride + column, result, mask=column < out_stride)


@triton.jit
def _gelu7(
    x, out, width, x_stride, out_stride, limit, alpha, LANES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    value = tl.reshape(_load(x + row * x_stride, start, width, BLOCK, LANES), (BLOCK,))
    value = tl.minimum(value, limit)
    result = (value * tl.sigmoid(alpha * value)).to(out.dtype.element_ty)
    column = start + tl.arange(0, BLOCK)
    tl.store(out + row * out_stride + column, result, mask=column < out_stride)


def swiglu7(x: Tensor, padded: int | None = None) -> Tensor:
    """`reference.swiglu7` of x [N, 2 M], as [N, padded or M]; columns from M on are zeros."""
    return _activate(_swiglu7, x, x.shape[1] // 2, padded)


def gelu7(x: Tensor, padded: int | None = None) -> Tensor:
    """`reference.gelu7` of x [N, M], as [N, padded or M]; columns from M on are zeros."""
    return _activate(_gelu7, x, x.shape[1], padded)


def _activate(kernel: Any, x: Tensor, width: int, padded: int | None) -> Tensor:
    rows, columns = x.shape
    padded = padded or width
    out = torch.empty((rows, padded), dtype=x.dtype, device=x.device)
    if rows:
        kernel[(rows, triton.cdiv(padded, BLOCK))](
            x, out, columns, x.stride(0), padded, ACTIVATION_LIMIT, ACTIVATION_ALPHA,
            LANES=math.gcd(8, columns), BLOCK=BLOCK,
        )  # fmt: skip
    return out
