"""Video latents to frames, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from magihuman.kernels.decoder import ops as decoder_ops
from magihuman.kernels.decoder import reference as ref
from magihuman.kernels.decoder.bands import AXES, Band, Reach
from magihuman.runtime.config import VIDEO_STRIDE, video_frames
from magihuman.runtime.model import TurboVAE, Window, decode_band
from magihuman.runtime.pipeline.finite import VIDEO_DECODER, check, largest

Frames = npt.NDArray[np.uint8]
STAGE = "decode_video"  # as in `Video.timings_s`
OnWindow = Callable[[Frames, Frames | None], None]
Made = tuple[Tensor, Tensor]  # frames of a window, and the largest magnitude behind them


class VideoDecoder(Protocol):
    """`TurboVAE`, or what decodes in its place."""

    def windows(self, z: Tensor) -> Iterator[Tensor]:
        """The frames of each window, in order, as `TurboVAE.windows` yields them.

        z: [1, 48, T, H, W], normalised. Yields [1, 3, frames, 16 H, 16 W] in about [-1, 1].
        """


class Decoder(Protocol):
    """Windows of latents [B, 48, T, H, W] to uint8 [B, kept, 16 H, 16 W, 3], without waiting.

    A call decodes whole windows, skips the first `skip` frames of each and keeps the next `kept`;
    with a band, the rows or columns of that alone are decoded.

    Attributes:
        magnitude: of what the last call's bytes were made from, a scalar that is NaN or infinite
            where one of the values was; the next call may overwrite it.
    """

    magnitude: Tensor

    def batch_of(self, rows: int, columns: int) -> int:
        """How many windows of so many latent rows and columns are decoded at once, at most."""

    def prepare(self, calls: Iterable[tuple[Sequence[int], bool, int, int]]) -> None:
        """Make ready for calls with these arguments, of the latents the shape alone."""

    def __call__(
        self, latents: Tensor, is_first: bool, skip: int, kept: int, band: Band | None = None
    ) -> Tensor: ...


class DistributedDecoder(Protocol):
    """Decodes the windows of a clip on several devices."""

    def frames(self, latent: Tensor) -> Iterator[Made]:
        """The frames of each window, in order: uint8 [frames, 16 H, 16 W, 3], and their magnitude.

        latent: [1, 48, T, H, W], normalised.
        """


@torch.inference_mode()
def decode_frames(
    vae: VideoDecoder,
    latent: Tensor,
    on_frames: Callable[[int, int], None] = lambda done, of: None,
    decoder: Decoder | None = None,
    on_window: OnWindow | None = None,
    distributed: DistributedDecoder | None = None,
) -> Frames:
    """[1, 48, T, H, W] normalised latents to uint8 [4 (T - 1) + 1, 16 H, 16 W, 3].

    Args:
        vae: on the latents' device.
        latent: any float dtype.
        on_frames: called as (done, of) with the frames finished; may raise to stop.
        decoder: stands in for the decoder of `vae`, a `TurboVAE` on a GPU.
        on_window: called with the next frames as soon as they are on the host, in order; from a GPU
            also with what `decoder_reference.to_yuv420` makes of them, on the CPU with None. They
            stay as they are.
        distributed: decodes in place of both.

    Raises:
        NonFiniteError: the decoder made NaN or infinity, which bytes would not show; the windows
            before that one have been handed over.
    """
    total = video_frames(latent.shape[2])
    done = 0
    on_frames(done, total)
    if distributed is not None:
        pixels = distributed.frames(latent)
    elif decoder is not None:
        pixels = _grouped(cast(TurboVAE, vae), latent, decoder)
    else:
        pixels = ((ref.to_uint8(window)[0], largest(window)) for window in vae.windows(latent))
    is_ahead = latent.is_cuda and (decoder is not None or distributed is not None)
    windows = (_overlapped if is_ahead else _waited)(pixels, latent, on_window is not None)
    for frames, planes, count in windows:
        if on_window is not None:
            part = slice(done, done + count)
            on_window(frames[part], None if planes is None else planes[part])
        done += count
        on_frames(done, total)
    return frames


Parts = Iterator[tuple[Frames, Frames | None, int]]


def _waited(windows: Iterator[Made], latent: Tensor, with_planes: bool) -> Parts:
    """All frames, on a GPU their planes where asked for, and how many each window has filled in.

    A window is on the host before the next is decoded.
    """
    shape = frames_shape(latent)
    out = np.empty(shape, np.uint8)
    planes = np.empty(planes_shape(shape), np.uint8) if with_planes and latent.is_cuda else None
    done = 0
    for number, (pixels, magnitude) in enumerate(windows, 1):
        part = slice(done, done + len(pixels))
        out[part] = pixels.cpu().numpy()
        check(float(magnitude), VIDEO_DECODER, STAGE, number)
        if planes is not None:
            planes[part] = ref.to_yuv420(pixels).cpu().numpy()
        done += len(pixels)
        yield out, planes, len(pixels)


def _overlapped(windows: Iterator[Made], latent: Tensor, with_planes: bool) -> Parts:
    """What `_waited` yields, where a window is copied to the host while the next is decoded, and
    handed over while that one still runs.
    """
    shape = frames_shape(latent)
    out: Tensor | None = None
    planes: Tensor | None = None
    compute, copies = torch.cuda.current_stream(latent.device), torch.cuda.Stream(latent.device)
    done = 0
    running: _Copied | None = None
    for number, (kept, magnitude) in enumerate(windows, 1):
        yuv = decoder_ops.yuv420(kept) if with_planes else None
        if out is None:  # the device is busy meanwhile
            out = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)
            if with_planes:
                planes = torch.empty(
                    planes_shape(shape), dtype=torch.uint8, device="cpu", pin_memory=True
                )
        copies.wait_stream(compute)
        with torch.cuda.stream(copies):
            for host, window in ((planes, yuv), (out, kept)):
                if host is not None and window is not None:
                    host[done : done + len(window)].copy_(window, non_blocking=True)
                    window.record_stream(copies)
            on_host = magnitude.to("cpu", non_blocking=True)
            magnitude.record_stream(copies)
        event = torch.cuda.Event()
        event.record(copies)
        done += len(kept)
        if running is not None:
            running.wait()
            yield out.numpy(), None if planes is None else planes.numpy(), running.frames
        running = _Copied(event, on_host, number, len(kept))
    assert out is not None and running is not None
    running.wait()
    yield out.numpy(), None if planes is None else planes.numpy(), running.frames


@dataclass(frozen=True)
class _Copied:
    """Frames of a window, the clip's `number`th from 1, on their way to the host."""

    event: torch.cuda.Event
    magnitude: Tensor
    number: int
    frames: int

    def wait(self) -> None:
        """Return once they are there. Raises `NonFiniteError`."""
        self.event.synchronize()
        check(float(self.magnitude), VIDEO_DECODER, STAGE, self.number)


def _grouped(vae: TurboVAE, latent: Tensor, decoder: Decoder) -> Iterator[Made]:
    """The frames of each group of windows that are decoded at once, uint8 [n, 16 H, 16 W, 3], and
    their magnitude.
    """
    x = vae.denormalize(latent)
    groups = list(_groups(vae.plan(latent.shape[2]), decoder.batch_of(*latent.shape[3:])))
    decoder.prepare(
        ((len(group), x.shape[1], group[0].latents, *x.shape[3:]), *_kind(group[0]))
        for group in groups
    )
    for group in groups:
        yield decode_group(decoder, x, group)


def decode_group(
    decoder: Decoder, x: Tensor, group: Sequence[Window], band: Band | None = None
) -> Made:
    """The frames kept of windows of one kind and size, uint8 [frames, 16 H, 16 W, 3], of a band its
    own rows or columns; and their magnitude.

    x: from `TurboVAE.denormalize`.
    """
    latents = torch.cat([x[:, :, window.begin : window.end] for window in group])
    # Copies: the next window may overwrite the decoder's own.
    pixels = decoder(latents, *_kind(group[0]), band=band).flatten(0, 1).clone()
    return pixels, decoder.magnitude.clone()


def whole_picture(parts: Sequence[Tensor], bands: Sequence[Band]) -> Tensor:
    """The picture that bands make: their pixels, [..., rows, columns, channels], in their order."""
    return torch.cat(list(parts), dim=AXES.index(bands[0].axis) - 1 - len(AXES))


class PlainDecoder:
    """The `Decoder` that a `TurboVAE` has, one window at a time."""

    def __init__(self, vae: TurboVAE) -> None:
        self._decoder, self._reach = vae.decoder, Reach.of(vae.config)
        self.magnitude = torch.zeros((), dtype=torch.float32, device=vae.mean.device)

    def batch_of(self, rows: int, columns: int) -> int:
        return 1

    def prepare(self, calls: Iterable[tuple[Sequence[int], bool, int, int]]) -> None:
        pass

    def __call__(
        self, latents: Tensor, is_first: bool, skip: int, kept: int, band: Band | None = None
    ) -> Tensor:
        if band is None:
            values = self._decoder(latents, is_first)
        else:
            values = decode_band(self._decoder, latents, is_first, band, self._reach)
        values = values[:, :, skip : skip + kept]
        self.magnitude = largest(values)
        return ref.to_uint8(values)


def _groups(windows: list[Window], batch: int) -> Iterator[list[Window]]:
    """Groups of neighbouring windows of one kind and size, at most `batch` in each."""
    group: list[Window] = []
    for window in windows:
        alike = group and (window.latents, *_kind(window)) == (group[0].latents, *_kind(group[0]))
        if group and (len(group) == batch or not alike):
            yield group
            group = []
        group.append(window)
    yield group


def _kind(window: Window) -> tuple[bool, int, int]:
    return window.is_first, window.skip, window.frames


def frames_shape(latent: Tensor) -> tuple[int, int, int, int]:
    """The shape [frames, height, width, 3] of what is decoded from latents [1, 48, T, H, W]."""
    _, _, frames, rows, columns = latent.shape
    _, down, across = VIDEO_STRIDE
    return video_frames(frames), rows * down, columns * across, 3


def planes_shape(frames: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """The shape [T, 3 H / 2, W] of `decoder_reference.to_yuv420` of frames [T, H, W, 3]."""
    count, height, width, _ = frames
    return count, height // 2 * 3, width
