"""Every fusable block of the video decoder, once, as a small plain-torch function.

As in `reference`, the model calls these functions, a graph rewrite traces them, and tests of fused
kernels compare against them. Source of the maths: daVinci-MagiHuman, arXiv 2603.21986, and its
published weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# BT.709 in limited range (ITU-T H.273) of R, G and B, times 2^16; whites and greys come out exact.
LUMA = (11966, 40254, 4064)
CHROMA = ((-6596, -22188, 28784), (28784, -26145, -2639))


def channel_norm(x: Tensor, eps: float) -> Tensor:
    """`x * rsqrt(mean over channels of x^2 + eps)`, the mean in fp32, no weight.

    x: [B, C, T, H, W]; returns shape and dtype of x.
    """
    if x.dtype == torch.float32:  # without casts that do nothing, which a capture would keep
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + eps)
    return (x * scale).to(x.dtype)


def pad_time(x: Tensor, frames: int) -> Tensor:
    """Repeat the first and the last frame `frames` times. x: [B, C, T, H, W]."""
    first = x[:, :, :1].expand(-1, -1, frames, -1, -1)
    last = x[:, :, -1:].expand(-1, -1, frames, -1, -1)
    return torch.cat((first, x, last), dim=2)


def interleave_time(x: Tensor) -> Tensor:
    """Split the channels into two frames each: [B, 2 C, T, H, W] -> [B, C, 2 T, H, W]."""
    return x.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)


def upsample_frames(x: Tensor) -> Tensor:
    """Each pixel twice along rows and columns: [B, C, T, H, W] -> frames [B T, C, 2 H, 2 W].

    In fp32 on the way, as published; no value changes.
    """
    frames = x.movedim(2, 1).flatten(0, 1)  # [B T, C, H, W]
    if x.dtype == torch.float32:
        return F.interpolate(frames, scale_factor=(2.0, 2.0), mode="nearest-exact")
    doubled = F.interpolate(frames.float(), scale_factor=(2.0, 2.0), mode="nearest-exact")
    return doubled.to(x.dtype)


def to_video(frames: Tensor, batch: int) -> Tensor:
    """[B T, C, H, W] -> [B, C, T, H, W]."""
    return frames.unflatten(0, (batch, -1)).movedim(1, 2)


def to_uint8(frames: Tensor) -> Tensor:
    """[B, 3, T, H, W] in about [-1, 1] to uint8 [B, T, H, W, 3].

    `x / 2 + 1/2`, clamped to [0, 1], times 255, truncated.
    """
    scaled = (frames.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """[B, C patch^2, T, H, W] -> [B, C, T, patch H, patch W]; channels are (C, column, row)."""
    x = x.unflatten(1, (-1, patch, patch))  # [B, C, column, row, T, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(3, 4).flatten(4, 5)


def join(x: Tensor, delta: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x + delta + bias` of videos [B, C, T, H, W] and [C], in fp32."""
    x = x.float()
    if delta is not None:
        x = x + delta.float()
    return x if bias is None else x + bias.float()[:, None, None, None]


def join_norm(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str,
    before: int,
    after: int,
    other_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What the decoder does between two convolutions, in fp32, rounded to x's dtype once.

    Returns `activation(channel_norm(join(x, delta, bias), eps))`, without the norm where eps is
    None, with the first and the last frame repeated `before` and `after` times; and the join, or
    with `other_eps` its `channel_norm`.
    """
    total = join(x, delta, bias)
    y = total if eps is None else channel_norm(total, eps)
    y = ACTIVATIONS[activation](y)
    y = torch.cat((y[:, :, :before], y, y[:, :, y.shape[2] - after :]), dim=2)
    other = total if other_eps is None else channel_norm(total, other_eps)
    return y.to(x.dtype), other.to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "none": lambda x: x,
}


def join_frames(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, in_time: bool, drop: int
) -> Tensor:
    """The join, its channels to frames where `in_time`, less `drop` frames at the start."""
    y = join(x, delta, bias).to(x.dtype)
    return (interleave_time(y) if in_time else y)[:, :, drop:]


def phase_weight(weight: Tensor) -> Tensor:
    """The weight of a convolution over pixels as they are that gives `from_phases` what `weight`
    gives over pixels repeated twice each way.

    Of the three taps along an axis, two meet the same pixel: for an even place the last two, for an
    odd one the first two. Sums are fp32, rounded once.

    weight: [out, C, 1, 3, 3]. Returns [4 out, C, 1, 2, 2], for zeros of one pixel around.
    """
    w = weight.float()
    rows = [(w[..., :1, :], w[..., 1:2, :] + w[..., 2:, :])]
    rows.append((w[..., :1, :] + w[..., 1:2, :], w[..., 2:, :]))
    phases = []
    for top, bottom in rows:
        both = torch.cat((top, bottom), dim=-2)
        left, middle, right = both.unbind(-1)
        phases.append(torch.stack((left, middle + right), dim=-1))
        phases.append(torch.stack((left + middle, right), dim=-1))
    return torch.cat(phases).to(weight.dtype)


def from_phases(x: Tensor) -> Tensor:
    """Pixels of even and odd rows and columns, side by side in the channels, in their places.

    x: [B, 4 C, T, H + 1, W + 1], even rows first, of each even columns first. Returns [B, C, T,
    2 H, 2 W]: those of odd places come from one pixel further.
    """
    batch, channels, frames, height, width = x.shape
    out = x.new_empty(batch, channels // 4, frames, 2 * (height - 1), 2 * (width - 1))
    for phase, part in enumerate(x.chunk(4, dim=1)):
        row, column = divmod(phase, 2)
        out[..., row::2, column::2] = part[..., row : height - 1 + row, column : width - 1 + column]
    return out


def join_pixels(x: Tensor, bias: Tensor, colors: int, patch: int, dtype: torch.dtype) -> Tensor:
    """Finished pixels [B, T, patch H, patch W, colors]: bytes as by `to_uint8`, or floats."""
    y = unpatchify(join(x, None, bias)[:, : colors * patch**2], patch)
    if dtype == torch.uint8:
        return to_uint8(y)
    return y.to(dtype).permute(0, 2, 3, 4, 1).contiguous()


def to_yuv420(frames: Tensor) -> Tensor:
    """RGB uint8 [T, H, W, 3] of even H and W to what H.264 takes: BT.709 in limited range, chroma
    at half size, level with the left column of its four pixels and between their rows.

    Each value is rounded once. Returns uint8 [T, 3 H / 2, W], a frame as H rows of Y, then all Cb
    and all Cr, two of their rows in one.
    """
    red, green, blue = rgb = frames.int().unbind(-1)
    luma = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + (33 << 15)) >> 16
    sums = [_around_even_columns(color[:, ::2] + color[:, 1::2]) for color in rgb]
    planes = [luma] + [
        (weights[0] * sums[0] + weights[1] * sums[1] + weights[2] * sums[2] + (257 << 18)) >> 19
        for weights in CHROMA
    ]
    flat = torch.cat([plane.flatten(1) for plane in planes], dim=1).to(torch.uint8)
    return flat.unflatten(1, (-1, frames.shape[2]))


def _around_even_columns(x: Tensor) -> Tensor:
    """Sums of a column's neighbours and twice itself, the first repeated before it."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat((even[..., :1], odd[..., :-1]), dim=-1) + 2 * even + odd
