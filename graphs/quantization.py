"""Which linears of the blocks are held in 8 bits, and how a model's weights get there and back.

A quantised linear has, in place of its bf16 weight, `weight` in e4m3 or int8, of the same shape but
in rows padded with zeros to whole tiles, and beside it `weight_scale`, fp32, one for each row.
Nothing else says that a linear is quantised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from magihuman.kernels import reference as ref

KEEP_NONE, KEEP_MODALITY = "none", "modality"
PARTS = ("attention.linear_qkv", "attention.linear_proj", "mlp.up_gate_proj", "mlp.down_proj")
BLOCK_ROWS = 4096  # rows quantised at a time, so that their fp32 copies stay small

KeepBf16 = str | Sequence[str]


def linears(config: Any) -> list[str]:
    """Names of all linears in the blocks."""
    return [f"block.layers.{layer}.{part}" for layer in range(config.num_layers) for part in PARTS]


def quantized_linears(config: Any, keep_bf16: KeepBf16 = KEEP_NONE) -> list[str]:
    """Names of the linears to hold in 8 bits, in the model's order.

    Args:
        config: the architecture, anything with the fields of `magihuman.runtime`'s `DiTConfig`.
        keep_bf16: those that stay bf16: "none", "modality" (all of the layers with weights for each
            modality), or names and patterns such as "block.layers.7.*" or "*.down_proj".

    Raises:
        ValueError: a name or pattern matches nothing, or no linear is left.
    """
    every = linears(config)
    if isinstance(keep_bf16, str):
        if keep_bf16 not in (KEEP_NONE, KEEP_MODALITY):
            raise ValueError(
                f"keep_bf16 must be 'none', 'modality' or a list of names, got {keep_bf16!r}"
            )
        layers = config.modality_layers if keep_bf16 == KEEP_MODALITY else ()
        patterns = [f"block.layers.{layer}.*" for layer in layers]
    else:
        patterns = list(keep_bf16)
        for pattern in patterns:
            if not isinstance(pattern, str) or not any(fnmatchcase(n, pattern) for n in every):
                raise ValueError(
                    "keep_bf16 must name linears of the blocks or match some, such as"
                    f" {every[-1]!r} or '*.down_proj', got {pattern!r}"
                )
    chosen = [n for n in every if not any(fnmatchcase(n, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(
            f"keep_bf16 must leave a linear to quantise, got {keep_bf16!r}; use precision='bf16'"
        )
    return chosen


def quantize(weight: Tensor, dtype: torch.dtype = ref.FP8) -> tuple[Tensor, Tensor]:
    """A weight [M, K] in 8 bits, its rows padded with zeros to whole tiles, and scales [M] fp32.

    dtype: float8_e4m3fn or int8.
    """
    rows, width = weight.shape
    values = weight.new_zeros(rows, ref.padded_width(width), dtype=dtype)
    scale = weight.new_empty(rows, dtype=torch.float32)
    for start in range(0, rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        values[block, :width], scale[block] = ref.quantize_rows(weight[block], dtype)
    return values[:, :width], scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """The weight [M, K] in bf16, its rows one after another."""
    weight = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    for start in range(0, len(weight), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        weight[block] = ref.dequantize_rows(values[block], scale[block])
    return weight


def quantize_linear(
    linear: nn.Module,
    weight: Tensor,
    rest: torch.device | None = None,
    dtype: torch.dtype = ref.FP8,
) -> None:
    """Give a linear this weight in 8 bits, and let go of the one it had.

    Args:
        linear: a module with a `weight`, changed in place.
        weight: [M, K], of a float dtype, on the device where it is to be quantised.
        rest: where the weight in 8 bits is to be, if not on that device.
        dtype: float8_e4m3fn or int8.
    """
    values, scale = quantize(weight, dtype)
    if rest is not None:  # with the zeros behind its rows, which a plain copy leaves out
        whole = values.as_strided((len(values), values.stride(0)), values.stride())
        values, scale = whole.to(rest)[:, : values.shape[1]], scale.to(rest)
    linear.weight = nn.Parameter(values, requires_grad=False)
    linear.register_buffer("weight_scale", scale)


@torch.no_grad()
def quantize_model(model: nn.Module, names: Iterable[str], dtype: torch.dtype = ref.FP8) -> None:
    """Quantise linears in place, one after another: at no time is there more than one twice."""
    for name in names:
        linear = model.get_submodule(name)
        quantize_linear(linear, linear.get_parameter("weight"), dtype=dtype)


@torch.no_grad()
def dequantize_model(model: nn.Module) -> None:
    """Give every quantised linear a bf16 weight back: that of the rounded values."""
    for linear in model.modules():
        if is_quantized(linear):
            weight = dequantize(linear.get_parameter("weight"), linear.get_buffer("weight_scale"))
            linear.weight = nn.Parameter(weight, requires_grad=False)
            del linear.weight_scale


def quantized_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every weight in 8 bits, by the name of its linear."""
    return {
        name: linear.get_parameter("weight").dtype
        for name, linear in model.named_modules()
        if is_quantized(linear)
    }


def is_quantized(linear: nn.Module) -> bool:
    """Whether this module's weight is in 8 bits."""
    return "weight_scale" in linear._buffers
