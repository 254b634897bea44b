"""Per-head RMS norm and rotation of one row's queries or keys, for kernels that lay them out.

A thread holds both dims of its pairs, so that each value is read once, and a step's loads are
issued before the arithmetic of the step in front of it. Tuned on H100 with heads of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 8  # heads of a step
WARPS = 2


@triton.jit
def load_heads(source, head, first, second, COUNT: tl.constexpr, DIM: tl.constexpr):
    """Both dims of each pair of some heads of a row [COUNT, DIM]; zeros beyond the last head."""
    exists = (head < COUNT) & (first >= 0)  # the mask in the shape of the tile
    a = tl.load(source + head * DIM + first, mask=exists, other=0.0)
    b = tl.load(source + head * DIM + second, mask=exists, other=0.0)
    return a, b


@triton.jit
def store_heads(a, b, target, head, first, second, COUNT: tl.constexpr, DIM: tl.constexpr):
    """Store what `load_heads` loads, in the target's dtype; nothing beyond the last head."""
    exists = (head < COUNT) & (first >= 0)
    tl.store(target + head * DIM + first, a.to(target.dtype.element_ty), mask=exists)
    tl.store(target + head * DIM + second, b.to(target.dtype.element_ty), mask=exists)


@triton.jit
def norm_and_turn(
    source, weight, factor, target, pairs, eps,
    COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`reference.qk_norm_rotary` of all COUNT heads of one row, times `factor`, BLOCK at a time.

    source, target: pointers to the row's heads [COUNT, DIM]; weight: pointer to the gains [DIM];
    pairs: what `load_pairs` returns for the row.
    """
    heads, first, second, sin, cos = pairs
    first_gain = (tl.load(weight + first) + 1.0) * factor
    second_gain = (tl.load(weight + second) + 1.0) * factor
    a, b = load_heads(source, heads, first, second, COUNT, DIM)
    for start in tl.static_range(0, COUNT, BLOCK):
        head = start + heads
        next_a, next_b = load_heads(source, head + BLOCK, first, second, COUNT, DIM)
        x = a.to(tl.float32)
        y = b.to(tl.float32)
        mean = tl.sum(tl.sum(x * x + y * y, axis=2), axis=0) / DIM
        scale = tl.rsqrt(mean + eps)[None, :, None]
        x = x * scale * first_gain
        y = y * scale * second_gain
        store_heads(x * cos - y * sin, y * cos + x * sin, target, head, first, second, COUNT, DIM)
        a = next_a
        b = next_b


@triton.jit
def load_pairs(
    rope, row, DIM: tl.constexpr, ANGLES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    """Heads of a step, the two dims of each pair that turns, and the sine and cosine of its angle.

    rope: pointer to [rows, 2 ANGLES] fp32, sines before cosines; LANES: dims loaded together, a
    divisor of ANGLES and of DIM / 2. All five have the shape [pieces, heads, lanes] or broadcast to
    it. In this order warps divide the heads, and sums stay in one warp.
    """
    pieces: tl.constexpr = DIM // (2 * LANES)
    pairs: tl.constexpr = ANGLES // LANES  # pieces that turn
    piece = tl.arange(0, pieces)[:, None, None]
    heads = tl.arange(0, BLOCK)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    whole = tl.zeros((pieces, BLOCK, LANES), tl.int32)  # one shape, hence one layout, for all loads
    turns = piece + whole < pairs
    # Of the dims that pass through, the first half is paired with the second.
    first = (piece + tl.where(turns, 0, pairs)) * LANES + lane
    second = (piece + tl.where(turns, pairs, pieces)) * LANES + lane
    table = rope + row * 2 * ANGLES + piece * LANES + lane + whole
    sin = tl.load(table, mask=turns, other=0.0)
    cos = tl.load(table + ANGLES, mask=turns, other=1.0)
    return heads, first, second, sin, cos
