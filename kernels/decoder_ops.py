"""The video decoder's kernels as PyTorch operators, `torch.ops.magihuman.*`; see `ops.py`.

Videos go in and out as [B, C, T, H, W] in `channels_last_3d`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from magihuman.kernels import reference as ref

CHANNELS_LAST = torch.channels_last_3d


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)


@torch.library.custom_op("magihuman::join_norm", mutates_args=())
def join_norm(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    border: int,
    shortcut_eps: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.join_norm`; of what is not asked for, nothing but an empty tensor comes."""
    if x.is_cuda:
        from magihuman.kernels.channel_norm import channel_norm

        out, shortcut, total = channel_norm(
            x, delta, bias, eps, activation, before, after, border, shortcut_eps, keep
        )
    else:
        out, shortcut, total = ref.join_norm(
            x, delta, bias, eps, activation, before, after, border, shortcut_eps
        )
        out, total = (part.contiguous(memory_format=CHANNELS_LAST) for part in (out, total))
    none = x.new_empty(0)
    return (
        out,
        none if shortcut is None else shortcut,
        total if keep and total is not None else none.clone(),
    )


@join_norm.register_fake
def _(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    border: int,
    shortcut_eps: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, frames, height, width)
    padded = (frames + before + after, height + 2 * border, width + 2 * border)
    return (
        _empty(x, batch, channels, *padded),
        x.new_empty(0) if shortcut_eps is None else _empty(x, *shape),
        _empty(x, *shape) if keep else x.new_empty(0),
    )


@torch.library.custom_op("magihuman::join_upsample", mutates_args=())
def join_upsample(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, in_time: bool, drop: int, border: int
) -> Tensor:
    """`reference.join_upsample`."""
    if x.is_cuda:
        from magihuman.kernels.frames import upsample

        return upsample(x, delta, bias, in_time, drop, border)
    out = ref.join_upsample(x, delta, bias, in_time, drop, border)
    return out.contiguous(memory_format=CHANNELS_LAST)


@join_upsample.register_fake
def _(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, in_time: bool, drop: int, border: int
) -> Tensor:
    batch, channels, frames, height, width = x.shape
    parts = 2 if in_time else 1
    size = (parts * frames - drop, 2 * (height + border), 2 * (width + border))
    return _empty(x, batch, channels // parts, *size)


@torch.library.custom_op("magihuman::join_pixels", mutates_args=())
def join_pixels(x: Tensor, bias: Tensor, colors: int, patch: int, dtype: torch.dtype) -> Tensor:
    """`reference.join_pixels`."""
    if x.is_cuda:
        from magihuman.kernels.frames import pixels

        return pixels(x, bias, colors, patch, dtype)
    return ref.join_pixels(x, bias, colors, patch, dtype)


@join_pixels.register_fake
def _(x: Tensor, bias: Tensor, colors: int, patch: int, dtype: torch.dtype) -> Tensor:
    batch, _, frames, height, width = x.shape
    return x.new_empty(batch, frames, patch * height, patch * width, colors, dtype=dtype)


@torch.library.custom_op("magihuman::yuv420", mutates_args=())
def yuv420(frames: Tensor) -> Tensor:
    """`reference.to_yuv420`."""
    if frames.is_cuda:
        from magihuman.kernels import frames as kernels

        return kernels.yuv420(frames.contiguous())
    return ref.to_yuv420(frames)


@yuv420.register_fake
def _(frames: Tensor) -> Tensor:
    count, height, width, _ = frames.shape
    return frames.new_empty(count, height // 2 * 3, width)


@torch.library.custom_op("magihuman::conv", mutates_args=())
def conv(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    """Convolution of a video without bias, on a GPU by cuDNN's heuristics.

    x: [B, C, T, H, W]; weight: [out, C, 3 or 1, ...] in `channels_last_3d`, like x; padding: zeros
    along T, H and W.
    """
    if not x.is_cuda:
        out = F.conv3d(x, weight, None, 1, padding)
        return out.contiguous(memory_format=CHANNELS_LAST)
    # By name: PyTorch sends some bf16 convolutions to a slow kernel of its own. Without a search
    # (`benchmark`), which found nothing faster and may choose otherwise in another process.
    return torch.ops.aten.cudnn_convolution(
        x, weight, padding, [1, 1, 1], [1, 1, 1], 1, benchmark=False, deterministic=False,
        allow_tf32=False,
    )  # fmt: skip


@conv.register_fake
def _(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    size = [
        n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, weight.shape[2:], strict=True)
    ]
    return _empty(x, x.shape[0], weight.shape[0], *size)


@torch.library.custom_op("magihuman::add_bias", mutates_args=())
def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """`x + bias` of a video and [C]; stands in a graph only until another operator takes it in."""
    return ref.join(x, None, bias).to(x.dtype)


@add_bias.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)
