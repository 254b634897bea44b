"""Kernels compiled for Hopper without one: what the compiler made of them, read from its output."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from magihuman.kernels import (  # noqa: E402
    activations,
    attention_triton,
    head_gate,
    qk_norm_rope,
    sandwich_norm,
)

BF16, FP32, I32, F = "*bf16", "*fp32", "i32", "fp32"
FULL = {"HEADS": 40, "KV_HEADS": 8, "DIM": 128}


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """A kernel for sm_90, pointers and strides aligned as they are at run time."""
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [
        n for n in names if signature[n].startswith("*") or n.endswith(("stride", "channels"))
    ]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"enable_fp_fusion": True, **options}  # the default, of which triton 3.9 wants a word
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spills(compiled: Any, folder: Path) -> int:
    """Bytes spilled, from the object's own resource report."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run(
        [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    )
    return sum(int(size) for size in re.findall(r"(?:LOCAL|STACK):(\d+)", done.stdout))


CASES = {
    "sandwich_norm": (
        sandwich_norm._sandwich_norm,
        {"x": FP32, "delta": BF16, "weight": FP32, "x_out": FP32, "out": BF16, "eps": F,
         "audio_start": I32, "text_start": I32, "channels": I32},
        {"HAS_DELTA": True, "HEAD": 4096, "TAIL": 1024},
        8,
    ),
    "qk_norm_rope": (
        qk_norm_rope._qk_norm_rope,
        {"qkv": BF16, "q_weight": FP32, "k_weight": FP32, "rope": FP32, "q": BF16, "k": BF16,
         "v": BF16, "qkv_stride": I32, "audio_start": I32, "text_start": I32, "eps": F},
        {**FULL, "ANGLES": 48, "LANES": 8, "BLOCK": qk_norm_rope.BLOCK},
        qk_norm_rope.WARPS,
    ),
    "swiglu7": (
        activations._swiglu7,
        {"x": BF16, "out": BF16, "width": I32, "x_stride": I32, "out_stride": I32, "limit": F,
         "alpha": F},
        {"LANES": 8, "BLOCK": activations.BLOCK},
        4,
    ),
    "gelu7": (
        activations._gelu7,
        {"x": BF16, "out": BF16, "width": I32, "x_stride": I32, "out_stride": I32, "limit": F,
         "alpha": F},
        {"LANES": 8, "BLOCK": activations.BLOCK},
        4,
    ),
    "head_gate": (
        head_gate._head_gate,
        {"x": BF16, "gate": BF16, "out": BF16, "gate_stride": I32},
        {"HEADS": 40, "DIM": 128},
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_streaming_kernels_load_whole_vectors_and_spill_nothing(name: str, tmp_path: Path) -> None:
    kernel, types, constants, warps = CASES[name]
    compiled = build(kernel, types, constants, num_warps=warps)
    assert spills(compiled, tmp_path) == 0
    assert re.search(r"ld\.global[.\w:]*\.v4", compiled.asm["ptx"])
    assert re.search(r"st\.global[.\w:]*\.v4", compiled.asm["ptx"])


def test_triton_attention_uses_the_tensor_cores_and_tensor_maps(tmp_path: Path) -> None:
    types = dict.fromkeys(("q", "k", "v", "gate", "out"), BF16)
    types |= {"valid_length": "*i32", "rows": I32, "gate_stride": I32, "scale": F}
    blocks = {"BLOCK_Q": attention_triton.BLOCK_Q, "BLOCK_K": attention_triton.BLOCK_K}
    constants = {**FULL, "HAS_GATE": True, **blocks}
    compiled = build(attention_triton._attention, types, constants, num_warps=8, num_stages=3)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert spills(compiled, tmp_path) == 0
