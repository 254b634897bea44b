"""Kernels compiled for Hopper without one: what the compiler made of them, read from its output."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from ahead import (  # noqa: E402
    BF16,
    CASES,
    E4M3,
    FP32,
    I32,
    ROWS,
    TYPES,
    Recorder,
    build,
    empty,
    full_size_qkv,
    spills,
    widths,
)

from magihuman.kernels.attention import (  # noqa: E402
    fp8 as attention_fp8,
)
from magihuman.kernels.attention import (  # noqa: E402
    gluon as attention_gluon,
)
from magihuman.kernels.attention import (  # noqa: E402
    triton as attention_triton,
)
from magihuman.kernels.attention.shared_rows import SharedRows  # noqa: E402
from magihuman.kernels.reference import LocalAttention  # noqa: E402


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
    # Each consumer: scores of the first block and of any, weighted sums in the loop and after it.
    depth, consumers = 32 if is_fp8 else 16, 3 if is_fp8 and local is None else 2
    assert len(products) == consumers * 2 * (dim + 128) // depth
    assert all(re.fullmatch(PRODUCTS[attend], product) for product in products)
    # In bf16 the softmax runs beside the weighted sum of the block before: one product pending.
    assert ptx.count("wgmma.wait_group.sync.aligned 1;") == (0 if is_fp8 else 2)
    # Frame-local results are stored by threads, others through a tensor map by each consumer.
    assert ptx.count("cp.async.bulk.tensor.2d.global") == (0 if local else consumers)
    assert "cp.async.bulk.tensor.2d.shared" in ptx
    assert spills(compiled, tmp_path) <= allowed_spills(is_fp8, dim, local)


@pytest.mark.parametrize("consumers", [2, 3])
def test_rows_of_several_processes_are_stored_by_whole_vectors(
    consumers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes a thread, wherever their process is."""
    ranks, own, dim, blocks = 4, (10, 2), 128, 34
    monkeypatch.setattr(attention_fp8, "processors", lambda device: 132)
    monkeypatch.setitem(TYPES, torch.int64, "i64")
    rows = empty(1072, ranks * own[0] * dim)
    shared = SharedRows(rows, own[0] * dim, empty(ranks, dtype=torch.int64))
    q, k = (empty(1072 * ranks, heads, dim, dtype=E4M3) for heads in own)
    v, v_scale = empty(own[1], dim, 128 * blocks, dtype=E4M3), empty(own[1], blocks, dtype=FP32)
    scales, gate = (empty(1, dtype=FP32), v_scale), empty(1072 * ranks, 264)[:, 256:]
    compiled = build(
        monkeypatch,
        attention_fp8,
        "_attention",
        lambda: attention_fp8.attention(
            q, k, v, *scales, gate, empty(dtype=I32), consumers=consumers, shared=shared
        ),
    )
    assert widths(compiled, "st") == {16}
    assert "cp.async.bulk.tensor.2d.global" not in compiled.asm["ptx"]
    # Of three, addresses and counters outside of the loop: 128 by triton 3.6, 264 by 3.9.
    assert spills(compiled, tmp_path) <= (264 if consumers == 3 else 0)


def allowed_spills(is_fp8: bool, dim: int, local: LocalAttention | None) -> int:
    """Of three consumers what is kept while a tile's blocks are gone through, else none with the
    release that the kernels are tuned with; triton 3.9 keeps six counters of one in memory.
    """
    if is_fp8 and local is None:
        return 160
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
