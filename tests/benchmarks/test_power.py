"""The parts of a forward, what follows from their figures, and the tables and picture of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import power
import power_tables
import render_power
import render_readme
from harness import forward_parts, sizes
from harness.sustained import Reading
from magihuman.kernels import ops
from magihuman.runtime.config import DiTConfig

CPU = torch.device("cpu")
COUNTS = (32 * 8 * 15, 126, 320)
ROWS = sum(COUNTS)

# -- parts of a forward -----------------------------------------------------------------------


def test_the_linears_of_the_published_model():
    found = forward_parts.linears(DiTConfig(), COUNTS)
    assert sum(found.values()) == 4 * 40
    shared = {one.name: one for one in found if one.counts is None}
    shapes = {name: (one.columns, one.depth, found[one]) for name, one in shared.items()}
    assert shapes == {
        "qkv": (7208, 5120, 32),
        "proj": (5120, 5120, 32),
        "up": (27304, 5120, 32),
        "down": (5120, 13652, 32),
    }
    others = {one.name: layers for one, layers in found.items() if one.counts == COUNTS}
    assert others == {
        "qkv, weights by modality": 8,
        "proj, weights by modality": 8,
        "up, GELU7, weights by modality": 4,
        "down, GELU7, weights by modality": 4,
        "up, weights by modality": 4,
        "down, weights by modality": 4,
    }
    assert shared["up"].flops(ROWS) == 2 * 4286 * 27304 * 5120


def test_the_library_s_products_are_those_of_the_routes():
    torch.manual_seed(0)
    linear = forward_parts.Linear("qkv", 72, 384, "store")
    given = forward_parts.operands(linear, 37, CPU, is_fp8=True)
    own = forward_parts.own_call(linear, given, "128x192")()[:32, :64].float()
    calls = forward_parts.library_calls(linear, given)
    assert {flops for _, flops in calls.values()} == {2 * 32 * 64 * 384}
    row_wise, tensor_wise = (calls[name][0]().float() for name in ("row-wise", "tensor-wise"))
    scale = given.x_scale[:32, None] * given.weight_scale[None, :64]
    # Two roundings to bf16 of the same sums.
    for product in (row_wise, tensor_wise * scale):
        torch.testing.assert_close(product, own, rtol=2 * 2**-8, atol=1e-6)


def test_bf16_products_have_the_zeros_behind_rows():
    linear = forward_parts.Linear("down", 24, 340, "add")
    given = forward_parts.operands(linear, 5, CPU, is_fp8=False)
    (call, flops) = forward_parts.library_calls(linear, given)["product alone"]
    expected = given.x[:, :340].float() @ given.weight.float().T
    torch.testing.assert_close(call().float(), expected, rtol=2**-7, atol=1e-4)
    assert flops == linear.flops(5)
    added = forward_parts.own_call(linear, given, "library")()
    torch.testing.assert_close(added, expected, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("name", ["norm", "norm_fp8", "qk_norm_rope", "qkv_fp8", "quantize_fp8"])
def test_bytes_are_those_of_inputs_and_outputs(name):
    """But for the scales, and the keys that pad values to whole blocks."""
    size = sizes.TINY
    counts = size.layout.counts
    build, moved = forward_parts.rest(size.arch, counts, sum(counts), CPU)[name]
    call = build()
    if hasattr(call, "args") and name in ("qk_norm_rope", "qkv_fp8"):
        given = call.func.__self__
        read = given.qkv[:, : -size.arch.heads].numel() * 2 + given.rope.nbytes
    else:
        read = sum(x.nbytes for x in call.args if isinstance(x, torch.Tensor))
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    written = sum(x.numel() * x.element_size() for x in outputs)
    assert moved == pytest.approx(read + written, rel=0.05)


def test_the_fewest_bytes_of_the_published_forward():
    config = DiTConfig()
    moved = {"norm_fp8": 10, "qkv_fp8": 7, "quantize_fp8": 3, "qk_norm_rope": 5, "norm": 20}
    moved["head_norm"] = 1
    found = {p: forward_parts.rest_bytes(p, config.num_layers, moved) for p in forward_parts.REST}
    assert found == {"bf16": 40 * 45 + 1, "fp8": 40 * 28 + 1, "fp8-attn": 40 * 30 + 1}


FP8_LAYER = [
    ("_norm_rows", 1), ("matmul", 2), ("_qkv_fp8", 3), ("_attention", 4), ("_quantize_rows", 5),
    ("matmul", 6), ("_norm_rows", 7), ("matmul", 8), ("matmul", 9),
]  # fmt: skip
BF16_LAYER = [  # weights by modality, by the library
    ("_add_rms_norm", 1), ("nvjet_hsh_1", 2), ("nvjet_hsh_1", 2), ("nvjet_hsh_1", 2),
    ("_qk_norm_rope", 3), ("void flash::fwd<cutlass::bfloat16_t>", 4), ("_head_gate", 1),
    ("nvjet_hsh_2", 6), ("_add_rms_norm", 7), ("nvjet_hsh_3", 8), ("nvjet_hsh_3", 8), ("_gelu7", 9),
    ("nvjet_hsh_4", 10), ("nvjet_hsh_4", 10),
]  # fmt: skip


def test_parts_are_told_apart_by_their_place():
    outside = [("void at::native::copy", 1), ("cutlass_80_simt_sgemm", 2), ("nvjet_sss", 3)]
    heads = [("_head_norm", 1), ("nvjet_sss", 1), ("Memcpy DtoD", 1)]
    found = forward_parts.parts_ms([*outside, *FP8_LAYER, *FP8_LAYER, *heads])
    assert found == {
        "embedders, heads, copies": 9, "norms": 16, "qkv": 4, "q, k, v to attention": 6,
        "attention": 8, "quantising attention's output": 10, "proj": 12, "up": 16, "down": 18,
    }  # fmt: skip
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert forward_parts.parts_ms(BF16_LAYER) == {
        "norms": 8, "qkv": 6, "q, k, v to attention": 3, "attention": 5, "proj": 6, "up": 16,
        "activations alone": 9, "down": 20,
    }  # fmt: skip
    assert forward_parts.parts_ms(outside) == {"embedders, heads, copies": 6}


# -- what follows from figures ----------------------------------------------------------------


def call(ms: float, watts: float | None = 700.0, **more: Any) -> dict[str, Any]:
    throttle = None if watts is None else {"power cap": 1.0}
    return {**Reading(ms, watts, watts and 1400.0, throttle).figures(), **more}


def product(ms: float, flops: float = 1e12) -> dict[str, Any]:
    return call(ms, tflops=flops / ms / 1e9, picojoules_per_flop=0.7 * ms / flops * 1e12)


def linear(by: dict[str, Any], columns: int = 8, layers: int = 1, serves: str = "own") -> Any:
    facts = {"columns": columns, "depth": 4, "flops": 10**12, "layers": layers}
    return {**facts, "serves": serves, "by": by}


@pytest.fixture
def figures() -> dict[str, Any]:
    """Of a model of two layers."""
    library = {"row-wise": product(0.9), "tensor-wise": product(0.8)}
    names = ("qkv", "proj", "up", "down")
    narrow = {name: linear({"own": product(1.0), **library}) for name in names}
    # Of the same shape as another, and so without the library's products.
    narrow["up, weights by modality"] = linear({"own": product(1.5)}, layers=2)
    wide = {
        name: linear({"library": product(2.0), "product alone": product(1.6)}, serves="library")
        for name in names
    }
    forward = {
        "sustained": call(10.0),
        "after_rest": {"8_steps_ms": 79.0, "joules": 50.0},
    }
    moved = {"norm": 30, "norm_fp8": 20, "qk_norm_rope": 10, "qkv_fp8": 8, "quantize_fp8": 5}
    norms = {name: call(0.1, 400.0, bytes=n * 10**9, tb_per_s=2.0) for name, n in moved.items()}
    norms["head_norm"] = call(0.1, 300.0, bytes=10**9, tb_per_s=1.0)
    norms["copy"] = call(1.0, 350.0, bytes=2 * 10**9, tb_per_s=2.0)
    return {
        "environment": {"gpu": "Some GPU", "driver": "1.2", "torch": "2.11", "date": "2026-11-27"},
        "tokens": 4266,
        "rows": 4286,
        "steps": 8,
        "forward": {name: copy.deepcopy(forward) for name in forward_parts.REST},
        "products": {"bf16": wide, "fp8": narrow},
        "attention": {"fp8": product(0.4), "gluon": product(0.6), "cudnn": product(0.5)},
        "bf16 attention": "cudnn",
        "norms": norms,
        "other rows": {},
    }


def test_the_bound_of_a_forward(figures):
    narrow = power.bound(figures, "fp8-attn", 2, 8)
    # Six linears of 1e12 FLOP at 1,250 TFLOP/s; two attentions; two layers' bytes and the heads'.
    assert narrow["products_ms"] == pytest.approx(6 * 0.8)
    assert narrow["attention_ms"] == pytest.approx(2 * 0.4)
    assert narrow["rest_bytes"] == (2 * (2 * 20 + 8 + 5) + 1) * 10**9
    assert narrow["rest_ms"] == pytest.approx(107e9 / 2e12 * 1e3)
    assert narrow["forward_ms"] == pytest.approx(4.8 + 0.8 + 53.5)
    assert narrow["8_steps_ms"] == pytest.approx(8 * 59.1)
    assert narrow["ratio"] == pytest.approx(10 / 59.1)
    assert power.bound(figures, "fp8", 2, 8)["attention_ms"] == pytest.approx(2 * 0.5)
    wide = power.bound(figures, "bf16", 2, 8)
    assert wide["products_ms"] == pytest.approx(4 * 1.6)
    assert wide["rest_bytes"] == (2 * (2 * 30 + 10) + 1) * 10**9


def test_joules_by_kernel(figures):
    figures["products"]["fp8"]["up"]["by"]["own"] = call(1.0, 600.0)
    parts = {"up": 5.0, "norms": 2.0, "embedders, heads, copies": 1.0}
    found = power.joules_by_kernel(figures, "fp8-attn", parts)
    joules = {name: own["joules"] for name, own in found.items()}
    assert joules == pytest.approx(
        {"up": 3.0, "norms": 0.8, "embedders, heads, copies": 0.7}  # at 600, 400 and 700 W
    )
    assert sum(own["share"] for own in found.values()) == pytest.approx(1.0)
    assert found["up"]["share"] == pytest.approx(3.0 / 4.5)


def test_a_part_without_a_reading_has_no_joules(figures):
    figures["products"]["fp8"]["up"]["by"]["own"] = call(1.0, None)
    found = power.joules_by_kernel(figures, "fp8-attn", {"up": 5.0, "norms": 2.0})
    assert found["up"] == {"ms": 5.0, "watts": None, "joules": None, "share": None}
    assert found["norms"]["share"] == 1.0


@pytest.fixture
def written(figures) -> dict[str, Any]:
    """With what follows from them."""
    parts = {"up": 5.0, "attention": 3.0, "norms": 1.0}
    figures["bound"] = {name: power.bound(figures, name, 2, 8) for name in figures["forward"]}
    figures["joules by kernel"] = {
        name: power.joules_by_kernel(figures, name, parts) for name in figures["forward"]
    }
    return figures


def test_tables(written):
    heights = {"products": {"up": written["products"]["fp8"]["up"]}, "attention": {}}
    written["other rows"] = {"1072": heights}
    text = "\n".join(power_tables.power_lines(written))
    steady = "10.0 ms | 7.0 J | 700 W | 1400 MHz | power cap (100 %)"
    assert f"| fp8-attn | {steady} | 0.079 s | 50 J |" in text
    assert "| fp8-attn | 4.8 ms | 0.8 ms | 53.5 ms | 59.1 ms | 0.473 s | 0.17 |" in text
    own, by_row, by_one = (
        f"{ms:.3f} ms, {rate} TFLOP/s, {energy:.2f} pJ/FLOP"
        for ms, rate, energy in ((1.0, 1000, 0.70), (0.9, 1111, 0.63), (0.8, 1250, 0.56))
    )
    assert f"| up, 8 x 4 | own | {own} | {by_row} | {by_one} |" in text
    assert f"| 1072 | up, 8 x 4 | own | {own} | {by_row} | {by_one} |" in text
    modality = "1.500 ms, 667 TFLOP/s, 1.05 pJ/FLOP"
    assert f"| up, weights by modality, 8 x 4 | own | {modality} |  |  |" in text
    assert "| `norm_fp8` | 0.100 ms | 2.00 TB/s | 0.040 J | 1400 MHz |" in text
    assert "None" not in text.replace("driver None", "")
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block


def test_tables_where_no_energy_was_measured(written):
    without = json.loads(json.dumps(written))
    for own in without["forward"].values():
        own["sustained"] |= {"joules": None, "watts": None, "mhz": None, "throttle": None}
        own["after_rest"]["joules"] = None
    text = "\n".join(power_tables.power_lines(without))
    assert "| bf16 | 10.0 ms |  |  |  |  | 0.079 s |  |" in text


def test_no_table_where_nothing_was_measured(written, tmp_path):
    assert render_readme.power_table(tmp_path) == []
    (tmp_path / "power.json").write_text(json.dumps(written))
    assert render_readme.power_table(tmp_path)[0] == "## Power"


def pixels(figures: dict[str, Any], path: Path) -> np.ndarray:
    render_power.draw(figures, path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_picture_has_every_part(written, tmp_path):
    first = pixels(written, tmp_path / "a" / "first.png")
    counts = {}
    for name, colour in {"up": (31, 119, 180), "attention": (255, 127, 14)}.items():
        counts[name] = (np.abs(first - colour).sum(axis=-1) < 12).sum()
    # Their milliseconds are 5 and 3, at 700 W both; numbers cover a little of each.
    assert counts["up"] / counts["attention"] == pytest.approx(5 / 3, rel=0.1)


def test_the_picture_shows_milliseconds_where_there_is_no_energy(written, tmp_path):
    first = pixels(written, tmp_path / "first.png")
    for bar in written["joules by kernel"].values():
        for own in bar.values():
            own["joules"] = None
    second = pixels(written, tmp_path / "second.png")
    assert not np.array_equal(first, second)


def test_attention_in_fp8_is_that_of_the_operators():
    size = sizes.TINY
    rows = size.layout.tokens
    torch.manual_seed(0)
    found = forward_parts.attentions(size.arch, rows, rows - 3, CPU)
    assert list(found) == ["fp8", "reference"]
    narrow = found["fp8"]()
    *parts, gate, length, local, _ = narrow.args
    assert length.item() == rows - 3 and local == [] and gate.shape == (rows, size.arch.heads)
    assert narrow.func is ops.gated_attention_fp8 and len(parts) == 5
    assert narrow()[: rows - 3].isfinite().all()
