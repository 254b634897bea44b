"""Attention for Hopper in Gluon: one loader warp feeds two consumer warp groups.

The scheme is FlashAttention-3 (arXiv 2407.08608). A tile is 128 queries of one head, 64 for each
consumer. The loader fills rings of key and value blocks through tensor maps. A consumer issues the
scores of the next key block before the weighted sum of the current one, so that its softmax runs
while the tensor cores work. The block with the last valid key comes first: the only masked one.

Frame-local attention walks two ranges of keys under one softmax: audio and text, then the frames
seen. A tile then ends where its frame ends, and a block is masked where it reaches out of a range.

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

from magihuman.kernels.reference import LocalAttention

LOG2_E = math.log2(math.e)
CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # queries of a consumer: the height of one wgmma
CONSUMER_REGISTERS = gl.constexpr(240)
LOADER_REGISTERS = gl.constexpr(24)
BLOCK_K = 128  # keys in a block
STAGES = 2  # blocks of keys, and as many of values, in shared memory


@gluon.jit
def _mask_ends(scores, block, first, end, BLOCK_K: gl.constexpr, layout: gl.constexpr):
    """`_mask` where the block reaches out of its range."""
    if (block * BLOCK_K < first) | ((block + 1) * BLOCK_K > end):
        scores = _mask(scores, block, first, end, BLOCK_K, layout)
    return scores


@gluon.jit
def _row_tiles(rows, frames, frame_tokens, LOCAL: gl.constexpr):
    """Tiles of a head: of each frame, and of what follows the last."""
    tile: gl.constexpr = CONSUMERS * ROWS
    count = gl.cdiv(rows - frames * frame_tokens, tile)
    if LOCAL:
        count += frames * gl.cdiv(frame_tokens, tile)
    return count


@gluon.jit
def _place(
    tile, rows, frames, frame_tokens, reach,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, LOCAL: gl.constexpr,
):  # fmt: skip
    """Head, key head, first query and end of a tile, and the frames' keys that it sees.

    Tiles that share keys are neighbours.
    """
    size: gl.constexpr = CONSUMERS * ROWS
    shared: gl.constexpr = HEADS // KV_HEADS
    per_kv_head = _row_tiles(rows, frames, frame_tokens, LOCAL) * shared
    kv_head = tile // per_kv_head
    rest = tile % per_kv_head
    at = rest // shared
    first = at * size
    end = rows
    low = 0
    high = 0
    if LOCAL:
        of_frame = gl.cdiv(frame_tokens, size)
        frame = at // of_frame
        video = frames * frame_tokens
        is_video = frame < frames
        in_frame = frame * frame_tokens + at % of_frame * size
        first = gl.where(is_video, in_frame, video + (at - frames * of_frame) * size)
        end = gl.where(is_video, (frame + 1) * frame_tokens, rows)
        low = gl.where(is_video, gl.maximum(frame - reach, 0) * frame_tokens, 0)
        high = gl.where(is_video, gl.minimum(frame + reach + 1, frames) * frame_tokens, video)
    return kv_head * shared + rest % shared, kv_head, first, end, low, high


@gluon.jit
def _blocks(video, length, low, high, BLOCK_K: gl.constexpr, LOCAL: gl.constexpr):
    """How many blocks of keys a tile sees. Blocks start at multiples of their size."""
    count = gl.cdiv(length, BLOCK_K)
    if LOCAL:
        count += gl.cdiv(high, BLOCK_K) - low // BLOCK_K - video // BLOCK_K
    return count


@gluon.jit
def _key_block(i, video, length, low, high, BLOCK_K: gl.constexpr, LOCAL: gl.constexpr):
    """Number of the block that comes as the i-th, and the ends of its range of keys."""
    blocks = gl.cdiv(length, BLOCK_K)
    block = gl.where(i == 0, blocks - 1, i - 1)
    first = 0
    end = length
    if LOCAL:
        others = blocks - video // BLOCK_K
        is_other = i < others  # audio or text
        block = gl.where(is_other, video // BLOCK_K + i, low // BLOCK_K + i - others)
        first = gl.where(is_other, video, low)
        end = gl.where(is_other, length, high)
    return block, first, end


@gluon.jit
def _mask(scores, block, first, end, BLOCK_K: gl.constexpr, layout: gl.constexpr):
    # Keys before the range are huge as unsigned numbers: one comparison for both ends.
    key = block * BLOCK_K - first + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    count = (end - first).to(gl.uint32)
    return gl.where((key.to(gl.uint32) < count)[None, :], scores, float("-inf"))


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
    q_map, k_map, v_map, q_ring, k_ring, v_ring, rows, length, tiles, frames, frame_tokens, reach,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, LOCAL: gl.constexpr, KEYS_LAST: gl.constexpr,
):  # fmt: skip
    """The loader warp: the queries of a tile, then keys one block ahead of values.

    KEYS_LAST: values are [kv_heads D, keys].
    """
    video = frames * frame_tokens
    k_count = 0
    v_count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, kv_head, first, _, low, high = _place(
            tile, rows, frames, frame_tokens, reach, HEADS, KV_HEADS, LOCAL
        )
        lap = tile // gl.num_programs(0)
        for consumer in gl.static_range(CONSUMERS):
            _fill(q_ring, consumer, lap, q_map, first + consumer * ROWS, head * DIM)
        blocks = _blocks(video, length, low, high, BLOCK_K, LOCAL)
        for i in range(blocks + 1):
            if i < blocks:
                block, _, _ = _key_block(i, video, length, low, high, BLOCK_K, LOCAL)
                slot = k_count % STAGES
                _fill(k_ring, slot, k_count // STAGES, k_map, block * BLOCK_K, kv_head * DIM)
                k_count += 1
            if i > 0:
                block, _, _ = _key_block(i - 1, video, length, low, high, BLOCK_K, LOCAL)
                slot = v_count % STAGES
                row = block * BLOCK_K
                column = kv_head * DIM
                if KEYS_LAST:
                    _fill(v_ring, slot, v_count // STAGES, v_map, column, row)
                else:
                    _fill(v_ring, slot, v_count // STAGES, v_map, row, column)
                v_count += 1


@gluon.jit
def _lane_sums(x):
    """[rows, keys] -> [rows, 4]: what each of a row's four lanes holds; they exchange nothing."""
    pairs = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(pairs, 3), 1)


@gluon.jit
def _store(
    sums, out_map, out_place, out, first, end, head,
    HEADS: gl.constexpr, DIM: gl.constexpr, layout: gl.constexpr, LOCAL: gl.constexpr,
):  # fmt: skip
    """A consumer's rows; of a frame's tile, which may end inside, by threads, not by a map."""
    result = sums.to(out.dtype)
    if LOCAL:
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        column = head * DIM + gl.arange(0, DIM, gl.SliceLayout(0, layout))
        place = out_place + row.to(gl.int64)[:, None] * (HEADS * DIM) + column[None, :]
        gl.store(place, result, mask=(row < end)[:, None])
    else:
        tma.store_wait(0)
        out.store(result)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_map, [first, head * DIM], out)


@gluon.jit
def _consume(
    out_map, out_place, gate, gate_stride, scale, q_ring, k_ring, v_ring, outs,
    rows, length, tiles, frames, frame_tokens, reach,
    SELF: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LOCAL: gl.constexpr,
):  # fmt: skip
    """A consumer warp group: 64 queries against the valid keys they see, then gate and store."""
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
    video = frames * frame_tokens
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, _, first, end, low, high = _place(
            tile, rows, frames, frame_tokens, reach, HEADS, KV_HEADS, LOCAL
        )
        first += SELF * ROWS
        blocks = _blocks(video, length, low, high, BLOCK_K, LOCAL)
        lap = tile // gl.num_programs(0)
        slot = count % STAGES
        parity = count // STAGES & 1

        # The first block, masked.
        mbarrier.wait(q_full.index(SELF), lap & 1)
        mbarrier.wait(k_full.index(slot), parity)
        scores = warpgroup_mma(query, keys.index(slot).permute((1, 0)), no_scores, use_acc=False)
        mbarrier.arrive(k_empty.index(slot))
        block, key_first, key_end = _key_block(0, video, length, low, high, BLOCK_K, LOCAL)
        scores = _mask(scores, block, key_first, key_end, BLOCK_K, s_layout)
        peak = gl.max(scores, 1) * scale
        weights = gl.exp2(gl.fma(scores, scale, -peak[:, None]))
        total = _lane_sums(weights)
        weight = gl.convert_layout(weights.to(dtype), p_layout)
        sums = gl.zeros([ROWS, DIM], gl.float32, o_layout)

        # Every other block: its scores beside the weighted sum of the block before.
        for i in range(1, blocks):
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
            if LOCAL:
                block, key_first, key_end = _key_block(i, video, length, low, high, BLOCK_K, LOCAL)
                scores = _mask_ends(scores, block, key_first, key_end, BLOCK_K, s_layout)
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
    q_map, k_map, v_map, out_map, out_place, gate, valid_length, rows, gate_stride, scale,
    frames, frame_tokens, reach,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, LOCAL: gl.constexpr,
):  # fmt: skip
    length = gl.load(valid_length)
    tiles = _row_tiles(rows, frames, frame_tokens, LOCAL) * HEADS
    dtype: gl.constexpr = q_map.dtype
    q_ring = _ring(dtype, CONSUMERS, q_map, 1)
    k_ring = _ring(dtype, STAGES, k_map, CONSUMERS)
    v_ring = _ring(dtype, STAGES, v_map, CONSUMERS)
    outs = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, DIM], out_map.layout)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                out_map, out_place, gate, gate_stride, scale, q_ring, k_ring, v_ring, outs,
                rows, length, tiles, frames, frame_tokens, reach,
                0, HEADS, KV_HEADS, DIM, BLOCK_K, STAGES, LOCAL,
            )),
            (_consume, (
                out_map, out_place, gate, gate_stride, scale, q_ring, k_ring, v_ring, outs,
                rows, length, tiles, frames, frame_tokens, reach,
                1, HEADS, KV_HEADS, DIM, BLOCK_K, STAGES, LOCAL,
            )),
            (_load, (
                q_map, k_map, v_map, q_ring, k_ring, v_ring,
                rows, length, tiles, frames, frame_tokens, reach,
                HEADS, KV_HEADS, DIM, BLOCK_K, STAGES, LOCAL, False,
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


def tiles_of(rows: int, heads: int, local: LocalAttention | None) -> int:
    """Tiles of all heads: what `_row_tiles` counts."""
    size = CONSUMERS.value * ROWS.value
    if local is None:
        return heads * triton.cdiv(rows, size)
    rest = rows - local.frames * local.frame_tokens
    in_frames = local.frames * triton.cdiv(local.frame_tokens, size)
    return heads * (in_frames + triton.cdiv(rest, size))


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
        gate: [N, heads], any row stride.
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
    tiles = tiles_of(rows, heads, local)
    _attention[(min(tiles, _processors(q.device)),)](
        _map(q, ROWS.value), _map(k, BLOCK_K), _map(v, BLOCK_K), _map(out, ROWS.value), out,
        gate, length, rows, gate.stride(0), dim**-0.5 * LOG2_E,
        *(local or (0, 0, 0)),
        HEADS=heads, KV_HEADS=k.shape[1], DIM=dim, BLOCK_K=BLOCK_K, STAGES=STAGES,
        LOCAL=local is not None, num_warps=4,
    )  # fmt: skip
    return out
