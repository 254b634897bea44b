"""Kernels compiled ahead of a GPU, as a launch at the model's full size would compile them.

`CASES` has the streaming kernels, and how wide their loads and stores are. An entry of `PORTABLE`
is what the portable kernels beside these launch on a GPU of each architecture.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from harness import kernel_cases
from magihuman.kernels import add_rms_norm
from magihuman.kernels.attention import head_gate, portable, qkv_fp8
from magihuman.kernels.decoder import channel_norm, frames
from magihuman.kernels.linear import activations, matmul_portable, quantize
from magihuman.kernels.parallel import head_pack
from magihuman.kernels.reference import FP8_KEYS
from magihuman.kernels.target import E4M3_FROM, PORTABLE_FROM, Capability
from magihuman.runtime.config import DiTConfig

BF16, FP32, I32, U8 = torch.bfloat16, torch.float32, torch.int32, torch.uint8
E4M3, I8 = torch.float8_e4m3fn, torch.int8
TYPES = {BF16: "bf16", FP32: "fp32", I32: "i32", U8: "u8", E4M3: "fp8e4nv", I8: "i8"}
COUNTS = (3860, 126, 300)
ROWS = sum(COUNTS)


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.names: list[str] = kernel.arg_names
        self.arguments: dict[str, Any] = {}
        self.options: dict[str, Any] = {"enable_fp_fusion": True}  # triton 3.9 wants it said

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *positional: Any, **named: Any) -> None:
        self.arguments.update(zip(self.names, positional, strict=False))
        for name, value in named.items():
            (self.arguments if name in self.names else self.options)[name] = value


def build(
    patch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    launch: Callable[[], object],
    capability: Capability = (9, 0),
) -> Any:
    """The module's kernel for a GPU of this capability, specialised as Triton does to the arguments
    of this launch.
    """
    kernel = getattr(module, name)
    recorder = Recorder(kernel)
    with patch.context() as context:
        context.setattr(module, name, recorder)
        launch()
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for at, parameter in enumerate(kernel.params):
        value = recorder.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(at,)] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            boxes = f"{TYPES[value.base.dtype]}{value.block_shape}".replace(" ", "")
            signature[parameter.name] = f"tensordesc<{boxes},{value.layout!r}>"
            continue
        address = value
        if isinstance(value, Tensor):  # the allocator's own addresses are multiples of 16
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            address = value.storage_offset() * value.itemsize
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if address % 16 == 0 and not parameter.do_not_specialize:
            attributes[(at,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature=signature, constexprs=constants, attrs=attributes)
    major, minor = capability
    return triton.compile(
        source, target=GPUTarget("cuda", 10 * major + minor, 32), options=recorder.options
    )


def resource_usage(code: bytes, folder: Path) -> str:
    """An object's own report of the resources it takes."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(code)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    )
    return done.stdout


def spills(compiled: Any, folder: Path) -> int:
    """Bytes spilled."""
    usage = resource_usage(compiled.asm["cubin"], folder)
    return sum(int(size) for size in re.findall(r"(?:LOCAL|STACK):(\d+)", usage))


def widths(compiled: Any, operation: str) -> set[int]:
    """Bytes that a thread moves at once, of all global loads (`ld`) or stores (`st`)."""
    pattern = rf"\b{operation}\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
    accesses = re.findall(pattern, compiled.asm["ptx"])
    return {int(count or 1) * int(bits) // 8 for count, bits in accesses}


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def full_size_qkv() -> Tensor:
    """[Q | K | V | gate]: rows of 7208 elements, of which 8 is a divisor and 16 is none."""
    return empty(ROWS, (40 + 2 * 8) * 128 + 40)


def video(channels: int, frames: int, height: int, width: int) -> Tensor:
    """Of a window of 9 latents at 480x256."""
    shape = (1, channels, frames, height, width)
    return empty(*shape).contiguous(memory_format=torch.channels_last_3d)


# Kernel, its launch at full size, and the bytes that a thread loads and stores at once: 16, but for
# the end of a row in add_rms_norm, of 4 elements a thread, single gates, and colours of pixels.
CASES: dict[str, tuple[Any, str, Callable[[], object], set[int], set[int]]] = {
    "add_rms_norm": (
        add_rms_norm,
        "_add_rms_norm",
        lambda: add_rms_norm.add_rms_norm(
            empty(ROWS, 5120, dtype=FP32), empty(ROWS, 5120), empty(3 * 5120, dtype=FP32), COUNTS,
            BF16,
        ),
        {16, 8},
        {16, 8},
    ),
    "swiglu7": (
        activations,
        "_swiglu7",
        lambda: activations.swiglu7(empty(ROWS, 2 * 13652), 13696),
        {16},
        {16},
    ),
    "gelu7": (
        activations,
        "_gelu7",
        lambda: activations.gelu7(empty(ROWS, 20480), 20480),
        {16},
        {16},
    ),
    "head_gate": (
        head_gate,
        "_head_gate",
        lambda: head_gate.head_gate(empty(ROWS, 40, 128), full_size_qkv()[:, -40:]),
        {16, 2},
        {16},
    ),
    "pack_heads": (
        head_pack,
        "_pack_heads",
        lambda: head_pack.pack_heads(full_size_qkv(), 40, 8, 2),
        {16, 2},  # 2 of gates
        {16, 2},
    ),
    "unpack_heads": (
        head_pack,
        "_unpack_heads",
        lambda: head_pack.unpack_heads(empty(2, ROWS // 2, 2560)),
        {16},
        {16},
    ),
    "norm_rows": (
        quantize,
        "_norm_rows",
        lambda: quantize.norm_rows(
            empty(ROWS, 5120, dtype=FP32), empty(3 * 5120, dtype=FP32), COUNTS
        ),
        {16},
        {16, 8, 4},  # 4 of the scales
    ),
    "quantize_rows": (
        quantize,
        "_quantize_rows",
        lambda: quantize.quantize_rows(empty(ROWS, 5120)),
        {16},
        {16, 8, 4},
    ),
    "channel_norm": (
        channel_norm,
        "_channel_norm",
        lambda: channel_norm.channel_norm(
            video(128, 36, 128, 240), video(128, 36, 128, 240), empty(128, dtype=FP32),
            channel_norm.Norm(1e-8, "silu", 1, 1, 1e-6), replace=True,
        ),
        {16},
        {16},
    ),
    "channel_norm of wide rows": (
        channel_norm,
        "_channel_norm",
        lambda: channel_norm.channel_norm(
            video(512, 9, 16, 30), None, empty(512, dtype=FP32),
            channel_norm.Norm(1e-8, "silu", 1, 1),
        ),
        {16},
        {16},
    ),
    "channel_norm of phases": (
        channel_norm,
        "_channel_norm",
        lambda: channel_norm.channel_norm(
            video(128, 36, 128, 240), video(512, 36, 65, 121), empty(128, dtype=FP32),
            channel_norm.Norm(1e-8, "relu", 1, 1), delta_phases=True, replace=True,
        ),
        {16},
        {16},
    ),
    "join_frames": (
        frames,
        "_join_frames",
        lambda: frames.join_frames(video(512, 18, 32, 60), None, empty(512, dtype=FP32), True, 1),
        {16, 8},  # 8 of the bias
        {16},
    ),
    "yuv420": (
        frames,
        "_yuv420",
        lambda: frames.yuv420(empty(29, 256, 480, 3, dtype=U8)),
        {1},
        {1, 4},  # 4 of chroma
    ),
    "quantize_rows padded": (
        quantize,
        "_quantize_rows",
        lambda: quantize.quantize_rows(empty(ROWS, 13696)),
        {16},
        {16, 4},
    ),
}  # fmt: skip


def shared_case(case: kernel_cases.KernelCase) -> tuple[Any, ...]:
    """An entry of the table that all tests share, as those above."""
    shape = case.full_shape(COUNTS, DiTConfig())
    arguments = case.draw(shape, torch.device("meta"), BF16)
    return case.loaded(), case.kernel, lambda: case.launched(*arguments), case.loads, case.stores


CASES |= {case.name: shared_case(case) for case in kernel_cases.CASES.values()}


@dataclass(frozen=True)
class Portable:
    """A kernel that every GPU from one capability on runs, as it would launch it.

    Attributes:
        module: with the kernel.
        kernel: its name there.
        launch: what launches it on tensors without memory, given the capability.
        since: the first capability that runs it.
    """

    module: Any
    kernel: str
    launch: Callable[[Capability], object]
    since: Capability = PORTABLE_FROM


def attend(capability: Capability, dtype: torch.dtype) -> Tensor:
    """Portable attention at full size."""
    tile = portable.tile_of(capability, dtype)
    gate, length = full_size_qkv()[:, -40:], empty(dtype=I32)
    q, k, v = (empty(ROWS, heads, 128, dtype=dtype) for heads in (40, 8, 8))
    scales = None
    if dtype == E4M3:
        blocks = -(-ROWS // FP8_KEYS)
        v = empty(8, 128, blocks * FP8_KEYS, dtype=E4M3)
        scales = empty(1, dtype=FP32), empty(8, blocks, dtype=FP32)
    return portable.attention(q, k, v, gate, length, None, tile, scales)


def quantized_qkv(capability: Capability) -> object:
    norms = (empty(3 * 128, dtype=FP32) for _ in "qk")
    rope, length = empty(ROWS, 96, dtype=FP32), empty(dtype=I32)
    return qkv_fp8.qkv_fp8(full_size_qkv(), *norms, rope, length, COUNTS, 40, 8)


def multiply(capability: Capability, dtype: torch.dtype, epilogue: str, at: int) -> None:
    """A portable product at full size, by the tile at this place among the capability's."""
    tile = matmul_portable.TILES[matmul_portable.names_for(capability)[at]]
    scales: tuple[Any, ...] = ()
    if epilogue == "add":
        x, weight = empty(ROWS, 13696, dtype=dtype), empty(3 * 5120, 13696, dtype=dtype)[:, :13652]
        out = empty(ROWS, 5120, dtype=FP32)
    else:
        x, weight = empty(ROWS, 5120, dtype=dtype), empty(3 * 27304, 5120, dtype=dtype)
        out = empty(ROWS, 13696, dtype=E4M3 if dtype == E4M3 else BF16)
    if dtype != BF16:
        is_static = epilogue == "add" and dtype == E4M3
        scales = 1.0 if is_static else empty(ROWS, dtype=FP32), empty(len(weight), dtype=FP32)
    matmul_portable.matmul(x, weight, out, COUNTS, epilogue, tile, *scales)


PORTABLE: dict[str, Portable] = {
    name: Portable(
        module,
        kernel,
        lambda capability, launch=launch: launch(),
        E4M3_FROM if module is quantize else PORTABLE_FROM,
    )
    for name, (module, kernel, launch, _, _) in CASES.items()
}
PORTABLE |= {
    "attention": Portable(portable, "_attention", lambda one: attend(one, BF16)),
    "attention over e4m3": Portable(
        portable, "_attention", lambda one: attend(one, E4M3), E4M3_FROM
    ),
    "product, bf16": Portable(
        matmul_portable, "_product", lambda one: multiply(one, BF16, "swiglu7", 0)
    ),
    "sum, int8": Portable(matmul_portable, "_product", lambda one: multiply(one, I8, "add", 0)),
    "product, e4m3": Portable(
        matmul_portable, "_product", lambda one: multiply(one, E4M3, "swiglu7", 0), E4M3_FROM
    ),
    "sum, e4m3": Portable(
        matmul_portable, "_product", lambda one: multiply(one, E4M3, "add", -1), E4M3_FROM
    ),
    "qkv_fp8": Portable(qkv_fp8, "_qkv_fp8", quantized_qkv, E4M3_FROM),
    "pixels": Portable(
        frames,
        "_pixels",
        lambda one: frames.pixels(
            video(16, 36, 128, 240), empty(16, dtype=FP32), 3, 2, torch.uint8
        ),
    ),
}
