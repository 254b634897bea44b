"""The Hopper matrix product of `matmul_sm90.cu`: an activation or an addition in its epilogue."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from magihuman.kernels import nvrtc
from magihuman.kernels.reference import Counts

Epilogue = Literal["store", "gelu7", "swiglu7", "add"]

EPILOGUES = {"store": 0, "gelu7": 1, "swiglu7": 2, "add": 3}
SHARED_BYTES = 232448 - 2048  # of a block on sm_90, less alignment and barriers
CONSUMERS = 2
THREADS = 128 * (1 + CONSUMERS)
DEPTH = 64  # elements of the sum in a block of an operand
SOURCE = Path(__file__).with_name("matmul_sm90.cu")


@dataclass(frozen=True)
class Tile:
    """Shape of the work of a thread block.

    Attributes:
        columns: of the product, a multiple of 16.
        blocks: of 64 rows for each of two warp groups.
        cluster_rows: blocks, one below the other, that share their columns' operand.
        cluster_columns: blocks side by side that share their rows' operand; one of the two is 1.
        group: at most so many row tiles go through all columns together, for the L2 cache's sake.
    """

    columns: int
    blocks: int
    cluster_rows: int = 1
    cluster_columns: int = 1
    group: int = 8

    @property
    def rows(self) -> int:
        """Of the product."""
        return CONSUMERS * self.blocks * 64


class _Shape(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.c_int),
        ("column_tiles", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("group", ctypes.c_int),
        ("weight_rows", ctypes.c_int),
        ("first_row", ctypes.c_int * 3),
        ("rows", ctypes.c_int * 3),
        ("last_tile", ctypes.c_int * 3),
    ]


class _Maps(ctypes.Structure):
    _fields_ = [
        ("x", nvrtc.TensorMap),
        ("weight", nvrtc.TensorMap),
        ("out", nvrtc.TensorMap * 3),
    ]


def out_bytes(tile: Tile, epilogue: Epilogue) -> int:
    """Width of the boxes that leave a tile: the widest swizzle that divides it."""
    width = tile.columns * {"store": 2, "gelu7": 2, "swiglu7": 1, "add": 4}[epilogue]
    return next(size for size in (128, 64, 32) if width % size == 0)


def ring(tile: Tile, epilogue: Epilogue) -> tuple[int, int]:
    """Blocks in the ring and boxes of output for each warp group, as many as fit."""
    stage = 2 * DEPTH * (tile.rows + tile.columns)
    box = 64 * out_bytes(tile, epilogue)
    buffers = 2 if SHARED_BYTES - 4 * CONSUMERS * box >= 4 * stage else 1
    return (SHARED_BYTES - buffers * CONSUMERS * box) // stage, buffers


def source(tile: Tile, epilogue: Epilogue) -> str:
    """The kernel for one tile and epilogue."""
    stages, buffers = ring(tile, epilogue)
    sums = tile.columns // 2  # registers of a thread for 64 rows
    macros = {
        "COLUMNS": tile.columns,
        "BLOCKS": tile.blocks,
        "STAGES": stages,
        "CLUSTER_ROWS": tile.cluster_rows,
        "CLUSTER_COLUMNS": tile.cluster_columns,
        "EPILOGUE": EPILOGUES[epilogue],
        "OUT_BYTES": out_bytes(tile, epilogue),
        "BUFFERS": buffers,
        "WGMMA_KIND": f'"m64n{tile.columns}k16.f32.bf16.bf16"',
        "WGMMA_SUMS": '"' + ", ".join(f"%{i}" for i in range(sums)) + '"',
        "WGMMA_OPERANDS": ", ".join(f'"+f"(sums[{i}])' for i in range(sums)),
        "WGMMA_X": f'"%{sums}"',
        "WGMMA_WEIGHT": f'"%{sums + 1}"',
        "WGMMA_USE": f'"%{sums + 2}"',
    }
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    return "\n".join([*lines, SOURCE.read_text()])


@functools.cache
def _kernel(tile: Tile, epilogue: Epilogue, device: torch.device) -> nvrtc.Kernel:
    return nvrtc.Kernel(
        nvrtc.compile_cubin(source(tile, epilogue), "sm_90a"), "matmul", SHARED_BYTES + 2048
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    counts: Counts | None,
    epilogue: Epilogue,
    tile: Tile,
) -> None:
    """`out = epilogue(x @ weight.T)`, or `out += x @ weight.T` for "add".

    Args:
        x: [N, K or more] bf16, rows at multiples of 16 bytes; N at least 1.
        weight: [M, K] or, with `counts`, [3 M, K], likewise. For "swiglu7" the even rows of M are
            glu, the odd ones lin.
        out: [N, M] bf16, or [N, M / 2] for "swiglu7", or [N, M] fp32 for "add"; rows likewise.
            Columns beyond its shape are not touched.
        counts: rows of each of three runs, each with its own third of the weight's rows.
        epilogue: what happens to the product. Activations take it rounded to bf16, as the plain
            model does; "add" takes it as summed, in fp32.
        tile: how the work is cut.
    """
    columns, depth = weight.shape[0] // (3 if counts else 1), weight.shape[1]
    runs = counts or (x.shape[0], 0, 0)
    maps, shape = _Maps(), _Shape()
    maps.x = nvrtc.tensor_map(x, x.shape[0], depth, tile.rows // tile.cluster_columns, DEPTH)
    maps.weight = nvrtc.tensor_map(
        weight, weight.shape[0], depth, tile.columns // tile.cluster_rows, DEPTH
    )
    box_columns = out_bytes(tile, epilogue) // out.element_size()
    row = tiles = 0
    for i, count in enumerate(runs):
        if count:
            maps.out[i] = nvrtc.tensor_map(out[row:], count, out.shape[1], 64, box_columns)
        tiles += -(-count // (tile.rows * tile.cluster_rows))
        shape.first_row[i], shape.rows[i], shape.last_tile[i] = row, count, tiles
        row += count
    shape.blocks = -(-depth // DEPTH)
    shape.column_tiles = -(-columns // (tile.columns * tile.cluster_columns))
    shape.row_tiles = tiles
    shape.group = -(-tiles // -(-tiles // tile.group))  # groups of like height
    shape.weight_rows = columns
    cluster = tile.cluster_rows * tile.cluster_columns
    clusters = min(tiles * shape.column_tiles, _processors(x.device) // cluster)
    with torch.cuda.device(x.device):
        _kernel(tile, epilogue, x.device).launch(clusters * cluster, THREADS, maps, shape)
