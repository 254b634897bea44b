"""The compiled and replayed forward on a GPU."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import golden
from harness import kernel_cases
from harness.kernel_cases import CASES
from magihuman.runtime.model import tokens
from magihuman.runtime.pipeline import denoise

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman import runtime
from magihuman.graphs import quantization
from magihuman.graphs.cuda_graphs.addresses import MovedError
from magihuman.graphs.transformer.options import ReplayOptions
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.kernels.attention import backends
from magihuman.kernels.linear import routes

DEVICE = torch.device("cuda")
LOOP = 1e-2
GEMM = re.compile("nvjet|gemm|gemv|cutlass|splitK|cublasLt|scal_kernel", re.IGNORECASE)
# Second halves of products: sums of one split along K, biases.
SECOND = re.compile("splitKreduce|cublasLt.*epilogue|scal_kernel", re.IGNORECASE)


def compiled_of(**options: Any) -> tuple[torch.nn.Module, CompiledForward]:
    model = golden.dit(local=False).to(DEVICE)
    given = ReplayOptions(**options)
    return model, CompiledForward(model, model.config, torch.bfloat16, DEVICE, given)


def velocity_of(
    model: torch.nn.Module, forward: CompiledForward, layout: tokens.Layout
) -> denoise.Velocity:
    generator = torch.Generator(DEVICE).manual_seed(layout.tokens)
    text = torch.randn(layout.text, model.config.text_channels, generator=generator, device=DEVICE)
    return denoise.velocity_of(model, layout, text, "v2", forward)


def streams_of(layout: tokens.Layout) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(layout.tokens)
    shape = (1, 48, layout.frames, layout.rows, layout.columns)
    video = torch.randn(shape, generator=generator, device=DEVICE)
    return video, torch.randn(1, layout.audio, 64, generator=generator, device=DEVICE)


@pytest.mark.parametrize("name", ["loop_distill_t2v", "loop_distill_ti2v", "loop_base_cfg2"])
def test_golden_loops(name: str) -> None:
    """Through capture, passes, kernels and replay; or no further than our own rounding, as on the
    CPU.
    """
    model, forward = compiled_of()
    data = {key: value.to(DEVICE) for key, value in golden.load(name).items()}
    meta = golden.META[name]

    def run(nudge: float) -> tuple[Tensor, Tensor]:
        video, sound = data["latent_video"] * (1 + nudge), data["latent_audio"]

        def velocity(text: Tensor) -> denoise.Velocity:
            layout = tokens.Layout(*video.shape[2:], sound.shape[1], len(text))
            return denoise.velocity_of(model, layout, text, "v2", forward)

        conditional = velocity(data["context"][0, : meta["text_len"]])
        options = {"steps": meta["steps"], "image": data.get("image")}
        if meta["cfg_number"] == 2:
            null = velocity(data["context_null"][0, : meta["null_len"]])
            return denoise.guided(conditional, null, video, sound, **options)
        draws = (data[f"noise{i:03d}"] for i in range(meta["draws"]))
        return denoise.distilled(
            conditional, video, sound, noise=lambda like: next(draws), **options
        )

    with torch.inference_mode():
        ours, again = run(0.0), run(1e-6)
    for stream, rerun, theirs in zip(ours, again, ("out_video", "out_audio"), strict=True):
        own_noise = golden.error(rerun, stream)
        assert golden.error(stream, data[theirs]) <= max(LOOP, 1.25 * own_noise)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("name", "local"), [("dit_forward", False), ("sr_forward", True)])
def test_golden_forwards(name: str, local: bool, is_compiled: bool) -> None:
    data = {key: value.to(DEVICE) for key, value in golden.load(name).items()}
    model = golden.dit(local=local).to(DEVICE)
    text = data["text"][0, : golden.META[name]["text_len"]]
    layout = tokens.Layout(*data["x_t"].shape[2:], data["audio"].shape[1], len(text))
    forward = None
    if is_compiled:
        forward = CompiledForward(model, model.config, torch.bfloat16, DEVICE)
    velocity = denoise.velocity_of(model, layout, text, "v1" if local else "v2", forward)
    with torch.inference_mode():
        ours = velocity(data["x_t"], data["audio"])
    for stream, theirs in zip(ours, ("video", "audio_out"), strict=True):
        # Two bf16 runs that sum in different orders are 5e-3 to 7e-3 apart here.
        assert golden.error(stream, data[theirs]) <= 1e-2


def test_two_prompts_share_a_graph() -> None:
    model, forward = compiled_of()
    video, sound = torch.randn(1, 48, 3, 4, 6, device=DEVICE), torch.randn(1, 9, 64, device=DEVICE)
    with torch.inference_mode():
        for length in (5, 64, 1, 33):
            layout = tokens.Layout(3, 4, 6, 9, length)
            text = torch.randn(length, model.config.text_channels, device=DEVICE)
            ours = denoise.velocity_of(model, layout, text, "v2", forward)(video, sound)
            plain = denoise.velocity_of(model, layout, text, "v2")
            expected, again = plain(video, sound), plain(video * (1 + 1e-5), sound)
            for a, b, rerun in zip(ours, expected, again, strict=True):
                # As far as the plain model is from itself, nudged, a half allowed for chance; a
                # padded token that were seen would cost ten times as much.
                assert golden.error(a, b) <= 1.5 * golden.error(rerun, b) <= 3e-2
    assert len(forward.reports()) == 1


def test_outputs_are_the_callers_to_keep() -> None:
    model, forward = compiled_of()
    layout = tokens.Layout(3, 4, 6, 9, 8)
    text = torch.randn(8, model.config.text_channels, device=DEVICE)
    velocity = denoise.velocity_of(model, layout, text, "v2", forward)
    sound = torch.randn(1, 9, 64, device=DEVICE)
    with torch.inference_mode():
        first = velocity(torch.randn(1, 48, 3, 4, 6, device=DEVICE), sound)
        kept = [stream.clone() for stream in first]
        velocity(torch.randn(1, 48, 3, 4, 6, device=DEVICE), sound)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_engine_runs_compiled_and_steadily(tmp_path: Path) -> None:
    """50 requests of changing length leave no memory behind; the same seed gives the same bits."""
    runtime.write_tiny(tmp_path)
    with runtime.load(tmp_path, sr="540p") as engine:
        assert engine.is_compiled
        options = {"seconds": 0.2, "width": 64, "height": 64, "sr_width": 96, "sr_height": 96}
        first = engine.generate("a" * 30, seed=3, **options)
        used = None
        for i in range(50):
            engine.generate("b" * (1 + i), **options)
            if i == 4:
                used = torch.cuda.memory_allocated()
        assert torch.cuda.memory_allocated() <= used + 2**20
        again = engine.generate("a" * 30, seed=3, **options)
    assert (again.frames == first.frames).all()
    assert (again.audio == first.audio).all()


@pytest.mark.parametrize("attention", [False, True])
def test_fp8_linears(attention: bool) -> None:
    """As near to bf16 as rounding operands to e4m3 leaves it; padding is not seen."""
    layout = tokens.Layout(3, 4, 6, 9, 33)
    reference, _ = compiled_of()
    model = golden.dit(local=False).to(DEVICE)
    quantization.quantize_model(model, quantization.quantized_linears(model.config))
    options = ReplayOptions(fp8_attention=attention)
    forward = CompiledForward(model, model.config, torch.bfloat16, DEVICE, options)
    text = torch.randn(layout.text, model.config.text_channels, device=DEVICE)
    with torch.inference_mode():
        plain = denoise.velocity_of(reference, layout, text, "v2")(*streams_of(layout))
        ours = denoise.velocity_of(model, layout, text, "v2", forward)(*streams_of(layout))
    for a, b in zip(ours, plain, strict=True):
        assert 1e-3 < golden.error(a, b) < 0.1


@pytest.mark.parametrize(
    ("backend", "route"), [("gluon", "library"), ("triton", "library"), ("gluon", "128x192")]
)
def test_nothing_but_the_expected_kernels_runs(
    backend: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    reason = backends.why_not(backend, 32, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(backends, "fastest", lambda *shape: backend)
    # The tiny architecture's rows of q, k, v and gates are no multiple of 16 bytes.
    monkeypatch.setattr(
        routes, "fastest", lambda after, *rest: "library" if after == "store" else route
    )
    model, forward = compiled_of(debug=True)
    found = forward.recorded(72, 9, 64)

    layers, own = model.config.num_layers, route != "library"
    gelu, modality = len(model.config.gelu7_layers), len(model.config.modality_layers)
    expected = {
        "_add_rms_norm": 2 * layers,
        "_attention": layers,
        "_gelu7": 0 if own else gelu,
        "_swiglu7": 0 if own else layers - gelu,
        "matmul": 3 * layers if own else 0,
    }
    calls = kernel_cases.OPERATORS["none"]
    expected |= {case.kernel: calls[case.name] for case in CASES.values() if case.name in calls}
    assert {name: found.kernels[name] for name in expected} == expected

    others = Counter({k: n for k, n in found.kernels.items() if k not in expected})
    gemms = Counter({k: n for k, n in others.items() if GEMM.search(k)})
    seconds = Counter({k: n for k, n in gemms.items() if SECOND.search(k)})
    by_library = 1 if own else 4  # of a layer's linears
    products = by_library * (layers + 2 * modality) + 2 + 2  # and embedders, heads
    assert (gemms - seconds).total() == products, gemms
    assert seconds.total() <= products

    # Outside the blocks, what the graph leaves to PyTorch: one launch each, and one concatenation.
    # The embedders' biases may be copied before the product. By modality, the own product leaves
    # the padding of SwiGLU7's rows to a fill.
    others -= gemms
    elementwise = sum(n for k, n in others.items() if "elementwise_kernel" in k)
    fills = modality - gelu if own else 0
    plain = sum(kernel_cases.ELEMENTWISE.values())
    reductions = sum(kernel_cases.REDUCTIONS.values())
    assert plain + fills <= elementwise <= plain + fills + 3, others
    assert sum(n for k, n in others.items() if "reduce_kernel" in k) == reductions, others
    assert sum(n for k, n in others.items() if "CatArrayBatchedCopy" in k) == 1, others
    assert others.total() == elementwise + reductions + 1, others

    assert found.nodes["kernel"] == found.kernels.total()
    assert found.nodes["memset"] <= products  # some products clear what they count in
    assert set(found.nodes) <= {"kernel", "memset"}


def test_sizes_beyond_the_budget_are_captured_again() -> None:
    """With no budget at all, a larger size is kept alone, and a smaller one beside one other."""
    model, forward = compiled_of(budget_bytes=0)
    layouts = [tokens.Layout(3, 4, 6, 9, text) for text in (8, 70, 130)]
    sizes = [(18, 9, 64), (18, 9, 128), (18, 9, 192)]
    with torch.inference_mode():
        first = []
        for layout, size in zip(layouts, sizes, strict=True):
            first.append(velocity_of(model, forward, layout)(*streams_of(layout)))
            assert [kept.modality_rows for kept in forward.reports()] == [size]
        reserved = None
        for _ in range(4):
            for layout, expected in zip(layouts, first, strict=True):
                again = velocity_of(model, forward, layout)(*streams_of(layout))
                assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
                assert len(forward.reports()) == 2
            torch.cuda.empty_cache()
            reserved = reserved or torch.cuda.memory_reserved()
    assert torch.cuda.memory_reserved() <= reserved + 2 * 2**20  # a block of small tensors


def test_out_of_memory_leaves_the_forward_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "fastest", lambda *shape: "triton")
    model, forward = compiled_of()
    layout = tokens.Layout(3, 4, 6, 9, 8)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    with torch.inference_mode():
        velocity = velocity_of(model, forward, layout)
        streams = streams_of(layout)
        expected = velocity(*streams)
        torch.cuda.empty_cache()
        # Inputs alone are 18 MiB, and activations three times as much.
        limit = torch.cuda.memory_reserved() + 32 * 2**20
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            with pytest.raises(torch.OutOfMemoryError, match="no room to capture 20073 tokens"):
                forward.prepare(20000, 9, 64)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert forward.reports() == {}
        assert all(torch.equal(a, b) for a, b in zip(velocity(*streams), expected, strict=True))


def test_a_moved_weight_is_named_in_debug() -> None:
    model, forward = compiled_of(debug=True)
    layout = tokens.Layout(3, 4, 6, 9, 8)
    streams = streams_of(layout)
    velocity = velocity_of(model, forward, layout)
    expected = velocity(*streams)
    weight = model.block.layers[1].mlp.down_proj.weight
    before = weight.data
    weight.data = before.clone()
    with pytest.raises(MovedError, match=r"weight block\.layers\.1\.mlp\.down_proj\.weight"):
        velocity(*streams)
    weight.data = before
    assert all(torch.equal(a, b) for a, b in zip(velocity(*streams), expected, strict=True))
