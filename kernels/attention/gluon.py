"""Attention for Hopper in Gluon: one loader warp feeds two consumer warp groups.

The scheme is FlashAttention-3 (arXiv 2407.08608). A tile is 128 queries of one head, 64 for each
consumer. The loader fills rings of key and value blocks through tensor maps. A consumer issues the
scores of the next key block before the weighted sum of the current one, so that its softmax runs
while the tensor cores work. The block with the last valid key comes first: the only masked one.
What both this kernel and that for e4m3 are built from is in `tiles`, frame-local attention too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from magihuman.kernels.attention.tiles import (
    LOADER_REGISTERS,
    LOG2_E,
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
from magihuman.kernels.reference import LocalAttention

BLOCK_K = 128  # keys in a block
CONSUMERS = gl.constexpr(2)
STAGES = 2  # blocks of keys, and as many of values, in shared memory


@gluon.jit
def _consume(
    output: Output, scale, rings: Rings, seq: Sequence, SELF: gl.constexpr, STAGES: gl.constexpr
):
    """A consumer warp group: 64 queries against the valid keys they see, then gate and store."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, seq.BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, seq.DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)

    queries, keys, values = rings.queries, rings.keys, rings.values
    query = queries.memory.index(SELF)
    staging = rings.results.index(SELF)
    dtype: gl.constexpr = staging.dtype
    no_scores = gl.zeros([ROWS, seq.BLOCK_K], gl.float32, s_layout)
    video = seq.frames.count * seq.frames.tokens
    count = 0
    for number in range(gl.program_id(0), seq.tiles, gl.num_programs(0)):
        tile = seq.tile(number)
        first = tile.first + SELF * ROWS
        blocks = seq.key_blocks(video, tile)
        lap = number // gl.num_programs(0)
        slot = count % STAGES
        parity = count // STAGES & 1

        # The first block, masked.
        mbarrier.wait(queries.full.index(SELF), lap & 1)
        mbarrier.wait(keys.full.index(slot), parity)
        key = keys.memory.index(slot).permute((1, 0))
        scores = warpgroup_mma(query, key, no_scores, use_acc=False)
        mbarrier.arrive(keys.empty.index(slot))
        scores = seq.key_block(0, video, tile).mask(scores, s_layout)
        peak = gl.max(scores, 1) * scale
        weights = gl.exp2(gl.fma(scores, scale, -peak[:, None]))
        total = lane_sums(weights)
        weight = gl.convert_layout(weights.to(dtype), p_layout)
        sums = gl.zeros([ROWS, seq.DIM], gl.float32, o_layout)

        # Every other block: its scores beside the weighted sum of the block before.
        for i in range(1, blocks):
            count += 1
            k_slot = count % STAGES
            k_parity = count // STAGES & 1
            mbarrier.wait(keys.full.index(k_slot), k_parity)
            key = keys.memory.index(k_slot).permute((1, 0))
            pending = warpgroup_mma(query, key, no_scores, use_acc=False, is_async=True)
            mbarrier.wait(values.full.index(slot), parity)
            sums = warpgroup_mma(weight, values.memory.index(slot), sums, is_async=True)
            scores = warpgroup_mma_wait(1, [pending])
            mbarrier.arrive(keys.empty.index(k_slot))
            if seq.frames.LOCAL:
                scores = seq.key_block(i, video, tile).mask_ends(scores, s_layout)
            peak, total, decay, weights = softmax(scores, scale, peak, total, 0.0)
            # Already complete, hence free; the branch in it keeps ptxas from moving the softmax
            # below the wait for the weighted sum, where it would overlap with nothing.
            mbarrier.wait(values.full.index(slot), parity)
            sums = warpgroup_mma_wait(0, [sums])
            mbarrier.arrive(values.empty.index(slot))
            sums = sums * gl.convert_layout(decay, o_row)[:, None]
            weight = gl.convert_layout(weights.to(dtype), p_layout)
            slot = k_slot
            parity = k_parity
        mbarrier.arrive(queries.empty.index(SELF))

        mbarrier.wait(values.full.index(slot), parity)
        sums = warpgroup_mma(weight, values.memory.index(slot), sums, is_async=True)
        factor = 1.0 / gl.convert_layout(gl.sum(total, 1), o_row)
        factor = output.gated(factor, seq.rows, first, tile.head, o_row)
        sums = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(values.empty.index(slot))
        count += 1

        output.store(sums * factor[:, None], staging, seq, tile, first, o_layout)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "gate_stride", "frames", "frame_tokens", "reach"])
def _attention(
    q_map, k_map, v_map, out_map, out, gate, valid_length, rows, gate_stride, scale,
    frames, frame_tokens, reach,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, LOCAL: gl.constexpr,
):  # fmt: skip
    length = gl.load(valid_length)
    local = Frames(frames, frame_tokens, reach, LOCAL)
    tiles = tiles_of_head(rows, local, CONSUMERS) * HEADS
    seq = Sequence(rows, length, tiles, local, HEADS, KV_HEADS, DIM, BLOCK_K, CONSUMERS)
    rings = make_rings(q_map, k_map, v_map, out_map, STAGES, CONSUMERS)
    output = Output(out_map, out, gate, gate_stride, Owners(out, rows, rows, False))
    gl.warp_specialize(
        [
            (_consume, (output, scale, rings, seq, 0, STAGES)),
            (_consume, (output, scale, rings, seq, 1, STAGES)),
            (load, (q_map, k_map, v_map, rings, seq, STAGES, False)),
        ],
        [4, 1],
        [REGISTERS_OF_TWO, LOADER_REGISTERS],
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    length: Tensor,
    local: LocalAttention | None = None,
) -> Tensor:
    """`reference.head_gate(reference.attention(q, k, v, local, length), gate)`.

    Args:
        q: [N, heads, D] bf16 contiguous; D 32, 64 or 128.
        k, v: [N, kv_heads, D] bf16 contiguous. Rows of v between `length` and the end of its
            block are multiplied by zero, so they must be finite.
        gate: [N, heads] of a float dtype, any row stride.
        length: int32 scalar on the device, 1 to N: keys from there on carry no weight. With
            `local`, beyond the last frame.
        local: shape of frame-local attention, or None for all tokens.

    Returns:
        [N, heads, D] in q's dtype. Rows from `length` on are computed and mean nothing.

    Tuned on H100 at D = 128: 618 TFLOP/s at N = 4266, 649 at N = 14762; at N = 65,726 (1080p) 729,
    and 704 of what frame-local attention over 32 frames computes. Strict turns of the two
    consumers at the tensor cores, one program a tile, and blocks of 64 keys were all slower.
    """
    rows, heads, dim = q.shape
    out = torch.empty_like(q)
    tiles = tiles_of(rows, heads, local, CONSUMERS.value)
    _attention[(min(tiles, processors(q.device)),)](
        tensor_map(q.view(rows, -1), ROWS.value, dim), tensor_map(k.view(rows, -1), BLOCK_K, dim),
        tensor_map(v.view(rows, -1), BLOCK_K, dim), tensor_map(out.view(rows, -1), ROWS.value, dim),
        out, gate, length, rows, gate.stride(0), dim**-0.5 * LOG2_E,
        *(local or (0, 0, 0)),
        HEADS=heads, KV_HEADS=k.shape[1], DIM=dim, BLOCK_K=BLOCK_K, STAGES=STAGES,
        LOCAL=local is not None, num_warps=4,
    )  # fmt: skip
    return out
