"""What a forward of the transformer is made of, each part alone: its linears, attention, the rest.

Parts are called as the compiled forward calls them, over random operands at its rows.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import kernel_cases
from harness.measure import NORMS, OUTSIDE
from magihuman.graphs import quantization
from magihuman.kernels import ops
from magihuman.kernels import reference as ref
from magihuman.kernels.attention import backends
from magihuman.kernels.linear import routes
from magihuman.kernels.linear.matmul_sm90 import Epilogue
from magihuman.runtime.config import DiTConfig

Call = Callable[[], object]

BF16, FP8 = torch.bfloat16, ref.FP8
OPS = torch.ops.magihuman
LIBRARY_MULTIPLE = 16  # rows and columns of the library's products in fp8
TENSOR_WISE, ROW_WISE, PLAIN = "tensor-wise", "row-wise", "product alone"  # of the library
# Operators of a layer that are neither linears nor attention.
REST = {
    "bf16": {"norm": 2, "qk_norm_rope": 1},
    "fp8": {"norm_fp8": 2, "qk_norm_rope": 1, "quantize_fp8": 1},
    "fp8-attn": {"norm_fp8": 2, "qkv_fp8": 1, "quantize_fp8": 1},
}
# What the name of a kernel holds, or on the CPU that of an operator; the first that fits counts.
OTHERS = "embedders, heads, copies"
KINDS = {
    OTHERS: OUTSIDE,
    "q, k, v to attention": ("qk_norm_rope", "qkv_fp8"),
    "norms": NORMS,
    "quantising attention's output": ("quantize",),
    "attention": ("attention", "flash", "Flash", "fmha", "cudnn", "head_gate"),
    "activations alone": ("swiglu7", "gelu7", "magihuman::activation"),
    "linear": ("matmul", "gemm", "nvjet", "cutlass", "magihuman::linear"),
}
HALVES = (("qkv", "proj"), ("up", "down"))  # linears of both halves of a layer


@dataclass(frozen=True)
class Linear:
    """A linear of the model, with what follows it.

    Attributes:
        columns: of the product, for each row.
        depth: columns of the input.
        counts: rows of each modality, where each has weights of its own.
    """

    name: str
    columns: int
    depth: int
    epilogue: Epilogue
    counts: ref.Counts | None = None

    def flops(self, rows: int) -> int:
        """Of the product over so many rows."""
        return 2 * rows * self.columns * self.depth


def linears(config: DiTConfig, counts: ref.Counts) -> dict[Linear, int]:
    """The layers that have each linear; those with one set of weights come first."""
    found = collections.Counter[Linear]()
    for layer in range(config.num_layers):
        own = counts if layer in config.modality_layers else None
        kind: Epilogue = "gelu7" if layer in config.gelu7_layers else "swiglu7"
        (up, down), hidden = config.mlp_widths(layer), config.hidden_size
        by = "" if own is None else ", weights by modality"
        mlp = f", GELU7{by}" if kind == "gelu7" else by
        found[Linear(f"qkv{by}", config.qkv_rows, hidden, "store", own)] += 1
        found[Linear(f"proj{by}", hidden, hidden, "add", own)] += 1
        found[Linear(f"up{mlp}", up, hidden, kind, own)] += 1
        found[Linear(f"down{mlp}", hidden, down, "add", own)] += 1
    return dict(sorted(found.items(), key=lambda item: item[0].counts is not None))


class Operands(NamedTuple):
    """Of a linear, as the compiled model holds them: rows end in zeros, scales only in fp8."""

    x: Tensor  # [rows, depth and what pads it]
    weight: Tensor  # [columns, depth] or [3 columns, depth], of x's row stride
    x_scale: Tensor | None = None
    weight_scale: Tensor | None = None


def operands(linear: Linear, rows: int, device: torch.device, is_fp8: bool) -> Operands:
    """Random normal ones."""
    depth, padded = linear.depth, ref.padded_width(linear.depth)
    outputs = linear.columns * (3 if linear.counts else 1)
    x, weight = (
        torch.randn(count, padded, device=device, dtype=BF16).mul_(depth**-0.5)
        for count in (rows, outputs)
    )
    x[:, depth:] = weight[:, depth:] = 0
    weight = weight[:, :depth]
    if not is_fp8:
        return Operands(x, weight)
    values, x_scale = ops.quantize_fp8(x)
    weight, weight_scale = quantization.quantize(weight)
    return Operands(values, weight, x_scale, weight_scale)


def own_call(linear: Linear, given: Operands, route: str) -> Call:
    """A call of the linear with its epilogue, by a route."""
    x, weight, x_scale, weight_scale = given
    runs = list(linear.counts or ())
    activated = linear.columns // (2 if linear.epilogue == "swiglu7" else 1)
    after = (runs, linear.epilogue, ref.padded_width(activated))
    stream = torch.zeros(len(x), linear.columns if linear.epilogue == "add" else 0, device=x.device)
    if x_scale is None:
        if linear.epilogue == "store":
            return partial(ops.linear, x, weight, runs, route)
        if linear.epilogue == "add":
            return partial(OPS.linear_add_, stream, x, weight, runs, route)
        return partial(ops.linear_activation, x, weight, *after, route)
    scaled = (x, x_scale, weight, weight_scale)
    if linear.epilogue == "store":
        return partial(ops.linear_fp8, *scaled, runs, route)
    if linear.epilogue == "add":
        return partial(
            OPS.linear_add_fp8_, stream, x, x_scale, 0.0, weight, weight_scale, runs, route
        )
    return partial(ops.linear_activation_fp8, *scaled, *after, FP8, route)


def library_calls(linear: Linear, given: Operands) -> dict[str, tuple[Call, int]]:
    """The library's products of the same operands, and the FLOP of each.

    All rows by the weights of the first modality. In fp8 rows and columns are whole multiples of
    16, and results bf16: with a scale for each row of both operands, or with one for all.
    """
    x, weight, x_scale, weight_scale = given
    step = 1 if x_scale is None else LIBRARY_MULTIPLE
    rows, columns = (count // step * step for count in (len(x), linear.columns))
    flops = 2 * rows * columns * linear.depth
    whole = weight.as_strided((columns, weight.stride(0)), weight.stride())
    if x_scale is None or weight_scale is None:
        return {PLAIN: (partial(F.linear, x, whole), flops)}
    one = torch.ones((), device=x.device)
    scales = {
        TENSOR_WISE: (one, one),
        ROW_WISE: (x_scale[:rows].view(-1, 1), weight_scale[:columns].view(1, -1)),
    }
    product = partial(torch._scaled_mm, out_dtype=BF16, use_fast_accum=True)
    return {
        name: (partial(product, x[:rows], whole.t(), *pair), flops) for name, pair in scales.items()
    }


def route_names(is_fp8: bool) -> list[str]:
    """All routes of a linear."""
    return [*([] if is_fp8 else [routes.LIBRARY]), *routes.TILES]


def serving(linear: Linear, given: Operands) -> str:
    """The route by which the compiled forward computes this linear."""
    activated = linear.columns // (2 if linear.epilogue == "swiglu7" else 1)
    return routes.fastest(
        linear.epilogue,
        given.weight,
        linear.counts,
        len(given.x),
        ref.padded_width(activated),
        given.weight_scale,
    )


def attentions(
    config: DiTConfig, rows: int, tokens: int, device: torch.device
) -> dict[str, Callable[[], Call]]:
    """By name what makes a call over fresh operands: in fp8, and in bf16 by each backend.

    tokens: keys that are attended to, of as many as there are rows. On the CPU the references.
    """

    def build(name: str) -> Call:
        given = _projected(config, rows, tokens, device)
        gate, length = given.qkv[:, -config.heads :], given.length
        if name == "fp8":
            return partial(
                ops.gated_attention_fp8, *given.in_fp8(config), gate, length, [], "gluon"
            )
        return partial(ops.gated_attention, *given.in_bf16(config), gate, length, [], name)

    names = backends.usable(config.head_dim, device) if device.type == "cuda" else ["reference"]
    if rows >= backends.LONG_ROWS:
        names = [name for name in names if name != "cudnn"]  # its mask is rows x rows
    return {name: partial(build, name) for name in ("fp8", *names)}


def serving_attention(config: DiTConfig, rows: int, device: torch.device) -> str:
    """The backend of bf16 attention in the compiled forward."""
    if device.type != "cuda":
        return "reference"
    return backends.fastest(rows, config.heads, config.kv_heads, config.head_dim, device)


class Projected(NamedTuple):
    """What the kernel between the q, k, v projection and attention is given."""

    qkv: Tensor  # [rows, qkv_rows] bf16
    norms: tuple[Tensor, Tensor]
    rope: Tensor
    length: Tensor

    def in_bf16(self, config: DiTConfig) -> tuple[Tensor, ...]:
        """Contiguous q, k and v."""
        heads = config.heads, config.kv_heads
        return ops.qk_norm_rope(self.qkv, *self.norms, self.rope, [], *heads)

    def in_fp8(self, config: DiTConfig) -> tuple[Tensor, ...]:
        """q, k and v in e4m3, and their scales."""
        heads = config.heads, config.kv_heads
        return ops.qkv_fp8(self.qkv, *self.norms, self.rope, self.length, [], *heads)


def _projected(config: DiTConfig, rows: int, tokens: int, device: torch.device) -> Projected:
    angle = torch.randn(rows, 3 * config.rope_bands, device=device)
    return Projected(
        torch.randn(rows, config.qkv_rows, device=device, dtype=BF16),
        (torch.zeros(config.head_dim, device=device), torch.zeros(config.head_dim, device=device)),
        torch.cat((angle.sin(), angle.cos()), dim=1),
        torch.tensor(tokens, device=device, dtype=torch.int32),
    )


def rest(
    config: DiTConfig, counts: ref.Counts, tokens: int, device: torch.device
) -> dict[str, tuple[Callable[[], Call], int]]:
    """By operator what makes a call over fresh operands, and the bytes that a call must move: its
    inputs and outputs, once each.
    """
    rows, channels, attended = sum(counts), config.hidden_size, config.heads * config.head_dim
    bound = kernel_cases.QK_NORM_ROPE.full_shape(counts, config)
    heads = kernel_cases.HEAD_NORM.full_shape(counts, config)
    qkv_bytes = kernel_cases.QK_NORM_ROPE.work(bound)
    qkv_values = rows * (config.heads + 2 * config.kv_heads) * config.head_dim

    def norm(name: str) -> Call:
        x, weight = torch.randn(rows, channels, device=device), torch.zeros(channels, device=device)
        if name == "norm":
            return partial(ops.norm, x, weight, [], BF16)
        return partial(ops.norm_fp8, x, weight, [])

    def projected(name: str) -> Call:
        given = _projected(config, rows, tokens, device)
        return partial(given.in_fp8 if name == "qkv_fp8" else given.in_bf16, config)

    def quantize() -> Call:
        return partial(ops.quantize_fp8, torch.randn(rows, attended, device=device, dtype=BF16))

    def head_norm() -> Call:
        return partial(OPS.head_norm, *kernel_cases.draw_head_norm(heads, device, BF16))

    return {
        "norm": (partial(norm, "norm"), 6 * rows * channels + 4 * channels),
        "norm_fp8": (partial(norm, "norm_fp8"), rows * (5 * channels + 4) + 4 * channels),
        "qk_norm_rope": (partial(projected, "qk_norm_rope"), qkv_bytes),
        "qkv_fp8": (partial(projected, "qkv_fp8"), qkv_bytes - qkv_values),
        "quantize_fp8": (quantize, rows * (3 * attended + 4)),
        "head_norm": (head_norm, kernel_cases.HEAD_NORM.work(heads)),
    }


def rest_bytes(precision: str, layers: int, moved: dict[str, int]) -> int:
    """What a forward's operators beside linears and attention must move; moved: of each."""
    per_layer = sum(count * moved[name] for name, count in REST[precision].items())
    return layers * per_layer + moved["head_norm"]


def parts_ms(kernels: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds of each part of a forward, from its kernels in the order in which they ran.

    Linears are told apart by their place: a norm opens each half of a layer.
    """
    kinds = [_kind(name) for name, _ in kernels]
    starts = [i for i, kind in enumerate(kinds) if kind == "norms"]
    heads = next((i for i, (name, _) in enumerate(kernels) if "head_norm" in name), len(kinds))
    for half, (start, end) in enumerate(itertools.pairwise([*starts, heads])):
        kinds[start:end] = _linears_named(kinds[start:end], HALVES[half % 2])
    kinds = [OTHERS if kind == "linear" else kind for kind in kinds]  # of embedders and heads
    sums: dict[str, float] = {}
    for kind, (_, ms) in zip(kinds, kernels, strict=True):
        sums[kind] = sums.get(kind, 0.0) + ms
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _kind(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), OTHERS)


def _linears_named(kinds: Sequence[str], names: tuple[str, str]) -> list[str]:
    """The linears of half a layer by their names. Attention or an activation divides them; without
    one, the first kernel has the activation in its epilogue.
    """
    dividers = [i for i, kind in enumerate(kinds) if kind in ("attention", "activations alone")]
    linear = [i for i, kind in enumerate(kinds) if kind == "linear"]
    last = dividers[-1] if dividers else min(linear, default=0)
    return [names[i > last] if kind == "linear" else kind for i, kind in enumerate(kinds)]
