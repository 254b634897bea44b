"""The matrix product in Triton, for every GPU from sm_80 on: an activation or an addition in its
epilogue, as `matmul_sm90.py` has.

Operands are bf16, or e4m3 or int8 with a scale for each row of both. They are loaded through
pointers, so that a tile asks for nothing but tensor cores and the shared memory of its stages.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from magihuman.kernels.linear.matmul_sm90 import Epilogue, columns_of
from magihuman.kernels.reference import (
    ACTIVATION_ALPHA,
    ACTIVATION_LIMIT,
    STATIC_SCALES,
    Counts,
    padded_width,
)
from magihuman.kernels.target import PORTABLE, Capability, Target


@dataclass(frozen=True)
class Tile:
    """Shape of the work of a block of threads, and how it is done.

    Attributes:
        rows: of the product.
        columns: of the product.
        depth_bytes: of a row of each operand that are multiplied at a time.
        stages: blocks of both operands in shared memory, one in use and others on their way.
        warps: of a block.
        group: at most so many tiles of rows go through all columns together, for the L2 cache's
            sake.
    """

    rows: int
    columns: int
    depth_bytes: int
    stages: int
    warps: int
    group: int = 12

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that the stages take."""
        return self.stages * self.depth_bytes * (self.rows + self.columns)


# By name, which is a route's. In instructions of 4 or 8 warps together, as sm_90 and sm_100 have,
# sums of 128x256 fit the registers; in those of single warps, which all others have, of 128x128.
WIDE = {
    "portable 128x256, 4 stages": Tile(128, 256, 128, stages=4, warps=8, group=16),
    "portable 128x256": Tile(128, 256, 128, stages=3, warps=8, group=16),
}
NARROW = {
    "portable 128x128, 4 stages": Tile(128, 128, 128, stages=4, warps=8),
    "portable 128x128": Tile(128, 128, 128, stages=3, warps=8),
    "portable 128x128, half as deep": Tile(128, 128, 64, stages=4, warps=8),
}
TILES = WIDE | NARROW
# Arguments that differ from one length of a sequence to the next: a kernel serves all.
OF_LENGTHS = [
    "video_tiles",
    "sound_tiles",
    "row_tiles",
    "video_end",
    "audio_end",
    "end",
    "group",
]
WIDE_MAJORS = (9, 10)  # compute capabilities
SUMMED_AT_ONCE = tl.constexpr(128)  # columns: more of a stream have no registers beside the sums


def names_for(capability: Capability) -> list[str]:
    """The tiles that fit a GPU's registers and shared memory, most likely the fastest first."""
    room = Target(PORTABLE, capability).shared_bytes
    tiles = TILES if capability[0] in WIDE_MAJORS else NARROW
    return [name for name, tile in tiles.items() if tile.shared_bytes <= room]


@triton.jit
def _place(
    tile, row_tiles, column_tiles, video_tiles, sound_tiles, video_end, audio_end, end, group,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Where a tile is: its first row, the end of its run, that run's number, its tile of columns.

    Tiles go down `group` tiles of rows, then on to the next column, then to the next group.
    """
    in_group = group * column_tiles
    first = tile // in_group * group
    height = tl.minimum(row_tiles - first, group)
    row_tile = first + tile % in_group % height
    column_tile = tile % in_group // height
    is_audio = (row_tile >= video_tiles) & (row_tile < sound_tiles)
    is_text = row_tile >= sound_tiles
    begin = tl.where(is_text, audio_end, tl.where(is_audio, video_end, 0))
    stop = tl.where(is_text, end, tl.where(is_audio, audio_end, video_end))
    before = tl.where(is_text, sound_tiles, tl.where(is_audio, video_tiles, 0))
    run = is_audio.to(tl.int32) + 2 * is_text.to(tl.int32)
    return begin + (row_tile - before) * ROWS, stop, run, column_tile


@triton.jit
def _sums(
    x, weight, x_offsets, weight_offsets, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Sums of a tile over whole blocks of depth and a last one of TAIL; int32 of int8, else fp32.

    x, weight: pointers to the first element of either; offsets: int32 [ROWS, DEPTH] and
    [DEPTH, COLUMNS] from there, which take half the registers of pointers.
    """
    is_integer: tl.constexpr = x.dtype.element_ty == tl.int8
    kind: tl.constexpr = tl.int32 if is_integer else tl.float32
    sums = tl.zeros((ROWS, COLUMNS), dtype=kind)
    for _ in range(blocks):
        sums = tl.dot(
            tl.load(x + x_offsets), tl.load(weight + weight_offsets), sums, out_dtype=kind
        )
        x += DEPTH
        weight += DEPTH
    if TAIL > 0:
        depth = tl.arange(0, DEPTH)
        nothing: tl.constexpr = 0 if is_integer else 0.0
        left = tl.load(x + x_offsets, mask=depth[None, :] < TAIL, other=nothing)
        right = tl.load(weight + weight_offsets, mask=depth[:, None] < TAIL, other=nothing)
        sums = tl.dot(left, right, sums, out_dtype=kind)
    return sums


@triton.jit
def _activated(
    product, limit, alpha, SWIGLU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The clamped activation of a product in fp32: as many columns, or half for SwiGLU7."""
    if SWIGLU:
        glu, lin = tl.split(tl.reshape(product, (ROWS, COLUMNS // 2, 2)))
        glu = tl.minimum(glu, limit, propagate_nan=tl.PropagateNan.ALL)
        lin = tl.clamp(lin, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        result = glu * tl.sigmoid(alpha * glu) * (lin + 1.0)
    else:
        value = tl.minimum(product, limit, propagate_nan=tl.PropagateNan.ALL)
        result = value * tl.sigmoid(alpha * value)
    return result


@triton.jit
def _halves(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _add(product, out, row, stop, column, out_stride, out_columns):
    """Add a piece of the product to what `out` has there."""
    target = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    mask = (row < stop)[:, None] & (column < out_columns)[None, :]
    tl.store(target, tl.load(target, mask=mask, other=0.0) + product, mask=mask)


@triton.jit(do_not_specialize=OF_LENGTHS)
def _product(
    x, weight, out, x_scale, weight_scale, x_scale_of_all, out_factor,
    video_tiles, sound_tiles, row_tiles, video_end, audio_end, end, group,
    x_stride, weight_stride, out_stride, columns, out_columns, blocks, limit, alpha,
    EPILOGUE: tl.constexpr, SCALED: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A tile of the product and what follows it; programs are [tiles].

    x_scale: None where all rows have one. out_columns: of `out`; PADDED: whether the last of them
    are beyond the product and become zeros. TAIL: what is left of the depth after whole blocks.
    """
    per_out: tl.constexpr = 2 if EPILOGUE == "swiglu7" else 1
    row_start, stop, run, column_tile = _place(
        tl.program_id(0), row_tiles, tl.cdiv(out_columns * per_out, COLUMNS), video_tiles,
        sound_tiles, video_end, audio_end, end, group, ROWS,
    )  # fmt: skip
    row = row_start + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    # Rows and columns beyond the end are the last one once more, so that no load has a mask.
    near = tl.minimum(row, stop - 1)
    part = run * columns + tl.minimum(column, columns - 1)
    first_part = run * columns + column_tile * COLUMNS
    depth = tl.arange(0, DEPTH)
    sums = _sums(
        x + row_start.to(tl.int64) * x_stride,
        weight + first_part.to(tl.int64) * weight_stride,
        (near - row_start)[:, None] * x_stride + depth[None, :],
        (part - first_part)[None, :] * weight_stride + depth[:, None],
        blocks, ROWS, COLUMNS, DEPTH, TAIL,
    )  # fmt: skip
    product = sums.to(tl.float32)
    if SCALED:
        if x_scale is None:
            product = product * x_scale_of_all
        else:
            product = product * tl.load(x_scale + near)[:, None]
        product = product * tl.load(weight_scale + part)[None, :]
    product = product.to(tl.bfloat16).to(tl.float32)  # as the plain model rounds it
    if EPILOGUE == "gelu7" or EPILOGUE == "swiglu7":
        product = _activated(product, limit, alpha, EPILOGUE == "swiglu7", ROWS, COLUMNS)
        product = product * out_factor
    at = column_tile * (COLUMNS // per_out) + tl.arange(0, COLUMNS // per_out)
    if PADDED:
        product = tl.where((at < columns // per_out)[None, :], product, 0.0)
    if EPILOGUE != "add":
        target = out + row.to(tl.int64)[:, None] * out_stride + at[None, :]
        mask = (row < stop)[:, None] & (at < out_columns)[None, :]
        tl.store(target, product.to(out.dtype.element_ty), mask=mask)
    elif COLUMNS <= SUMMED_AT_ONCE:
        _add(product, out, row, stop, at, out_stride, out_columns)
    else:
        left, right = _halves(product, ROWS, COLUMNS)
        at = column_tile * COLUMNS + tl.arange(0, COLUMNS // 4)
        for half in tl.static_range(2):
            first, second = _halves(left if half == 0 else right, ROWS, COLUMNS // 2)
            begin = at + half * (COLUMNS // 2)
            _add(first, out, row, stop, begin, out_stride, out_columns)
            _add(second, out, row, stop, begin + COLUMNS // 4, out_stride, out_columns)


def matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    counts: Counts | None,
    epilogue: Epilogue,
    tile: Tile,
    x_scale: Tensor | float | None = None,
    weight_scale: Tensor | None = None,
) -> None:
    """`out = epilogue(x @ weight.T)`, or `out += x @ weight.T` for "add".

    Args:
        x: [N, K or more] bf16, e4m3 or int8; N at least 1. Where it has `padded_width(K)` columns
            and rows of weight have as many values, those beyond K are read too, and must be zeros.
        weight: [M, K] or, with `counts`, [3 M, K], of x's dtype. For "swiglu7" the even rows of M
            are glu, the odd ones lin.
        out: [N, M], or [N, M / 2] for "swiglu7", fp32 for "add" and else bf16, or e4m3 after an
            activation, divided by its entry in `reference.STATIC_SCALES`. Columns beyond those
            become zeros, but not for "add".
        counts: rows of each of three runs, each with a third of the weight's rows.
        epilogue: what happens to the product, which is rounded to bf16 first, as in the plain
            model.
        tile: how the work is cut.
        x_scale: of 8-bit operands, [N] fp32, or one number for all rows.
        weight_scale: of 8-bit operands, [M] or [3 M] fp32.

    All rows are contiguous and may have any stride; loads are fast where it is a multiple of 16
    bytes. Raises `ValueError` where rows are not contiguous.
    """
    for tensor in (x, weight, out):
        if tensor.stride(1) != 1:
            raise ValueError(f"rows must be contiguous, got strides {tensor.stride()}")
    video, audio, text = counts or (x.shape[0], 0, 0)
    ends = video, video + audio, video + audio + text
    tiles = [-(-count // tile.rows) for count in (video, audio, text)]
    columns, depth = columns_of(weight, counts), weight.shape[1]
    whole = padded_width(depth)
    if x.shape[1] >= whole and weight.stride(0) >= whole:
        depth = whole
    per_out = 2 if epilogue == "swiglu7" else 1
    step = tile.depth_bytes // x.element_size()
    column_tiles = -(-out.shape[1] * per_out // tile.columns)
    group = -(-sum(tiles) // -(-sum(tiles) // tile.group))  # groups of like height
    of_all = x_scale if isinstance(x_scale, float) else 1.0
    factor = 1.0 if out.dtype.itemsize > 1 else 1 / STATIC_SCALES[epilogue]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _product[(sum(tiles) * column_tiles,)](
            x, weight, out, x_scale if isinstance(x_scale, Tensor) else None, weight_scale, of_all,
            factor, tiles[0], tiles[0] + tiles[1], sum(tiles), *ends, group, x.stride(0),
            weight.stride(0), out.stride(0), columns, out.shape[1], depth // step,
            ACTIVATION_LIMIT, ACTIVATION_ALPHA, EPILOGUE=epilogue,
            SCALED=weight_scale is not None, PADDED=out.shape[1] * per_out > columns,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=step, TAIL=depth % step,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
