"""CUDA graphs of the compiled window decoder, one for each kind and size of window, replayed.

`cuda_graphs` says which are kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from magihuman.graphs.cuda_graphs import Captures
from magihuman.graphs.decoder.compile import compile_decoder
from magihuman.graphs.decoder.passes.crop import crop
from magihuman.graphs.decoder.passes.magnitude import with_magnitude
from magihuman.graphs.decoder.passes.trim import trim
from magihuman.graphs.decoder.peak import peak_bytes, reserve
from magihuman.graphs.rewrite import CompileReport
from magihuman.kernels.decoder.bands import AXES, Band, Reach, cut_latents, cuts

log = logging.getLogger("magihuman")
Call = tuple[Sequence[int], bool, int, int]  # a decoder's arguments, the shape alone of the latents

# Latents of a frame up to which windows are decoded together: 2 % faster at 480x256 (480 of them),
# for 4 GiB more.
SMALL = 512
BATCH = 3
STRIDE = 16  # pixels of a latent's side
COLORS = 3
# Sizes of which the graph is kept where none is captured: four kinds of window in four bands.
UNCAPTURED = 16
ROOM = 1.03  # of the memory that a graph's tensors take, since they leave gaps


class Size(NamedTuple):
    """A kind of window: latents of a batch of clips, whether each is a clip's first, and the frames
    kept of those that a window gives; and of these pictures the band that is decoded, if not all.
    """

    batch: int
    frames: int
    rows: int
    columns: int
    is_first: bool
    skip: int
    kept: int
    band: Band | None = None

    @property
    def latents(self) -> int:
        """The number of latents of all clips and frames."""
        return self.batch * self.frames * self.rows * self.columns

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of the pixels that are kept: [batch, kept, 16 rows, 16 columns, 3]."""
        sides = [self.rows, self.columns]
        if self.band is not None:
            sides[AXES.index(self.band.axis)] = self.band.end - self.band.begin
        return self.batch, self.kept, STRIDE * sides[0], STRIDE * sides[1], COLORS

    @property
    def length(self) -> int:
        """Latents along the axis of the band."""
        assert self.band is not None
        return (self.rows, self.columns)[AXES.index(self.band.axis)]


@dataclass
class _Captured:
    """A graph with its fixed input and outputs."""

    graph: torch.cuda.CUDAGraph
    latents: Tensor
    pixels: Tensor
    magnitude: Tensor


class CompiledDecoder:
    """Windows of latents to uint8 pixels on a GPU: compiles once, captures each size when first
    seen.

    Not safe to call from several threads at once.

    Attributes:
        magnitude: a scalar, fp32: of what the last call's pixels were made from, NaN or infinite
            where one of the values was; the next call may overwrite it.
    """

    def __init__(
        self,
        decoder: nn.Module,
        config: Any,
        *,
        dtype: torch.dtype = torch.uint8,
        batch: int = BATCH,
        budget_bytes: int | None = None,
        capturing: AbstractContextManager[Any] | None = None,
        replays: bool = True,
    ) -> None:
        """Compile both kinds of window; nothing is captured yet.

        Args:
            decoder: as of `compile_decoder`, in bf16 on the GPU; its weights are copied in another
                layout.
            config: its architecture.
            dtype: of the pixels; a float dtype gives the decoder's own values.
            batch: windows of one size, at most, that a caller should decode at once where they
                are small.
            budget_bytes: of all captured graphs; by default a quarter of the memory free now. One
                graph is kept even where it passes the budget alone.
            capturing: entered while a size is captured, when nothing but the sound of the same
                clip may run on the device.
            replays: False launches kernels one by one, and nothing is captured: activations are
                freed as it goes, and windows are decoded one at a time.
        """
        self._batch, self._replays = batch if replays else 1, replays
        self._reach = Reach.of(config)
        self._device = next(decoder.parameters()).device
        self._dtype = dtype
        self.magnitude = torch.zeros((), dtype=torch.float32, device=self._device)
        self._modules: dict[bool, fx.GraphModule] = {}
        self.reports: dict[bool, CompileReport] = {}
        for is_first in (True, False):
            module, report = compile_decoder(decoder, config, is_first, dtype)
            self._modules[is_first], self.reports[is_first] = module, report
        _share_buffers(self._modules[True], self._modules[False])
        self._captures = Captures[Size, _Captured](self._device, budget_bytes, capturing)
        self._uncaptured: dict[Size, tuple[fx.GraphModule, int]] = {}  # and bytes of its tensors

    def __call__(
        self, latents: Tensor, is_first: bool, skip: int, kept: int, band: Band | None = None
    ) -> Tensor:
        """Decode a batch of windows of one kind, or a band of them.

        latents: [B, 48, T, H, W], of any strides; skip, kept: frames of each window that are not
        wanted at its start, and wanted after that. Returns [B, kept, 16 H, 16 W, 3], of a band its
        own rows or columns; the next call of the same size may overwrite it.

        Raises:
            torch.OutOfMemoryError: a new size has no room, even with every other graph given up.
        """
        size = _size(latents.shape, is_first, skip, kept, band)
        latents = self._needed(latents, size)
        if not self._replays:
            return self._launch(latents, size)
        captured = self._prepare(size)
        captured.latents.copy_(latents)
        captured.graph.replay()
        self.magnitude = captured.magnitude
        return captured.pixels

    def _launch(self, latents: Tensor, size: Size) -> Tensor:
        """Run the rewritten graph without capturing it."""
        if size not in self._uncaptured:
            module = self._trimmed(size)
            while len(self._uncaptured) >= UNCAPTURED:
                del self._uncaptured[next(iter(self._uncaptured))]
            self._uncaptured[size] = module, int(ROOM * peak_bytes(module, latents))
        module, room = self._uncaptured[size]
        weight: Tensor = module.get_buffer("conv_in.conv.weight")
        with torch.inference_mode():
            block = reserve(room, self._device)
            pixels = torch.empty(size.pixels, dtype=self._dtype, device=self._device)
            del block  # after the pixels, which live on, lie elsewhere
            x = latents.to(weight.dtype, memory_format=torch.channels_last_3d)
            made, magnitude = module(x)
            pixels.copy_(made)
            # In place: a new tensor would be cut from the block.
            self.magnitude.copy_(magnitude)
            del x, made, magnitude
        if self._device.type == "cuda":
            # Or the caller's next tensors would be cut from the block, and the next window's
            # find no room beside what is left of it.
            torch.cuda.empty_cache()
        return pixels

    def prepare(self, calls: Iterable[Call]) -> None:
        """Capture what these calls need now, the largest first: a smaller one fits into the blocks
        of memory of a larger one, not the other way round.
        """
        if not self._replays:
            return
        sizes = {_size(*call) for call in calls}
        for size in sorted(sizes, key=lambda size: (size.latents, size.kept), reverse=True):
            self._prepare(size)

    def batch_of(self, rows: int, columns: int) -> int:
        """How many windows of latents of this size a caller should decode at once, at most."""
        return batch_of(rows, columns, self._batch)

    def _prepare(self, size: Size) -> _Captured:
        """The captured graph of this size, captured now if need be."""
        if size not in self._captures.kept:
            what = f"windows of {size.frames} latents of {size.columns}x{size.rows}"
            self._captures.add(size, size.latents, 0, lambda: self._capture(size), what)
        return self._captures.use(size)

    def release(self) -> None:
        """Give every graph up; sizes are captured again when they are asked for."""
        self._captures.release()

    def _trimmed(self, size: Size) -> fx.GraphModule:
        """The graph of this size's frames and their magnitude."""
        module = trim(self._modules[size.is_first], size.frames, size.skip, size.kept)
        if size.band is not None:
            module = crop(module, size.band.axis, cuts(size.band, size.length, self._reach))
        return with_magnitude(module)

    def _needed(self, latents: Tensor, size: Size) -> Tensor:
        """The latents that a size's pixels come from, of those of whole pictures."""
        if size.band is None:
            return latents
        part = cut_latents(size.band, size.length, self._reach)
        return latents.narrow(size.band.axis, part.begin, part.end - part.begin)

    def _capture(self, size: Size) -> _Captured:
        module = self._trimmed(size)
        start = time.perf_counter()
        weight: Tensor = module.get_buffer("conv_in.conv.weight")
        shape = size.batch, weight.shape[1], size.frames, size.rows, size.columns
        whole = torch.zeros((), dtype=weight.dtype, device=self._device).expand(shape)
        latents = self._needed(whole, size).contiguous(memory_format=torch.channels_last_3d)
        # Outside the pool, which is whole again for the next size when this one's graph is done.
        pixels = torch.empty(size.pixels, dtype=self._dtype, device=self._device)
        magnitude = torch.zeros((), dtype=torch.float32, device=self._device)
        room = int(ROOM * peak_bytes(module, latents))

        def warm_up() -> None:
            reserve(room, self._device)
            module(latents)
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()  # what cuDNN tried stays out of the way of the pool

        def run() -> None:
            reserve(room, self._device)
            made, largest = module(latents)
            pixels.copy_(made)
            magnitude.copy_(largest)

        graph, _ = self._captures.record(warm_up, run)
        log.info("captured the decoder of %s in %.1f s", size, time.perf_counter() - start)
        return _Captured(graph, latents, pixels, magnitude)


def batch_of(rows: int, columns: int, most: int = BATCH) -> int:
    """How many windows of so many latent rows and columns a graph is of: of small ones, `most`."""
    return most if rows * columns <= SMALL else 1


def _size(
    shape: Sequence[int], is_first: bool, skip: int, kept: int, band: Band | None = None
) -> Size:
    batch, _, frames, rows, columns = shape
    return Size(batch, frames, rows, columns, is_first, skip, kept, band)


def _share_buffers(owner: nn.Module, other: nn.Module) -> None:
    """Let `other` hold the buffers of `owner`, which are the same by name."""
    for name, value in owner.named_buffers():
        *path, last = name.split(".")
        setattr(other.get_submodule(".".join(path)), last, value)
