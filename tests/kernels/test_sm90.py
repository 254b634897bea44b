"""Kernels compiled for Hopper without one: what the compiler made of them, read from its output."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from harness import kernel_cases  # noqa: E402
from magihuman.kernels import add_rms_norm  # noqa: E402
from magihuman.kernels.attention import (  # noqa: E402
    fp8 as attention_fp8,
)
from magihuman.kernels.attention import (  # noqa: E402
    gluon as attention_gluon,
)
from magihuman.kernels.attention import (  # noqa: E402
    head_gate,
)
from magihuman.kernels.attention import (  # noqa: E402
    triton as attention_triton,
)
from magihuman.kernels.decoder import channel_norm, frames  # noqa: E402
from magihuman.kernels.linear import activations, quantize  # noqa: E402
from magihuman.kernels.parallel import head_pack  # noqa: E402
from magihuman.kernels.reference import LocalAttention  # noqa: E402
from magihuman.runtime.config import DiTConfig  # noqa: E402

BF16, FP32, I32, U8 = torch.bfloat16, torch.float32, torch.int32, torch.uint8
E4M3 = torch.float8_e4m3fn
TYPES = {BF16: "bf16", FP32: "fp32", I32: "i32", U8: "u8", E4M3: "fp8e4nv"}
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


def build(patch: pytest.MonkeyPatch, module: Any, name: str, launch: Callable[[], object]) -> Any:
    """The module's kernel for sm_90, specialised as Triton does to the arguments of this launch."""
    kernel = getattr(module, name)
    recorder = Recorder(kernel)
    patch.setattr(module, name, recorder)
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
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=recorder.options)


def spills(compiled: Any, folder: Path) -> int:
    """Bytes spilled, from the object's own resource report."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    )
    return sum(int(size) for size in re.findall(r"(?:LOCAL|STACK):(\d+)", done.stdout))


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


@pytest.mark.parametrize("name", CASES)
def test_streaming_kernels_move_whole_vectors_and_spill_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *case, loads, stores = CASES[name]
    compiled = build(monkeypatch, *case)
    assert spills(compiled, tmp_path) == 0
    assert widths(compiled, "ld") == loads
    assert widths(compiled, "st") == stores


def test_triton_attention_uses_the_tensor_cores_and_tensor_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (empty(ROWS, heads, 128) for heads in (40, 8, 8))
    gate, length = full_size_qkv()[:, -40:], torch.empty((), dtype=I32, device="meta")
    compiled = build(
        monkeypatch,
        attention_triton,
        "_attention",
        lambda: attention_triton.attention(q, k, v, gate, length),
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert spills(compiled, tmp_path) == 0


def attend_bf16(dim: int, local: LocalAttention | None) -> Tensor:
    """The bf16 kernel at full size, on tensors without memory."""
    q, k, v = (empty(ROWS, heads, dim) for heads in (40, 8, 8))
    return attention_gluon.attention(q, k, v, full_size_gate(BF16), empty(dtype=I32), local)


def attend_fp8(dim: int, local: LocalAttention | None, gates: torch.dtype = BF16) -> Tensor:
    """As `attend_bf16`, the e4m3 kernel."""
    blocks = -(-ROWS // 128)
    q, k = (empty(ROWS, heads, dim, dtype=E4M3) for heads in (40, 8))
    v, v_scale = empty(8, dim, 128 * blocks, dtype=E4M3), empty(8, blocks, dtype=FP32)
    scales = empty(1, dtype=FP32), v_scale
    length = empty(dtype=I32)
    return attention_fp8.attention(q, k, v, *scales, full_size_gate(gates), length, local)


def full_size_gate(dtype: torch.dtype) -> Tensor:
    return empty(ROWS, 7208, dtype=dtype)[:, -40:]


# Of the products of a block of keys; the rest of an instruction's name is its number of columns.
PRODUCTS = {attend_bf16: r"m64n\d+k16\.f32\.bf16\.bf16", attend_fp8: r"m64n\d+k32\.f32\.e4m3\.e4m3"}


@pytest.mark.parametrize("attend", [attend_bf16, attend_fp8])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("local", [None, LocalAttention(5, 772, 1)])
def test_gluon_attention_pipelines_its_products_and_spills_nothing(
    attend: Callable[[int, LocalAttention | None], Tensor],
    dim: int,
    local: LocalAttention | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_fp8 = attend is attend_fp8
    module = attention_fp8 if is_fp8 else attention_gluon
    monkeypatch.setattr(module, "processors", lambda device: 132)
    compiled = build(monkeypatch, module, "_attention", lambda: attend(dim, local))
    ptx = compiled.asm["ptx"]
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", ptx)
    # Both consumers: scores of the first block and of any, weighted sums in the loop and after it.
    depth = 32 if is_fp8 else 16
    assert len(products) == 2 * 2 * (dim + 128) // depth
    assert all(re.fullmatch(PRODUCTS[attend], product) for product in products)
    # In bf16 the softmax runs beside the weighted sum of the block before: one product pending.
    assert ptx.count("wgmma.wait_group.sync.aligned 1;") == (0 if is_fp8 else 2)
    # Frame-local results are stored by threads, others through a tensor map by each consumer.
    assert ptx.count("cp.async.bulk.tensor.2d.global") == (0 if local else 2)
    assert "cp.async.bulk.tensor.2d.shared" in ptx
    assert spills(compiled, tmp_path) <= allowed_spills(is_fp8, dim, local)


def allowed_spills(is_fp8: bool, dim: int, local: LocalAttention | None) -> int:
    """None with the release that the kernels are tuned with; triton 3.9 keeps six counters of one
    of them in memory.
    """
    is_newer = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    return 32 if is_newer and is_fp8 and dim == 128 and local is not None else 0


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_fp8_attention_gives_bf16_whatever_the_gates(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a map of bf16 over the tensor that it returns."""
    recorder = Recorder(attention_fp8._attention)
    monkeypatch.setattr(attention_fp8, "_attention", recorder)
    monkeypatch.setattr(attention_fp8, "processors", lambda device: 132)
    out = attend_fp8(128, None, dtype)
    assert (out.dtype, out.shape) == (BF16, (ROWS, 40, 128))
    assert recorder.arguments["out_map"].base.dtype == BF16
    assert recorder.arguments["gate_stride"] == 7208
