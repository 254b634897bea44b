"""Attention for Hopper in Gluon: one loader warp feeds two consumer warp groups.

The scheme is FlashAttention-3 (arXiv 2407.08608). A tile is 128 queries of one head, 64 for each
consumer. The loader fills rings of key and value blocks through tensor maps. A consumer issues the
scores of the next key block before the weighted sum of the current one, so that its softmax runs
while the tensor cores work. The block with the last valid key comes first: the only masked one.

A ring is (slots, full, empty). The copy engine completes `full`, both consumers complete `empty`;
slot and parity follow from a running count of blocks, which never restarts between tiles.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
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

LOG2_E = math.log2(math.e)
CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # queries of a consumer: the height of one wgmma
CONSUMER_REGISTERS = gl.constexpr(240)
LOADER_REGISTERS = gl.constexpr(24)
BLOCK_K = 128  # keys in a block
STAGES = 2  # blocks of keys, and as many of values, in shared memory


@gluon.jit
def _place(tile, rows, HEADS: gl.constexpr, KV_HEADS: gl.constexpr):
    """First query, head and key head of a tile. Tiles that share keys are neighbours."""
    shared: gl.constexpr = HEADS // KV_HEADS
    per_kv_head = gl.cdiv(rows, CONSUMERS * ROWS) * shared
    kv_head = tile // per_kv_head
    rest = tile % per_kv_head
    return rest // shared * CONSUMERS * ROWS, kv_head * shared + rest % shared, kv_head


@gluon.jit
def _ring(dtype: gl.constexpr, slots: gl.constexpr, box, readers: gl.constexpr):
    shape: gl.constexpr = [slots, box.block_shape[0], box.block_shape[1]]
    memory = gl.allocate_shared_memory(dtype, shape, box.layout)
    full = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(slots):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=readers)
    return memory, full, empty


@gluon.jit
def _fill(ring, slot, lap, source, row, column):
    """Wait until the slot's previous block is used up, then copy a new one into it."""
    memory, full, empty = ring
    mbarrier.wait(empty.index(slot), (lap & 1) ^ 1)
    mbarrier.expect(full.index(slot), source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [row, column], full.index(slot), memory.index(slot))


@gluon.jit
def _load(
    q_map, k_map, v_map, q_ring, k_ring, v_ring, rows, length, tiles,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loader warp: the queries of a tile, then keys one block ahead of values."""
    blocks = gl.cdiv(length, BLOCK_K)
    k_count = 0
    v_count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first, head, kv_head = _place(tile, rows, HEADS, KV_HEADS)
        lap = tile // gl.num_programs(0)
        for consumer in gl.static_range(CONSUMERS):
            _fill(q_ring, consumer, lap, q_map, first + consumer * ROWS, head * DIM)
        for i in range(blocks + 1):
            if i < blocks:
                key = gl.where(i == 0, blocks - 1, i - 1) * BLOCK_K
                _fill(k_ring, k_count % STAGES, k_count // STAGES, k_map, key, kv_head * DIM)
                k_count += 1
            if i > 0:
                key = gl.where(i == 1, blocks - 1, i - 2) * BLOCK_K
                _fill(v_ring, v_count % STAGES, v_count // STAGES, v_map, key, kv_head * DIM)
                v_count += 1


@gluon.jit
def _lane_sums(x):
    """[rows, keys] -> [rows, 4]: what each of a row's four lanes holds; they exchange nothing."""
    pairs = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(pairs, 3), 1)


@gluon.jit
def _consume(
    out_map, gate, gate_stride, scale, q_ring, k_ring, v_ring, outs, rows, length, tiles,
    SELF: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    HAS_GATE: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warp group: 64 queries against all valid keys, then gate and store."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)

    queries, q_full, q_empty = q_ring
    keys, k_full, k_empty = k_ring
    values, v_full, v_empty = v_ring
    query = queries.index(SELF)
    out = outs.index(SELF)
    dtype: gl.constexpr = out.dtype
    no_scores = gl.zeros([ROWS, BLOCK_K], gl.float32, s_layout)
    blocks = gl.cdiv(length, BLOCK_K)
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first, head, _ = _place(tile, rows, HEADS, KV_HEADS)
        first += SELF * ROWS
        lap = tile // gl.num_programs(0)
        slot = count % STAGES
        parity = count // STAGES & 1

        # The last block of keys, masked.
        mbarrier.wait(q_full.index(SELF), lap & 1)
        mbarrier.wait(k_full.index(slot), parity)
        scores = warpgroup_mma(query, keys.index(slot).permute((1, 0)), no_scores, use_acc=False)
        mbarrier.arrive(k_empty.index(slot))
        key = (blocks - 1) * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, s_layout))
        scores = gl.where(key[None, :] < length, scores, float("-inf"))
        peak = gl.max(scores, 1) * scale
        weights = gl.exp2(gl.fma(scores, scale, -peak[:, None]))
        total = _lane_sums(weights)
        weight = gl.convert_layout(weights.to(dtype), p_layout)
        sums = gl.zeros([ROWS, DIM], gl.float32, o_layout)

        # Every other block: its scores beside the weighted sum of the block before.
        for _ in range(1, blocks):
            count += 1
            k_slot = count % STAGES
            k_parity = count // STAGES & 1
            mbarrier.wait(k_full.index(k_slot), k_parity)
            pending = warpgroup_mma(
                query, keys.index(k_slot).permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(slot), parity)
            sums = warpgroup_mma(weight, values.index(slot), sums, is_async=True)
            scores = warpgroup_mma_wait(1, [pending])
            mbarrier.arrive(k_empty.index(k_slot))
            new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
            weights = gl.exp2(gl.fma(scores, scale, -new_peak[:, None]))
            decay = gl.exp2(peak - new_peak)
            peak = new_peak
            fresh = _lane_sums(weights)
            lane_row: gl.constexpr = gl.SliceLayout(1, fresh.type.layout)
            total = total * gl.convert_layout(decay, lane_row)[:, None] + fresh
            # Already complete, hence free; the branch in it keeps ptxas from moving the softmax
            # below the wait for the weighted sum, where it would overlap with nothing.
            mbarrier.wait(v_full.index(slot), parity)
            sums = warpgroup_mma_wait(0, [sums])
            mbarrier.arrive(v_empty.index(slot))
            sums = sums * gl.convert_layout(decay, o_row)[:, None]
            weight = gl.convert_layout(weights.to(dtype), p_layout)
            slot = k_slot
            parity = k_parity
        mbarrier.arrive(q_empty.index(SELF))

        mbarrier.wait(v_full.index(slot), parity)
        sums = warpgroup_mma(weight, values.index(slot), sums, is_async=True)
        factor = 1.0 / gl.convert_layout(gl.sum(total, 1), o_row)
        if HAS_GATE:
            row = first + gl.arange(0, ROWS, o_row)
            place = gate + row.to(gl.int64) * gate_stride + head
            logit = gl.load(place, mask=row < rows, other=0.0).to(gl.float32)
            factor = factor / (1.0 + gl.exp(-logit))
        sums = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(v_empty.index(slot))
        count += 1

        result = (sums * factor[:, None]).to(dtype)
        tma.store_wait(0)
        out.store(result)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_map, [first, head * DIM], out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "gate_stride"])
def _attention(
    q_map, k_map, v_map, out_map, gate, valid_length, rows, gate_stride, scale,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, HAS_GATE: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    length = gl.load(valid_length)
    tiles = gl.cdiv(rows, CONSUMERS * ROWS) * HEADS
    dtype: gl.constexpr = q_map.dtype
    q_ring = _ring(dtype, CONSUMERS, q_map, 1)
    k_ring = _ring(dtype, STAGES, k_map, CONSUMERS)
    v_ring = _ring(dtype, STAGES, v_map, CONSUMERS)
    outs = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, DIM], out_map.layout)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                out_map, gate, gate_stride, scale, q_ring, k_ring, v_ring, outs,
                rows, length, tiles, 0, HEADS, KV_HEADS, DIM, HAS_GATE, BLOCK_K, STAGES,
            )),
            (_consume, (
                out_map, gate, gate_stride, scale, q_ring, k_ring, v_ring, outs,
                rows, length, tiles, 1, HEADS, KV_HEADS, DIM, HAS_GATE, BLOCK_K, STAGES,
            )),
            (_load, (
                q_map, k_map, v_map, q_ring, k_ring, v_ring, rows, length, tiles,
                HEADS, KV_HEADS, DIM, BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _map(x: Tensor, block_rows: int) -> TensorDescriptor:
    """A tensor map over [N, heads D] whose boxes are rows of one head."""
    rows, heads, dim = x.shape
    box = [block_rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    return TensorDescriptor(x, [rows, heads * dim], [heads * dim, 1], box, layout)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    length: Tensor,
) -> Tensor:
    """`reference.head_gate(reference.attention(q, k[:length], v[:length]), gate)`.

    Args:
        q: [N, heads, D] bf16 contiguous; D 32, 64 or 128.
        k, v: [N, kv_heads, D] bf16 contiguous. Rows of v between `length` and the end of its
            block are multiplied by zero, so they must be finite.
        gate: [N, heads], any row stride, or None.
        length: int32 scalar on the device, 1 to N: keys from there on carry no weight.

    Returns:
        [N, heads, D] in q's dtype. Rows from `length` on are computed and mean nothing.

    Tuned on H100 at D = 128: 618 TFLOP/s at N = 4266, 649 at N = 14762. Strict turns of the two
    consumers at the tensor cores, one program a tile, and blocks of 64 keys were all slower.
    """
    rows, heads, dim = q.shape
    out = torch.empty_like(q)
    tiles = triton.cdiv(rows, CONSUMERS.value * ROWS.value) * heads
    _attention[(min(tiles, _processors(q.device)),)](
        _map(q, ROWS.value), _map(k, BLOCK_K), _map(v, BLOCK_K), _map(out, ROWS.value),
        gate, length, rows, 0 if gate is None else gate.stride(0), dim**-0.5 * LOG2_E,
        HEADS=heads, KV_HEADS=k.shape[1], DIM=dim, HAS_GATE=gate is not None,
        BLOCK_K=BLOCK_K, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return out
