"""What the paths in 8 bits compute, in plain torch over a bf16 model, on any device.

The linears chosen get the operands that the rewritten graph would give them
(`graphs/transformer/passes/precision.py`): weights and input rows in 8 bits with a scale each, but
in e4m3 the down projection's input with the activation's fixed one. Sums are fp32 and rounded to
bf16 once. With `attention`, layers whose projection to q, k and v is chosen attend over those in
e4m3.

Two differences are left on a GPU: its kernels add the output and down projections to the residual
stream in fp32, without that rounding, of 2^-9 at most; and they round the softmax's weights below
the largest so far, not of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from magihuman.graphs.quantization import quantize
from magihuman.kernels import reference as ref
from magihuman.runtime.model import DiT, Layer

QKV, UP, DOWN = "attention.linear_qkv", "mlp.up_gate_proj", "mlp.down_proj"


class Mode(Enum):
    """What a forward pass computes while the hooks are on."""

    BF16 = "the model's own products"
    MEASURE = "the model's own products, and beside them those in 8 bits, whose errors are kept"
    NARROW = "the products in 8 bits in the linears chosen"


class Simulated:
    """A context in which a bf16 model computes what `mode` says. Holds the weights in 8 bits.

    Attributes:
        mode: of the next forward pass, BF16 at first.
        linear_errors: of the last pass in MEASURE, `||narrow - bf16|| / ||bf16||` of each chosen
            linear's product, both from the input that it has in the bf16 model.
        attention_errors: as that, of attention with its gates in each such layer, by number.
        layer_errors: of the same pass, that of the residual stream after each layer, in 8 bits
            from the first layer on.
    """

    def __init__(
        self,
        model: DiT,
        names: Sequence[str],
        attention: bool = False,
        dtype: torch.dtype = ref.FP8,
    ) -> None:
        """names: of the linears in 8 bits, dtype: float8_e4m3fn or int8; attention: in e4m3 too."""
        self.mode = Mode.BF16
        self.linear_errors: dict[str, float] = {}
        self.attention_errors: dict[int, float] = {}
        self.layer_errors: list[float] = []
        self._model, self._dtype = model, dtype
        self._weights = {
            name: quantize(model.get_parameter(f"{name}.weight").detach(), dtype) for name in names
        }
        self._layers = cast("list[Layer]", list(model.block.layers))
        self._fixed_scales = {
            f"block.layers.{i}.{DOWN}": ref.STATIC_SCALES[layer.mlp.activation.__name__]
            for i, layer in enumerate(self._layers)
            if dtype == ref.FP8 and f"block.layers.{i}.{UP}" in self._weights
        }
        self._attentions = {
            i: layer.attention
            for i, layer in enumerate(self._layers)
            if attention and f"block.layers.{i}.{QKV}" in self._weights
        }
        self._hooks: list[RemovableHandle] = []
        self._shadow: tuple[Any, ...] | None = None  # stream and delta in 8 bits so far

    def __enter__(self) -> Self:
        for name in self._weights:
            hook = partial(self._after_linear, name)
            self._hooks.append(self._model.get_submodule(name).register_forward_hook(hook))
        for i, attention in self._attentions.items():
            attention.attend = partial(self._attend, i)  # type: ignore[method-assign]
        for layer in self._layers:
            self._hooks.append(layer.register_forward_hook(self._after_layer))
            # The norm's fp32 reaches the hooks, as it does the quantising norm. Linears round it.
            layer.dtype = torch.float32
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for attention in self._attentions.values():
            del attention.attend  # the class has its own
        for layer in self._layers:
            layer.dtype = torch.bfloat16

    @contextmanager
    def running(self, mode: Mode) -> Iterator[None]:
        """`mode` for a while; entering MEASURE forgets the errors kept."""
        before, self.mode = self.mode, mode
        if mode is Mode.MEASURE:
            self.linear_errors, self.attention_errors = {}, {}
            self.layer_errors, self._shadow = [], None
        try:
            yield
        finally:
            self.mode = before

    def _after_linear(
        self, name: str, module: nn.Module, args: tuple[Any, ...], product: Tensor
    ) -> Tensor | None:
        if self.mode is Mode.BF16:
            return None
        narrow = self._product(name, *args)
        if self.mode is Mode.NARROW:
            return narrow
        self.linear_errors[name] = relative_error(narrow, product)
        return None

    def _attend(
        self,
        layer: int,
        qkv: Tensor,
        rope: Tensor,
        counts: ref.Counts | None,
        local: ref.LocalAttention | None,
        length: Tensor | None,
    ) -> Tensor:
        """Stands in for `Attention.attend` of one layer: [N, heads, head_dim]."""
        attention = self._attentions[layer]
        heads, kv_heads = attention.heads, attention.kv_heads
        q_weight, k_weight = attention.q_norm.weight, attention.k_norm.weight
        plain = None
        if self.mode is not Mode.NARROW:
            plain = type(attention).attend(attention, qkv, rope, counts, local, length)
        if plain is not None and self.mode is Mode.BF16:
            return plain
        seen = torch.tensor(len(qkv), device=qkv.device) if length is None else length
        parts = ref.qkv_fp8(qkv, q_weight, k_weight, rope, seen, counts, heads, kv_heads)
        narrow = ref.attention_fp8(*parts, qkv[:, -heads:], seen)
        if plain is None:
            return narrow
        self.attention_errors[layer] = relative_error(narrow, plain)
        return plain

    def _after_layer(
        self, layer: Layer, args: tuple[Any, ...], result: tuple[Tensor, Tensor]
    ) -> None:
        """Run the layer once more in MEASURE, on what 8 bits have made of the layers before."""
        if self.mode is not Mode.MEASURE:
            return
        before = args[:2] if self._shadow is None else self._shadow
        with self.running(Mode.NARROW):
            self._shadow = layer.forward(*before, *args[2:])
        self.layer_errors.append(relative_error(sum(self._shadow), sum(result)))

    def _product(self, name: str, x: Tensor, counts: ref.Counts | None) -> Tensor:
        fixed = self._fixed_scales.get(name)
        if fixed is None:
            values, scale = ref.quantize_rows(x, self._dtype)
        else:
            values = (x.float() / fixed).to(torch.float8_e4m3fn)
            scale = x.new_full((len(x),), fixed, dtype=torch.float32)
        return scaled_linear(values, scale, *self._weights[name], counts)


def scaled_linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: ref.Counts | None
) -> Tensor:
    """`reference.scaled_linear`; on a GPU from bf16, which has every number of e4m3 and of int8, an
    order faster.

    Products of two such numbers are exact in fp32 either way, and sums are fp32.
    """
    if not values.is_cuda:
        return ref.scaled_linear(values, scale, weight, weight_scale, counts)

    def product(x: Tensor, rows: Tensor) -> Tensor:
        return torch.mm(x.bfloat16(), rows.bfloat16().t(), out_dtype=torch.float32)

    sums = ref.per_modality(product, values, weight, counts) * scale[:, None]
    return ref.per_modality(lambda x, scales: x * scales, sums, weight_scale, counts).bfloat16()


def relative_error(actual: Any, expected: Any) -> float:
    """`||actual - expected|| / ||expected||`, of floats of any dtype; 0 for equal tensors, also of
    zeros.
    """
    difference = (actual.float() - expected.float()).norm()
    if difference == 0:
        return 0.0
    return float(difference / expected.float().norm())
