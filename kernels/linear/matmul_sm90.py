"""The Hopper matrix product of `matmul_sm90.cu`: an activation or an addition in its epilogue.

Operands are bf16, or e4m3 with a scale for each row: of x, which a token owns, and of the weight,
which an output channel owns.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from magihuman.kernels.jit import nvrtc
from magihuman.kernels.reference import FP8, STATIC_SCALES, Counts

Epilogue = Literal["store", "gelu7", "swiglu7", "add"]

EPILOGUES = {"store": 0, "gelu7": 1, "swiglu7": 2, "add": 3}
SHARED_BYTES = 232448  # of a block on sm_90
BARRIER_BYTES = 256
CONSUMERS = 2
ROWS = CONSUMERS * 64  # of the product in a tile
THREADS = 128 * (1 + CONSUMERS)
STAGES = 4  # blocks of both operands in shared memory
PANEL = 64  # columns of a product in bf16 that wait together for its epilogue
PANEL_BYTES = 64 * PANEL * 2
DEPTH_BYTES = 128  # of a row in a block of an operand
ARCH = "sm_90a"
SOURCE = Path(__file__).with_name("matmul_sm90.cu")


@dataclass(frozen=True)
class Tile:
    """Shape of the work of a thread block, of `ROWS` rows.

    Attributes:
        columns: columns of the product, a multiple of 64.
        cluster_rows: blocks, one below the other, that share their columns' operand.
        group: at most so many row tiles go through all columns together, for the L2 cache's sake.
    """

    columns: int
    cluster_rows: int = 1
    group: int = 8


class _Shape(ctypes.Structure):
    """`Shape` of the source, field by field."""

    _fields_ = [
        ("x_scale", ctypes.c_void_p),
        ("weight_scale", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_longlong),
        ("out_columns", ctypes.c_int),
        ("x_scale_of_all", ctypes.c_float),
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
    """`Maps` of the source: of both operands, and of each run's rows of the output."""

    _fields_ = [
        ("x", nvrtc.TensorMap),
        ("weight", nvrtc.TensorMap),
        ("out", nvrtc.TensorMap * 3),
    ]


def columns_of(weight: Tensor, counts: Counts | None) -> int:
    """Columns of the product: rows of the weight, or of each run's third of it."""
    return weight.shape[0] // (3 if counts else 1)


def out_dtypes(epilogue: Epilogue) -> list[torch.dtype]:
    """The dtypes that the output of a product with this epilogue may have."""
    if epilogue == "add":
        return [torch.float32]
    return [torch.bfloat16, FP8] if epilogue in STATIC_SCALES else [torch.bfloat16]


def ring_panels(tile: Tile, fp8: bool) -> int:
    """Panels that fit beside the blocks of operands, at most those of both consumers."""
    scales = CONSUMERS * tile.columns * 4 if fp8 else 0
    blocks = STAGES * DEPTH_BYTES * (ROWS + tile.columns)
    room = SHARED_BYTES - BARRIER_BYTES - scales - blocks
    return min(room // PANEL_BYTES, CONSUMERS * tile.columns // PANEL)


def source(tile: Tile, epilogue: Epilogue, fp8: bool, out_dtype: torch.dtype) -> str:
    """The kernel for one tile, epilogue, type of operands and of output."""
    sums = tile.columns // 2  # registers of a thread for 64 rows
    macros = {
        "FP8": int(fp8),
        "OUT_FP8": int(out_dtype == FP8),
        "COLUMNS": tile.columns,
        "STAGES": STAGES,
        "RING_PANELS": ring_panels(tile, fp8),
        "CLUSTER": tile.cluster_rows,
        "EPILOGUE": EPILOGUES[epilogue],
        "WGMMA_KIND": f'"m64n{tile.columns}{"k32.f32.e4m3.e4m3" if fp8 else "k16.f32.bf16.bf16"}"',
        "WGMMA_TAIL": '"1, 1"' if fp8 else '"1, 1, 0, 0"',
        "WGMMA_SUMS": '"' + ", ".join(f"%{i}" for i in range(sums)) + '"',
        "WGMMA_OPERANDS": ", ".join(f'"+f"(sums[{i}])' for i in range(sums)),
        "WGMMA_X": f'"%{sums}"',
        "WGMMA_WEIGHT": f'"%{sums + 1}"',
        "WGMMA_USE": f'"%{sums + 2}"',
    }
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    return "\n".join([*lines, SOURCE.read_text(encoding="utf-8")])


def compile_tiles(
    tiles: Iterable[Tile], epilogue: Epilogue, fp8: bool, out_dtype: torch.dtype
) -> None:
    """Compile side by side what `matmul` would one after another, and keep the code on disk."""
    sources = [source(tile, epilogue, fp8, out_dtype) for tile in tiles]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda text: nvrtc.compile_cubin(text, ARCH), sources))


@functools.cache
def _kernel(
    tile: Tile, epilogue: Epilogue, fp8: bool, out_dtype: torch.dtype, device: torch.device
) -> nvrtc.Kernel:
    """The compiled kernel, loaded into the context of the device, which must be current."""
    code = nvrtc.compile_cubin(source(tile, epilogue, fp8, out_dtype), ARCH)
    return nvrtc.Kernel(code, "matmul", SHARED_BYTES)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a block of threads runs on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


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
        x: [N, K or more] bf16 or e4m3, rows at multiples of 16 bytes; N at least 1.
        weight: [M, K] or, with `counts`, [3 M, K], of x's dtype, rows at multiples of 16 bytes. For
            "swiglu7" the even rows of M are glu, the odd ones lin.
        out: [N, M], or [N, M / 2] for "swiglu7", of one of `out_dtypes`, rows at multiples of 16
            bytes. "store" may touch columns beyond its shape up to the next such multiple. An e4m3
            activation is divided by its entry in `reference.STATIC_SCALES`.
        counts: rows of each of three runs, each with a third of the weight's rows.
        epilogue: what happens to the product, which is rounded to bf16 first, as in the plain
            model.
        tile: how the work is cut.
        x_scale: of e4m3 operands, [N] fp32, or one number for all rows.
        weight_scale: of e4m3 operands, [M] or [3 M] fp32.

    Raises `ValueError` where rows do not start at multiples of 16 bytes. `routes.TILES` has what
    was fastest on H100.
    """
    nvrtc.check_rows(out)
    fp8 = x.dtype == FP8
    depth_block = DEPTH_BYTES // x.element_size()
    columns, depth = columns_of(weight, counts), weight.shape[1]
    runs = counts or (x.shape[0], 0, 0)
    maps, shape = _Maps(), _Shape()
    maps.x = nvrtc.tensor_map(x, x.shape[0], depth, ROWS, depth_block)
    maps.weight = nvrtc.tensor_map(
        weight, weight.shape[0], depth, tile.columns // tile.cluster_rows, depth_block
    )
    row = tiles = 0
    for i, count in enumerate(runs):
        if count and epilogue == "store":
            maps.out[i] = nvrtc.tensor_map(out[row:], count, out.shape[1], 64, PANEL)
        tiles += -(-count // (ROWS * tile.cluster_rows))
        shape.first_row[i], shape.rows[i], shape.last_tile[i] = row, count, tiles
        row += count
    if isinstance(x_scale, Tensor):
        shape.x_scale = x_scale.data_ptr()
    else:
        shape.x_scale_of_all = x_scale or 1.0
    shape.weight_scale = None if weight_scale is None else weight_scale.data_ptr()
    shape.out, shape.out_stride, shape.out_columns = out.data_ptr(), out.stride(0), out.shape[1]
    shape.blocks = -(-depth // depth_block)
    shape.column_tiles = -(-columns // tile.columns)
    shape.row_tiles = tiles
    shape.group = -(-tiles // -(-tiles // tile.group))  # groups of like height
    shape.weight_rows = columns
    clusters = min(tiles * shape.column_tiles, _processors(x.device) // tile.cluster_rows)
    with torch.cuda.device(x.device):
        kernel = _kernel(tile, epilogue, fp8, out.dtype, x.device)
        kernel.launch(clusters * tile.cluster_rows, THREADS, maps, shape)
