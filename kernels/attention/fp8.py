"""Attention over e4m3 queries, keys and values for Hopper, in Gluon: as `gluon`.

Tensor cores take 8-bit values only with the keys along a row, and 8-bit weights from registers only
in an order of keys that differs from the one in which they leave the scores. So values come
transposed and with their keys in the latter order (`reference.qkv_fp8`), and nothing moves
between threads. Weights are largest at 2^8, of e4m3's 448. Values have a scale for each block of
keys; the weighted sum is kept in that of the block last added, a factor of its decay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from magihuman.kernels.attention.gluon import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    LOADER_REGISTERS,
    LOG2_E,
    ROWS,
    _blocks,
    _key_block,
    _lane_sums,
    _load,
    _mask,
    _mask_ends,
    _place,
    _processors,
    _ring,
    _row_tiles,
    _store,
    tiles_of,
)
from magihuman.kernels.reference import FP8_KEYS, LocalAttention

BLOCK_K = gl.constexpr(FP8_KEYS)  # keys in a block: those that share a scale of values
STAGES = 3
PEAK = gl.constexpr(8.0)  # log2 of the largest weight


@gluon.jit
def _as_operand(weights, layout: gl.constexpr):
    """Weights as they leave the scores, taken for those of the keys in the order of the values.

    Four neighbours become a register by two conversions: the compiler would take each byte out.
    """
    rows: gl.constexpr = weights.shape[0]
    keys: gl.constexpr = weights.shape[1]
    groups = weights.reshape([rows, keys // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [gl.convert_layout(groups.reshape([rows, keys]), layout)],
        gl.float8e4nv,
        True,
        4,
    )


@gluon.jit
def _softmax(scores, scale, peak, total):
    """Peak and lanes' totals with this block, the factor by which sums decay, and its weights."""
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale - PEAK)
    weights = gl.exp2(gl.fma(scores, scale, -new_peak[:, None]))
    decay = gl.exp2(peak - new_peak)
    fresh = _lane_sums(weights)
    lane_row: gl.constexpr = gl.SliceLayout(1, fresh.type.layout)
    total = total * gl.convert_layout(decay, lane_row)[:, None] + fresh
    return new_peak, decay, weights, total


@gluon.jit
def _consume(
    out_map, out_place, gate, gate_stride, scale, v_scale, q_ring, k_ring, v_ring, outs,
    rows, length, tiles, frames, frame_tokens, reach,
    SELF: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr, LOCAL: gl.constexpr,
):  # fmt: skip
    """A consumer warp group: 64 queries against the valid keys they see, then gate and store."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)

    queries, q_full, q_empty = q_ring
    keys, k_full, k_empty = k_ring
    values, v_full, v_empty = v_ring
    query = queries.index(SELF)
    out = outs.index(SELF)
    no_scores = gl.zeros([ROWS, BLOCK_K], gl.float32, s_layout)
    video = frames * frame_tokens
    all_blocks = gl.cdiv(rows, BLOCK_K)
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, kv_head, first, end, low, high = _place(
            tile, rows, frames, frame_tokens, reach, HEADS, KV_HEADS, LOCAL
        )
        first += SELF * ROWS
        blocks = _blocks(video, length, low, high, BLOCK_K, LOCAL)
        lap = tile // gl.num_programs(0)
        slot = count % STAGES
        scales = v_scale + kv_head * all_blocks

        # The first block, masked.
        mbarrier.wait(q_full.index(SELF), lap & 1)
        mbarrier.wait(k_full.index(slot), count // STAGES & 1)
        scores = warpgroup_mma(query, keys.index(slot).permute((1, 0)), no_scores, use_acc=False)
        mbarrier.arrive(k_empty.index(slot))
        block, key_first, key_end = _key_block(0, video, length, low, high, BLOCK_K, LOCAL)
        scores = _mask(scores, block, key_first, key_end, BLOCK_K, s_layout)
        unit = gl.load(scales + block)
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        total = _lane_sums(no_scores)
        sums = gl.zeros([ROWS, DIM], gl.float32, o_layout)

        # A block's softmax runs beside the scores of the next, and beside the other consumer's
        # products. Its own weighted sum is waited for: weights that go round the loop would do so
        # byte by byte.
        for i in range(1, blocks):
            next_slot = (count + 1) % STAGES
            mbarrier.wait(k_full.index(next_slot), (count + 1) // STAGES & 1)
            pending = warpgroup_mma(
                query, keys.index(next_slot).permute((1, 0)), no_scores, use_acc=False,
                is_async=True,
            )  # fmt: skip
            peak, decay, weights, total = _softmax(scores, scale, peak, total)
            new_unit = gl.load(scales + block)
            block, key_first, key_end = _key_block(i, video, length, low, high, BLOCK_K, LOCAL)
            sums = sums * gl.convert_layout(decay * (unit / new_unit), o_row)[:, None]
            weight = _as_operand(weights, p_layout)
            mbarrier.wait(v_full.index(slot), count // STAGES & 1)
            sums = warpgroup_mma(weight, values.index(slot).permute((1, 0)), sums, is_async=True)
            scores, sums = warpgroup_mma_wait(0, [pending, sums])
            mbarrier.arrive(k_empty.index(next_slot))
            mbarrier.arrive(v_empty.index(slot))
            if LOCAL:
                scores = _mask_ends(scores, block, key_first, key_end, BLOCK_K, s_layout)
            unit = new_unit
            slot = next_slot
            count += 1
        mbarrier.arrive(q_empty.index(SELF))

        peak, decay, weights, total = _softmax(scores, scale, peak, total)
        new_unit = gl.load(scales + block)
        sums = sums * gl.convert_layout(decay * (unit / new_unit), o_row)[:, None]
        weight = _as_operand(weights, p_layout)
        mbarrier.wait(v_full.index(slot), count // STAGES & 1)
        sums = warpgroup_mma(weight, values.index(slot).permute((1, 0)), sums, is_async=True)
        factor = new_unit / gl.convert_layout(gl.sum(total, 1), o_row)
        row = first + gl.arange(0, ROWS, o_row)
        place = gate + row.to(gl.int64) * gate_stride + head
        logit = gl.load(place, mask=row < rows, other=0.0).to(gl.float32)
        factor = factor / (1.0 + gl.exp(-logit))
        sums = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(v_empty.index(slot))
        count += 1

        _store(
            sums * factor[:, None], out_map, out_place, out, first, end, head, HEADS, DIM, o_layout,
            LOCAL,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "gate_stride", "frames", "frame_tokens", "reach"])
def _attention(
    q_map, k_map, v_map, out_map, out_place, gate, qk_scale, v_scale, valid_length, rows,
    gate_stride, scale, frames, frame_tokens, reach,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    LOCAL: gl.constexpr,
):  # fmt: skip
    length = gl.load(valid_length)
    scale *= gl.load(qk_scale)
    tiles = _row_tiles(rows, frames, frame_tokens, LOCAL) * HEADS
    dtype: gl.constexpr = q_map.dtype
    q_ring = _ring(dtype, CONSUMERS, q_map, 1)
    k_ring = _ring(dtype, STAGES, k_map, CONSUMERS)
    v_ring = _ring(dtype, STAGES, v_map, CONSUMERS)
    outs = gl.allocate_shared_memory(out_map.dtype, [CONSUMERS, ROWS, DIM], out_map.layout)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                out_map, out_place, gate, gate_stride, scale, v_scale, q_ring, k_ring, v_ring, outs,
                rows, length, tiles, frames, frame_tokens, reach,
                0, HEADS, KV_HEADS, DIM, STAGES, LOCAL,
            )),
            (_consume, (
                out_map, out_place, gate, gate_stride, scale, v_scale, q_ring, k_ring, v_ring, outs,
                rows, length, tiles, frames, frame_tokens, reach,
                1, HEADS, KV_HEADS, DIM, STAGES, LOCAL,
            )),
            (_load, (
                q_map, k_map, v_map, q_ring, k_ring, v_ring,
                rows, length, tiles, frames, frame_tokens, reach,
                HEADS, KV_HEADS, DIM, BLOCK_K, STAGES, LOCAL, True,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def _map(x: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """A tensor map over a matrix of contiguous rows."""
    box = [block_rows, block_columns]
    dtype = gl.bfloat16 if x.element_size() == 2 else gl.float8e4nv
    layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: Tensor,
    v_scale: Tensor,
    gate: Tensor,
    length: Tensor,
    local: LocalAttention | None = None,
) -> Tensor:
    """`reference.attention_fp8` in bf16.

    Args:
        q: [N, heads, D] e4m3 contiguous; D 32, 64 or 128.
        k: [N, kv_heads, D] e4m3 contiguous.
        v: [kv_heads, D, keys] e4m3, keys whole blocks of 128 in the order of
            `reference.qkv_fp8`; those from `length` on are zeros.
        qk_scale: [1] fp32, of q times k.
        v_scale: [kv_heads, keys / 128] fp32.
        gate: [N, heads] of a float dtype, any row stride.
        length: int32 scalar on the device, 1 to N: keys from there on carry no weight. With
            `local`, beyond the last frame.
        local: shape of frame-local attention, or None for all tokens.

    Returns:
        [N, heads, D] bf16. Rows from `length` on are computed and mean nothing.

    Tuned on H100 at D = 128: 806 TFLOP/s at N = 4286, 850 at N = 14784; at N = 65,726 (1080p) 947,
    and 887 of what frame-local attention over 32 frames computes. Weights that go round the
    loop (as in bf16, beside the next block's softmax) cost 27 %: the compiler carries their bytes.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    out = q.new_empty(q.shape, dtype=torch.bfloat16)
    tiles = tiles_of(rows, heads, local)
    _attention[(min(tiles, _processors(q.device)),)](
        _map(q.view(rows, -1), ROWS.value, dim), _map(k.view(rows, -1), BLOCK_K.value, dim),
        _map(v.flatten(0, 1), dim, BLOCK_K.value), _map(out.view(rows, -1), ROWS.value, dim),
        out, gate, qk_scale, v_scale, length, rows, gate.stride(0), dim**-0.5 * LOG2_E,
        *(local or (0, 0, 0)),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, STAGES=STAGES, LOCAL=local is not None,
        num_warps=4,
    )  # fmt: skip
    return out
