"""How far 8 bits are from bf16, and where they break: per linear, per layer, after 8 steps.

    python benchmarks/accuracy/fp8_errors.py [--precisions fp8 int8] [--folder RESULTS] [--tiny]

On weights that are normally distributed, heavy-tailed with massive activations, and made to break
(`harness/weight_kinds.py`), at full size, 480x256, 5 s, 300 text tokens; with --tiny at a size for
the CPU.

A linear's inputs are those that it has in the bf16 model. Its kernel and a careful reference
(operands in 8 bits with the same scales, all else in fp32) are compared with the product of the
bf16 operands in fp32. What `magihuman verify` says of the same weights stands beside that. Each
precision has a file of results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment, sizes, weight_kinds
from harness.measure import STEPS, distilled_steps, error, example, release
from magihuman import runtime
from magihuman.graphs import quantization
from magihuman.graphs.transformer import compile as compiling
from magihuman.graphs.transformer.options import CompileOptions
from magihuman.graphs.transformer.passes.context import Context
from magihuman.graphs.transformer.passes.precision import OVER
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.kernels import reference as ref
from magihuman.runtime.evaluate.simulated import Mode, Simulated
from magihuman.runtime.evaluate.verify_report import Report
from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import DiT, Layer
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.request import Request
from magihuman.runtime.weights import PrecisionPolicy, random_weights

KINDS = ("normal", "outliers", "broken")
PRECISIONS = ("fp8", "int8")
# All tiles of Hopper's product sum in the same order, and sums of integers are exact.
ROUTES = {ref.FP8: "128x192", ref.INT8: "portable 128x128"}
# What `verify` makes; its frames are compared on the CPU.
CLIPS = {
    "full": {"seconds": 1.0, "width": 480, "height": 256},
    "tiny": {"seconds": 0.2, "width": 32, "height": 32, "steps": 2},
}
NAMED = 5  # worst linears that are listed
OPS = torch.ops.magihuman
FP8 = ref.FP8

Errors = dict[str, float]  # of the kernel, by its precision, and of the reference, "careful"
Latents = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Linear:
    """A weight in bf16 and in 8 bits, for all rows or, with counts, for each modality."""

    weight: Tensor
    counts: ref.Counts | None
    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor, counts: ref.Counts | None, dtype: torch.dtype) -> Linear:
        return cls(weight, counts, *quantization.quantize(weight, dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def out(self) -> int:
        """Columns of the product."""
        return len(self.weight) // (3 if self.counts else 1)

    @property
    def narrow(self) -> tuple[Tensor, Tensor, list[int]]:
        """Arguments of an operator: values, scales, runs."""
        return self.values, self.scale, list(self.counts or ())

    def exact(self, x: Tensor) -> Tensor:
        """The product of bf16 operands, in fp32."""
        return ref.linear(x.float(), self.weight.float(), self.counts)

    def careful(self, values: Tensor, scale: Tensor) -> Tensor:
        """The product of 8-bit operands and their scales, in fp32."""
        x = ref.dequantize_rows(values, scale)
        return ref.linear(x, ref.dequantize_rows(self.values, self.scale), self.counts)

    def added(self, values: Tensor, scale: Tensor | float, stream: Tensor) -> Tensor:
        """The kernel's product joins a stream in place."""
        scales: tuple[Any, ...] = (scale,)
        if self.dtype == FP8:
            scales = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
        route = ROUTES[self.dtype]
        joined: Tensor = OVER[self.dtype].add(stream, values, *scales, *self.narrow, route)
        return joined

    def added_rows(self, x: Tensor, stream: Tensor) -> Tensor:
        """As `added`, of rows of bf16 that are quantised first."""
        return self.added(*OVER[self.dtype].quantize(x), stream)


class Blocks:
    """The operators that the rewritten graph has for one layer with all linears in 8 bits.

    Attention and its norms are the reference's in bf16, here and in what this is compared with.
    """

    def __init__(self, layer: Layer, rope: Tensor, counts: ref.Counts, dtype: torch.dtype) -> None:
        self.layer, self.rope = layer, rope
        self.counts = counts if layer.has_modality_weights else None
        attention, mlp = layer.attention, layer.mlp
        self.qkv, self.proj, self.up, self.down = (
            Linear.of(linear.weight, self.counts, dtype)
            for linear in (
                attention.linear_qkv, attention.linear_proj, mlp.up_gate_proj, mlp.down_proj,
            )
        )  # fmt: skip
        self.kind = mlp.activation.__name__
        self.over, self.route = OVER[dtype], ROUTES[dtype]
        self.fixed = ref.STATIC_SCALES[self.kind] if dtype == FP8 else None

    def __call__(self, stream: Tensor) -> Tensor:
        """The stream after the layer; its own argument stays as it is."""
        stream = stream.clone()
        rows = self.over.norm(stream, self.layer.attention.pre_norm.weight, self.qkv.narrow[2])
        mixed = self.attended(self.over.linear(*rows, *self.qkv.narrow, self.route))
        self.proj.added_rows(mixed, stream)
        rows = self.over.norm(stream, self.layer.mlp.pre_norm.weight, self.up.narrow[2])
        return self.down.added(*self.activated(*rows), stream)

    def attended(self, qkv: Tensor) -> Tensor:
        """Gated attention, [N, heads D]."""
        own = self.layer.attention
        q, k, v, gate = ref.split_qkv(
            qkv, own.q_norm.weight, own.k_norm.weight, self.rope, self.counts, own.heads,
            own.kv_heads,
        )  # fmt: skip
        return ref.gated_attention(q, k, v, gate).flatten(1)

    def activated(self, values: Tensor, scale: Tensor) -> tuple[Tensor, Any]:
        """The up projection and what follows it, [N, padded] in 8 bits, and scales: one in e4m3,
        else of each row.
        """
        padded = ref.padded_width(self.down.weight.shape[1])
        product = (values, scale, *self.up.narrow, self.kind, padded)
        if self.fixed is not None:
            return self.over.activation(*product, FP8, self.route), self.fixed
        narrow: tuple[Tensor, Tensor] = self.over.quantize(
            self.over.activation(*product, self.route)
        )
        return narrow


# -- one linear -------------------------------------------------------------------------------


def normed_errors(stream: Tensor, norm: Tensor, linear: Linear) -> Errors:
    """Of a linear after a norm, which makes its rows in 8 bits."""
    normed = ref.rms_norm(stream, norm, linear.counts)
    exact = linear.exact(normed.bfloat16())
    over, dtype = OVER[linear.dtype], linear.dtype
    rows = over.norm(stream, norm, linear.narrow[2])
    own = over.linear(*rows, *linear.narrow, ROUTES[dtype])
    return against(exact, own, linear.careful(*ref.quantize_rows(normed, dtype)), dtype)


def activated_errors(stream: Tensor, blocks: Blocks) -> Errors:
    """Of the up projection with its activation, as the next product reads it."""
    norm, width = blocks.layer.mlp.pre_norm.weight, blocks.down.weight.shape[1]
    normed = ref.rms_norm(stream, norm, blocks.counts)
    activation = blocks.layer.mlp.activation
    exact = activation(blocks.up.exact(normed.bfloat16()))
    dtype = blocks.up.dtype
    values, scale = blocks.activated(*blocks.over.norm(stream, norm, blocks.up.narrow[2]))
    careful = activation(blocks.up.careful(*ref.quantize_rows(normed, dtype)))
    if blocks.fixed is None:
        own = ref.dequantize_rows(values[:, :width], scale)
        careful = ref.dequantize_rows(*ref.quantize_rows(careful, dtype))
    else:
        own = values[:, :width].float() * blocks.fixed
        careful = (careful / blocks.fixed).to(FP8).float() * blocks.fixed
    return against(exact, own, careful, dtype)


def proj_errors(x: Tensor, linear: Linear) -> Errors:
    """Of a linear whose rows are quantised by themselves."""
    own = linear.added_rows(x, x.new_zeros(len(x), linear.out, dtype=torch.float32))
    careful = linear.careful(*ref.quantize_rows(x, linear.dtype))
    return against(linear.exact(x), own, careful, linear.dtype)


def down_errors(hidden: Tensor, linear: Linear, fixed: float | None) -> Errors:
    """Of a linear after an activation, over the activation's scale, if it has one."""
    if fixed is None:
        return proj_errors(hidden, linear)
    rows, width = hidden.shape
    values = hidden.new_zeros(rows, ref.padded_width(width), dtype=FP8)
    values[:, :width] = (hidden.float() / fixed).to(FP8)
    stream = hidden.new_zeros(rows, linear.out, dtype=torch.float32)
    scale = hidden.new_full((rows,), fixed, dtype=torch.float32)
    own = linear.added(values, fixed, stream)
    return against(linear.exact(hidden), own, linear.careful(values[:, :width], scale), FP8)


def against(exact: Tensor, own: Tensor, careful: Tensor, dtype: torch.dtype) -> Errors:
    """Both relative to the exact product."""
    name = "fp8" if dtype == FP8 else "int8"
    return {name: error(own, exact), "careful": error(careful, exact)}


# -- the whole model --------------------------------------------------------------------------


def walk(
    model: DiT, layout: tokens.Layout, latents: Latents, text: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Errors of every linear and layer in one forward, from the inputs that they have in bf16.

    "layer" is the error of what a layer adds to the stream by itself, "stream" that of the stream
    after it with all layers so far in 8 bits; "peak" is the largest of the stream over its median.
    """
    found: dict[str, list[Any]] = {}

    def note(name: str, value: Any) -> None:
        found.setdefault(name, []).append(value)

    rope = model.adapter.rope(tokens.coordinates(layout, "v2", text.device))
    stream = model.adapter(tokens.patchify(latents[0]), latents[1][0], text)
    narrow = stream
    for layer in model.block.layers:
        blocks = Blocks(layer, rope, layout.counts, dtype)
        attention, mlp = layer.attention, layer.mlp
        note("linear_qkv", normed_errors(stream, attention.pre_norm.weight, blocks.qkv))
        normed = ref.rms_norm(stream, attention.pre_norm.weight, blocks.counts).bfloat16()
        mixed = blocks.attended(attention.linear_qkv(normed, blocks.counts))
        note("linear_proj", proj_errors(mixed, blocks.proj))
        middle = stream + attention.linear_proj(mixed, blocks.counts)
        note("up_gate_proj", normed_errors(middle, mlp.pre_norm.weight, blocks.up))
        note("up_gate_proj and activation", activated_errors(middle, blocks))
        normed = ref.rms_norm(middle, mlp.pre_norm.weight, blocks.counts).bfloat16()
        hidden = mlp.activation(mlp.up_gate_proj(normed, blocks.counts))
        note("down_proj", down_errors(hidden, blocks.down, blocks.fixed))
        after = middle + mlp.down_proj(hidden, blocks.counts)
        note("layer", error(blocks(stream) - stream, after - stream))
        narrow, stream = blocks(narrow), after
        note("stream", error(narrow, stream))
        size = stream.abs()
        note("peak", float(size.max() / size.median()))
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Least, median and largest of each over the layers; "ratio" is the kernel over careful."""
    out: dict[str, Any] = {}
    for name, values in found.items():
        if not isinstance(values[0], dict):
            out[name] = spread(values)
            continue
        own, careful = values[0]
        out[name] = {key: spread([v[key] for v in values]) for key in (own, careful)}
        out[name]["ratio"] = spread([v[own] / v[careful] for v in values])
    return out


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def loops(
    model: DiT,
    layout: tokens.Layout,
    latents: Latents,
    text: Tensor,
    dtype: torch.dtype,
    cache: Path,
) -> dict[str, Any]:
    """Latents after 8 steps against bf16: simulated, and by the kernels. Leaves rounded weights."""
    names = quantization.quantized_linears(model.config)
    plain = denoise.velocity_of(model, layout, text, "v2")
    bf16 = distilled_steps(plain, *latents)
    with Simulated(model, names, dtype=dtype) as simulation, simulation.running(Mode.NARROW):
        simulated = distilled_steps(plain, *latents)
    quantization.quantize_model(model, names, dtype)
    release()
    forward = narrow_forward(model, layout, cache)
    narrow = distilled_steps(denoise.velocity_of(model, layout, text, "v2", forward), *latents)
    del forward
    release()
    quantization.dequantize_model(model)
    pairs = {
        "kernels against bf16": (narrow, bf16),
        "simulated against bf16": (simulated, bf16),
        "kernels against simulated": (narrow, simulated),
    }
    return {name: [error(a, b) for a, b in zip(*pair, strict=True)] for name, pair in pairs.items()}


def narrow_forward(model: DiT, layout: tokens.Layout, cache: Path) -> denoise.Forward:
    """The rewritten graph: replayed on a GPU, with the operators' references on the CPU.

    cache: of the CPU's graphs; a GPU's are in the user's.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        return CompiledForward(model, model.config, torch.bfloat16, device)
    compiling.pad_weights(model, model.config)
    context = Context(model.config, layout.counts, torch.bfloat16, device)
    module, _ = compiling.compile_forward(model, context, CompileOptions(cache=cache))
    length = torch.tensor(layout.tokens, dtype=torch.int32)
    return lambda video, audio, text, rope, local: module(video, audio, text, rope, length)


# -- where it breaks --------------------------------------------------------------------------


def sweeps(
    model: DiT, layout: tokens.Layout, latents: Latents, text: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Errors of one layer's linears as a channel grows, and as its activations shrink, by 2^k."""
    shared = [layer for layer in model.block.layers if not layer.has_modality_weights]
    layer, stream = shared[0], model.adapter(tokens.patchify(latents[0]), latents[1][0], text)
    prefix = "block.layers.0."
    own = {f"{prefix}{key}": value for key, value in layer.state_dict().items()}
    qkv, up, down = (
        f"{prefix}{part}" for part in ("attention.linear_qkv", "mlp.up_gate_proj", "mlp.down_proj")
    )
    huge, quiet = {}, {}
    for power in range(0, 25, 2):
        state = {key: value.clone() for key, value in own.items()}
        weight_kinds.hide(state, qkv, 2.0**power)
        linear = Linear.of(state[f"{qkv}.weight"], None, dtype)
        huge[power] = normed_errors(stream, state[weight_kinds.norm_of(qkv)], linear)
        weight_kinds.quieten(state, up, down, 2.0**power)
        normed = ref.rms_norm(stream, state[weight_kinds.norm_of(up)]).bfloat16()
        hidden = ref.swiglu7(ref.linear(normed, state[f"{up}.weight"]))
        linear = Linear.of(state[f"{down}.weight"], None, dtype)
        fixed = ref.STATIC_SCALES["swiglu7"] if dtype == FP8 else None
        quiet[power] = down_errors(hidden, linear, fixed)
    return {"channel times 2^k": huge, "activations over 2^k": quiet}


# -- what verify says -------------------------------------------------------------------------


def verdict(
    engine: runtime.Engine, prompt: str, precision: str, clip: dict[str, Any]
) -> dict[str, Any]:
    """`verify` on these weights and, after a fail, once more with what it suggests."""
    clip = clip | {"precision": precision}
    report = runtime.verify(engine, [prompt], **clip)
    said = described(report)
    if report.broken:
        again = runtime.verify(engine, [prompt], keep_bf16=report.suggested_keep_bf16, **clip)
        said["with what is suggested"] = described(again)
    return said


def described(report: Report) -> dict[str, Any]:
    """The verdict and what it rests on."""
    worst = sorted(report.per_linear, key=lambda n: -report.per_linear[n].worst)[:NAMED]
    (clip,) = report.clips
    return {
        "verdict": report.verdict,
        "over the threshold of a linear": [
            name
            for name, found in report.per_linear.items()
            if not found.worst <= report.thresholds.max_linear_error
        ],
        "suggested": report.suggested_keep_bf16,
        "worst": {name: report.per_linear[name].worst for name in worst},
        "last_layer": report.per_layer[-1].worst,
        "latents": [clip.video_error[-1], clip.audio_error[-1]],
        "psnr_db": clip.psnr_db,
        "ssim": clip.ssim,
    }


def give_weights(model: DiT, kind: str) -> list[str]:
    """Weights of a kind, in place; names of the linears made to break."""
    random_weights.randomize(model, 0, "distill")
    state, arch = model.state_dict(), model.config
    if kind == "outliers":
        weight_kinds.outliers(state, arch)
    return weight_kinds.broken(state, arch) if kind == "broken" else []


def measured(
    engine: runtime.Engine, size: sizes.Size, precision: str, cache: Path
) -> dict[str, Any]:
    """All figures, for each kind of weights in the engine's transformer."""
    with engine.hold(Request(size.prompt)) as pipeline:
        model = pipeline.components.dit
    torch.manual_seed(0)
    video, audio, text = example(size.layout, model.config.text_channels, size.device)
    dtype = PrecisionPolicy(precision).narrow
    assert dtype is not None
    inputs = (model, size.layout, (video, audio), text, dtype)
    clip = CLIPS[size.name]
    figures: dict[str, Any] = {}
    for kind in KINDS:
        names = give_weights(model, kind)
        if kind == "normal":
            figures["sweeps"] = sweeps(*inputs)
        found = walk(*inputs)
        figures[kind] = {"summary": summary(found), "made_to_break": names}
        figures[kind]["verify"] = verdict(engine, size.prompt, precision, clip)
        figures[kind]["after 8 steps"] = loops(*inputs, cache)
        print(precision, kind, json.dumps(figures[kind]), flush=True)
        figures[kind]["layers"] = found
    return figures


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    arguments = environment.arguments(parser)
    torch.set_float32_matmul_precision("highest")  # no TF32
    size, source = sizes.FULL, runtime.synthetic("distill")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            size, source = sizes.TINY, Path(folder, "model")
            runtime.write_tiny(source)
        engine = runtime.load(source, precision="bf16", compile=False, device=size.device)
        with engine, torch.inference_mode():
            figures = {
                name: measured(engine, size, name, Path(folder, "graphs"))
                for name in arguments.precisions
            }
    shapes = {
        "size": size.name,
        "tokens": size.layout.tokens,
        "layers": size.arch.num_layers,
        "channels": size.arch.hidden_size,
        "steps": STEPS,
        "reference": "operands in 8 bits with the kernels' scales, products in fp32 without TF32",
        "verify_clip": CLIPS[size.name],
    }
    for name, found in figures.items():
        print(environment.write(f"{name}_errors", shapes | found, arguments.folder))


if __name__ == "__main__":
    main()
