"""Video latents to frames, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from magihuman.kernels import reference as ref
from magihuman.runtime.config import VIDEO_STRIDE, video_frames
from magihuman.runtime.model.turbo_vae import TurboVAE, Window

Frames = npt.NDArray[np.uint8]


class VideoDecoder(Protocol):
    """`TurboVAE`, or what decodes in its place."""

    def windows(self, z: Tensor) -> Iterator[Tensor]:
        """As `TurboVAE.windows`."""


class Decoder(Protocol):
    """Windows of latents [B, 48, T, H, W] to uint8 [B, frames, 16 H, 16 W, 3], without waiting."""

    def batch_of(self, rows: int, columns: int) -> int:
        """How many windows of this size are decoded at once, at most."""

    def __call__(self, latents: Tensor, is_first: bool) -> Tensor: ...


@torch.inference_mode()
def decode_frames(
    vae: VideoDecoder,
    latent: Tensor,
    on_frames: Callable[[int, int], None] = lambda done, of: None,
    decoder: Decoder | None = None,
    on_window: Callable[[Frames], None] = lambda frames: None,
) -> Frames:
    """[1, 48, T, H, W] normalised latents to uint8 [4 (T - 1) + 1, 16 H, 16 W, 3].

    Args:
        vae: on the latents' device.
        latent: any float dtype.
        on_frames: called as (done, of) with the frames finished; may raise to stop.
        decoder: stands in for the decoder of `vae`, a `TurboVAE` on a GPU.
        on_window: called with the next frames as soon as they are on the host, in order. They are a
            part of the result, and stay as they are.
    """
    total = video_frames(latent.shape[2])
    done = 0
    on_frames(done, total)
    if decoder is None:
        windows = _plain(vae, latent)
    else:
        windows = _compiled(cast(TurboVAE, vae), latent, decoder)
    for frames, count in windows:
        on_window(frames[done : done + count])
        done += count
        on_frames(done, total)
    return frames


def _plain(vae: VideoDecoder, latent: Tensor) -> Iterator[tuple[Frames, int]]:
    """All frames, and how many of them each window has filled in. One window is on the device."""
    out = np.empty(frames_shape(latent), np.uint8)
    done = 0
    for window in vae.windows(latent):
        count = window.shape[2]
        out[done : done + count] = ref.to_uint8(window)[0].cpu().numpy()
        done += count
        yield out, count


def _compiled(vae: TurboVAE, latent: Tensor, decoder: Decoder) -> Iterator[tuple[Frames, int]]:
    """As `_plain`. A window is copied to the host while the next is decoded, and handed over while
    that one still runs.
    """
    x = vae.denormalize(latent)
    out: Tensor | None = None
    compute, copies = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
    done = 0
    running: tuple[torch.cuda.Event, int] | None = None
    for group in _groups(vae.plan(latent.shape[2]), decoder.batch_of(*latent.shape[3:])):
        latents = torch.cat([x[:, :, window.begin : window.end] for window in group])
        pixels = decoder(latents, group[0].is_first)
        kept = torch.cat(
            [pixels[i, w.skip : w.skip + w.frames] for i, w in enumerate(group)]
        )  # a copy: the next window may overwrite the decoder's own
        if out is None:  # the device is busy meanwhile
            out = torch.empty(frames_shape(latent), dtype=torch.uint8, pin_memory=True)
        copies.wait_stream(compute)
        with torch.cuda.stream(copies):
            out[done : done + len(kept)].copy_(kept, non_blocking=True)
            kept.record_stream(copies)
        copied = torch.cuda.Event()
        copied.record(copies)
        done += len(kept)
        if running is not None:
            running[0].synchronize()
            yield out.numpy(), running[1]
        running = copied, len(kept)
    assert out is not None and running is not None
    running[0].synchronize()
    yield out.numpy(), running[1]


def _groups(windows: list[Window], batch: int) -> Iterator[list[Window]]:
    """Neighbours of one kind and size, at most `batch` together."""
    group: list[Window] = []
    for window in windows:
        if group and (len(group) == batch or _size(window) != _size(group[0])):
            yield group
            group = []
        group.append(window)
    yield group


def _size(window: Window) -> tuple[bool, int]:
    return window.is_first, window.end - window.begin


def frames_shape(latent: Tensor) -> tuple[int, int, int, int]:
    """Of the frames decoded from [1, 48, T, H, W]."""
    _, _, frames, rows, columns = latent.shape
    _, down, across = VIDEO_STRIDE
    return video_frames(frames), rows * down, columns * across, 3
