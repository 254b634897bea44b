"""CUDA C++ kernels, compiled for the GPU at hand when first needed and kept on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import struct
from pathlib import Path
from typing import Any

import torch

from magihuman.kernels.jit.cache import read, write

KIND = "cubin"  # in the cache
ELF64 = b"\x7fELF\x02\x01"  # how a file of 64 bits begins, its numbers little end first
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # of such a file
CUDA_MACHINE = 190


class CudaError(RuntimeError):
    """The driver or the compiler refused."""


@functools.cache
def is_available() -> bool:
    """Whether cuda-bindings is installed and finds the compiler; PyTorch's CUDA 13 builds bring
    both along.
    """
    if importlib.util.find_spec("cuda") is None or not importlib.util.find_spec("cuda.bindings"):
        return False
    from cuda.bindings import nvrtc

    try:
        check(nvrtc.nvrtcVersion())
    except RuntimeError:  # no library, or one that does not answer
        return False
    return True


def check(result: tuple[Any, ...]) -> Any:
    """The value of a call of cuda.bindings, which returns its status first.

    Raises `CudaError` where the status is not success.
    """
    status, *values = result
    if status.value != 0:
        raise CudaError(f"CUDA call failed: {status!r}")
    return values[0] if len(values) == 1 else values


def compile_cubin(source: str, arch: str, cache: Path | None = None) -> bytes:
    """Machine code of a CUDA C++ source.

    Args:
        source: needs no header.
        arch: such as "sm_90a".
        cache: folder of compiled code; by default the user's.

    Raises:
        CudaError: the compiler's message.
    """
    from cuda.bindings import nvrtc

    version = check(nvrtc.nvrtcVersion())
    digest = hashlib.sha256(f"{version} {arch}\n{source}".encode()).hexdigest()
    key = digest[:32]
    kept = read(KIND, key, cache)
    if kept is not None and is_cubin(kept):
        return kept
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status.value != 0:
        text = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, text)
        raise CudaError(f"the kernel does not compile for {arch}:\n{_text(text)}")
    code = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    write(KIND, key, code, cache)
    return code


def is_cubin(code: bytes) -> bool:
    """Whether bytes are laid out as machine code for a GPU: a whole ELF file, for CUDA."""
    if len(code) < HEADER.size or not code.startswith(ELF64):
        return False
    _, _, machine, _, _, segments, sections, _, _, *sizes = HEADER.unpack_from(code)
    segment_bytes, segment_count, section_bytes, section_count, _ = sizes
    ends = (segments + segment_bytes * segment_count, sections + section_bytes * section_count)
    return bool(machine == CUDA_MACHINE and section_count and max(ends) <= len(code))


def _text(message: bytes) -> str:
    """A message without the zero that ends it."""
    return message.decode().rstrip("\0\n")


class Kernel:
    """A function of a compiled source on one device."""

    def __init__(self, code: bytes, name: str, shared_bytes: int) -> None:
        """Loads into the current context. shared_bytes: dynamic shared memory of each block."""
        from cuda.bindings import driver

        self._module = check(driver.cuModuleLoadData(code))
        self._function = check(driver.cuModuleGetFunction(self._module, name.encode()))
        self._shared_bytes = shared_bytes
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))

    def launch(self, blocks: int, threads: int, *arguments: ctypes.Structure) -> None:
        """Launch on PyTorch's current stream; arguments go by value."""
        from cuda.bindings import driver

        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = torch.cuda.current_stream().cuda_stream
        check(
            driver.cuLaunchKernel(
                self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream,
                ctypes.addressof(addresses), 0,
            )
        )  # fmt: skip


@functools.cache
def tensor_map_types() -> dict[torch.dtype, Any]:
    """The element type of a tensor map by the dtype of its tensor."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    return {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        torch.float8_e4m3fn: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }


class TensorMap(ctypes.Structure):
    """`CUtensorMap` of the CUDA driver, 128 bytes."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


def check_rows(x: torch.Tensor) -> None:
    """Raise `ValueError` unless x's rows start at multiples of 16 bytes and are contiguous."""
    if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16 or x.stride(1) != 1:
        raise ValueError(
            f"rows must start at multiples of 16 bytes, got strides {x.stride()} of {x.dtype}"
        )


def tensor_map(
    x: torch.Tensor, rows: int, columns: int, box_rows: int, box_columns: int
) -> TensorMap:
    """A map over the first rows and columns of x, swizzled over the width of a box.

    x: [N, C], its rows and its first element at multiples of 16 bytes, else `ValueError`; a box's
    row: 16, 32, 64 or 128 bytes. Reads outside give zeros, writes outside are dropped. Source: the
    CUDA driver API, `cuTensorMapEncodeTiled`.
    """
    from cuda.bindings import driver

    check_rows(x)
    size = x.element_size()
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        16: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
    }[box_columns * size]
    encoded = check(
        driver.cuTensorMapEncodeTiled(
            tensor_map_types()[x.dtype], 2, x.data_ptr(),
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(x.stride(0) * size)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip
    return TensorMap.from_buffer_copy(ctypes.string_at(int(encoded.getPtr()), 128))
