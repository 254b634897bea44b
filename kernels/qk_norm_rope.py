"""Per-head norm and rotation of q and k, and the layout attention wants, in one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.reference import NORM_EPS, Counts, run_starts

BLOCK = 2  # heads of a program
WARPS = 1


@triton.jit
def _norm_and_turn(
    source, weight, target, head, count, dim, partner, sin, cos, eps, DIM: tl.constexpr
):  # fmt: skip
    """Heads of one row as a tile [heads, groups, lanes]; `partner`: the other dim of each pair."""
    x = tl.load(source + head * DIM + dim, mask=head < count, other=0.0).to(tl.float32)
    other = tl.load(source + head * DIM + partner, mask=head < count, other=0.0).to(tl.float32)
    own_gain = tl.load(weight + dim) + 1.0
    other_gain = tl.load(weight + partner) + 1.0
    mean = tl.sum(tl.sum(x * x, axis=2), axis=1) / DIM
    scale = tl.rsqrt(mean + eps)[:, None, None]
    turned = x * scale * own_gain * cos + other * scale * other_gain * sin
    tl.store(target + head * DIM + dim, turned.to(target.dtype.element_ty), mask=head < count)


@triton.jit
def _copy(source, target, head, count, dim, DIM: tl.constexpr):
    x = tl.load(source + head * DIM + dim, mask=head < count, other=0.0)
    tl.store(target + head * DIM + dim, x, mask=head < count)


@triton.jit
def _qk_norm_rope(
    qkv,
    q_weight,
    k_weight,
    rope,
    q,
    k,
    v,
    qkv_stride,
    audio_start,
    text_start,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ANGLES: tl.constexpr,  # rotated pairs; dims at 2 * ANGLES and above pass through
    LANES: tl.constexpr,  # dims that are loaded together; divides ANGLES and DIM
    BLOCK: tl.constexpr,  # heads of a program
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    heads = tl.arange(0, BLOCK)[:, None, None]
    group = tl.arange(0, DIM // LANES)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    pairs: tl.constexpr = ANGLES // LANES  # groups of first halves; as many of second halves follow
    is_first = group < pairs
    is_rotated = group < 2 * pairs
    partner_group = tl.where(is_first, group + pairs, tl.where(is_rotated, group - pairs, group))
    dim = group * LANES + lane
    partner = partner_group * LANES + lane
    table = rope + row * 2 * ANGLES + tl.where(is_first, group, group - pairs) * LANES + lane
    turns = is_rotated & (lane >= 0)  # the mask in the shape of the tile
    sin = tl.load(table, mask=turns, other=0.0)
    cos = tl.load(table + ANGLES, mask=turns, other=1.0)
    sin = tl.where(is_first, -sin, sin)
    expert = (row >= audio_start).to(tl.int32) + (row >= text_start).to(tl.int32)

    source = qkv + row * qkv_stride
    q_gain = q_weight + expert * DIM
    k_gain = k_weight + expert * DIM
    if block < q_blocks:
        _norm_and_turn(
            source, q_gain, q + row * HEADS * DIM, block * BLOCK + heads, HEADS,
            dim, partner, sin, cos, eps, DIM,
        )  # fmt: skip
    else:
        head = (block - q_blocks) * BLOCK + heads
        k_source = source + HEADS * DIM
        _norm_and_turn(
            k_source, k_gain, k + row * KV_HEADS * DIM, head, KV_HEADS,
            dim, partner, sin, cos, eps, DIM,
        )  # fmt: skip
        v_source = k_source + KV_HEADS * DIM
        _copy(v_source, v + row * KV_HEADS * DIM, head, KV_HEADS, dim, DIM)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    counts: Counts | None,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.qk_norm_rotary` of q and k, and v, each contiguous.

    Args:
        qkv: [N, (heads + 2 kv_heads) D + heads], rows [Q | K | V | gate], bf16 or fp32.
        q_weight, k_weight: [D], or [3 D] with `counts`, fp32.
        rope: [N, R] fp32, `[sin | cos]` of R / 2 angles.
        counts: rows of video, audio and text.

    Returns:
        q [N, heads, D]; k, v [N, kv_heads, D], in qkv's dtype. D must be a power of two.
    """
    rows = qkv.shape[0]
    dim = (qkv.shape[1] - heads) // (heads + 2 * kv_heads)
    if dim & (dim - 1):
        raise ValueError(f"head_dim must be a power of two, got {dim}")
    q = torch.empty((rows, heads, dim), dtype=qkv.dtype, device=qkv.device)
    k, v = (torch.empty((rows, kv_heads, dim), dtype=qkv.dtype, device=qkv.device) for _ in "kv")
    if rows == 0:
        return q, k, v
    audio_start, text_start = run_starts(counts, rows)
    angles = rope.shape[1] // 2
    blocks = triton.cdiv(heads, BLOCK) + triton.cdiv(kv_heads, BLOCK)
    _qk_norm_rope[(rows, blocks)](
        qkv, q_weight, k_weight, rope, q, k, v, qkv.stride(0), audio_start, text_start, NORM_EPS,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, ANGLES=angles, LANES=math.gcd(8, angles),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return q, k, v
