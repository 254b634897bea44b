"""e4m3 linears in the rewritten graph, on the CPU, where operators compute the reference."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import golden
from harness import kernel_cases
from magihuman.graphs import quantization
from magihuman.graphs.transformer import compile as compiling
from magihuman.graphs.transformer.options import CompileOptions
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import reference as ref
from magihuman.runtime.model import tokens

CPU = torch.device("cpu")
LAYOUT = tokens.Layout(frames=3, rows=4, columns=6, audio=9, text=7)


@pytest.mark.parametrize(
    ("keep", "quantized", "dtype"),
    [
        ("none", "all", ref.FP8),
        pytest.param(["*.down_proj"], "all but down_proj", ref.FP8, marks=pytest.mark.thorough),
        (["*.up_gate_proj"], "all but up_gate_proj", ref.FP8),
        ("none", "all in int8", ref.INT8),
        pytest.param(
            ["*.up_gate_proj"],
            "all but up_gate_proj in int8",
            ref.INT8,
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_quantized_linears(
    keep: str | list[str], quantized: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As near to the bf16 model as operands rounded to 8 bits leave it, from either cache."""
    plain, model = golden.dit(local=False), golden.dit(local=False)
    names = quantization.quantized_linears(model.config, keep)
    quantization.quantize_model(model, names, dtype)
    compiling.pad_weights(model, model.config)
    torch.manual_seed(0)
    inputs = golden.inputs_of(model, LAYOUT)
    length = torch.tensor(LAYOUT.tokens, dtype=torch.int32)
    theirs = plain(**inputs, length=length)
    outputs = []
    for from_cache in (False, True):
        context = Context(model.config, LAYOUT.counts, torch.bfloat16, CPU)
        options = CompileOptions(cache=tmp_path)
        module, report = compiling.compile_forward(model, context, options)
        assert report.from_cache == from_cache
        found = Counter(
            str(node.target).removeprefix("magihuman.").removesuffix(".default")
            for node in module.graph.nodes
            if str(node.target).startswith("magihuman.")
        )
        assert found == kernel_cases.OPERATORS[quantized]
        outputs.append(module(*inputs.values(), length))
        for a, b in zip(outputs[-1], theirs, strict=True):
            assert 1e-3 < golden.error(a, b) < 0.1
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


ATTENTION_KEPT = ["block.layers.1.*", "block.layers.3.attention.linear_qkv"]


@pytest.mark.parametrize(("keep", "layers"), [("none", 5), (ATTENTION_KEPT, 3)])
def test_fp8_attention(keep: str | list[str], layers: int, tmp_path: Path) -> None:
    """In the layers whose projection is quantised, and as near to bf16 as rounding leaves it."""
    plain, model = golden.dit(local=False), golden.dit(local=False)
    quantization.quantize_model(model, quantization.quantized_linears(model.config, keep))
    compiling.pad_weights(model, model.config)
    torch.manual_seed(0)
    inputs = golden.inputs_of(model, LAYOUT)
    length = torch.tensor(LAYOUT.tokens - 2, dtype=torch.int32)
    theirs = plain(**inputs, length=length)
    errors, outputs = [], []
    for narrow in (False, True, True):
        context = Context(model.config, LAYOUT.counts, torch.bfloat16, CPU)
        options = CompileOptions(cache=tmp_path, fp8_attention=narrow)
        module, report = compiling.compile_forward(model, context, options)
        found = Counter(str(node.target).removesuffix(".default") for node in module.graph.nodes)
        assert found["magihuman.gated_attention_fp8"] == (layers if narrow else 0)
        assert found["magihuman.qkv_fp8"] == (layers if narrow else 0)
        assert found["magihuman.gated_attention"] == 5 - (layers if narrow else 0)
        assert (report.attention == compiling.ONE_KERNEL) == (narrow and layers == 5)
        outputs.append(module(*inputs.values(), length))
        errors.append(golden.error(outputs[-1][0], theirs[0]))
    assert report.from_cache
    assert all(torch.equal(a, b) for a, b in zip(*outputs[1:], strict=True))
    assert not torch.equal(outputs[0][0], outputs[1][0])
    assert all(1e-3 < error < 0.1 for error in errors)


def test_fp8_attention_does_not_see_padding() -> None:
    model = golden.dit(local=False)
    quantization.quantize_model(model, quantization.quantized_linears(model.config))
    outputs = []
    for text in (7, 64):  # the second one: padding in a block of its own
        layout = tokens.Layout(frames=3, rows=4, columns=6, audio=9, text=text)
        context = Context(model.config, layout.counts, torch.bfloat16, CPU)
        options = CompileOptions(fp8_attention=True)
        module, _ = compiling.compile_forward(model, context, options)
        torch.manual_seed(0)
        inputs = golden.inputs_of(model, LAYOUT)
        padding = text - LAYOUT.text
        inputs["text"] = torch.nn.functional.pad(inputs["text"], (0, 0, 0, padding), value=5.0)
        inputs["rope"] = torch.nn.functional.pad(inputs["rope"], (0, 0, 0, padding))
        outputs.append(module(*inputs.values(), torch.tensor(LAYOUT.tokens, dtype=torch.int32)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_the_graphs_cache_tells_quantized_linears_apart() -> None:
    model = golden.dit(local=False)
    keys = {
        compiling.graph_cache.key_of(model.config, torch.bfloat16, model, names)
        for names in (
            {},
            {"block.layers.0.mlp.down_proj": ref.FP8},
            {"block.layers.1.mlp.down_proj": ref.FP8},
            {"block.layers.1.mlp.down_proj": ref.INT8},
        )
    }
    assert len(keys) == 4
