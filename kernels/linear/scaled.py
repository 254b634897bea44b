"""What the operators over 8-bit operands compute, of either dtype: e4m3 or int8.

`ops.py` registers them for e4m3, `int8.py` for int8: two names, so that a graph and a profile say
which dtype they are over. On a CPU they compute the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from magihuman.kernels import reference as ref

BF16_ROW = 8  # columns of bf16 in 16 bytes

Kernel = TypeVar("Kernel", bound=Callable[..., object])


def kernel_of(operator: str) -> Callable[[Kernel], Kernel]:
    """Register a function as what computes a declared operator, on a CPU and on a GPU.

    `torch.library.impl` does so too, but leaves nothing under the function's own name.
    """

    def register(kernel: Kernel) -> Kernel:
        torch.library.impl(operator, ("CPU", "CUDA"), kernel)
        return kernel

    return register


def runs_of(rows: list[int]) -> ref.Counts | None:
    """Rows by modality as the reference takes them."""
    return (rows[0], rows[1], rows[2]) if rows else None


def empty_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zeros of x's shape in the rows that `quantize` writes, and room for their scales."""
    rows, columns = x.shape
    stride = -(-columns // ref.ROW_BYTES) * ref.ROW_BYTES
    values = x.new_zeros((rows, stride), dtype=dtype)[:, :columns]
    return values, x.new_empty(rows, dtype=torch.float32)


def empty_product(x: Tensor, columns: int) -> Tensor:
    """Room in bf16 for a product of x, in rows that start at multiples of 16 bytes."""
    stride = -(-columns // BF16_ROW) * BF16_ROW
    return x.new_empty((x.shape[0], stride), dtype=torch.bfloat16)[:, :columns]


def columns_of(weight: Tensor, modality_rows: list[int]) -> int:
    """Columns of a product with this weight."""
    return weight.shape[0] // (3 if modality_rows else 1)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` of x [N, C]; rows of values start at multiples of 16 bytes, with
    zeros between them.
    """
    if x.is_cuda:
        from magihuman.kernels.linear.quantize import quantize_rows

        return quantize_rows(x, dtype)
    values, scale = ref.quantize_rows(x, dtype)
    return empty_rows(x, dtype)[0].copy_(values), scale


def norm(
    x: Tensor, weight: Tensor, modality_rows: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`quantize` of `reference.rms_norm` of x [N, C] fp32, not rounded between."""
    runs = runs_of(modality_rows)
    if x.is_cuda:
        from magihuman.kernels.linear.quantize import norm_rows

        return norm_rows(x, weight, runs, dtype)
    return quantize(ref.rms_norm(x, weight, runs), dtype)


def linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str,
) -> Tensor:
    """`reference.scaled_linear` by this route, in bf16 rows that start at multiples of 16 bytes."""
    if x.is_cuda:
        from magihuman.kernels.linear import routes

        operands = routes.Quantized(x, x_scale), routes.Quantized(weight, weight_scale)
        return routes.scaled_linear(*operands, runs_of(modality_rows), route)
    product = ref.scaled_linear(x, x_scale, weight, weight_scale, runs_of(modality_rows))
    return empty_product(x, product.shape[1]).copy_(product)


def linear_activation(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    kind: str,
    padded: int,
    out_dtype: torch.dtype,
    route: str,
) -> Tensor:
    """`reference.swiglu7` or `gelu7`, by `kind`, of `linear`, in rows of `padded` columns.

    In bf16, or in e4m3 over `reference.STATIC_SCALES`.
    """
    if x.is_cuda:
        from magihuman.kernels.linear import routes

        operands = routes.Quantized(x, x_scale), routes.Quantized(weight, weight_scale)
        return routes.scaled_linear_activation(
            *operands, runs_of(modality_rows), kind, padded, out_dtype, route
        )
    product = ref.scaled_linear(x, x_scale, weight, weight_scale, runs_of(modality_rows))
    out = {"swiglu7": ref.swiglu7, "gelu7": ref.gelu7}[kind](product)
    out = torch.nn.functional.pad(out, (0, padded - out.shape[1]))
    if out_dtype == torch.bfloat16:
        return out
    return (out.float() / ref.STATIC_SCALES[kind]).to(out_dtype)


def linear_add_(
    stream: Tensor,
    x: Tensor,
    x_scale: Tensor | float,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str,
) -> None:
    """Add `linear` to the fp32 stream [N, out] in place; x_scale: of each row, or of all."""
    if x.is_cuda:
        from magihuman.kernels.linear import routes

        operands = routes.Quantized(x, x_scale), routes.Quantized(weight, weight_scale)
        routes.scaled_linear_add(stream, *operands, runs_of(modality_rows), route)
        return
    if not isinstance(x_scale, Tensor):
        x_scale = torch.full((x.shape[0],), x_scale, dtype=torch.float32, device=x.device)
    values = x[:, : weight.shape[1]]
    stream.add_(ref.scaled_linear(values, x_scale, weight, weight_scale, runs_of(modality_rows)))
