"""The video decoder's kernels as PyTorch operators, `torch.ops.magihuman.*`; see `kernels/ops.py`.

Videos go in and out as [B, C, T, H, W] in `channels_last_3d`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from magihuman.kernels.decoder import reference as ref

CHANNELS_LAST = torch.channels_last_3d
INDEXED = 2**31  # elements that 32 bits tell apart


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
    phases: list[bool],
) -> Tensor:
    """Compute the first result of `decoder.reference.join_norm`.

    phases: whether x, and whether delta, is to go through `decoder.reference.from_phases` before.
    """
    return _join_norm(x, delta, bias, eps, activation, before, after, phases, None, False)


@torch.library.custom_op("magihuman::join_norm_", mutates_args=("x",))
def join_norm_(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    phases: list[bool],
    other_eps: float | None,
) -> Tensor:
    """Compute what `join_norm` does, and replace x by the second result of the reference."""
    return _join_norm(x, delta, bias, eps, activation, before, after, phases, other_eps, True)


def _join_norm(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    phases: list[bool],
    other_eps: float | None,
    replace: bool,
) -> Tensor:
    if x.is_cuda:
        from magihuman.kernels.decoder.channel_norm import Norm, channel_norm

        norm = Norm(eps, activation, before, after, other_eps)
        return channel_norm(x, delta, bias, norm, phases[0], phases[1], replace)
    wide = ref.from_phases(x) if phases[0] else x
    if delta is not None and phases[1]:
        delta = ref.from_phases(delta)
    out, other = ref.join_norm(wide, delta, bias, eps, activation, before, after, other_eps)
    if replace:
        x.copy_(other)
    return out.contiguous(memory_format=CHANNELS_LAST)


@join_norm.register_fake
def _(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    phases: list[bool],
) -> Tensor:
    batch, channels, frames, height, width = x.shape
    if phases[0]:
        channels, height, width = channels // 4, 2 * (height - 1), 2 * (width - 1)
    return _empty(x, batch, channels, frames + before + after, height, width)


@join_norm_.register_fake
def _(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    phases: list[bool],
    other_eps: float | None,
) -> Tensor:
    batch, channels, frames, height, width = x.shape
    return _empty(x, batch, channels, frames + before + after, height, width)


@torch.library.custom_op("magihuman::join_frames", mutates_args=())
def join_frames(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, in_time: bool, drop: int
) -> Tensor:
    """Compute `decoder.reference.join_frames`."""
    if x.is_cuda:
        from magihuman.kernels.decoder import frames

        return frames.join_frames(x, delta, bias, in_time, drop)
    out = ref.join_frames(x, delta, bias, in_time, drop)
    return out.clone(memory_format=CHANNELS_LAST)


@join_frames.register_fake
def _(x: Tensor, delta: Tensor | None, bias: Tensor | None, in_time: bool, drop: int) -> Tensor:
    batch, channels, frames, height, width = x.shape
    parts = 2 if in_time else 1
    return _empty(x, batch, channels // parts, parts * frames - drop, height, width)


@torch.library.custom_op("magihuman::join_pixels", mutates_args=())
def join_pixels(x: Tensor, bias: Tensor, colors: int, patch: int, dtype: torch.dtype) -> Tensor:
    """Compute `decoder.reference.join_pixels`: [B, frames, patch H, patch W, colors]."""
    if x.is_cuda:
        from magihuman.kernels.decoder.frames import pixels

        return pixels(x, bias, colors, patch, dtype)
    return ref.join_pixels(x, bias, colors, patch, dtype)


@join_pixels.register_fake
def _(x: Tensor, bias: Tensor, colors: int, patch: int, dtype: torch.dtype) -> Tensor:
    batch, _, frames, height, width = x.shape
    return x.new_empty(batch, frames, patch * height, patch * width, colors, dtype=dtype)


@torch.library.custom_op("magihuman::yuv420", mutates_args=())
def yuv420(frames: Tensor) -> Tensor:
    """Compute `decoder.reference.to_yuv420` of uint8 frames [T, H, W, 3]."""
    if frames.is_cuda:
        from magihuman.kernels.decoder import frames as kernels

        return kernels.yuv420(frames.contiguous())
    return ref.to_yuv420(frames)


@yuv420.register_fake
def _(frames: Tensor) -> Tensor:
    count, height, width, _ = frames.shape
    return frames.new_empty(count, height // 2 * 3, width)


@torch.library.custom_op("magihuman::conv", mutates_args=())
def conv(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    """Convolve a video, without a bias, on a GPU as cuDNN's heuristics choose.

    x: [B, C, T, H, W]; weight: [out, C, ...] in `channels_last_3d`, like x; padding: zeros
    along T, H and W. A long video is convolved in parts.
    """
    if not x.is_cuda:
        out = F.conv3d(x, weight, None, 1, padding)
        return out.contiguous(memory_format=CHANNELS_LAST)
    # By name: PyTorch sends some bf16 convolutions to a slow kernel of its own. Without a search
    # (`benchmark`), which found nothing faster and may choose otherwise in another process.
    settings = padding, [1, 1, 1], [1, 1, 1], 1, False, False, False
    shape = _conv_shape(x, weight, padding)
    if max(x.numel(), math.prod(shape)) < INDEXED or x.shape[0] > 1 or padding[0]:
        return torch.ops.aten.cudnn_convolution(x, weight, *settings)
    out = _empty(x, *shape)
    frames, reach = shape[2], weight.shape[2] - 1
    largest = max(x[0, :, 0].numel(), out[0, :, 0].numel())
    parts = -(-frames // (INDEXED // largest - reach))
    begin = 0
    for part in range(parts):  # of the same length or one less
        end = frames * (part + 1) // parts
        torch.ops.aten.cudnn_convolution.out(
            x[:, :, begin : end + reach], weight, *settings, out=out[:, :, begin:end]
        )
        begin = end
    return out


def _conv_shape(x: Tensor, weight: Tensor, padding: list[int]) -> list[int]:
    size = [
        n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, weight.shape[2:], strict=True)
    ]
    return [x.shape[0], weight.shape[0], *size]


@conv.register_fake
def _(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    return _empty(x, *_conv_shape(x, weight, padding))


@torch.library.custom_op("magihuman::add_bias", mutates_args=())
def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias [C] to a video; it stands in a graph only until another operator takes it in."""
    return ref.join(x, None, bias).to(x.dtype)


@add_bias.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)
