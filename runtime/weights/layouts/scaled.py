"""fp8 weights with a scale beside each, as others have converted them.

A weight `X` in e4m3 has a float tensor `X.__fp8_scale`, and stands for `X * scale`. A scale for the
whole tensor or for each row is that of a quantised linear here, so such weights can be used as they
are. One for each column, or for blocks of 128 x 128, is multiplied in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from magihuman.graphs.quantization import PARTS
from magihuman.kernels import reference as ref
from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.weights.reading import TensorInfo, names, open_shard

SCALE = ".__fp8_scale"
FP8, FLOATS = "F8_E4M3", ("F32", "BF16", "F16")
BLOCK = 128  # rows and columns that share a scale


@dataclass(frozen=True)
class Scaled:
    """The tensors of a transformer's files, apart from the scales of those in fp8.

    Attributes:
        weights: every tensor but the scales.
        scales: of the weights in fp8, by the weight's name.
    """

    weights: dict[str, TensorInfo]
    scales: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def as_they_are(self) -> tuple[str, ...]:
        """Names of the block linears whose fp8 weights and scales can be used as they are."""
        return tuple(
            key.removesuffix(".weight")
            for key, scale in self.scales.items()
            if _is_block_linear(key) and _is_by_row(scale.shape, self.weights[key].shape)
        )

    def read_scales(self) -> dict[str, Tensor]:
        """The scales, in fp32, each to be multiplied with its weight or, by rows, as [rows]."""
        held = {}
        for key, info in self.scales.items():
            with open_shard(info.file) as shard:
                scale = shard.get_tensor(key + SCALE).float()
            held[key] = _laid_out(scale, self.weights[key].shape)
        return held


def split(tensors: Mapping[str, TensorInfo], source: str) -> Scaled:
    """The tensors of a file, weights and scales apart.

    Raises:
        CheckpointError: a dtype cannot be read, or a scale is missing, alone or misshapen.
    """
    scales = {key.removesuffix(SCALE): info for key, info in tensors.items() if key.endswith(SCALE)}
    weights = {key: info for key, info in tensors.items() if not key.endswith(SCALE)}
    alone = [key + SCALE for key in scales if key not in weights or weights[key].dtype != FP8]
    bare = [key for key, info in weights.items() if info.dtype == FP8 and key not in scales]
    other = [key for key, info in weights.items() if info.dtype not in (*FLOATS, FP8)]
    other += [key + SCALE for key, info in scales.items() if info.dtype not in FLOATS]
    misshapen = [
        f"{key}{SCALE} is {list(scale.shape)} for {list(weights[key].shape)}"
        for key, scale in scales.items()
        if key not in alone and key in weights and not _fits(scale.shape, weights[key].shape)
    ]
    for what, keys, remedy in (
        ("a dtype that is not read", [f"{key} ({_dtype(key, tensors)})" for key in other], ""),
        (
            f"fp8 weights without a scale named after them, ending in {SCALE}",
            bare,
            "take a file that has the scales, or one in bf16",
        ),
        ("scales without an fp8 weight", alone, "download the file again"),
        ("scales that do not fit their weights", misshapen, "give one for all, or for each row"),
    ):
        if keys:
            raise CheckpointError(
                f"{source} holds {len(keys)} tensors of {what}: {names(keys)};"
                f" {remedy or 'tensors must be ' + ', '.join((*FLOATS, FP8))}"
            )
    return Scaled(weights, scales)


def fp8_linears(tensors: Mapping[str, TensorInfo], source: str) -> tuple[str, ...]:
    """Names of the block linears that files hold in fp8 as it is used here, from headers."""
    if not any(key.endswith(SCALE) for key in tensors):
        return ()
    return split(tensors, source).as_they_are


def multiplied(value: Tensor, scale: Tensor) -> Tensor:
    """What an fp8 weight stands for, in fp32. scale: as `Scaled.read_scales` gives it."""
    by_row = scale.reshape(-1, *[1] * (value.ndim - 1)) if scale.ndim == 1 else scale
    return value.float() * by_row


def hold(linear: nn.Module, value: Tensor, scale: Tensor, rest: torch.device) -> None:
    """Give a linear an fp8 weight [M, K] as it is, with its scale for each row, on a device."""
    rows, width = value.shape
    padded = value.new_zeros(rows, ref.padded_width(width), device=rest)
    padded[:, :width] = value.to(rest)
    linear.weight = nn.Parameter(padded[:, :width], requires_grad=False)
    linear.register_buffer("weight_scale", scale.expand(rows).to(rest, copy=True).contiguous())


def _is_block_linear(key: str) -> bool:
    return key.startswith("block.layers.") and key.removesuffix(".weight").endswith(PARTS)


def _is_by_row(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    size = torch.Size(scale).numel()
    return size == 1 or (scale in ((weight[0],), (weight[0], 1)))


def _blocks(weight: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-side // BLOCK) for side in weight)


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if not weight:
        return False
    if _is_by_row(scale, weight):
        return True
    return len(weight) == 2 and scale in ((1, weight[1]), _blocks(weight))


def _laid_out(scale: Tensor, weight: tuple[int, ...]) -> Tensor:
    """[rows] where there is one for each row or for all, else what broadcasts to the weight."""
    if _is_by_row(tuple(scale.shape), weight):
        return scale.reshape(-1).expand(weight[0])
    if tuple(scale.shape) == (1, weight[1]):
        return scale
    whole = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return whole[: weight[0], : weight[1]]


def _dtype(key: str, tensors: Mapping[str, TensorInfo]) -> str:
    return tensors[key].dtype
