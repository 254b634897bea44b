"""q, k and v in e4m3 for the attention in `fp8`: norm and rotation of q and k, v transposed.

One launch: its first programs take a block of keys of one head's values each, the others a row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.attention.rotary import BLOCK, WARPS, load_pairs, norm_and_turn
from magihuman.kernels.reference import (
    FP8,
    FP8_KEYS,
    FP8_LIMIT,
    NORM_EPS,
    SMALLEST_VALUE,
    Counts,
    run_starts,
)

PIECE = 32  # dims of values that are in registers together


@triton.jit
def _scale_of(weight, of_gain, EXPERTS: tl.constexpr, DIM: tl.constexpr):
    """The scale of all normed heads, whose dims the largest gain bounds.

    weight: pointer to [EXPERTS, DIM] fp32, zero-centred; of_gain: the scale where the gain is 1.
    """
    dims = tl.arange(0, DIM)
    largest = tl.max(tl.abs(tl.load(weight + dims) + 1.0))
    for expert in tl.static_range(1, EXPERTS):
        largest = tl.maximum(largest, tl.max(tl.abs(tl.load(weight + expert * DIM + dims) + 1.0)))
    return largest * of_gain


@triton.jit
def _quantize_values(
    values, v, v_scale, program, length, stride, blocks, limit, inverse_limit, smallest,
    KV_HEADS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A block of one head's values [KEYS, DIM] to e4m3 [DIM, KEYS], and their scale.

    values: pointer to the first head's in rows `stride` apart; program: which of [blocks KV_HEADS];
    keys from `length` on give zeros. Values are read twice, the second time from a cache, so that
    few are in registers.
    """
    head = program % KV_HEADS
    block = program // KV_HEADS
    end = blocks * KEYS
    source = values + head * DIM
    target = v + head.to(tl.int64) * DIM * end
    place = tl.arange(0, KEYS)
    key = block * KEYS + place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    exists = (key < length)[:, None]
    dims = tl.arange(0, PIECE)
    rows = source + key.to(tl.int64)[:, None] * stride + dims[None, :]
    largest = smallest
    for start in tl.static_range(0, DIM, PIECE):
        x = tl.load(rows + start, mask=exists, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x)))
    scale = largest * inverse_limit
    tl.store(v_scale + head * blocks + block, scale)
    inverse = tl.div_rn(1.0, scale)
    columns = target + dims[:, None].to(tl.int64) * end + block * KEYS + place[None, :]
    for start in tl.static_range(0, DIM, PIECE):
        x = tl.load(rows + start, mask=exists, other=0.0).to(tl.float32)
        x = tl.clamp(x * inverse, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        tl.store(columns + start * end, tl.trans(x.to(target.dtype.element_ty)))


@triton.jit
def _qkv_fp8(
    qkv,
    q_weight,
    k_weight,
    rope,
    valid_length,
    q,
    k,
    v,
    qk_scale,
    v_scale,
    row_vectors,  # row stride of qkv / LANES, so that the compiler sees a multiple of LANES
    blocks,  # of keys
    audio_start,
    text_start,
    eps,
    of_gain,  # scale of a normed head whose gain is 1
    limit,
    inverse_limit,
    smallest,
    EXPERTS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ANGLES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """A block of values, or a row of q and k; programs are [blocks KV_HEADS + rows]."""
    program = tl.program_id(0)
    stride = row_vectors * LANES
    if program < blocks * KV_HEADS:
        _quantize_values(
            qkv + (HEADS + KV_HEADS) * DIM, v, v_scale, program, tl.load(valid_length), stride,
            blocks, limit, inverse_limit, smallest, KV_HEADS, KEYS, DIM, PIECE,
        )  # fmt: skip
    else:
        row = (program - blocks * KV_HEADS).to(tl.int64)
        pairs = load_pairs(rope, row, DIM, ANGLES, LANES, BLOCK)
        expert = (row >= audio_start).to(tl.int32) + (row >= text_start).to(tl.int32)
        q_scale = tl.maximum(_scale_of(q_weight, of_gain, EXPERTS, DIM), smallest)
        k_scale = tl.maximum(_scale_of(k_weight, of_gain, EXPERTS, DIM), smallest)
        if row == 0:
            tl.store(qk_scale, q_scale * k_scale)
        source = qkv + row * stride
        norm_and_turn(
            source, q_weight + expert * DIM, tl.div_rn(1.0, q_scale), q + row * HEADS * DIM,
            pairs, eps, HEADS, DIM, BLOCK,
        )  # fmt: skip
        norm_and_turn(
            source + HEADS * DIM, k_weight + expert * DIM, tl.div_rn(1.0, k_scale),
            k + row * KV_HEADS * DIM, pairs, eps, KV_HEADS, DIM, BLOCK,
        )  # fmt: skip


@triton.jit
def _values_fp8(
    values, valid_length, v, v_scale,
    row_vectors, blocks, limit, inverse_limit, smallest,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """A block of one head's values; programs are [blocks KV_HEADS], arguments as of `_qkv_fp8`."""
    _quantize_values(
        values, v, v_scale, tl.program_id(0), tl.load(valid_length), row_vectors * LANES, blocks,
        limit, inverse_limit, smallest, KV_HEADS, KEYS, DIM, PIECE,
    )  # fmt: skip


def values_fp8(x: Tensor, length: Tensor, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Values and their scales of `reference.qkv_fp8`, where q and k have been narrowed elsewhere.

    x: [N, at least kv_heads dim] bf16 or fp32, rows that begin with all heads' values, contiguous
    but for their stride; dim as for `qkv_fp8`. length: int32 scalar on the device. Returns v
    [kv_heads, dim, keys] e4m3 and [kv_heads, keys / 128] fp32.
    """
    blocks: int = triton.cdiv(x.shape[0], FP8_KEYS)
    v = x.new_empty((kv_heads, dim, blocks * FP8_KEYS), dtype=FP8)
    v_scale = x.new_empty((kv_heads, blocks), dtype=torch.float32)
    lanes = math.gcd(8, x.stride(0))
    _values_fp8[(blocks * kv_heads,)](
        x, length, v, v_scale, x.stride(0) // lanes, blocks, FP8_LIMIT, 1 / FP8_LIMIT,
        SMALLEST_VALUE, KV_HEADS=kv_heads, DIM=dim, LANES=lanes, KEYS=FP8_KEYS, PIECE=PIECE,
        num_warps=WARPS,
    )  # fmt: skip
    return v, v_scale


def qkv_fp8(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    length: Tensor,
    counts: Counts | None,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.qkv_fp8`.

    Args:
        qkv: [N, (heads + 2 kv_heads) D + heads], rows [Q | K | V | gate], bf16 or fp32, contiguous
            but for its rows' stride.
        q_weight, k_weight: [D], or [3 D] with `counts`, fp32.
        rope: [N, R] fp32, `[sin | cos]` of R / 2 angles.
        length: int32 scalar on the device; values from there on count as zeros.
        counts: rows of video, audio and text, or None for one set of weights.
        heads, kv_heads: of queries, and of keys and values.

    Returns:
        q [N, heads, D] and k [N, kv_heads, D] e4m3; v [kv_heads, D, keys] e4m3, keys whole blocks
        of 128; the scale [1] fp32 of q times k, and those [kv_heads, keys / 128] fp32 of v.

    Raises `ValueError` where D is not a power of two, or below 32. Written for H100 at 40 and 8
    heads of 128.
    """
    rows = qkv.shape[0]
    dim = (qkv.shape[1] - heads) // (heads + 2 * kv_heads)
    if dim & (dim - 1) or dim < PIECE:
        raise ValueError(f"head_dim must be a power of two, {PIECE} at least, got {dim}")
    blocks: int = triton.cdiv(rows, FP8_KEYS)
    q, k, v = (
        qkv.new_empty(shape, dtype=FP8)
        for shape in ((rows, heads, dim), (rows, kv_heads, dim), (kv_heads, dim, blocks * FP8_KEYS))
    )
    qk_scale, v_scale = (
        qkv.new_empty(shape, dtype=torch.float32) for shape in ((1,), (kv_heads, blocks))
    )
    if rows == 0:
        return q, k, v, qk_scale.fill_(1), v_scale
    audio_start, text_start = run_starts(counts, rows)
    angles = rope.shape[1] // 2
    lanes = math.gcd(8, angles, qkv.stride(0))
    _qkv_fp8[(rows + blocks * kv_heads,)](
        qkv, q_weight, k_weight, rope, length, q, k, v, qk_scale, v_scale,
        qkv.stride(0) // lanes, blocks, audio_start, text_start, NORM_EPS,
        dim**0.5 / FP8_LIMIT, FP8_LIMIT, 1 / FP8_LIMIT, SMALLEST_VALUE,
        EXPERTS=1 if counts is None else 3, HEADS=heads, KV_HEADS=kv_heads, DIM=dim, ANGLES=angles,
        LANES=lanes, BLOCK=BLOCK, KEYS=FP8_KEYS, PIECE=PIECE, num_warps=WARPS,
    )  # fmt: skip
    return q, k, v, qk_scale, v_scale
