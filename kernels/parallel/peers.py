"""Exchanges by stores to the other GPUs' memory, without packing or a library's launches.

Every process has room that all of a team map and can write to (CUDA driver API,
`cuIpcOpenMemHandle`). One kernel copies rows to where they are wanted, tells the others, and waits
for them, so it can be captured like any other. Room is for one exchange of each kind at a time: a
process writes to it again only once it has got the next exchange of the other kind, which all
others send after they have read what is there.

Attention over e4m3 sends less: q and k are narrowed on their way (`rows_to_heads_fp8`), and its own
kernel writes results where they are wanted (`shared_rows`), so that a signal is all that is left.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magihuman.kernels.attention.shared_rows import SharedRows
from magihuman.kernels.jit import nvrtc
from magihuman.kernels.parallel.rooms import Gather, Room
from magihuman.kernels.reference import (
    FP8_LIMIT,
    NORM_EPS,
    SMALLEST_VALUE,
    Counts,
    packed_width,
    run_starts,
)

FOLDER = Path(__file__).parent
SIGNAL = "peer_signal.cu"  # comes before each of the others
SOURCES = {"exchange": "peer_exchange.cu", "exchange_qkv": "peer_qkv.cu"}  # of each kernel
MOST = 8  # processes
THREADS = 512
BLOCKS_EACH = 2  # of threads, on a multiprocessor
NARROW_DIM = 128  # width of heads that are narrowed on their way
ANGLES_OF = 16  # multiples of so many angles turn them
VECTOR_BYTES = 16  # of loads


class _Signal(ctypes.Structure):
    """`Signal` of the source, field by field."""

    _fields_ = [
        ("flags", ctypes.c_void_p * MOST),
        ("state", ctypes.c_void_p),
        ("is_given_up", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("ranks", ctypes.c_int),
        ("is_alone", ctypes.c_int),
    ]


class _Exchange(ctypes.Structure):
    """`Exchange` of the source, field by field."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p * MOST),
        ("signal", _Signal),
        ("source_stride", ctypes.c_longlong),
        ("target_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("q", ctypes.c_int),
        ("kv", ctypes.c_int),
        ("gate", ctypes.c_int),
    ]


class _Qkv(ctypes.Structure):
    """`Qkv` of the source, field by field."""

    _fields_ = [
        ("qkv", ctypes.c_void_p),
        ("q_weight", ctypes.c_void_p),
        ("k_weight", ctypes.c_void_p),
        ("rope", ctypes.c_void_p),
        ("qk_scale", ctypes.c_void_p),
        ("target", ctypes.c_void_p * MOST),
        ("signal", _Signal),
        ("stride", ctypes.c_longlong),
        ("k_at", ctypes.c_longlong),
        ("rest_at", ctypes.c_longlong),
        ("rest_stride", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("audio_start", ctypes.c_int),
        ("text_start", ctypes.c_int),
        ("experts", ctypes.c_int),
        ("angles", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("of_gain", ctypes.c_float),
        ("smallest", ctypes.c_float),
    ]


class Peers:
    """This process's end of the exchanges of a team. One GPU for each process, of one host.

    Rooms that graphs were captured with stay until the team ends.
    """

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        """Raises `ValueError` for more than 8 processes. Nothing is exchanged before `reserve`."""
        if ranks > MOST:
            raise ValueError(f"at most {MOST} processes exchange by stores, got {ranks}")
        self.rank, self.ranks, self.device = rank, ranks, device
        self._rooms: list[Room] = []
        self._is_given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def has_room(self, heads_bytes: int, rows_bytes: int) -> bool:
        """Whether exchanges of so many bytes have room already."""
        if not self._rooms:
            return False
        room = self._rooms[-1]
        return heads_bytes <= room.heads_bytes and rows_bytes <= room.rows_bytes

    def allocate(self, heads_bytes: int, rows_bytes: int) -> None:
        """Make room in this process. Raises `torch.OutOfMemoryError` or `RuntimeError` for none."""
        self._rooms.append(Room(self.device, heads_bytes, rows_bytes))

    def meet(self, gather: Gather) -> None:
        """Have all processes map the room that each has just made.

        gather: what a process gives to what all give, by rank; it waits for the others.
        """
        self._rooms[-1].meet(self.rank, gather)

    def forget(self) -> None:
        """Give up the room made last, which some process does not have."""
        self._rooms.pop().leave(self.rank)

    def close(self) -> None:
        """Give up all rooms, and the graphs that were captured with them."""
        torch.cuda.synchronize(self.device)
        while self._rooms:
            self.forget()

    def give_up(self) -> None:
        """End what waits for another process, now and from now on."""
        self._is_given_up.fill_(1)

    def rows_to_heads(
        self, qkv: Tensor, heads: int, kv_heads: int, ranks: int, is_alone: bool
    ) -> Tensor:
        """`exchange.rows_to_heads` on the device; what it gives is there until the exchange after
        the next.
        """
        rows, columns = qkv.shape
        dim = (columns - heads) // (heads + 2 * kv_heads)
        width = packed_width(columns, ranks)
        room, size = self._rooms[-1], qkv.element_size()
        out = _view(room.own_heads, qkv.dtype, ranks * rows, width)
        q, kv = heads // ranks * dim * size, kv_heads // ranks * dim * size
        shape = self._shape(qkv, out, rows, is_alone, room.heads)
        shape.q, shape.kv, shape.gate = q, kv, heads // ranks * size
        parts = (qkv.data_ptr(), shape.source_stride, shape.target_stride, q, kv)
        self._copy(True, parts, size, shape)
        return out[:, : columns // ranks]

    def heads_to_rows(self, x: Tensor, ranks: int, is_alone: bool) -> Tensor:
        """`exchange.heads_to_rows` on the device, likewise. x: contiguous."""
        rows, columns = x.shape[0] // ranks, x.shape[1]
        room, size = self._rooms[-1], x.element_size()
        out = _view(room.own_rows, x.dtype, rows, ranks * columns)
        shape = self._shape(x, out, rows, is_alone, room.rows)
        shape.q = columns * size
        parts = (x.data_ptr(), shape.source_stride, shape.target_stride, shape.q)
        self._copy(False, parts, size, shape)
        return out

    def narrows(
        self, qkv: Tensor, tables: tuple[Tensor, Tensor, Tensor], heads: int, kv_heads: int
    ) -> bool:
        """Whether `rows_to_heads_fp8` takes this projection, and has room for it.

        tables: its `q_weight`, `k_weight` and `rope`.
        """
        rows, columns = qkv.shape
        dim = (columns - heads) // (heads + 2 * kv_heads)
        if dim != NARROW_DIM or qkv.dtype != torch.bfloat16:
            return False
        starts = (x.data_ptr() for x in (qkv, *tables))
        if math.gcd(VECTOR_BYTES, 2 * qkv.stride(0), *starts) < VECTOR_BYTES:
            return False
        angles, ranks = tables[2].shape[1] // 2, self.ranks
        if angles % ANGLES_OF:
            return False
        return self._rooms[-1].has_narrow(rows * ranks, heads // ranks, kv_heads // ranks, dim)

    def rows_to_heads_fp8(
        self,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        rope: Tensor,
        counts: Counts | None,
        heads: int,
        kv_heads: int,
        is_alone: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`exchange.rows_to_heads_fp8` on the device, likewise, but for the values in e4m3.

        Where `narrows`. counts, rope: of the rows of all processes.

        Returns:
            q [N, heads / ranks, D] and k [N, kv_heads / ranks, D] in e4m3, rows [V | gate] and
            then zeros in bf16, and the scale [1] fp32 of q times k.
        """
        (rows, columns), ranks, room = qkv.shape, self.ranks, self._rooms[-1]
        own, own_kv = heads // ranks, kv_heads // ranks
        dim = (columns - heads) // (heads + 2 * kv_heads)
        given = room.narrow(rows * ranks, own, own_kv, dim)
        scale = qkv.new_empty(1, dtype=torch.float32)
        shape = _Qkv()
        shape.qkv, shape.q_weight, shape.k_weight, shape.rope, shape.qk_scale = (
            x.data_ptr() for x in (qkv, q_weight, k_weight, rope, scale)
        )
        for rank in range(ranks):
            shape.target[rank] = room.heads(rank)
        shape.signal = self._signal(is_alone)
        shape.stride, shape.rest_stride = qkv.stride(0), given.rest.stride(0)
        shape.k_at, shape.rest_at = given.k_at, given.rest_at
        shape.rows, shape.heads, shape.kv_heads = rows, own, own_kv
        shape.audio_start, shape.text_start = run_starts(counts, rows * ranks)
        shape.experts, shape.angles = 1 if counts is None else 3, rope.shape[1] // 2
        shape.eps, shape.of_gain, shape.smallest = NORM_EPS, dim**0.5 / FP8_LIMIT, SMALLEST_VALUE
        self._launch(rows, "exchange_qkv", (), shape)
        return given.q, given.k, given.rest, scale

    def shared_rows(self, rows: int, columns: int, dtype: torch.dtype, alone: bool) -> SharedRows:
        """Where heads of all rows are written to be `exchange.heads_to_rows`, before `meet_again`.

        rows: of each process; columns: of one's heads.
        """
        room = self._rooms[-1]
        out = _view(room.own_rows, dtype, rows, self.ranks * columns)
        distances = room.no_distances if alone else room.distances
        return SharedRows(out, self.rank * columns, distances)

    def meet_again(self, is_alone: bool) -> None:
        """Tell the others that what was launched before has written to their memory, and wait for
        what they have told.
        """
        shape = _Exchange()
        shape.signal = self._signal(is_alone)
        self._launch(0, "exchange", (("PACK", 0), ("VECTOR", 16), ("ELEMENT", 2)), shape)

    def _signal(self, is_alone: bool) -> _Signal:
        room, signal = self._rooms[-1], _Signal()
        for rank in range(self.ranks):
            signal.flags[rank] = room.addresses[rank]
        signal.state, signal.is_given_up = room.state.data_ptr(), self._is_given_up.data_ptr()
        signal.rank, signal.ranks, signal.is_alone = self.rank, self.ranks, int(is_alone)
        return signal

    def _shape(self, x: Tensor, out: Tensor, rows: int, is_alone: bool, place: Any) -> _Exchange:
        shape = _Exchange()
        shape.source, shape.signal = x.data_ptr(), self._signal(is_alone)
        for rank in range(self.ranks):
            shape.target[rank] = place(rank)
        shape.source_stride = x.stride(0) * x.element_size()
        shape.target_stride = out.stride(0) * x.element_size()
        shape.rows = rows
        return shape

    def _copy(self, pack: bool, parts: tuple[int, ...], size: int, shape: _Exchange) -> None:
        macros = ("PACK", int(pack)), ("VECTOR", math.gcd(16, *parts)), ("ELEMENT", size)
        self._launch(shape.rows, "exchange", macros, shape)

    def _launch(
        self, rows: int, name: str, macros: tuple[tuple[str, int], ...], shape: ctypes.Structure
    ) -> None:
        """A warp for what each row has for each process, as far as there are warps."""
        warps = max(1, rows * self.ranks)
        most = BLOCKS_EACH * torch.cuda.get_device_properties(self.device).multi_processor_count
        blocks = min(-(-warps * 32 // THREADS), most)
        with torch.cuda.device(self.device):
            _kernel(name, macros, self.device).launch(blocks, THREADS, shape)


def _view(memory: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """The first bytes as a tensor of this shape."""
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def source_of(name: str, macros: tuple[tuple[str, int], ...]) -> str:
    """The CUDA C++ of a kernel, whole."""
    lines = [f"#define {macro} {value}" for macro, value in macros]
    files = [(FOLDER / file).read_text() for file in (SIGNAL, SOURCES[name])]
    return "\n".join([*lines, *files])


@functools.cache
def _kernel(name: str, macros: tuple[tuple[str, int], ...], device: torch.device) -> nvrtc.Kernel:
    """The compiled kernel, loaded into the context of the device, which must be current."""
    major, minor = torch.cuda.get_device_capability(device)
    code = nvrtc.compile_cubin(source_of(name, macros), f"sm_{major}{minor}")
    return nvrtc.Kernel(code, name, 0)
