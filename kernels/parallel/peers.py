"""Exchanges by stores to the other GPUs' memory, without packing or a library's launches.

Every process has room that all of a team map and can write to (CUDA driver API,
`cuIpcOpenMemHandle`). One kernel copies rows to where they are wanted, tells the others, and waits
for them, so it can be captured like any other. Room is for one exchange of each kind at a time: a
process writes to it again only once it has got the next exchange of the other kind, which all
others send after they have read what is there.

Nothing is exchanged by multicast, which some hosts do not allow.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magihuman.kernels.jit import nvrtc
from magihuman.kernels.reference import packed_width

SOURCE = Path(__file__).with_name("peer_exchange.cu")
MOST = 8  # processes
THREADS = 512
ROW_BYTES = 256  # rooms begin at multiples of so many
PAGE_BYTES = 2**21  # of device memory, which is mapped by whole pages
HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
BLOCKS_EACH = 2  # of threads, on a multiprocessor

Gather = Callable[[bytes], list[bytes]]


class _Exchange(ctypes.Structure):
    """`Exchange` of the source, field by field."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p * MOST),
        ("flags", ctypes.c_void_p * MOST),
        ("state", ctypes.c_void_p),
        ("is_given_up", ctypes.c_void_p),
        ("source_stride", ctypes.c_longlong),
        ("target_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("ranks", ctypes.c_int),
        ("is_alone", ctypes.c_int),
        ("q", ctypes.c_int),
        ("kv", ctypes.c_int),
        ("gate", ctypes.c_int),
    ]


@dataclass(frozen=True)
class _Bytes:
    """Device memory, for PyTorch to make a tensor of."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.address, False)
        return {"shape": (self.size,), "typestr": "|u1", "data": data, "version": 3}


def _allocate(size: int, device: torch.device) -> int:
    """The address of device memory that other processes can map.

    PyTorch's allocator cuts tensors out of larger blocks; this is a block of its own.

    Raises `torch.OutOfMemoryError` where there is none.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        status, pointer = driver.cuMemAlloc(size)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"no {size / 2**20:.0f} MiB for exchanges on {device}")
        return int(nvrtc.check((status, pointer)))


def _handle(address: int) -> bytes:
    """What another process needs to map this memory."""
    from cuda.bindings import driver

    handle = nvrtc.check(driver.cuIpcGetMemHandle(address))
    return ctypes.string_at(int(handle.getPtr()), HANDLE_BYTES)


def _map(handle: bytes, device: torch.device) -> int:
    """The address of another process's memory in this one."""
    from cuda.bindings import driver

    given = driver.CUipcMemHandle()
    ctypes.memmove(int(given.getPtr()), handle, HANDLE_BYTES)
    flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    with torch.cuda.device(device):
        return int(nvrtc.check(driver.cuIpcOpenMemHandle(given, flag.value)))


class _Room:
    """Memory of this process for both kinds of exchange, and where it is in every process.

    First come the flags, then what `rows_to_heads` gives, then what `heads_to_rows` gives.
    """

    def __init__(self, device: torch.device, heads_bytes: int, rows_bytes: int) -> None:
        """Allocates; the others cannot write to it before `meet`."""
        self.device = device
        self.heads_bytes = -(-heads_bytes // ROW_BYTES) * ROW_BYTES
        self.rows_bytes = rows_bytes
        size = ROW_BYTES + self.heads_bytes + rows_bytes
        self._address = _allocate(-(-size // PAGE_BYTES) * PAGE_BYTES, device)
        starts = (0, ROW_BYTES, ROW_BYTES + self.heads_bytes)
        sizes = (ROW_BYTES, self.heads_bytes, rows_bytes)
        # Each has a storage of its own, as outputs of operators must.
        flags, self.own_heads, self.own_rows = (
            torch.as_tensor(_Bytes(self._address + start, size), device=device)
            for start, size in zip(starts, sizes, strict=True)
        )
        flags.zero_()
        self.state = torch.zeros(2, dtype=torch.int32, device=device)
        self.addresses: list[int] = []

    def meet(self, rank: int, gather: Gather) -> None:
        """Have all processes map each other's room; all call this."""
        torch.cuda.synchronize(self.device)  # flags are zero before anybody can set them
        for other, handle in enumerate(gather(_handle(self._address))):
            own = other == rank
            self.addresses.append(self._address if own else _map(handle, self.device))

    def leave(self, rank: int) -> None:
        """Unmap the others' rooms, and give up this one."""
        from cuda.bindings import driver

        with torch.cuda.device(self.device):
            for other, address in enumerate(self.addresses):
                if other != rank:
                    driver.cuIpcCloseMemHandle(address)
            driver.cuMemFree(self._address)

    def heads(self, rank: int) -> int:
        """The address of what `rows_to_heads` gives in a process."""
        return self.addresses[rank] + ROW_BYTES

    def rows(self, rank: int) -> int:
        """The address of what `heads_to_rows` gives in a process."""
        return self.heads(rank) + self.heads_bytes


class Peers:
    """This process's end of the exchanges of a team. One GPU for each process, of one host.

    Rooms that graphs were captured with stay until the team ends.
    """

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        """Raises `ValueError` for more than 8 processes. Nothing is exchanged before `reserve`."""
        if ranks > MOST:
            raise ValueError(f"at most {MOST} processes exchange by stores, got {ranks}")
        self.rank, self.ranks, self.device = rank, ranks, device
        self._rooms: list[_Room] = []
        self._is_given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def has_room(self, heads_bytes: int, rows_bytes: int) -> bool:
        """Whether exchanges of so many bytes have room already."""
        if not self._rooms:
            return False
        room = self._rooms[-1]
        return heads_bytes <= room.heads_bytes and rows_bytes <= room.rows_bytes

    def allocate(self, heads_bytes: int, rows_bytes: int) -> None:
        """Make room in this process. Raises `torch.OutOfMemoryError` or `RuntimeError` for none."""
        self._rooms.append(_Room(self.device, heads_bytes, rows_bytes))

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
        self._launch(True, parts, size, shape)
        return out[:, : columns // ranks]

    def heads_to_rows(self, x: Tensor, ranks: int, is_alone: bool) -> Tensor:
        """`exchange.heads_to_rows` on the device, likewise. x: contiguous."""
        rows, columns = x.shape[0] // ranks, x.shape[1]
        room, size = self._rooms[-1], x.element_size()
        out = _view(room.own_rows, x.dtype, rows, ranks * columns)
        shape = self._shape(x, out, rows, is_alone, room.rows)
        shape.q = columns * size
        parts = (x.data_ptr(), shape.source_stride, shape.target_stride, shape.q)
        self._launch(False, parts, size, shape)
        return out

    def _shape(self, x: Tensor, out: Tensor, rows: int, is_alone: bool, place: Any) -> _Exchange:
        room, shape = self._rooms[-1], _Exchange()
        shape.source = x.data_ptr()
        for rank in range(self.ranks):
            shape.target[rank], shape.flags[rank] = place(rank), room.addresses[rank]
        shape.state, shape.is_given_up = room.state.data_ptr(), self._is_given_up.data_ptr()
        shape.source_stride = x.stride(0) * x.element_size()
        shape.target_stride = out.stride(0) * x.element_size()
        shape.rows, shape.rank, shape.ranks = rows, self.rank, self.ranks
        shape.is_alone = int(is_alone)
        return shape

    def _launch(self, pack: bool, parts: tuple[int, ...], size: int, shape: _Exchange) -> None:
        warps = max(1, shape.rows * shape.ranks)
        most = BLOCKS_EACH * torch.cuda.get_device_properties(self.device).multi_processor_count
        blocks = min(-(-warps * 32 // THREADS), most)
        with torch.cuda.device(self.device):
            kernel = _kernel(pack, math.gcd(16, *parts), size, self.device)
            kernel.launch(blocks, THREADS, shape)


def _view(memory: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """The first bytes as a tensor of this shape."""
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


@functools.cache
def _kernel(pack: bool, vector: int, element: int, device: torch.device) -> nvrtc.Kernel:
    """The compiled kernel, loaded into the context of the device, which must be current."""
    major, minor = torch.cuda.get_device_capability(device)
    macros = {"PACK": int(pack), "VECTOR": vector, "ELEMENT": element}
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    code = nvrtc.compile_cubin("\n".join([*lines, SOURCE.read_text()]), f"sm_{major}{minor}")
    return nvrtc.Kernel(code, "exchange", 0)
