"""What the fp8 path computes, in plain torch over a bf16 model, on any device.

The linears chosen get the operands that the rewritten graph would give them
(`graphs/passes/precision.py`): weights and input rows in e4m3 with a scale each, the down
projection's input with the activation's fixed one. Sums are fp32 and rounded to bf16 once. One
difference is left on a GPU: its kernels add the output and down projections to the residual stream
in fp32, without that rounding, of 2^-9 at most.
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

from magihuman.graphs.precision import quantize
from magihuman.kernels import reference as ref
from magihuman.runtime.model.dit import DiT, Layer

UP, DOWN = "mlp.up_gate_proj", "mlp.down_proj"


class Mode(Enum):
    """What a forward pass computes while the hooks are on."""

    BF16 = "the model's own products"
    MEASURE = "the model's own products, and beside them those of fp8, whose errors are kept"
    FP8 = "the products of fp8 in the linears chosen"


class SimulatedFp8:
    """A context in which a bf16 model computes what `mode` says. Holds the weights in e4m3.

    Attributes:
        mode: of the next forward pass, BF16 at first.
        linear_errors: of the last pass in MEASURE, `||fp8 - bf16|| / ||bf16||` of each chosen
            linear's product, both from the input that it has in the bf16 model.
        layer_errors: of the same pass, that of the residual stream after each layer, in fp8 from
            the first layer on.
    """

    def __init__(self, model: DiT, names: Sequence[str]) -> None:
        self.mode = Mode.BF16
        self.linear_errors: dict[str, float] = {}
        self.layer_errors: list[float] = []
        self._model = model
        self._weights = {
            name: quantize(model.get_parameter(f"{name}.weight").detach()) for name in names
        }
        self._layers = cast("list[Layer]", list(model.block.layers))
        self._fixed_scales = {
            f"block.layers.{i}.{DOWN}": ref.STATIC_SCALES[layer.mlp.activation.__name__]
            for i, layer in enumerate(self._layers)
            if f"block.layers.{i}.{UP}" in self._weights
        }
        self._hooks: list[RemovableHandle] = []
        self._shadow: tuple[Any, ...] | None = None  # stream and delta that fp8 has so far

    def __enter__(self) -> Self:
        for name in self._weights:
            hook = partial(self._after_linear, name)
            self._hooks.append(self._model.get_submodule(name).register_forward_hook(hook))
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
        for layer in self._layers:
            layer.dtype = torch.bfloat16

    @contextmanager
    def running(self, mode: Mode) -> Iterator[None]:
        """`mode` for a while; entering MEASURE forgets the errors kept."""
        before, self.mode = self.mode, mode
        if mode is Mode.MEASURE:
            self.linear_errors, self.layer_errors, self._shadow = {}, [], None
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
        if self.mode is Mode.FP8:
            return narrow
        self.linear_errors[name] = relative_error(narrow, product)
        return None

    def _after_layer(
        self, layer: Layer, args: tuple[Any, ...], result: tuple[Tensor, Tensor]
    ) -> None:
        """In MEASURE, the same layer once more, of what fp8 has made of the layers before."""
        if self.mode is not Mode.MEASURE:
            return
        before = args[:2] if self._shadow is None else self._shadow
        with self.running(Mode.FP8):
            self._shadow = layer.forward(*before, *args[2:])
        self.layer_errors.append(relative_error(sum(self._shadow), sum(result)))

    def _product(self, name: str, x: Tensor, counts: ref.Counts | None) -> Tensor:
        fixed = self._fixed_scales.get(name)
        if fixed is None:
            values, scale = ref.quantize_rows(x)
        else:
            values = (x.float() / fixed).to(torch.float8_e4m3fn)
            scale = x.new_full((len(x),), fixed, dtype=torch.float32)
        return scaled_linear(values, scale, *self._weights[name], counts)


def scaled_linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: ref.Counts | None
) -> Tensor:
    """`reference.scaled_linear`; on a GPU from bf16, which has every e4m3 number, an order faster.

    Products of two such numbers are exact in fp32 either way, and sums are fp32.
    """
    if not values.is_cuda:
        return ref.scaled_linear(values, scale, weight, weight_scale, counts)

    def product(x: Tensor, own: Tensor) -> Tensor:
        return torch.mm(x.bfloat16(), own.bfloat16().t(), out_dtype=torch.float32)

    sums = ref.per_modality(product, values, weight, counts) * scale[:, None]
    return ref.per_modality(lambda x, own: x * own, sums, weight_scale, counts).bfloat16()


def relative_error(actual: Any, expected: Any) -> float:
    """`||actual - expected|| / ||expected||`; 0 for equal tensors, also of zeros."""
    difference = (actual.float() - expected.float()).norm()
    if difference == 0:
        return 0.0
    return float(difference / expected.float().norm())
