"""Attention in Triton for any card with tensor cores for bf16, and for e4m3 where they take it.

An online softmax (arXiv 2205.14135, 2307.08691) over loads by pointer. A program owns a tile of
queries of one head. Keys come in blocks that start at multiples of their size: first the whole ones
of both ranges that frame-local attention walks (the frames seen; audio and text), then those that a
range fills in part, masked. Attention over all tokens is the same with an empty first range.

e4m3 values come transposed, with the keys of each 16 in the order in which tensor cores leave the
scores of a row in a thread's registers (`reference.qkv_fp8`). Weights put in that order are
operands of the next product where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.reference import FP8, FP8_KEYS, LocalAttention
from magihuman.kernels.target import Capability, nearest

LOG2_E = math.log2(math.e)
E4M3_PEAK = 8.0  # log2 of the largest weight in e4m3, whose largest value is 448


@dataclass(frozen=True)
class Tile:
    """How a program's work is cut for heads of 128.

    Attributes:
        queries: of a program.
        keys: of a block; in e4m3 a divisor of 128, over which values have a scale.
        warps: of a program.
        stages: blocks of keys in flight.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# Large ones that spill nothing under triton 3.6 and 3.9; those of sm_90 alone could be timed.
BF16_TILES: dict[Capability, Tile] = {
    (8, 0): Tile(128, 64, 8, 2),
    (8, 6): Tile(128, 64, 8, 2),
    (9, 0): Tile(128, 128, 8, 2),
    (10, 0): Tile(128, 128, 8, 2),
    (12, 0): Tile(128, 32, 8, 3),
}
E4M3_TILES: dict[Capability, Tile] = {
    (8, 9): Tile(128, 64, 8, 3),
    (9, 0): Tile(128, 64, 8, 3),
    (10, 0): Tile(128, 64, 8, 3),
    (12, 0): Tile(128, 64, 8, 3),
}
ARCHITECTURES = tuple(sorted({*BF16_TILES, *E4M3_TILES}))


@triton.jit
def _load(places, seen, MASKED: tl.constexpr):
    """A block of rows; MASKED: zeros for those not seen, which are not read."""
    return tl.load(places, mask=seen[:, None], other=0.0) if MASKED else tl.load(places)


@triton.jit
def _step(
    sums, total, peak, unit, query, k, k_places, v, v_places, v_scale, scale, block, low, high,
    BLOCK_K: tl.constexpr, STRIDE: tl.constexpr, E4M3: tl.constexpr, PEAK: tl.constexpr,
    SCALE_KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax.

    sums: [queries, DIM] fp32, in e4m3 of values over `unit`; total, peak: [queries] fp32, peaks
    are logarithms to base 2; MASKED: whether keys from `low` to `high` alone are seen.
    """
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    seen = (key >= low) & (key < high)
    rows = block.to(tl.int64) * (BLOCK_K * STRIDE)
    keys = _load(k + rows + k_places, seen, MASKED)
    scores = tl.dot(query, keys.T)
    if MASKED:
        scores = tl.where(seen[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale - PEAK)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    if E4M3:
        queries: tl.constexpr = weights.shape[0]
        new_unit = tl.load(v_scale + block * BLOCK_K // SCALE_KEYS)
        sums = sums * (decay * (unit / new_unit))[:, None]
        ordered = tl.reshape(weights, (queries, BLOCK_K // 16, 2, 4, 2))
        ordered = tl.reshape(tl.permute(ordered, (0, 1, 3, 2, 4)), (queries, BLOCK_K))
        values = tl.load(v + block * BLOCK_K + v_places)
        sums = tl.dot(ordered.to(values.dtype), values.T, sums)
        unit = new_unit
    else:
        sums = sums * decay[:, None]
        values = _load(v + rows + v_places, seen, MASKED)
        sums = tl.dot(weights.to(values.dtype), values, sums)
    return sums, total, new_peak, unit


@triton.jit
def _tile_of(number, rows, frames, frame_tokens, reach, BLOCK_Q: tl.constexpr):
    """The first query of a tile and the end of its queries; then the frames' keys that they see,
    from `low` to `high`.
    """
    of_frame = tl.cdiv(frame_tokens, BLOCK_Q)
    video = frames * frame_tokens
    in_frames = frames * of_frame
    frame = number // tl.maximum(of_frame, 1)
    if number < in_frames:
        first = frame * frame_tokens + number % of_frame * BLOCK_Q
        end = (frame + 1) * frame_tokens
        low = tl.maximum(frame - reach, 0) * frame_tokens
        high = tl.minimum(frame + reach + 1, frames) * frame_tokens
    else:
        first = video + (number - in_frames) * BLOCK_Q
        end = rows
        low = 0
        high = video
    return first, end, low, high


@triton.jit
def _edges(start, stop, BLOCK_K: tl.constexpr):
    """Whether a range begins inside of a block, and whether it ends inside of another one, as 0 or
    1 each.
    """
    begins = (start % BLOCK_K != 0) & (start < stop)
    ends = (stop % BLOCK_K != 0) & (start < stop)
    ends = ends & ((start // BLOCK_K != stop // BLOCK_K) | (begins == 0))
    return begins.to(tl.int32), ends.to(tl.int32)


@triton.jit(
    do_not_specialize=["rows", "gate_stride", "v_stride", "frames", "frame_tokens", "reach"]
)
def _attention(
    q, k, v, gate, out, qk_scale, v_scale, valid_length, rows, gate_stride, v_stride, scale,
    frames, frame_tokens, reach,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, E4M3: tl.constexpr, PEAK: tl.constexpr, SCALE_KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head against the keys they see; programs are [tiles, HEADS].

    v_stride: in e4m3 keys of a row of v, else unused; SCALE_KEYS: of a scale of v.
    """
    length = tl.load(valid_length)
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    first, end, low, high = _tile_of(tl.program_id(0), rows, frames, frame_tokens, reach, BLOCK_Q)
    video = frames * frame_tokens

    row = tl.arange(0, BLOCK_Q)
    dim = tl.arange(0, DIM)
    key = tl.arange(0, BLOCK_K)
    exists = first + row < end
    at = (first.to(tl.int64) * HEADS + head) * DIM
    places = row[:, None] * (HEADS * DIM) + dim[None, :]
    query = tl.load(q + at + places, mask=exists[:, None], other=0.0)
    k += kv_head * DIM
    k_places = key[:, None] * (KV_HEADS * DIM) + dim[None, :]
    if E4M3:
        scale *= tl.load(qk_scale)
        v += kv_head.to(tl.int64) * DIM * v_stride
        v_places = dim[:, None] * v_stride + key[None, :]
        v_scale += kv_head * (v_stride // SCALE_KEYS)
    else:
        v += kv_head * DIM
        v_places = k_places

    sums = tl.zeros([BLOCK_Q, DIM], dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    unit = 0.0

    near = tl.cdiv(low, BLOCK_K)
    near_blocks = tl.maximum(high // BLOCK_K - near, 0)
    far = tl.cdiv(video, BLOCK_K)
    far_blocks = tl.maximum(length // BLOCK_K - far, 0)
    for i in range(near_blocks + far_blocks):
        block = tl.where(i < near_blocks, near + i, far + i - near_blocks)
        sums, total, peak, unit = _step(
            sums, total, peak, unit, query, k, k_places, v, v_places, v_scale, scale, block, 0, 0,
            BLOCK_K, KV_HEADS * DIM, E4M3, PEAK, SCALE_KEYS, False,
        )  # fmt: skip
    # The block in which a range begins, and that in which it ends, where it does not fill them.
    near_begins, near_ends = _edges(low, high, BLOCK_K)
    far_begins, far_ends = _edges(video, length, BLOCK_K)
    second = near_begins + near_ends
    for i in tl.range(0, second + far_begins + far_ends, num_stages=1):
        is_near = i < second
        start = tl.where(is_near, low, video)
        stop = tl.where(is_near, high, length)
        begins = tl.where(is_near, near_begins - i, second + far_begins - i) > 0
        block = tl.where(begins, start, stop) // BLOCK_K
        sums, total, peak, unit = _step(
            sums, total, peak, unit, query, k, k_places, v, v_places, v_scale, scale, block,
            start, stop, BLOCK_K, KV_HEADS * DIM, E4M3, PEAK, SCALE_KEYS, True,
        )  # fmt: skip

    logit = tl.load(gate + (first + row).to(tl.int64) * gate_stride + head, mask=exists, other=0.0)
    factor = tl.sigmoid(logit.to(tl.float32)) / total
    if E4M3:
        factor *= unit
    result = sums * factor[:, None]
    tl.store(out + at + places, result.to(out.dtype.element_ty), mask=exists[:, None])


def tile_of(capability: Capability, dtype: torch.dtype) -> Tile:
    """The tile for q, k and v of this dtype on a GPU of this capability.

    Raises `ValueError` where there is none, as for e4m3 before sm_89.
    """
    tiles = E4M3_TILES if dtype == FP8 else BF16_TILES
    return tiles[nearest(capability, tiles)]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    length: Tensor,
    local: LocalAttention | None,
    tile: Tile,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`reference.gated_attention`, or, with `scales`, `reference.attention_fp8`.

    Args:
        q: [N, heads, D] bf16 or e4m3, contiguous; D 32, 64 or 128.
        k: [N, kv_heads, D] of q's dtype, contiguous.
        v: [N, kv_heads, D] bf16 contiguous, or [kv_heads, D, keys] e4m3, keys whole blocks of 128
            in the order of `reference.qkv_fp8`, those from `length` on zeros.
        gate: [N, heads] of a float dtype, any row stride.
        length: int32 scalar on the device, 1 to N: keys from there on carry no weight. With
            `local`, beyond the last frame.
        local: shape of frame-local attention, or None for all tokens.
        tile: what `tile_of` returns, or any other that fits.
        scales: of e4m3, [1] fp32 of q times k, and [kv_heads, keys / 128] fp32 of v.

    Returns:
        [N, heads, D] in q's dtype, for e4m3 in bf16. Rows from `length` on are computed and mean
        nothing.
    """
    rows, heads, dim = q.shape
    out = torch.empty_like(q) if scales is None else q.new_empty(q.shape, dtype=torch.bfloat16)
    frames, frame_tokens, reach = local or (0, 0, 0)
    tiles = frames * triton.cdiv(frame_tokens, tile.queries)
    tiles += triton.cdiv(rows - frames * frame_tokens, tile.queries)
    _attention[(tiles, heads)](
        q, k, v, gate, out, *(scales or (None, None)), length, rows, gate.stride(0),
        v.shape[2], dim**-0.5 * LOG2_E, frames, frame_tokens, reach,
        HEADS=heads, KV_HEADS=k.shape[1], DIM=dim, BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
        E4M3=scales is not None, PEAK=0.0 if scales is None else E4M3_PEAK, SCALE_KEYS=FP8_KEYS,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
