"""Weights in 8 bits with a scale for each row; what they are multiplied with stays as it is.

For a model that runs once a request: the widened weight of one product at a time is made for that
product, so that the bytes that stay are halved and the time hardly changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magihuman.kernels import reference as ref

BLOCK_ROWS = 4096  # rounded at a time
DTYPES = {"int8": ref.INT8, "fp8": ref.FP8}  # of the weights, by the name of a precision


def quantize_rows(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """A weight [M, K] of any float dtype as int8 or e4m3 [M, K], and scales [M] fp32.

    Rounded as by `kernels.reference.quantize_rows`, in blocks, so that fp32 copies stay small.
    """
    values = torch.empty(weight.shape, dtype=DTYPES[precision], device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        values[rows], scale[rows] = ref.quantize_rows(weight[rows], DTYPES[precision])
    return values, scale


class RowScaled(nn.Module):
    """A weight [M, K] in 8 bits and a scale for each of its rows, as buffers."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, columns: int, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.register_buffer("weight", torch.empty(rows, columns, dtype=DTYPES[precision]))
        self.register_buffer("weight_scale", torch.empty(rows, dtype=torch.float32))

    @torch.no_grad()
    def hold(self, weight: Tensor, rest: torch.device | None = None) -> None:
        """Round a weight on its device, and hold it there or on another."""
        values, scale = quantize_rows(weight, self.precision)
        self.weight, self.weight_scale = values.to(rest), scale.to(rest)


class RowScaledLinear(RowScaled):
    """A linear over the values as they are, whose outputs are scaled.

    8 bits become bf16 without rounding, so that the product is that of the rounded weight.
    """

    def __init__(self, linear: nn.Linear, precision: str) -> None:
        super().__init__(linear.out_features, linear.in_features, precision)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x, self.weight.to(x.dtype)) * self.weight_scale
        return (product if self.bias is None else product + self.bias).to(x.dtype)


class RowScaledEmbedding(RowScaled):
    """A table of which the rows that are looked up alone are widened. dtype: of what it gives."""

    def __init__(self, table: nn.Embedding, precision: str, dtype: torch.dtype) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, precision)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        bits = self.weight.view(torch.uint8)[ids]  # not every device indexes e4m3
        values = bits.view(self.weight.dtype).float()
        return (values * self.weight_scale[ids][..., None]).to(self.dtype)


def narrowed(model: nn.Module, precision: str, dtype: torch.dtype) -> nn.Module:
    """The model, without weights, with linears and tables that hold 8 bits in place of its own.

    dtype: of what tables give.
    """
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if not isinstance(child, (nn.Linear, nn.Embedding)):
                continue
            with torch.device(child.weight.device):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, RowScaledLinear(child, precision))
                else:
                    setattr(owner, name, RowScaledEmbedding(child, precision, dtype))
    return model


def put(model: nn.Module, key: str, weight: Tensor, rest: torch.device | None = None) -> None:
    """Give a model a weight by its name, rounded where it is to be in 8 bits.

    rest: where it is to be, if not on the device that it is on.
    """
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, RowScaled) and name == "weight":
        owner.hold(weight, rest)
    else:
        setattr(owner, name, nn.Parameter(weight.to(rest), requires_grad=False))


def held_bytes(shape: tuple[int, ...], precision: str) -> int:
    """Bytes of a weight of this shape, of a linear or a table if it has two axes, else in bf16."""
    size = torch.Size(shape).numel()
    if precision not in DTYPES or len(shape) != 2:
        return 2 * size
    return size + 4 * shape[0]
