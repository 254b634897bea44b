"""The transformer in fused kernels: the order of the passes and the matches they must reach."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from magihuman.graphs import graph_cache
from magihuman.graphs.quantization import quantized_dtypes
from magihuman.graphs.rewrite import CompileError, CompileReport, arguments, with_arguments
from magihuman.graphs.trace import capture
from magihuman.graphs.transformer.options import CompileOptions
from magihuman.graphs.transformer.passes import (
    activation,
    add_rms_norm,
    attention,
    attention_fp8,
    epilogue,
    head_norm,
    linear,
    precision,
    qk_norm_rope,
)
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels.jit import UNSET
from magihuman.kernels.parallel import exchange  # noqa: F401 - registers torch.ops.magihuman, as ops do
from magihuman.kernels.reference import (
    FP8,
    INT8,
    LIMITS,
    Counts,
    LocalAttention,
    Sharding,
    padded_width,
)
from magihuman.kernels.target import Target, target_of

OPS = torch.ops.magihuman
Pass = Callable[[fx.GraphModule, Context], int]

TRACE_ROWS: Counts = (24, 7, 5)  # by modality; any do that nothing else in the model is split by
TRACE_LOCAL = LocalAttention(frames=3, frame_tokens=8, reach=1)  # of so many video tokens
META = torch.device("meta")
OVER_E4M3 = (OPS.gated_attention_fp8.default, OPS.gated_attention_fp8_to_rows.default)
ONE_KERNEL = "one kernel"  # where all attention is over fp8 or frame-local


def passes_for(config: Any) -> list[tuple[str, Pass, int]]:
    """Every pass with the number of matches that the architecture implies."""
    layers = config.num_layers
    return [
        ("add_rms_norm", add_rms_norm.run, 2 * layers),
        ("qk_norm_rope", qk_norm_rope.run, layers),
        ("attention", attention.run, layers),
        ("activation", activation.run, layers),
        ("linear", linear.run, 4 * layers),
        ("epilogue", epilogue.run, 3 * layers),
        ("head_norm", head_norm.run, 1),
    ]


def compile_forward(
    model: nn.Module,
    context: Context,
    options: CompileOptions | None = None,
) -> tuple[fx.GraphModule, CompileReport]:
    """The forward of `model` for sequences of the context's sizes, in fused kernels.

    Args:
        model: a DiT with the signature of `magihuman.runtime.model.dit.DiT.forward`.
        context: its architecture, dtype and device, and the sizes of a sequence; text includes the
            padding of its bucket. With `sharding` the graph is every process's.
        options: by default those of `CompileOptions`.

    Returns:
        A module that takes video, audio, text, rope and length, and the report.

    Raises:
        CaptureError: the forward is not one graph.
        CompileError: a pass found more or fewer places than the architecture has.
    """
    options = options or CompileOptions()
    report = CompileReport()
    start = time.perf_counter()
    config, device = context.config, context.device
    quantized = quantized_dtypes(model)
    narrow = options.fp8_attention
    key = graph_cache.key_of(config, context.dtype, model, quantized, narrow, context.ranks)
    inputs = tuple(example_inputs(dataclasses.replace(context, device=META)))
    module = graph_cache.load(key, model, options.cache, inputs)
    report.from_cache = module is not None
    report.seconds["cache"] = time.perf_counter() - start
    if module is None:
        traced = dataclasses.replace(
            context,
            modality_rows=TRACE_ROWS,
            local=TRACE_LOCAL if config.local_attention_layers else None,
            sharding=_traced(context.ranks),
        )
        module = rewrite(model, traced, report, quantized, narrow)
        graph_cache.save(module, key, options.cache)
    start = time.perf_counter()
    has_choice = any(
        node.target is OPS.gated_attention.default and not arguments(node)["local"]
        for node in module.graph.nodes
    )
    target = None
    if device.type == "cuda":
        target = target_of(options.kernels, device, options.tiles_for)
        report.kernels = target.kernels
    backend = other = options.attention_backend or UNSET
    if target is not None:
        from magihuman.kernels.attention import backends

        other = backends.local_for(target, config.head_dim, device)
        if has_choice and backend == UNSET:
            shape = (sum(context.attended_rows), *context.heads, config.head_dim)
            backend = backends.fastest(*shape, device, target)
    report.attention = backend if has_choice else ONE_KERNEL
    report.seconds["choose attention"] = time.perf_counter() - start
    specialize(module, context.modality_rows, backend, context.local, context.sharding, other)
    start = time.perf_counter()
    report.linears = route_linears(module, context.tokens, options.linear_route, target)
    report.seconds["choose linears"] = time.perf_counter() - start
    report.nodes_after = len(module.graph.nodes)
    return module, report


def rewrite(
    model: nn.Module,
    context: Context,
    report: CompileReport,
    quantized: Mapping[str, torch.dtype] | None = None,
    fp8_attention: bool = False,
) -> fx.GraphModule:
    """Capture the whole forward and run every pass on it, at the context's sizes.

    Args:
        model: as of `compile_forward`.
        context: with the sizes to trace at, `TRACE_ROWS` and `TRACE_LOCAL` for `specialize`.
        report: that steps and matches are added to.
        quantized: the dtype of the weights in 8 bits, by the name of the linear.
        fp8_attention: as of `CompileOptions`.

    Raises:
        CaptureError: the forward is not one graph.
        CompileError: a pass found more or fewer places than the architecture has.
    """
    start = time.perf_counter()
    source = model
    # The forward knows nothing of weights in 8 bits, and a capture nothing of those that share
    # memory: it is made over others, of no size.
    stands_in = bool(quantized) or _shares_memory(model)
    if stands_in:
        context = dataclasses.replace(context, device=META)
        with META:
            source = type(model)(context.config, context.dtype)
    inputs = example_inputs(context)
    module = capture(source, inputs, local=context.local, sharding=context.sharding)
    report.seconds["capture"] = time.perf_counter() - start
    report.nodes_before = len(module.graph.nodes)
    for name, run, expected in passes_for(context.config):
        start = time.perf_counter()
        matches = run(module, context)
        report.seconds[name] = time.perf_counter() - start
        report.matches[name] = matches
        if matches != expected:
            raise CompileError(
                f"the pass {name} must find {expected} places in {context.config.num_layers}"
                f" layers, found {matches}; the model and kernels/reference.py have drifted apart"
            )
    if quantized:
        start = time.perf_counter()
        report.matches["precision"] = precision.run(module.graph, quantized)
        report.seconds["precision"] = time.perf_counter() - start
        if report.matches["precision"] != len(quantized):
            raise CompileError(
                f"{len(quantized)} linears have weights in 8 bits, the graph has"
                f" {report.matches['precision']} of them"
            )
        if fp8_attention:
            report.matches["attention_fp8"] = attention_fp8.run(module.graph)
    if stands_in:
        module = fx.GraphModule(model, module.graph)  # a copy of the model's attributes it names
        module.graph.lint()
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _shares_memory(model: nn.Module) -> bool:
    """Whether parameters are views of one another's memory."""
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    return len(set(storages)) < len(storages)


def specialize(
    module: fx.GraphModule,
    modality_rows: Counts,
    attention_backend: str,
    local: LocalAttention | None = None,
    sharding: Sharding | None = None,
    other_backend: str | None = None,
) -> None:
    """Put rows by modality, the shape of frame-local attention and the attention backend into a
    graph rewritten at `TRACE_ROWS` and `TRACE_LOCAL`, in place.

    Once rewritten, a graph holds them only as arguments of these names of the project's operators;
    an empty list says that an operator groups no rows, or attends to all, and stays. So one capture
    serves every length and size. Where processes share a sequence, `attended_rows` are those of all
    of it. other_backend: of attention that is frame-local or over e4m3, by default the same.
    """
    attended = modality_rows if sharding is None else sharding.counts
    symbols = {
        "modality_rows": list(modality_rows),
        "attended_rows": list(attended),
        "local": list(local or ()),
        "backend": attention_backend,
    }
    for node in module.graph.nodes:
        if getattr(node.target, "namespace", None) == OPS.name:
            given = arguments(node)
            changes = {name: value for name, value in symbols.items() if given.get(name)}
            if node.target in OVER_E4M3 or given.get("local"):
                changes["backend"] = other_backend or attention_backend
            with_arguments(node, **changes)
    module.recompile()


def _traced(ranks: int) -> Sharding | None:
    """What to trace with for so many processes: rows by modality, as many for each of them."""
    if ranks == 1:
        return None
    video, audio, text = TRACE_ROWS
    return Sharding((video + (ranks - 1) * sum(TRACE_ROWS), audio, text), ranks)


def route_linears(
    module: fx.GraphModule, rows: int, route: str | None, target: Target | None = None
) -> dict[str, str]:
    """Put the route of each linear into a specialised graph; by default the fastest of the target
    for its shape, or none where there is no target, since the weights are on no GPU.

    Returns the route of each kind, by what follows the product, its shape and its runs.
    """
    chosen: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.target not in ROUTED:
            continue
        given = arguments(node)
        weight, scale, runs = given["weight"], given.get("weight_scale"), given["modality_rows"]
        after = given["kind"] if ROUTED[node.target] == "kind" else ROUTED[node.target]
        values, scales = _attribute(module, weight), _attribute(module, scale)
        kind = f"{after} {tuple(values.shape)}{PRECISIONS[values.dtype] if scale else ''}"
        kind += " by modality" if runs else ""
        if kind not in chosen:
            chosen[kind] = route or _fastest(
                after, values, runs, rows, given.get("padded", 0), scales, target
            )
        with_arguments(node, route=chosen[kind])
    module.recompile()
    return chosen


PRECISIONS = {FP8: " fp8", INT8: " int8"}

# The operators that have a route, and what follows the product of each; their argument `kind`
# names the activation.
ROUTED: dict[Any, str] = {
    OPS.linear.default: "store",
    OPS.linear_fp8.default: "store",
    OPS.linear_int8.default: "store",
    OPS.linear_add_.default: "add",
    OPS.linear_add_fp8_.default: "add",
    OPS.linear_add_int8_.default: "add",
    OPS.linear_activation.default: "kind",
    OPS.linear_activation_fp8.default: "kind",
    OPS.linear_activation_int8.default: "kind",
}


def _attribute(module: fx.GraphModule, node: fx.Node | None) -> Any:
    """The tensor that a node stands for, if there is one."""
    return node and functools.reduce(getattr, str(node.target).split("."), module)


def _fastest(
    after: Any,
    weight: Tensor,
    runs: list[int],
    rows: int,
    padded: int,
    scale: Tensor | None,
    target: Target | None,
) -> str:
    if target is None or not weight.is_cuda:
        return UNSET
    from magihuman.kernels.linear import routes

    counts = (runs[0], runs[1], runs[2]) if runs else None
    return routes.fastest(after, weight, counts, rows, padded, scale, target)


def example_inputs(context: Context) -> dict[str, Tensor]:
    """Tensors of the shapes that the captured graph takes."""
    config = context.config
    video, audio, text = context.modality_rows
    return {
        "video": context.example(video, config.video_channels),
        "audio": context.example(audio, config.audio_channels),
        "text": context.example(text, config.text_channels),
        "rope": context.example(sum(context.attended_rows), 6 * config.rope_bands),
        "length": context.example(dtype=torch.int32),
    }


def pad_weights(model: nn.Module, config: Any) -> None:
    """Lay the weights of the last product of each MLP out in rows of whole tiles, once.

    Values and shapes stay what they are; the storage behind a row is longer and filled with zeros.
    """
    for name, parameter in model.named_parameters():
        width = parameter.shape[-1]
        padded = padded_width(width)
        if (
            name.endswith("down_proj.weight")
            and parameter.dtype not in LIMITS
            and parameter.stride(0) == width != padded
        ):
            storage = parameter.new_zeros(parameter.shape[0], padded)
            storage[:, :width] = parameter.data
            parameter.data = storage[:, :width]
