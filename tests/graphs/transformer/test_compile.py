"""Capture and rewriting on the CPU: what is found, and that the numbers stay what they were."""

from __future__ import annotations

import dataclasses
import json
import operator
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, fx, nn

import golden
from harness import kernel_cases
from magihuman.graphs import graph_cache, quantization, support
from magihuman.graphs.rewrite import arguments, call
from magihuman.graphs.rewrite.report import CompileError, CompileReport
from magihuman.graphs.trace import CaptureError, capture
from magihuman.graphs.transformer import compile as compiling
from magihuman.graphs.transformer.options import CompileOptions
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops
from magihuman.kernels import reference as ref
from magihuman.kernels.decoder import ops as decoder_ops
from magihuman.kernels.jit import UNSET
from magihuman.kernels.jit import cache as kept
from magihuman.kernels.parallel import exchange
from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import random_weights

CPU = torch.device("cpu")
OPS = torch.ops.magihuman
ONE_ROUNDING = 7e-3  # between two runs of the model that round one sum to bf16 differently
LAYOUTS = [
    tokens.Layout(frames=3, rows=4, columns=6, audio=9, text=7),
    tokens.Layout(frames=1, rows=2, columns=2, audio=1, text=64),
]


@pytest.fixture(scope="module")
def model() -> DiT:
    """The golden architecture: modality layers at both ends, both activations."""
    model = golden.dit(local=False)
    compiling.pad_weights(model, model.config)
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


def assert_same(
    model: DiT, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...], length: Tensor | None
) -> None:
    """The same functions; but padded rows change the order of fp32 sums, which may turn a rounding
    to bf16. So: as near as the model is to itself on inputs a few fp32 steps away, a half allowed
    for chance, and as near as one such rounding. A padded token that were seen would cost more.
    """
    expected = model(**inputs, length=length)
    nudged = {**inputs, "video": inputs["video"] * (1 + 1e-5)}
    again = model(**nudged, length=length)
    for ours, theirs, rerun in zip(outputs, expected, again, strict=True):
        own_noise = golden.error(rerun, theirs)
        assert golden.error(ours, theirs) <= max(ONE_ROUNDING, 1.5 * own_noise) <= 3e-2


def test_every_block_is_found_and_the_numbers_stay(model: DiT, cache: Path) -> None:
    """First captured, then, for other lengths, from the cache; padding included."""
    for number, layout in enumerate(LAYOUTS):
        context = Context(model.config, layout.counts, torch.bfloat16, CPU)
        options = CompileOptions(cache=cache)
        module, report = compiling.compile_forward(model, context, options)
        assert report.from_cache == (number > 0)
        if number == 0:
            assert report.matches == kernel_cases.PASSES
        inputs = golden.inputs_of(model, layout)
        for padding in (0, 3):
            length = torch.tensor(layout.tokens - padding, dtype=torch.int32)
            assert_same(model, inputs, module(*inputs.values(), length), length)


def test_nothing_of_the_blocks_is_left_in_the_graph(model: DiT, cache: Path) -> None:
    context = Context(model.config, LAYOUTS[0].counts, torch.bfloat16, CPU)
    options = CompileOptions(cache=cache)
    module, _ = compiling.compile_forward(model, context, options)
    calls = [node.target for node in module.graph.nodes if node.op == "call_function"]
    names = {"magihuman": Counter(), "aten": Counter()}
    for target in calls:
        if target is not operator.getitem:
            names[target.namespace][target._schema.name.partition("::")[2]] += 1
    assert names["magihuman"] == kernel_cases.OPERATORS["none"]
    views = {"flatten", "slice"}
    left = {name: count for name, count in names["aten"].items() if name not in views}
    assert left == kernel_cases.PLAIN


def test_a_prompt_gives_the_same_in_any_bucket(model: DiT, cache: Path) -> None:
    """Padding after the text must not reach a valid token."""
    exact, padded = LAYOUTS[0], dataclasses.replace(LAYOUTS[0], text=40)
    inputs = golden.inputs_of(model, exact)
    rows = (*padded.counts, padded.tokens)
    wide = {}
    for (name, value), count in zip(inputs.items(), rows, strict=True):
        wide[name] = value.new_full((count, *value.shape[1:]), 7.0)
        wide[name][: len(value)] = value
    context = Context(model.config, padded.counts, torch.bfloat16, CPU)
    options = CompileOptions(cache=cache)
    module, _ = compiling.compile_forward(model, context, options)
    length = torch.tensor(exact.tokens, dtype=torch.int32)
    assert_same(model, inputs, module(*wide.values(), length), None)


def test_values_like_those_of_the_trace_stay() -> None:
    """Rows and shapes are known by the arguments that they are, not by being the traced ones."""
    own, whole = list(compiling.TRACE_ROWS), [60, 7, 5]
    shape = list(compiling.TRACE_LOCAL)
    graph = fx.Graph()
    x, weight, length = (graph.placeholder(name) for name in ("x", "weight", "length"))
    by_modality = call(graph, OPS.linear.default, x=x, weight=weight, modality_rows=own)
    all_alike = call(graph, OPS.linear.default, x=x, weight=weight, modality_rows=[])
    operands = {"qkv": x, "q_weight": weight, "k_weight": weight, "rope": x}
    heads = {"heads": 24, "kv_heads": 7}
    rotated = call(graph, OPS.qk_norm_rope.default, **operands, **heads, attended_rows=whole)
    operands = {"x": x, "video_weight": weight, "audio_weight": weight}
    parts = call(graph, OPS.head_norm.default, **operands, modality_rows=own)
    operands = {"q": x, "k": x, "v": x, "gate": x, "length": length}
    near = call(graph, OPS.gated_attention.default, **operands, local=shape)
    far = call(graph, OPS.gated_attention.default, **operands, local=[])
    others = [
        call(graph, OPS.conv.default, x=x, weight=weight, padding=shape),
        call(graph, OPS.conv.default, x=x, weight=weight, padding=own),
        graph.call_function(torch.ops.aten.view.default, (x, own)),
        graph.call_function(torch.ops.aten.split_with_sizes.default, (x, whole)),
    ]
    before = [node.args for node in others]
    graph.output((by_modality, all_alike, rotated, parts, near, far, *others))
    module = fx.GraphModule(nn.Module(), graph)
    sharding = ref.Sharding((100, 20, 8), 2)
    local = ref.LocalAttention(4, 25, 2)
    compiling.specialize(module, (64, 0, 0), "gluon", local, sharding)
    assert arguments(by_modality)["modality_rows"] == [64, 0, 0]
    assert arguments(parts)["modality_rows"] == [64, 0, 0]
    assert arguments(all_alike)["modality_rows"] == []
    assert arguments(rotated)["attended_rows"] == [100, 20, 8]
    assert (arguments(rotated)["heads"], arguments(rotated)["kv_heads"]) == (24, 7)
    assert (arguments(near)["local"], arguments(near)["backend"]) == ([4, 25, 2], "gluon")
    assert (arguments(far)["local"], arguments(far)["backend"]) == ([], "gluon")
    assert [node.args for node in others] == before
    compiling.specialize(module, (64, 0, 0), "triton", local, sharding, "gluon")
    assert (arguments(near)["backend"], arguments(far)["backend"]) == ("gluon", "triton")


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchanges_are_operators_of_the_graph(ranks: int, tmp_path: Path) -> None:
    """Own counts outside of them, those of the whole sequence between them; one graph for all."""
    config = dataclasses.replace(golden.dit(local=False).config, hidden_size=128, kv_heads=4)
    model = DiT(config)
    sharding = ref.Sharding.of(LAYOUTS[0].counts, ranks)
    for rank in range(ranks):
        own = sharding.own_counts(rank)
        context = Context(config, own, torch.bfloat16, CPU, sharding=sharding)
        options = CompileOptions(cache=tmp_path)
        module, report = compiling.compile_forward(model, context, options)
        assert report.from_cache == (rank > 0)
        seen = Counter(
            (str(node.target).removeprefix("magihuman.").removesuffix(".default"), tuple(argument))
            for node in module.graph.nodes
            for argument in node.args
            if isinstance(argument, list) and len(argument) == 3
        )
        modality = len(config.modality_layers)
        assert seen["qk_norm_rope", sharding.counts] == modality
        assert seen["linear", own] == seen["linear_activation", own] == modality
        assert {rows for name, rows in seen if name != "aten.cat"} == {own, sharding.counts}
        assert all(seen[name, own] == 1 for name in kernel_cases.OUTSIDE)
        names = Counter(str(node.target) for node in module.graph.nodes)
        layers = config.num_layers
        assert names["magihuman.rows_to_heads.default"] == layers
        assert names["magihuman.heads_to_rows.default"] == layers
        assert names["magihuman.gated_attention.default"] == layers
        inputs = golden.inputs_of(model, dataclasses.replace(LAYOUTS[0], text=sharding.counts[2]))
        for (name, value), rows in zip(inputs.items(), sharding.own(rank), strict=False):
            inputs[name] = value[rows]
        length = torch.tensor(LAYOUTS[0].tokens, dtype=torch.int32)
        with exchange.apart():  # shapes; values are compared in tests/runtime/parallel/test_team.py
            video, audio = module(*inputs.values(), length)
        assert (len(video), len(audio)) == own[:2]
    key = (config, torch.bfloat16, model)
    assert graph_cache.key_of(*key, ranks=ranks) != graph_cache.key_of(*key)


def test_exchanges_are_taken_in_by_attention_over_e4m3(tmp_path: Path) -> None:
    """In the layers whose projection is quantised; the others exchange as they do in bf16."""
    config = dataclasses.replace(golden.dit(local=False).config, hidden_size=128, kv_heads=4)
    model = random_weights.dit(config, 0, CPU, torch.bfloat16, "distill")
    quantization.quantize_model(model, quantization.quantized_linears(config, ["block.layers.1.*"]))
    compiling.pad_weights(model, config)
    sharding = ref.Sharding.of(LAYOUTS[0].counts, 2)
    made = []
    for narrow in (False, True):
        context = Context(config, sharding.own_counts(1), torch.bfloat16, CPU, sharding=sharding)
        options = CompileOptions(cache=tmp_path, fp8_attention=narrow)
        module, _ = compiling.compile_forward(model, context, options)
        names = Counter(str(node.target).split(".")[1] for node in module.graph.nodes
                        if str(node.target).startswith("magihuman."))  # fmt: skip
        narrowed = config.num_layers - 1 if narrow else 0
        assert names["rows_to_heads_fp8"] == names["gated_attention_fp8_to_rows"] == narrowed
        plain = config.num_layers - narrowed
        assert names["rows_to_heads"] == names["heads_to_rows"] == plain
        assert names["gated_attention"] == names["qk_norm_rope"] == plain
        assert names["gated_attention_fp8"] == names["qkv_fp8"] == 0
        chosen = [arguments(n) for n in module.graph.nodes if "fp8_to_rows" in str(n.target)]
        assert all(given["ranks"] == 2 and given["backend"] == UNSET for given in chosen)
        torch.manual_seed(0)
        inputs = golden.inputs_of(model, dataclasses.replace(LAYOUTS[0], text=sharding.counts[2]))
        for (name, value), rows in zip(inputs.items(), sharding.own(1), strict=False):
            inputs[name] = value[rows]
        length = torch.tensor(LAYOUTS[0].tokens, dtype=torch.int32)
        with exchange.apart():
            made.append(module(*inputs.values(), length))
    for plain_stream, narrow_stream in zip(*made, strict=True):
        if len(plain_stream):
            assert 0 < golden.error(narrow_stream, plain_stream) < 0.1


@pytest.mark.parametrize("quantized", [False, True])
def test_frame_local_layers(quantized: bool, tmp_path: Path) -> None:
    """One capture for any number of frames, size of frames and reach."""
    plain, model = golden.dit(local=True), golden.dit(local=True)
    if quantized:
        quantization.quantize_model(model, quantization.quantized_linears(model.config))
    compiling.pad_weights(model, model.config)
    local_layers = len(model.config.local_attention_layers)
    assert 0 < local_layers < 5
    for number, (layout, reach) in enumerate(((LAYOUTS[0], 1), (LAYOUTS[1], 2), (LAYOUTS[0], 0))):
        local = ref.LocalAttention(layout.frames, layout.frame_tokens, reach)
        context = Context(model.config, layout.counts, torch.bfloat16, CPU, local=local)
        options = CompileOptions(cache=tmp_path, fp8_attention=quantized)
        module, report = compiling.compile_forward(model, context, options)
        assert report.from_cache == (number > 0)
        name = "gated_attention_fp8" if quantized else "gated_attention"
        calls = [n for n in module.graph.nodes if str(n.target) == f"magihuman.{name}.default"]
        shapes = [list(arguments(node)["local"]) for node in calls]
        assert shapes.count(list(local)) == local_layers and shapes.count([]) == 5 - local_layers
        inputs = golden.inputs_of(model, layout)
        length = torch.tensor(layout.tokens - 1, dtype=torch.int32)
        outputs = module(*inputs.values(), length)
        expected = plain(**inputs, local=local, length=length)
        for ours, theirs in zip(outputs, expected, strict=True):
            # The bar of this file; e4m3 costs most where attention is over a few keys.
            assert golden.error(ours, theirs) < (0.15 if quantized else 3e-2)


def test_golden_super_resolution_through_the_compiled_graph(tmp_path: Path) -> None:
    data, model = golden.load("sr_forward"), golden.dit(local=True)
    compiling.pad_weights(model, model.config)
    text = data["text"][0, : golden.META["sr_forward"]["text_len"]]
    layout = tokens.Layout(*data["x_t"].shape[2:], data["audio"].shape[1], len(text))

    def forward(
        video: Tensor, audio: Tensor, text: Tensor, rope: Tensor, local: ref.LocalAttention | None
    ) -> tuple[Tensor, Tensor]:
        context = Context(model.config, layout.counts, torch.bfloat16, CPU, local=local)
        options = CompileOptions(cache=tmp_path)
        module, _ = compiling.compile_forward(model, context, options)
        return module(video, audio, text, rope, torch.tensor(layout.tokens, dtype=torch.int32))

    plain = denoise.velocity_of(model, layout, text, "v1")
    outputs = denoise.velocity_of(model, layout, text, "v1", forward)(data["x_t"], data["audio"])
    again = plain(data["x_t"] * (1 + 1e-5), data["audio"])
    once = plain(data["x_t"], data["audio"])
    theirs = (data["video"], data["audio_out"])
    for ours, exact, rerun, own in zip(outputs, theirs, again, once, strict=True):
        assert (
            golden.error(ours, exact) <= max(ONE_ROUNDING, 1.5 * golden.error(rerun, own)) <= 3e-2
        )


def test_golden_loop_through_the_compiled_graph(model: DiT, cache: Path) -> None:
    data, meta = golden.load("loop_distill_t2v"), golden.META["loop_distill_t2v"]
    text = data["context"][0, : meta["text_len"]]
    video, sound = data["latent_video"], data["latent_audio"]
    layout = tokens.Layout(*video.shape[2:], sound.shape[1], len(text))
    context = Context(model.config, layout.counts, torch.bfloat16, CPU)
    options = CompileOptions(cache=cache)
    module, _ = compiling.compile_forward(model, context, options)

    def forward(
        video: Tensor, audio: Tensor, text: Tensor, rope: Tensor, local: None
    ) -> tuple[Tensor, Tensor]:
        return module(video, audio, text, rope, torch.tensor(len(rope), dtype=torch.int32))

    draws = (data[f"noise{i:03d}"] for i in range(meta["draws"]))
    outputs = denoise.distilled(
        denoise.velocity_of(model, layout, text, "v2", forward),
        video,
        sound,
        steps=meta["steps"],
        noise=lambda like: next(draws),
    )
    for ours, theirs in zip(outputs, (data["out_video"], data["out_audio"]), strict=True):
        assert golden.error(ours, theirs) <= 1e-2


def test_a_model_that_drifts_from_the_reference_is_refused(
    model: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = model.block.layers[2].mlp
    monkeypatch.setattr(module, "activation", lambda x: ref.swiglu7(x) * 1.0)
    monkeypatch.setattr(ref, "swiglu7", lambda x, swiglu7=ref.swiglu7: swiglu7(x).clamp(-1e4, 1e4))
    context = Context(model.config, compiling.TRACE_ROWS, torch.bfloat16, CPU)
    with pytest.raises(CompileError, match=r"activation must find 5 .* found [0-4]"):
        compiling.rewrite(model, context, CompileReport())


def test_a_graph_break_names_the_line() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # the value decides
                return x
            return -x

    with pytest.raises(CaptureError, match=r"test_compile\.py"):
        capture(Breaks(), {"x": torch.randn(3)})


def test_stored_graphs(model: DiT, cache: Path, tmp_path: Path) -> None:
    key = graph_cache.key_of(model.config, torch.bfloat16, model)
    other = dataclasses.replace(model.config, frame_reach=5)
    assert key != graph_cache.key_of(other, torch.bfloat16, model)
    assert key != graph_cache.key_of(model.config, torch.float32, model)
    assert graph_cache.load(key, model, tmp_path) is None
    gone = json.dumps([["call_function", "a", "aten.gone.x", [], {}]])
    for text in ("[[", gone):
        kept.write(graph_cache.KIND, key, text.encode(), tmp_path)
        assert graph_cache.load(key, model, tmp_path) is None


@pytest.mark.parametrize("changed", [ops, exchange, ref, decoder_ops])
def test_stored_graphs_are_those_of_their_operators(
    changed: ModuleType, model: DiT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file has arguments in the order of the schemas that it was written with, wherever below
    kernels/ the operators are registered.
    """
    key = graph_cache.key_of(model.config, torch.bfloat16, model)
    kernels = Path(str(ref.__file__)).parent
    copied = shutil.copytree(kernels, tmp_path / "kernels")
    monkeypatch.setattr(graph_cache, "KERNELS", copied)
    assert graph_cache.key_of(model.config, torch.bfloat16, model) == key
    source = copied / Path(str(changed.__file__)).relative_to(kernels)
    source.write_text(source.read_text() + "# changed")
    assert graph_cache.key_of(model.config, torch.bfloat16, model) != key


def test_a_new_file_of_an_operator_counts(tmp_path: Path) -> None:
    copied = shutil.copytree(graph_cache.KERNELS, tmp_path / "kernels")
    before = graph_cache.operator_sources(copied)
    (copied / "linear" / "new.py").write_text('@torch.library.custom_op("magihuman::new")')
    (copied / "linear" / "other.py").write_text("BLOCK = 128")
    added = set(graph_cache.operator_sources(copied)) - set(before)
    assert [file.name for file in added] == ["new.py"]


def test_padding_weights_changes_no_value(model: DiT) -> None:
    fresh = golden.dit(local=False)
    for (name, ours), theirs in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        if name.endswith("down_proj.weight"):
            assert ours.stride(0) % 128 == 0
            whole = ours.as_strided((len(ours), ours.stride(0)), ours.stride())
            assert (whole[:, ours.shape[1] :] == 0).all()


def test_reasons_not_to_compile(model: DiT) -> None:
    assert support.why_not(model.config, torch.bfloat16, CPU) == "there is no GPU"


def test_what_no_gpu_has_chosen_is_unset(cache: Path, tmp_path: Path) -> None:
    """Not a route or backend that runs, which a GPU would take for a choice."""
    model = golden.dit(local=False)
    quantization.quantize_model(model, ["block.layers.1.mlp.up_gate_proj"])
    compiling.pad_weights(model, model.config)
    for given in (None, "128x192"):
        context = Context(model.config, LAYOUTS[0].counts, torch.bfloat16, CPU)
        options = CompileOptions(linear_route=given, cache=tmp_path)
        module, report = compiling.compile_forward(model, context, options)
        assert set(report.linears.values()) == {given or UNSET}
        assert any(kind.startswith("swiglu7") and "fp8" in kind for kind in report.linears)
        assert report.attention == UNSET
        names = ("linear", "linear_add_", "linear_activation", "linear_activation_fp8")
        routed = {getattr(torch.ops.magihuman, name).default for name in names}
        routes = [arguments(n)["route"] for n in module.graph.nodes if n.target in routed]
        assert routes == [given or UNSET] * 20
