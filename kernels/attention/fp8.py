"""Attention over e4m3 queries, keys and values for Hopper, in Gluon, by the scheme of `gluon`.

Tensor cores take 8-bit values only with the keys along a row, and 8-bit weights from registers only
in an order of keys that differs from the one in which they leave the scores. So values come
transposed and with their keys in the latter order (`reference.qkv_fp8`), and nothing moves
between threads. Weights are largest at 2^8, of e4m3's 448. Values have a scale for each block of
keys; the weighted sum is kept in that of the block last added, a factor of its decay.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from magihuman.kernels.attention.shared_rows import SharedRows
from magihuman.kernels.attention.tiles import (
    LOADER_REGISTERS,
    LOG2_E,
    REGISTERS_OF_THREE,
    REGISTERS_OF_TWO,
    ROWS,
    Frames,
    Output,
    Owners,
    Rings,
    Sequence,
    lane_sums,
    load,
    make_rings,
    processors,
    softmax,
    tensor_map,
    tiles_of,
    tiles_of_head,
)
from magihuman.kernels.reference import FP8_KEYS, LocalAttention

BLOCK_K = gl.constexpr(FP8_KEYS)  # keys in a block: those that share a scale of values
STAGES = 3
PEAK = gl.constexpr(8.0)  # log2 of the largest weight
# How much more work three consumers may take and still be faster: it fits what was measured at
# 3,700, 4,286 and 14,784 rows of 40 heads, and nothing else was.
GAIN = 1.05


@gluon.jit
def _as_operand(weights, layout: gl.constexpr):
    """Weights [queries, keys] fp32 as the left operand of a product, in e4m3 and in this layout.

    They stay in the registers where the scores left them, and so count as the weights of the keys
    in the order of the values. Four neighbours become a register by two conversions: the compiler
    would take each byte out.
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
def _consume(
    output: Output, scale, v_scale, rings: Rings, seq: Sequence,
    SELF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warp group: 64 queries against the valid keys they see, then gate and store."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, seq.BLOCK_K, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, seq.DIM, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)

    queries, keys, values = rings.queries, rings.keys, rings.values
    query = queries.memory.index(SELF)
    staging = rings.results.index(SELF)
    no_scores = gl.zeros([ROWS, seq.BLOCK_K], gl.float32, s_layout)
    video = seq.frames.count * seq.frames.tokens
    all_blocks = gl.cdiv(seq.rows, seq.BLOCK_K)
    count = 0
    for number in range(gl.program_id(0), seq.tiles, gl.num_programs(0)):
        tile = seq.tile(number)
        first = tile.first + SELF * ROWS
        blocks = seq.key_blocks(video, tile)
        lap = number // gl.num_programs(0)
        slot = count % STAGES
        scales = v_scale + tile.kv_head * all_blocks

        # The first block, masked.
        mbarrier.wait(queries.full.index(SELF), lap & 1)
        mbarrier.wait(keys.full.index(slot), count // STAGES & 1)
        key = keys.memory.index(slot).permute((1, 0))
        scores = warpgroup_mma(query, key, no_scores, use_acc=False)
        mbarrier.arrive(keys.empty.index(slot))
        block = seq.key_block(0, video, tile)
        scores = block.mask(scores, s_layout)
        unit = gl.load(scales + block.index)
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        total = lane_sums(no_scores)
        sums = gl.zeros([ROWS, seq.DIM], gl.float32, o_layout)

        # Of two consumers each has its softmax beside the scores of the next block, and beside the
        # other's products. Three have no registers for scores and sums in flight together: each has
        # its softmax beside the products of the others alone. Its own weighted sum is waited for:
        # weights that go round the loop would do so byte by byte.
        for i in range(1, blocks):
            next_slot = (count + 1) % STAGES
            key = keys.memory.index(next_slot).permute((1, 0))
            if seq.CONSUMERS == 2:
                mbarrier.wait(keys.full.index(next_slot), (count + 1) // STAGES & 1)
                pending = warpgroup_mma(query, key, no_scores, use_acc=False, is_async=True)
            peak, total, decay, weights = softmax(scores, scale, peak, total, PEAK)
            new_unit = gl.load(scales + block.index)
            block = seq.key_block(i, video, tile)
            sums = sums * gl.convert_layout(decay * (unit / new_unit), o_row)[:, None]
            weight = _as_operand(weights, p_layout)
            mbarrier.wait(values.full.index(slot), count // STAGES & 1)
            value = values.memory.index(slot).permute((1, 0))
            sums = warpgroup_mma(weight, value, sums, is_async=True)
            if seq.CONSUMERS == 2:
                scores, sums = warpgroup_mma_wait(0, [pending, sums])
            else:
                sums = warpgroup_mma_wait(0, [sums])
                mbarrier.wait(keys.full.index(next_slot), (count + 1) // STAGES & 1)
                scores = warpgroup_mma(query, key, no_scores, use_acc=False)
            mbarrier.arrive(keys.empty.index(next_slot))
            mbarrier.arrive(values.empty.index(slot))
            if seq.frames.LOCAL:
                scores = block.mask_ends(scores, s_layout)
            unit = new_unit
            slot = next_slot
            count += 1
        mbarrier.arrive(queries.empty.index(SELF))

        peak, total, decay, weights = softmax(scores, scale, peak, total, PEAK)
        new_unit = gl.load(scales + block.index)
        sums = sums * gl.convert_layout(decay * (unit / new_unit), o_row)[:, None]
        weight = _as_operand(weights, p_layout)
        mbarrier.wait(values.full.index(slot), count // STAGES & 1)
        value = values.memory.index(slot).permute((1, 0))
        sums = warpgroup_mma(weight, value, sums, is_async=True)
        factor = new_unit / gl.convert_layout(gl.sum(total, 1), o_row)
        factor = output.gated(factor, seq.rows, first, tile.head, o_row)
        sums = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(values.empty.index(slot))
        count += 1

        output.store(sums * factor[:, None], staging, seq, tile, first, o_layout)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["rows", "gate_stride", "frames", "frame_tokens", "reach", "rows_each"]
)
def _attention(
    q_map, k_map, v_map, out_map, out, gate, qk_scale, v_scale, valid_length, rows,
    gate_stride, scale, frames, frame_tokens, reach, distances, rows_each, out_stride,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    LOCAL: gl.constexpr, CONSUMERS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    length = gl.load(valid_length)
    scale *= gl.load(qk_scale)
    local = Frames(frames, frame_tokens, reach, LOCAL)
    tiles = tiles_of_head(rows, local, CONSUMERS) * HEADS
    seq = Sequence(rows, length, tiles, local, HEADS, KV_HEADS, DIM, BLOCK_K, CONSUMERS)
    rings = make_rings(q_map, k_map, v_map, out_map, STAGES, CONSUMERS)
    owners = Owners(distances, rows_each, out_stride, SHARED)
    output = Output(out_map, out, gate, gate_stride, owners)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (output, scale, v_scale, rings, seq, 0, STAGES)),
                (_consume, (output, scale, v_scale, rings, seq, 1, STAGES)),
                (load, (q_map, k_map, v_map, rings, seq, STAGES, True)),
            ],
            [4, 1],
            [REGISTERS_OF_TWO, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (output, scale, v_scale, rings, seq, 0, STAGES)),
                (_consume, (output, scale, v_scale, rings, seq, 1, STAGES)),
                (_consume, (output, scale, v_scale, rings, seq, 2, STAGES)),
                (load, (q_map, k_map, v_map, rings, seq, STAGES, True)),
            ],
            [4, 4, 1],
            [REGISTERS_OF_THREE, REGISTERS_OF_THREE, LOADER_REGISTERS],
        )


def consumers_for(rows: int, heads: int, local: LocalAttention | None, processors: int) -> int:
    """How many consumers share a tile, 2 or 3: what takes least, whole rounds of tiles counted.

    Frame-local attention took 6 % longer with three, at 1920x1088 on an H200.
    """
    if local is not None:
        return 2
    two, three = (n * triton.cdiv(tiles_of(rows, heads, None, n), processors) for n in (2, 3))
    return 3 if three <= GAIN * two else 2


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: Tensor,
    v_scale: Tensor,
    gate: Tensor,
    length: Tensor,
    local: LocalAttention | None = None,
    consumers: int | None = None,
    shared: SharedRows | None = None,
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
        consumers: of a tile of queries, 64 each, 2 or 3; by default as of `consumers_for`.
        shared: where rows go, not with `local`, if not all of them are this process's.

    Returns:
        [N, heads, D] bf16, or the `out` of `shared`. Rows from `length` on are computed and mean
        nothing.

    Tuned on H100 at D = 128: in two runs 842 and 871 TFLOP/s at N = 4286, 794 and 751 by two
    consumers, and 882 and 902 at N = 14784, 860 and 822 by two; by two 887 of what frame-local
    attention over 32 frames of 1080p computes.
    Weights that go round the loop (as in bf16, beside the next block's softmax) cost 27 %: the
    compiler carries their bytes.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    programs = processors(q.device)
    consumers = consumers or consumers_for(rows, heads, local, programs)
    tiles = tiles_of(rows, heads, local, consumers)
    if shared is None:
        out = q.new_empty(q.shape, dtype=torch.bfloat16)
        result, distances = out.view(rows, -1), length
    else:
        out, distances = shared.out, shared.distances
        result = out[:, shared.first : shared.first + heads * dim]
    _attention[(min(tiles, programs),)](
        tensor_map(q.view(rows, -1), ROWS.value, dim),
        tensor_map(k.view(rows, -1), BLOCK_K.value, dim),
        tensor_map(v.flatten(0, 1), dim, BLOCK_K.value),
        tensor_map(result, ROWS.value, dim),
        result, gate, qk_scale, v_scale, length, rows, gate.stride(0), dim**-0.5 * LOG2_E,
        *(local or (0, 0, 0)), distances, out.shape[0], result.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, STAGES=STAGES, LOCAL=local is not None,
        CONSUMERS=consumers, SHARED=shared is not None, num_warps=4,
    )  # fmt: skip
    return out
