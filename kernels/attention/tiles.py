"""What the two attention kernels for Hopper share: tiles of queries, the blocks of keys that a tile
sees, rings in shared memory, the loader, the softmax, the epilogue and the host's tensor maps.

A tile is queries of one head, 64 for each consumer, of which there are two or three. A program
takes every n-th tile of its kernel, n being the number of programs. Frame-local attention
(`reference.LocalAttention`) walks two ranges of keys under one softmax: audio and text, then the
frames seen. A tile then ends where its frame ends, and a block of keys is masked where it reaches
out of its range.

A ring is a few blocks of shared memory with two barriers each. The copy engine completes `full`,
the consumers complete `empty`; slot and parity follow from a running count of blocks, which never
restarts between tiles. For PTX's barriers and tensor maps see the PTX ISA, sections "mbarrier" and
"cp.async.bulk.tensor".

Arguments that go together are aggregates, which the compiler takes apart: they cost nothing.
"""

# Aggregates check a field against its annotation, so annotations must be evaluated here.

import functools
import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from magihuman.kernels.reference import LocalAttention

LOG2_E = math.log2(math.e)
ROWS = gl.constexpr(64)  # queries of a consumer: the height of one wgmma
# Of a thread: of each of two consumers, of each of three, of the loader.
REGISTERS_OF_TWO = gl.constexpr(240)
REGISTERS_OF_THREE = gl.constexpr(160)
LOADER_REGISTERS = gl.constexpr(24)

# triton 3.6 has the copies of a tensor map by their first names, later releases by shorter ones.
copy_to_shared = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_to_global = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@aggregate
class Frames:
    """Shape of frame-local attention, all zeros and LOCAL false where all tokens see all keys."""

    count: gl.tensor  # latent frames
    tokens: gl.tensor  # video tokens of each
    reach: gl.tensor  # frames seen each way
    LOCAL: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, count, tokens, reach, LOCAL):
        self.count = count
        self.tokens = tokens
        self.reach = reach
        self.LOCAL = gl.constexpr(LOCAL)


@aggregate
class Tile:
    """Queries `first` to `end` of a head, and the frames' keys that they see, `low` to `high`."""

    head: gl.tensor
    kv_head: gl.tensor
    first: gl.tensor
    end: gl.tensor
    low: gl.tensor
    high: gl.tensor

    @gluon.constexpr_function
    def __init__(self, head, kv_head, first, end, low, high):
        self.head = head
        self.kv_head = kv_head
        self.first = first
        self.end = end
        self.low = low
        self.high = high


@aggregate
class KeyBlock:
    """The block of keys `index` BLOCK_K to (`index` + 1) BLOCK_K, and its range's ends."""

    index: gl.tensor
    first: gl.tensor
    end: gl.tensor
    BLOCK_K: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, index, first, end, BLOCK_K):
        self.index = index
        self.first = first
        self.end = end
        self.BLOCK_K = gl.constexpr(BLOCK_K)

    @gluon.jit
    def mask(self, scores, layout: gl.constexpr):
        """Scores [queries, BLOCK_K] in this layout, those of keys outside of the range -inf."""
        # Keys before the range are huge as unsigned numbers: one comparison for both ends.
        start = self.index * self.BLOCK_K - self.first
        key = start + gl.arange(0, self.BLOCK_K, gl.SliceLayout(0, layout))
        count = (self.end - self.first).to(gl.uint32)
        return gl.where((key.to(gl.uint32) < count)[None, :], scores, float("-inf"))

    @gluon.jit
    def mask_ends(self, scores, layout: gl.constexpr):
        """`mask`, passed over where the block lies within its range."""
        before = self.index * self.BLOCK_K < self.first
        if before | ((self.index + 1) * self.BLOCK_K > self.end):
            scores = self.mask(scores, layout)
        return scores


@gluon.jit
def tiles_of_head(rows, frames: Frames, CONSUMERS: gl.constexpr):
    """Tiles of each frame, and of what follows the last frame: `tiles_of` for one head."""
    tile: gl.constexpr = CONSUMERS * ROWS
    count = gl.cdiv(rows - frames.count * frames.tokens, tile)
    if frames.LOCAL:
        count += frames.count * gl.cdiv(frames.tokens, tile)
    return count


@aggregate
class Sequence:
    """Rows of queries and keys, of which the first `length` are valid, and how they are cut."""

    rows: gl.tensor
    length: gl.tensor
    tiles: gl.tensor  # of all heads
    frames: Frames
    HEADS: gl.constexpr
    KV_HEADS: gl.constexpr
    DIM: gl.constexpr
    BLOCK_K: gl.constexpr
    CONSUMERS: gl.constexpr  # of the queries of a tile

    @gluon.constexpr_function
    def __init__(self, rows, length, tiles, frames, HEADS, KV_HEADS, DIM, BLOCK_K, CONSUMERS):
        self.rows = rows
        self.length = length
        self.tiles = tiles
        self.frames = frames
        self.HEADS = gl.constexpr(HEADS)
        self.KV_HEADS = gl.constexpr(KV_HEADS)
        self.DIM = gl.constexpr(DIM)
        self.BLOCK_K = gl.constexpr(BLOCK_K)
        self.CONSUMERS = gl.constexpr(CONSUMERS)

    @gluon.jit
    def tile(self, number):
        """The tile of this number; tiles that share keys are neighbours."""
        size: gl.constexpr = self.CONSUMERS * ROWS
        shared: gl.constexpr = self.HEADS // self.KV_HEADS
        frames = self.frames
        per_kv_head = tiles_of_head(self.rows, frames, self.CONSUMERS) * shared
        kv_head = number // per_kv_head
        rest = number % per_kv_head
        at = rest // shared
        first = at * size
        end = self.rows
        low = 0
        high = 0
        if frames.LOCAL:
            of_frame = gl.cdiv(frames.tokens, size)
            frame = at // of_frame
            video = frames.count * frames.tokens
            is_video = frame < frames.count
            in_frame = frame * frames.tokens + at % of_frame * size
            first = gl.where(is_video, in_frame, video + (at - frames.count * of_frame) * size)
            end = gl.where(is_video, (frame + 1) * frames.tokens, self.rows)
            first_seen = gl.maximum(frame - frames.reach, 0) * frames.tokens
            low = gl.where(is_video, first_seen, 0)
            end_seen = gl.minimum(frame + frames.reach + 1, frames.count) * frames.tokens
            high = gl.where(is_video, end_seen, video)
        return Tile(kv_head * shared + rest % shared, kv_head, first, end, low, high)

    @gluon.jit
    def key_blocks(self, video, tile: Tile):
        """How many blocks of keys a tile sees; blocks start at multiples of their size.

        video: tokens of all frames.
        """
        count = gl.cdiv(self.length, self.BLOCK_K)
        if self.frames.LOCAL:
            of_frames = gl.cdiv(tile.high, self.BLOCK_K) - tile.low // self.BLOCK_K
            count += of_frames - video // self.BLOCK_K
        return count

    @gluon.jit
    def key_block(self, i, video, tile: Tile):
        """The i-th block of keys that a tile sees: first that of the last valid key."""
        blocks = gl.cdiv(self.length, self.BLOCK_K)
        index = gl.where(i == 0, blocks - 1, i - 1)
        first = 0
        end = self.length
        if self.frames.LOCAL:
            others = blocks - video // self.BLOCK_K
            is_other = i < others  # audio or text
            near = tile.low // self.BLOCK_K + i - others
            index = gl.where(is_other, video // self.BLOCK_K + i, near)
            first = gl.where(is_other, video, tile.low)
            end = gl.where(is_other, self.length, tile.high)
        return KeyBlock(index, first, end, self.BLOCK_K)


@aggregate
class Ring:
    """Blocks [slots, rows, columns] in shared memory, and the barriers [slots, 1] of each."""

    memory: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, memory, full, empty):
        self.memory = memory
        self.full = full
        self.empty = empty

    @gluon.jit
    def fill(self, slot, lap, source, row, column):
        """Wait until the slot's previous block is used up, then copy a new one into it.

        The block is that of the tensor map `source` at this row and column; lap: how often the
        slot was filled before.
        """
        mbarrier.wait(self.empty.index(slot), (lap & 1) ^ 1)
        mbarrier.expect(self.full.index(slot), source.block_type.nbytes)
        copy_to_shared(source, [row, column], self.full.index(slot), self.memory.index(slot))


@gluon.jit
def make_ring(box, slots: gl.constexpr, readers: gl.constexpr):
    """A ring for boxes of a tensor map, each of which so many consumers read."""
    shape: gl.constexpr = [slots, box.block_shape[0], box.block_shape[1]]
    memory = gl.allocate_shared_memory(box.dtype, shape, box.layout)
    full = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(slots):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=readers)
    return Ring(memory, full, empty)


@aggregate
class Rings:
    """Shared memory of a program: queries [ROWS, D], keys and values by the block, and results."""

    queries: Ring  # a slot for each consumer
    keys: Ring
    values: Ring
    results: gl.shared_memory_descriptor  # [consumers, ROWS, D]

    @gluon.constexpr_function
    def __init__(self, queries, keys, values, results):
        self.queries = queries
        self.keys = keys
        self.values = values
        self.results = results


@gluon.jit
def make_rings(q_map, k_map, v_map, out_map, stages: gl.constexpr, CONSUMERS: gl.constexpr):
    """Rings of so many blocks of keys, and as many of values, with their barriers made ready."""
    queries = make_ring(q_map, CONSUMERS, 1)
    keys = make_ring(k_map, stages, CONSUMERS)
    values = make_ring(v_map, stages, CONSUMERS)
    shape: gl.constexpr = [CONSUMERS, out_map.block_shape[0], out_map.block_shape[1]]
    results = gl.allocate_shared_memory(out_map.dtype, shape, out_map.layout)
    fence_async_shared()
    return Rings(queries, keys, values, results)


@gluon.jit
def load(
    q_map, k_map, v_map, rings: Rings, seq: Sequence, STAGES: gl.constexpr, KEYS_LAST: gl.constexpr
):
    """The loader warp: the queries of a tile, then keys one block ahead of values.

    KEYS_LAST: whether values are [kv_heads D, keys] and not [keys, kv_heads D].
    """
    video = seq.frames.count * seq.frames.tokens
    k_count = 0
    v_count = 0
    for number in range(gl.program_id(0), seq.tiles, gl.num_programs(0)):
        tile = seq.tile(number)
        lap = number // gl.num_programs(0)
        for consumer in gl.static_range(seq.CONSUMERS):
            row = tile.first + consumer * ROWS
            rings.queries.fill(consumer, lap, q_map, row, tile.head * seq.DIM)
        blocks = seq.key_blocks(video, tile)
        for i in range(blocks + 1):
            if i < blocks:
                block = seq.key_block(i, video, tile)
                slot = k_count % STAGES
                row = block.index * seq.BLOCK_K
                rings.keys.fill(slot, k_count // STAGES, k_map, row, tile.kv_head * seq.DIM)
                k_count += 1
            if i > 0:
                block = seq.key_block(i - 1, video, tile)
                slot = v_count % STAGES
                row = block.index * seq.BLOCK_K
                column = tile.kv_head * seq.DIM
                if KEYS_LAST:
                    rings.values.fill(slot, v_count // STAGES, v_map, column, row)
                else:
                    rings.values.fill(slot, v_count // STAGES, v_map, row, column)
                v_count += 1


@gluon.jit
def lane_sums(x):
    """[rows, keys] -> [rows, 4]: what each of a row's four lanes holds; they exchange nothing."""
    pairs = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(pairs, 3), 1)


@gluon.jit
def softmax(scores, scale, peak, total, PEAK: gl.constexpr):
    """A step of the online softmax in base 2: peak and lanes' totals with this block, the factor by
    which earlier sums decay, and the block's weights, of which the largest may be 2^PEAK.

    scores: [rows, keys] fp32, times `scale` logarithms; peak: [rows]; total: as of `lane_sums`.
    """
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale - PEAK)
    weights = gl.exp2(gl.fma(scores, scale, -new_peak[:, None]))
    decay = gl.exp2(peak - new_peak)
    fresh = lane_sums(weights)
    lane_row: gl.constexpr = gl.SliceLayout(1, fresh.type.layout)
    total = total * gl.convert_layout(decay, lane_row)[:, None] + fresh
    return new_peak, total, decay, weights


@aggregate
class Owners:
    """Which processes results are for where several share a sequence: equal runs of rows.

    SHARED is false, and the others are not looked at, where all rows are this process's.
    """

    distances: gl.tensor  # a pointer to int64 [processes]: from `out` to theirs, in 8 elements
    rows: gl.tensor  # of each
    stride: gl.tensor  # elements of a row of `out`
    SHARED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, distances, rows, stride, SHARED):
        self.distances = distances
        self.rows = rows
        self.stride = stride
        self.SHARED = gl.constexpr(SHARED)


@aggregate
class Output:
    """Where results [rows, heads D] go, and the gates [rows, heads] that they are scaled by."""

    out_map: tma.tensor_descriptor
    out: gl.tensor  # a pointer to the same
    gate: gl.tensor  # a pointer
    gate_stride: gl.tensor  # elements of a row
    owners: Owners

    @gluon.constexpr_function
    def __init__(self, out_map, out, gate, gate_stride, owners):
        self.out_map = out_map
        self.out = out
        self.gate = gate
        self.gate_stride = gate_stride
        self.owners = owners

    @gluon.jit
    def gated(self, factor, rows, first, head, layout: gl.constexpr):
        """A factor of each row from `first` on, times the sigmoid of its gate."""
        row = first + gl.arange(0, ROWS, layout)
        place = self.gate + row.to(gl.int64) * self.gate_stride + head
        logit = gl.load(place, mask=row < rows, other=0.0).to(gl.float32)
        return factor / (1.0 + gl.exp(-logit))

    @gluon.jit
    def store(self, sums, staging, seq: Sequence, tile: Tile, first, layout: gl.constexpr):
        """A consumer's rows, rounded; of a frame's tile, which may end inside, by threads.

        Elsewhere by the tensor map, from the shared memory `staging`, or by threads to several
        processes, whole rows of a head at a time.
        """
        result = sums.to(staging.dtype)
        if self.owners.SHARED:
            lanes: gl.constexpr = seq.DIM // 8
            wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
            staging.store(result)
            row = first + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
            column = tile.head * seq.DIM + gl.arange(0, seq.DIM, gl.SliceLayout(0, wide))
            exists = row < seq.rows
            owner = row // self.owners.rows
            away = gl.load(self.owners.distances + owner, mask=exists, other=0) * 8
            start = away + (row - owner * self.owners.rows).to(gl.int64) * self.owners.stride
            place = self.out + start[:, None] + column[None, :]
            gl.store(place, staging.load(wide), mask=exists[:, None])
        elif seq.frames.LOCAL:
            row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            column = tile.head * seq.DIM + gl.arange(0, seq.DIM, gl.SliceLayout(0, layout))
            place = self.out + row.to(gl.int64)[:, None] * (seq.HEADS * seq.DIM) + column[None, :]
            gl.store(place, result, mask=(row < tile.end)[:, None])
        else:
            tma.store_wait(0)
            staging.store(result)
            fence_async_shared()
            copy_to_global(self.out_map, [first, tile.head * seq.DIM], staging)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a program runs on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def tensor_map(x: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """A map of boxes [block_rows, block_columns] over a matrix of bf16 or e4m3 in contiguous rows.

    Reads outside of the matrix give zeros, writes outside are dropped.
    """
    box = [block_rows, block_columns]
    dtype = gl.bfloat16 if x.element_size() == 2 else gl.float8e4nv
    layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def tiles_of(rows: int, heads: int, local: LocalAttention | None, consumers: int) -> int:
    """Tiles of all heads over this many rows: what `Sequence.tiles` holds."""
    size = consumers * ROWS.value
    if local is None:
        return heads * triton.cdiv(rows, size)
    rest = rows - local.frames * local.frame_tokens
    in_frames = local.frames * triton.cdiv(local.frame_tokens, size)
    return heads * (in_frames + triton.cdiv(rest, size))
