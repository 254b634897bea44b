"""The Turbo VAE decoder: 48-channel latents to frames, in overlapping windows of seven latents.

Module names spell the published keys (`decoder....`). Non-causal 3-D convolutions, weight-free
channel norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magihuman.kernels.decoder import reference as ref
from magihuman.kernels.decoder.bands import Band, Range, Reach, cut_latents, cuts
from magihuman.runtime.config import LATENT_MEAN, LATENT_STD, TurboVAEConfig

NORM_EPS = 1e-8
SHORTCUT_NORM_EPS = 1e-6
Decode = Callable[[Tensor, bool], Tensor]  # a window, and whether it is a clip's first


class Conv3d(nn.Module):
    """Convolution padded by repeated frames in time and by zeros in space."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.time_pad = kernel[0] // 2
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(channels, out, kernel, padding=padding, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self.time_pad:
            x = ref.pad_time(x, self.time_pad)
        out: Tensor = self.conv(x)
        return out


class ResBlock(nn.Module):
    """Norm, act, conv, norm, SiLU, conv, plus shortcut; act is ReLU right after an upsample."""

    def __init__(self, channels: int, out: int, after_upsample: bool = False) -> None:
        super().__init__()
        self.first_act = F.relu if after_upsample else F.silu
        self.conv1 = Conv3d(channels, out, (3, 3, 3))
        self.conv2 = Conv3d(out, out, (3, 3, 3))
        self.conv_shortcut = Conv3d(channels, out, (1, 1, 1)) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.first_act(ref.channel_norm(x, NORM_EPS)))
        y = self.conv2(F.silu(ref.channel_norm(y, NORM_EPS)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(ref.channel_norm(x, SHORTCUT_NORM_EPS))
        return y + x


class Upsample(nn.Module):
    """Doubles rows and columns and, where `in_time`, frames, of which a first window drops one."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.time_conv = Conv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None
        conv = nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float32)
        self.resample = nn.Sequential(nn.Identity(), conv)

    def forward(self, x: Tensor, first_window: bool) -> Tensor:
        if self.time_conv is not None:
            x = ref.interleave_time(self.time_conv(x))
            if first_window:
                x = x[:, :, 1:]
        frames = self.resample(ref.upsample_frames(x))
        return ref.to_video(frames, x.shape[0])


class MidBlock(nn.Module):
    """Residual blocks of one width."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class UpBlock(nn.Module):
    """A width change where needed, an upsample where there is one, residual blocks."""

    def __init__(self, channels: int, out: int, layers: int, upsample: bool, in_time: bool) -> None:
        super().__init__()
        self.conv_in = ResBlock(channels, out) if channels != out else None
        self.upsamplers = nn.ModuleList([Upsample(out, in_time)] if upsample else [])
        self.resnets = nn.ModuleList(ResBlock(out, out, upsample) for _ in range(layers))

    def forward(self, x: Tensor, first_window: bool) -> Tensor:
        if self.conv_in is not None:
            x = self.conv_in(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, first_window)
        for resnet in self.resnets:
            x = resnet(x)
        return x


class Decoder(nn.Module):
    """One window: [B, 48, T, H, W] -> [B, 3, frames, 16 H, 16 W].

    frames = 4 T - 3 in a first window, else 4 T.
    """

    def __init__(self, config: TurboVAEConfig) -> None:
        super().__init__()
        widths = config.decoder_block_out_channels[::-1]
        layers = config.decoder_layers_per_block[::-1]
        scaling = config.decoder_spatio_temporal_scaling[::-1]
        spatio_only = config.decoder_spatio_only[::-1]
        self.patch = config.patch_size
        self.conv_in = Conv3d(config.latent_channels, widths[0], (3, 3, 3))
        self.mid_block = MidBlock(widths[0], layers[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, layers[i + 1], scaling[i], not spatio_only[i])
            for i, width in enumerate(widths)
        )
        self.conv_out = Conv3d(widths[-1], config.out_channels * self.patch**2, (3, 3, 3))

    def forward(self, x: Tensor, first_window: bool) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x, first_window)
        x = self.conv_out(F.silu(ref.channel_norm(x, NORM_EPS)))
        return ref.unpatchify(x, self.patch)


def decode_band(
    decoder: Decoder, x: Tensor, first_window: bool, band: Band, reach: Reach
) -> Tensor:
    """The rows or columns of a band, of what `Decoder.forward` makes of the whole picture.

    x: latents of the whole picture, [B, 48, T, H, W]. reach: of the decoder's architecture. Returns
    [B, 3, frames, 16 H, 16 W], as long along the band's axis as the band.
    """

    def cut(y: Tensor, part: Range) -> Tensor:
        return y.narrow(band.axis, part.begin, part.end - part.begin)

    length = x.shape[band.axis]
    kept = iter(cuts(band, length, reach))
    x = decoder.mid_block(decoder.conv_in(cut(x, cut_latents(band, length, reach))))
    for block in cast(Iterable[UpBlock], decoder.up_blocks):
        if block.conv_in is not None:
            x = block.conv_in(x)
        for upsampler in block.upsamplers:
            x = upsampler(cut(x, next(kept)), first_window)
        for resnet in block.resnets:
            x = resnet(x)
    x = decoder.conv_out(F.silu(ref.channel_norm(x, NORM_EPS)))
    return ref.unpatchify(cut(x, next(kept)), decoder.patch)


class Window(NamedTuple):
    """Latents begin .. end decoded together, context included, and the frames kept of them."""

    begin: int
    end: int
    is_first: bool
    skip: int  # frames before those kept
    frames: int

    @property
    def latents(self) -> int:
        """How many the decoder is given."""
        return self.end - self.begin


def plan_windows(latents: int, config: TurboVAEConfig) -> list[Window]:
    """The windows of a clip, in order; the last may reach beyond the clip's end."""
    first, step = config.first_chunk_size, config.step_size
    ratio = config.temporal_compression_ratio
    end = max(first, latents + -(latents - first) % step)
    remaining = ratio * (latents - 1) + 1  # frames still to yield, padding cut
    windows = []
    for start in (0, *range(first, end, step)):
        stop = start + (first if start == 0 else step)
        left, right = int(start > 0), int(stop < end)  # latents of context on each side
        frames = min(ratio * (stop - start) - (ratio - 1) * (start == 0), remaining)
        windows.append(Window(start - left, stop + right, start == 0, ratio * left, frames))
        remaining -= frames
    return windows


def window_kinds(config: TurboVAEConfig) -> dict[str, Window]:
    """An example of every kind of window that clips of any length are made of, by its name."""
    (single,) = plan_windows(config.first_chunk_size, config)
    first, middle, last = plan_windows(config.first_chunk_size + 2 * config.step_size, config)
    return {"single": single, "first": first, "middle": middle, "last": last}


def fill_windows(z: Tensor, config: TurboVAEConfig) -> Tensor:
    """Latents with the last one repeated to fill the last window."""
    padding = plan_windows(z.shape[2], config)[-1].end - z.shape[2]
    return torch.cat((z, z[:, :, -1:].expand(-1, -1, padding, -1, -1)), dim=2)


def decode_windows(
    decode: Decode, z: Tensor, config: TurboVAEConfig, latents: int | None = None
) -> Iterator[Tensor]:
    """Decode a clip window by window, in order, each when it is asked for.

    decode: gives [1, 3, frames, 16 H, 16 W] for latents [1, 48, t, H, W] and whether they are the
        first window; frames = 4 t - 3 there, else 4 t.
    z: [1, 48, T, H, W], as `decode` takes latents; or, with `latents`, filled already.

    The frames yielded concatenate to 4 (T - 1) + 1: those of context and repeats are cut.
    """
    x = fill_windows(z, config) if latents is None else z
    for window in plan_windows(latents or z.shape[2], config):
        frames = decode(x[:, :, window.begin : window.end], window.is_first)
        yield frames[:, :, window.skip : window.skip + window.frames]


class TurboVAE(nn.Module):
    """Windowed decoder of normalised latents."""

    def __init__(self, config: TurboVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        shape = (1, -1, 1, 1, 1)
        for name, values in (("mean", LATENT_MEAN), ("std", LATENT_STD)):
            statistic = torch.tensor(values, dtype=torch.float32, device="cpu")  # never on meta
            self.register_buffer(name, statistic.view(shape), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def denormalize(self, z: Tensor) -> Tensor:
        """[1, 48, T, H, W] normalised latents, any float dtype, to the decoder's input for all
        windows: in the weights' dtype, the last latent repeated to fill the last window.
        """
        dtype = self.decoder.conv_in.conv.weight.dtype
        return fill_windows(
            (z.float() * self.std.float() + self.mean.float()).to(dtype), self.config
        )

    def plan(self, latents: int) -> list[Window]:
        """The windows of a clip, in order."""
        return plan_windows(latents, self.config)

    def windows(self, z: Tensor, decode: Decode | None = None) -> Iterator[Tensor]:
        """Decode window by window, in order.

        z: [1, 48, T, H, W] normalised latents, any float dtype. `decode` stands in for the decoder.
        Yields [1, 3, frames, 16 H, 16 W] in the weights' dtype, about [-1, 1]; the yields
        concatenate to 4 (T - 1) + 1 frames.
        """
        x = self.denormalize(z)
        decode = self.decoder if decode is None else decode  # a compiled module has no truth value
        return decode_windows(decode, x, self.config, z.shape[2])

    def forward(self, z: Tensor) -> Tensor:
        """All frames of latents z [1, 48, T, H, W]: [1, 3, 4 (T - 1) + 1, 16 H, 16 W]."""
        return torch.cat(list(self.windows(z)), dim=2)
