"""Every fused kernel, its reference, and the linears, at the shapes of the model.

A kernel that is bound by memory reports its bytes, one bound by the tensor cores its FLOP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import kernel_cases
from harness.sizes import Size
from magihuman.graphs import quantization as weights_precision
from magihuman.graphs import support
from magihuman.kernels import ops
from magihuman.kernels import reference as ref
from magihuman.kernels.attention import backends
from magihuman.kernels.linear import routes
from magihuman.runtime.config import FRAME_REACH
from magihuman.runtime.model.tokens import Layout

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn

OPS = torch.ops.magihuman


def randn(size: Size, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=size.device).to(dtype)


def nbytes(*tensors: Tensor) -> int:
    """Of tensors that are read or written once, whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(params=["fused", "reference"])
def is_fused(request: pytest.FixtureRequest, size: Size) -> bool:
    """The kernel, or the plain-torch function that it replaces; on the CPU, only the latter."""
    reason = support.why_not(size.arch, BF16, size.device)
    if request.param == "fused" and reason is not None:
        pytest.skip(reason)
    return bool(request.param == "fused")


@pytest.mark.benchmark(group="norms and activations")
@pytest.mark.parametrize("has_delta", [True, False], ids=["add", "alone"])
def test_add_rms_norm(size: Size, time_kernel: Callable, is_fused: bool, has_delta: bool) -> None:
    rows, channels = size.layout.tokens, size.arch.hidden_size
    weight = randn(size, channels, dtype=FP32)

    def build() -> Callable:
        x, delta = randn(size, rows, channels, dtype=FP32), randn(size, rows, channels)
        if not has_delta:
            if is_fused:
                return partial(ops.norm, x, weight, [], BF16)
            return partial(ref.add_norm, x, None, weight, None, BF16)
        if is_fused:
            return partial(ops.add_norm, x, delta, weight, [])
        return partial(ref.add_norm, x, delta, weight, None, BF16)

    stream, normed = 4 * rows * channels, 2 * rows * channels
    moved = 2 * stream + 2 * normed if has_delta else stream + normed
    time_kernel(build, moved + nbytes(weight), "bytes", rows=rows, channels=channels)


@pytest.mark.parametrize("name", kernel_cases.CASES)
def test_kernel(
    size: Size, time_kernel: Callable, is_fused: bool, name: str, benchmark: Any
) -> None:
    """The kernels of the table that tests and benchmarks share."""
    case = kernel_cases.CASES[name]
    benchmark.group = case.group
    shape = case.full_shape(size.layout.counts, size.arch)

    def build() -> Callable:
        arguments = case.draw(shape, size.device, BF16)
        return partial(case.fused if is_fused else case.plain, *arguments)

    numbers = {key: value for key, value in shape.items() if isinstance(value, int)}
    time_kernel(build, case.work(shape), case.unit, **numbers)


@pytest.mark.benchmark(group="norms and activations")
@pytest.mark.parametrize("kind", ["swiglu7", "gelu7"])
def test_activation(size: Size, time_kernel: Callable, is_fused: bool, kind: str) -> None:
    rows, arch = size.layout.tokens, size.arch
    layers = range(arch.num_layers)
    layer = next(i for i in layers if (i in arch.gelu7_layers) == (kind == "gelu7"))
    width, out = arch.mlp_widths(layer)
    padded = ref.padded_width(out)

    def build() -> Callable:
        x = randn(size, rows, width)
        if is_fused:
            return partial(ops.activation, x, kind, padded)
        return partial(getattr(ref, kind), x)

    moved = 2 * rows * (width + (padded if is_fused else out))
    time_kernel(build, moved, "bytes", rows=rows, columns_in=width, columns_out=out)


@pytest.mark.benchmark(group="norms and activations")
def test_norm_fp8(size: Size, time_kernel: Callable, is_fused: bool) -> None:
    rows, channels = size.layout.tokens, size.arch.hidden_size
    weight = randn(size, channels, dtype=FP32)

    def build() -> Callable:
        x = randn(size, rows, channels, dtype=FP32)
        if is_fused:
            return partial(ops.norm_fp8, x, weight, [])
        return lambda: ref.quantize_rows(ref.rms_norm(x, weight))

    moved = rows * (5 * channels + 4)
    time_kernel(build, moved + nbytes(weight), "bytes", rows=rows, channels=channels)


@pytest.mark.benchmark(group="norms and activations")
@pytest.mark.parametrize("source", ["attention", "activation"])
def test_quantize_fp8(size: Size, time_kernel: Callable, is_fused: bool, source: str) -> None:
    rows, arch = size.layout.tokens, size.arch
    middle = arch.mlp_widths(arch.num_layers // 2)[1]
    columns = arch.heads * arch.head_dim if source == "attention" else ref.padded_width(middle)

    def build() -> Callable:
        return partial(
            ops.quantize_fp8 if is_fused else ref.quantize_rows, randn(size, rows, columns)
        )

    time_kernel(build, rows * (3 * columns + 4), "bytes", rows=rows, columns=columns)


@pytest.mark.benchmark(group="norms and activations")
def test_head_gate(size: Size, time_kernel: Callable, is_fused: bool) -> None:
    rows, heads, dim = size.layout.tokens, size.arch.heads, size.arch.head_dim

    def build() -> Callable:
        x, gate = randn(size, rows, heads, dim), gates(size)
        if not is_fused:
            return partial(ref.head_gate, x, gate)
        from magihuman.kernels.attention.head_gate import head_gate

        return partial(head_gate, x, gate)

    moved = 2 * rows * heads * (2 * dim + 1)
    time_kernel(build, moved, "bytes", rows=rows, heads=heads, dim=dim)


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("backend", [*backends.NAMES, "reference"])
def test_attention(size: Size, time_kernel: Callable, backend: str) -> None:
    rows, heads, dim = size.layout.tokens, size.arch.heads, size.arch.head_dim
    kv_heads = size.arch.kv_heads
    if backend != "reference":
        reason = backends.why_not(backend, dim, size.device)
        if reason is not None:
            pytest.skip(reason)
    length = torch.tensor(rows, dtype=torch.int32, device=size.device)

    def build() -> Callable:
        q = randn(size, rows, heads, dim)
        k, v = randn(size, rows, kv_heads, dim), randn(size, rows, kv_heads, dim)
        if backend == "reference":
            return partial(ref.gated_attention, q, k, v, gates(size))
        return partial(ops.gated_attention, q, k, v, gates(size), length, [], backend)

    shape = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    time_kernel(build, 4 * rows * rows * heads * dim, "flops", **shape)


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("is_local", [False, True], ids=["all frames", "near frames"])
def test_attention_of_super_resolution(
    size: Size, time_kernel: Callable, precision: str, is_local: bool
) -> None:
    """At 1080p, over all keys and over those of frame-local layers; the tiny size as it is."""
    arch, device = size.arch, size.device
    heads, kv_heads, dim = arch.heads, arch.kv_heads, arch.head_dim
    layout = Layout(32, 68, 120, 126, 300) if size.name == "full" else size.layout
    local = ref.LocalAttention(layout.frames, layout.frame_tokens, FRAME_REACH)
    rows = layout.tokens
    if device.type == "cuda":
        reason = backends.why_not(backends.LOCAL, dim, device)
        if reason is not None:
            pytest.skip(reason)
    length = torch.tensor(rows, dtype=torch.int32, device=device)
    fields = list(local) if is_local else []

    def build() -> Callable:
        qkv = randn(size, rows, arch.qkv_rows)
        norms = [randn(size, dim, dtype=FP32) * 0 for _ in "qk"]
        rope = randn(size, rows, 6 * arch.rope_bands, dtype=FP32)
        gate = qkv[:, -heads:]
        if precision == "fp8":
            parts = ops.qkv_fp8(qkv, *norms, rope, length, [], heads, kv_heads)
            return partial(ops.gated_attention_fp8, *parts, gate, length, fields, backends.LOCAL)
        parts = ops.qk_norm_rope(qkv, *norms, rope, [], heads, kv_heads)
        backend = backends.LOCAL
        return partial(ops.gated_attention, *parts, gate, length, fields, backend)

    pairs = pairs_seen(layout, local) if is_local else rows * rows
    shape = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    time_kernel(build, 4 * pairs * heads * dim, "flops", **shape)


def pairs_seen(layout: Layout, local: ref.LocalAttention) -> int:
    """Queries times the keys that each sees."""
    frames, frame_tokens, reach = local
    others = layout.audio + layout.text
    near = sum(min(f + reach + 1, frames) - max(f - reach, 0) for f in range(frames))
    return near * frame_tokens**2 + frames * frame_tokens * others + others * layout.tokens


def gates(size: Size) -> Tensor:
    """The last columns of a projection, as in the model."""
    return randn(size, size.layout.tokens, size.arch.qkv_rows)[:, -size.arch.heads :]


@pytest.mark.benchmark(group="linears")
@pytest.mark.parametrize(
    "name", ["qkv", "proj", "gelu7_up", "gelu7_down", "swiglu7_up", "swiglu7_down"]
)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("route", [routes.LIBRARY, *routes.TILES])
def test_linear(size: Size, time_kernel: Callable, name: str, precision: str, route: str) -> None:
    """With what follows each; those of the GELU7 layers have weights for each modality."""
    rows, arch, is_fp8 = size.layout.tokens, size.arch, precision == "fp8"
    is_library = route == routes.LIBRARY
    if not is_library and size.device.type == "cpu":
        pytest.skip("the own product needs a GPU")
    if is_fp8 and is_library and size.device.type == "cuda":
        pytest.skip("the library has no fp8 route")
    layers = range(arch.num_layers)
    layer = next(i for i in layers if (i in arch.gelu7_layers) == name.startswith("gelu7"))
    up, down = arch.mlp_widths(layer)
    fan_in, fan_out = {
        "qkv": (arch.hidden_size, arch.qkv_rows),
        "proj": (arch.hidden_size, arch.hidden_size),
        "up": (arch.hidden_size, up),
        "down": (down, arch.hidden_size),
    }[name.split("_")[-1]]
    counts = list(size.layout.counts) if name.startswith("gelu7") else []
    padded = ref.padded_width(fan_in) if name.endswith("down") else fan_in

    def build() -> Callable:
        # As the compiled model holds them: rows of x and of the weight end in zeros.
        x, weight = (
            randn(size, n, padded) * fan_in**-0.5 for n in (rows, fan_out * (3 if counts else 1))
        )
        x[:, fan_in:] = weight[:, fan_in:] = 0
        weight = weight[:, :fan_in]
        operands: list[Any] = [x, weight]
        if is_fp8:
            x, x_scale = ref.quantize_rows(x)
            operands = [x, x_scale, *weights_precision.quantize(weight)]
        if name == "qkv":
            return partial(ops.linear_fp8 if is_fp8 else ops.linear, *operands, counts, route)
        if name.endswith("up"):
            width = ref.padded_width(down)
            after = [counts, name.removesuffix("_up"), width]
            if is_fp8:
                return partial(ops.linear_activation_fp8, *operands, *after, FP8, route)
            return partial(ops.linear_activation, *operands, *after, route)
        stream = randn(size, rows, fan_out, dtype=FP32)
        if is_fp8:
            x, x_scale, *weights = operands
            return partial(OPS.linear_add_fp8_, stream, x, x_scale, 0.0, *weights, counts, route)
        return partial(OPS.linear_add_, stream, *operands, counts, route)

    time_kernel(build, 2 * rows * fan_in * fan_out, "flops", rows=rows, k=fan_in, out=fan_out)
