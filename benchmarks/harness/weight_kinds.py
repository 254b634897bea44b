"""Weights unlike normally distributed ones, made in place from those of `random_weights`.

Tensors are found by their published names, so that a model's `state_dict()` and a file's content
both serve. Factors of channels that only move a range are powers of 2, which bf16 takes exactly.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from magihuman.runtime.config import DiTConfig
from magihuman.runtime.model.dit import MODALITIES

State = Mapping[str, Tensor]

NORMED = {"attention.linear_qkv": "attention.pre_norm", "mlp.up_gate_proj": "mlp.pre_norm"}
LINEARS = (*NORMED, "attention.linear_proj", "mlp.down_proj")
CHANNEL_SPREAD, ROW_SPREAD = 1.0, 0.5  # standard deviations of the logarithm of a gain
LARGE_ROWS, LARGE_GAIN = 256, 8.0  # one row in so many is larger by this
MASSIVE = (
    3e1,
    1e2,
    1e3,
    3e3,
)  # standard deviations of single channels of the stream, in text tokens
BEYOND = 2.0**21  # beside it all else in a row is below half of e4m3's smallest, 448 / 2^19 / 2
CHANNEL = 3  # that is made huge
QUIET = 2.0**13  # so much less than 1, activations are below half the smallest over a fixed scale


def outliers(state: State, config: DiTConfig) -> None:
    """Heavy-tailed channels and rows everywhere, and massive activations in the residual stream.

    Gains of channels are log-normal, in the norms and, since training makes linears undo a part,
    inversely to their square root in the columns after them. Rows of linears have such gains too,
    and some are large outright. What the last of the opening modality layers adds to four channels
    of text tokens, and so of few rows, is up to 1e4 times what the stream has elsewhere, as in
    published transformers (arXiv 2402.17762).
    """
    for layer in range(config.num_layers):
        stem = f"block.layers.{layer}."
        for linear, norm in NORMED.items():
            gains = _log_normal(state[f"{stem}{norm}.weight"], CHANNEL_SPREAD, stem + norm)
            _scale_channels(state, stem + linear, gains)
        for linear in LINEARS:
            weight = state[f"{stem}{linear}.weight"]
            gains = _log_normal(weight[:, 0], ROW_SPREAD, stem + linear)
            gains[::LARGE_ROWS] *= LARGE_GAIN
            weight.mul_(gains[:, None])
    opening = [i for i in config.modality_layers if i < config.num_layers // 2]
    down = state[f"block.layers.{opening[-1]}.mlp.down_proj.weight"].chunk(MODALITIES)[-1]
    generator = torch.Generator(down.device).manual_seed(0)
    for i, factor in enumerate(MASSIVE, 1):
        row = down[i * len(down) // (len(MASSIVE) + 1)]
        row.normal_(0.0, factor * len(row) ** -0.5, generator=generator)


def broken(state: State, config: DiTConfig) -> list[str]:
    """Three linears that fp8 cannot hold, whose names are returned, in an otherwise sound model.

    Two have an input channel beyond the range of e4m3, one an input far below its fixed scale.
    """
    shared = [i for i in range(config.num_layers) if i not in config.modality_layers]
    first, second, third = (shared[i] for i in (len(shared) // 4, len(shared) // 2, -1))
    names = [
        f"block.layers.{first}.attention.linear_qkv",
        f"block.layers.{second}.mlp.up_gate_proj",
        f"block.layers.{third}.mlp.down_proj",
    ]
    hide(state, names[0])
    hide(state, names[1])
    quieten(state, f"block.layers.{third}.mlp.up_gate_proj", names[2])
    return names


def hide(state: State, linear: str, factor: float = BEYOND) -> None:
    """Make a channel of a linear's input huge, in its norm, and let its column undo it.

    In bf16 the function stays the same but for the norm's rounding. There must be one set of
    weights for all rows.
    """
    norm, column = state[norm_of(linear)], state[f"{linear}.weight"][:, CHANNEL]
    norm[CHANNEL] = (norm[CHANNEL] + 1) * factor - 1
    column.div_(factor)


def quieten(state: State, up: str, down: str, factor: float = QUIET) -> None:
    """Make what a SwiGLU7 returns small, and the linear after it as much larger."""
    state[f"{up}.weight"][0::2].div_(factor)
    state[f"{down}.weight"].mul_(factor)


def norm_of(linear: str) -> str:
    """Key of the norm before a linear."""
    part = ".".join(linear.split(".")[-2:])
    return f"{linear.removesuffix(part)}{NORMED[part]}.weight"


def _scale_channels(state: State, linear: str, gains: Tensor) -> None:
    norm, weight = state[norm_of(linear)], state[f"{linear}.weight"]
    norm.copy_((norm + 1) * gains - 1)
    experts = len(gains) // weight.shape[1]
    for rows, own in zip(weight.chunk(experts), gains.chunk(experts), strict=True):
        rows.mul_(own.rsqrt())


def _log_normal(like: Tensor, spread: float, name: str) -> Tensor:
    """Gains of a vector's length, fp32, of median 1."""
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(name.encode()))
    gains = torch.empty(like.shape, device=like.device)
    return gains.normal_(0.0, spread, generator=generator).exp_()
