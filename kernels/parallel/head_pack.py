"""Columns of a projection grouped by the process that attends with them, and attention's result put
back together: what is copied before and after an exchange between GPUs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.reference import packed_width

BLOCK = 512  # 16 bytes for each thread of two warps
WARPS = 2


@triton.jit
def _copy(source, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT values from one pointer to another, BLOCK at a time."""
    for start in tl.static_range(0, COUNT, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < COUNT), mask=at < COUNT)


@triton.jit
def _pack_heads(
    qkv,
    out,
    rows,
    row_vectors,  # row stride of qkv / LANES, so that the compiler sees a multiple of LANES
    HEADS: tl.constexpr,  # of one process
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's columns for one process; programs are [rows, RANKS]."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    q: tl.constexpr = HEADS * DIM
    kv: tl.constexpr = KV_HEADS * DIM
    source = qkv + row * row_vectors * LANES
    target = out + (rank * rows + row) * WIDTH
    _copy(source + rank * q, target, q, BLOCK)
    _copy(source + RANKS * q + rank * kv, target + q, kv, BLOCK)
    _copy(source + RANKS * (q + kv) + rank * kv, target + q + kv, kv, BLOCK)
    gates = source + RANKS * (q + 2 * kv) + rank * HEADS
    at = tl.arange(0, 64)  # a gate for each of up to 64 heads, and zeros
    gate = tl.load(gates + at, mask=at < HEADS, other=0.0)
    tl.store(target + q + 2 * kv + at, gate, mask=at < WIDTH - q - 2 * kv)


@triton.jit
def _unpack_heads(x, out, rows, COLUMNS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """A row's columns from one process; programs are [rows, RANKS]."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    target = out + (row * RANKS + rank) * COLUMNS
    _copy(x + (rank * rows + row) * COLUMNS, target, COLUMNS, BLOCK)


def pack_heads(qkv: Tensor, heads: int, kv_heads: int, ranks: int) -> Tensor:
    """`reference.pack_heads`, bit for bit.

    Args:
        qkv: [S, (heads + 2 kv_heads) D + heads], any 2- or 4-byte dtype, contiguous but for its
            rows' stride.
        heads, kv_heads: of the projection, 64 ranks query heads at most.
        ranks: processes, a divisor of both.

    Returns:
        [ranks, S, W] contiguous in qkv's dtype.

    Raises `ValueError` where a process would get more than 64 heads. Written for H100, where it
    reads and writes 14416 bytes a row at 40 and 8 heads of 128 in bf16.
    """
    rows, columns = qkv.shape
    dim = (columns - heads) // (heads + 2 * kv_heads)
    if heads > 64 * ranks:
        raise ValueError(f"a process takes at most 64 heads, got {heads} over {ranks}")
    width = packed_width(columns, ranks)
    out = qkv.new_empty(ranks, rows, width)
    lanes = math.gcd(8, qkv.stride(0))
    if rows:
        _pack_heads[(rows, ranks)](
            qkv, out, rows, qkv.stride(0) // lanes, HEADS=heads // ranks,
            KV_HEADS=kv_heads // ranks, DIM=dim, RANKS=ranks, WIDTH=width, LANES=lanes,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def unpack_heads(x: Tensor) -> Tensor:
    """`reference.unpack_heads`, bit for bit.

    x: [ranks, S, C] contiguous, any 2- or 4-byte dtype. Returns [S, ranks C] contiguous.
    """
    ranks, rows, columns = x.shape
    out = torch.empty((rows, ranks * columns), dtype=x.dtype, device=x.device)
    if rows:
        _unpack_heads[(rows, ranks)](
            x, out, rows, COLUMNS=columns, RANKS=ranks, BLOCK=BLOCK, num_warps=WARPS
        )
    return out
