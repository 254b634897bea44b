"""Device memory of this process that the others of a team map, for exchanges by stores.

Nothing is exchanged by multicast, which some hosts do not allow.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magihuman.kernels.jit import nvrtc
from magihuman.kernels.reference import FP8, packed_width

ROW_BYTES = 256  # rooms, and what is in them, begin at multiples of so many
PAGE_BYTES = 2**21  # of device memory, which is mapped by whole pages
HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
UNIT_BYTES = 16  # of distances between rooms

Gather = Callable[[bytes], list[bytes]]


@dataclass(frozen=True)
class _Bytes:
    """Device memory, for PyTorch to make a tensor of."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.address, False)
        return {"shape": (self.size,), "typestr": "|u1", "data": data, "version": 3}


def _rounded(size: int) -> int:
    return -(-size // ROW_BYTES) * ROW_BYTES


def _places(rows: int, heads: int, kv_heads: int, dim: int) -> tuple[int, int, int]:
    """Columns of `Narrow.rest`, `Narrow.k_at` and `Narrow.rest_at`."""
    k_at = _rounded(rows * heads * dim)
    return packed_width(kv_heads * dim + heads, 1), k_at, k_at + _rounded(rows * kv_heads * dim)


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


class Room:
    """Memory of this process for both kinds of exchange, and where it is in every process.

    First come the flags, then what `rows_to_heads` gives, then what `heads_to_rows` gives.
    """

    def __init__(self, device: torch.device, heads_bytes: int, rows_bytes: int) -> None:
        """Allocates; the others cannot write to it before `meet`."""
        self.device = device
        self.heads_bytes = _rounded(heads_bytes)
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
        # From this room to each process's, in units of 16 bytes, int64 [ranks]; and to this one.
        self.distances = self.no_distances = torch.empty(0, dtype=torch.int64, device=device)

    def meet(self, rank: int, gather: Gather) -> None:
        """Have all processes map each other's room; all call this."""
        torch.cuda.synchronize(self.device)  # flags are zero before anybody can set them
        for other, handle in enumerate(gather(_handle(self._address))):
            own = other == rank
            self.addresses.append(self._address if own else _map(handle, self.device))
        away = [(address - self._address) // UNIT_BYTES for address in self.addresses]
        self.distances = torch.tensor(away, device=self.device)
        self.no_distances = torch.zeros_like(self.distances)

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

    def has_narrow(self, rows: int, heads: int, kv_heads: int, dim: int) -> bool:
        """Whether what `narrow` gives has room."""
        columns, _, rest_at = _places(rows, heads, kv_heads, dim)
        return rest_at + rows * columns * torch.bfloat16.itemsize <= self.heads_bytes

    def narrow(self, rows: int, heads: int, kv_heads: int, dim: int) -> Narrow:
        """What `rows_to_heads_fp8` gives as tensors of their own, where `has_narrow`.

        rows: of all processes; heads, kv_heads: of this one.
        """
        columns, k_at, rest_at = _places(rows, heads, kv_heads, dim)
        start = self._address + ROW_BYTES
        shapes = (0, FP8, (heads, dim)), (k_at, FP8, (kv_heads, dim))
        q, k, rest = (
            torch.as_tensor(
                _Bytes(start + at, rows * math.prod(shape) * dtype.itemsize), device=self.device
            )
            .view(dtype)
            .view(rows, *shape)
            for at, dtype, shape in (*shapes, (rest_at, torch.bfloat16, (columns,)))
        )
        return Narrow(q, k, rest, k_at, rest_at)


@dataclass(frozen=True)
class Narrow:
    """What a process is sent for its heads, in its room.

    Attributes:
        q, k: [rows, heads, dim] e4m3.
        rest: [rows, columns] bf16, rows [V | gate] and then zeros.
        k_at, rest_at: bytes from where q begins to where they do.
    """

    q: Tensor
    k: Tensor
    rest: Tensor
    k_at: int
    rest_at: int
