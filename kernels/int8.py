"""The operators of int8 operands, `torch.ops.magihuman.*_int8`, as those of e4m3 in `ops.py`.

All rows of inputs have scales of their own, those after an activation too: its bound, 56 for
SwiGLU7, is far above what it returns, and over one scale for all of them int8, whose steps are all
of one size, would round a row of magnitude 1 by 0.13 of it. The steps of e4m3 follow the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magihuman.kernels.jit import UNSET
from magihuman.kernels.linear import scaled
from magihuman.kernels.reference import INT8


@torch.library.custom_op("magihuman::quantize_int8", mutates_args=())
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantize_rows` of x [N, C] in int8, in rows as those of `quantize_fp8`."""
    return scaled.quantize(x, INT8)


@quantize_int8.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return scaled.empty_rows(x, INT8)


@torch.library.custom_op("magihuman::norm_int8", mutates_args=())
def norm_int8(x: Tensor, weight: Tensor, modality_rows: list[int]) -> tuple[Tensor, Tensor]:
    """Compute `quantize_int8` of `reference.rms_norm` of x [N, C] fp32, not rounded between."""
    return scaled.norm(x, weight, modality_rows, INT8)


@norm_int8.register_fake
def _(x: Tensor, weight: Tensor, modality_rows: list[int]) -> tuple[Tensor, Tensor]:
    return scaled.empty_rows(x, INT8)


@torch.library.custom_op("magihuman::linear_int8", mutates_args=())
def linear_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str = UNSET,
) -> Tensor:
    """Compute `reference.scaled_linear` by this route, as `linear_fp8` does."""
    return scaled.linear(x, x_scale, weight, weight_scale, modality_rows, route)


@linear_int8.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str = UNSET,
) -> Tensor:
    return scaled.empty_product(x, scaled.columns_of(weight, modality_rows))


@torch.library.custom_op("magihuman::linear_activation_int8", mutates_args=())
def linear_activation_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    kind: str,
    padded: int,
    route: str = UNSET,
) -> Tensor:
    """Compute `activation` of `linear_int8`, in bf16."""
    return scaled.linear_activation(
        x, x_scale, weight, weight_scale, modality_rows, kind, padded, torch.bfloat16, route
    )


@linear_activation_int8.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    kind: str,
    padded: int,
    route: str = UNSET,
) -> Tensor:
    return x.new_empty(x.shape[0], padded, dtype=torch.bfloat16)


torch.library.define(
    "magihuman::linear_add_int8_",
    "(Tensor(a!) stream, Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale,"
    f' int[] modality_rows, str route="{UNSET}") -> Tensor(a!)',
)


@scaled.kernel_of("magihuman::linear_add_int8_")
def linear_add_int8_(
    stream: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str = UNSET,
) -> Tensor:
    """Add `linear_int8` to the fp32 stream [N, out] in place, and return the stream itself."""
    scaled.linear_add_(stream, x, x_scale, weight, weight_scale, modality_rows, route)
    return stream


@torch.library.register_fake("magihuman::linear_add_int8_")
def _(
    stream: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str = UNSET,
) -> Tensor:
    return stream
