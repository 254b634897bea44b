"""The head gate by itself, for attention kernels that cannot apply it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _head_gate(x, gate, out, gate_stride, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Scale eight heads of a row; programs are [rows, heads / 8]."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * 8 + tl.arange(0, 8)
    at = (row * HEADS + head[:, None]) * DIM + tl.arange(0, DIM)[None, :]
    exists = head < HEADS
    value = tl.load(x + at, mask=exists[:, None], other=0.0).to(tl.float32)
    logit = tl.load(gate + row * gate_stride + head, mask=exists, other=0.0).to(tl.float32)
    tl.store(
        out + at,
        (value * tl.sigmoid(logit)[:, None]).to(out.dtype.element_ty),
        mask=exists[:, None],
    )


def head_gate(x: Tensor, gate: Tensor) -> Tensor:
    """`reference.head_gate`: each head times the sigmoid of its gate, in fp32.

    Args:
        x: [N, heads, D] of a float dtype, contiguous; D a power of two.
        gate: [N, heads] of a float dtype, any row stride.

    Returns:
        [N, heads, D] contiguous, in x's dtype.
    """
    rows, heads, dim = x.shape
    out = torch.empty_like(x)
    if rows:
        _head_gate[(rows, triton.cdiv(heads, 8))](
            x, gate, out, gate.stride(0), HEADS=heads, DIM=dim, num_warps=2
        )
    return out
