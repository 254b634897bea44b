"""A picture decoded in bands, by several devices or one after another by one: which part of it each
band needs.

The decoder only convolves, and norms over channels, so a pixel depends on what is near it alone. A
band of the picture is decoded from its latents and as many on each side as its convolutions reach
(`Reach.latents`); before each upsample, what only far pixels would need is cut off
(`Reach.before`). Beyond a cut a convolution reads zeros, which spoils what it reaches from there,
and that is cut off in turn: the pixels of the band are those of the whole picture.

Arithmetic alone, over an architecture with the fields of `magihuman.runtime`'s `TurboVAEConfig`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

AXES = (3, 4)  # of a video [B, C, T, H, W]: its rows, and its columns
# Of frames from which on a device decodes no window alone: at 1920x1088 one takes 20 GiB.
LARGE_PIXELS = 2**20
STEPS = 24  # of the search for bands of like cost


class Band(NamedTuple):
    """A part of a picture: latents begin .. end along one axis of `AXES`, all along the other."""

    axis: int
    begin: int
    end: int


@dataclass(frozen=True)
class Reach:
    """How far what follows reaches, on each side, in places of the size that it begins with.

    Attributes:
        latents: of the whole decoder.
        before: of what begins with each upsample, in order.
    """

    latents: int
    before: tuple[int, ...]

    @classmethod
    def of(cls, config: Any) -> Reach:
        """That of an architecture."""
        reach, before = 1, []  # the last convolution
        for width, wider, layers, upsample in reversed(list(_blocks(config))):
            reach += 2 * layers
            if upsample:
                reach = -(-(reach + 1) // 2)  # its convolution is over doubled places
                before.append(reach)
            reach += 2 * (width != wider)
        reach += 2 * config.decoder_layers_per_block[-1] + 1
        return cls(reach, tuple(reversed(before)))


def _blocks(config: Any) -> list[tuple[int, int, int, bool]]:
    """Of each up block, from the latents outwards: channels, those before it, residual blocks after
    its upsample, and whether it has one.
    """
    widths = config.decoder_block_out_channels[::-1]
    layers = config.decoder_layers_per_block[::-1][1:]
    upsamples = config.decoder_spatio_temporal_scaling[::-1]
    return list(zip(widths, (widths[0], *widths), layers, upsamples, strict=False))


class Range(NamedTuple):
    """Places begin .. end of a picture's axis, at some size."""

    begin: int
    end: int


def cut_latents(band: Band, length: int, reach: Reach) -> Range:
    """The latents that a band is decoded from. length: of its axis, in latents."""
    return _widened(Range(band.begin, band.end), reach.latents, length)


def cuts(band: Band, length: int, reach: Reach) -> list[Range]:
    """What is kept before each upsample, counted from where the tensor there begins; and last, what
    the band has of the last convolution's result.
    """
    held, kept, scale = cut_latents(band, length, reach), [], 1
    for far in reach.before:
        needed = _widened(Range(scale * band.begin, scale * band.end), far, scale * length)
        kept.append(Range(needed.begin - held.begin, needed.end - held.begin))
        held, scale = Range(2 * needed.begin, 2 * needed.end), 2 * scale
    kept.append(Range(scale * band.begin - held.begin, scale * band.end - held.begin))
    return kept


def _widened(part: Range, reach: int, length: int) -> Range:
    return Range(max(0, part.begin - reach), min(length, part.end + reach))


def cost(band: Band, length: int, config: Any) -> float:
    """Work of a band, as a share of that of the whole picture: products in residual blocks."""
    reach = Reach.of(config)
    first = cut_latents(band, length, reach)
    kept = iter(cuts(band, length, reach))
    width, whole, others = first.end - first.begin, length, 1  # frames and places across
    widest = config.decoder_block_out_channels[-1]
    work = total = 0
    # Products of channels, all over at the size before an upsample, and at that after it.
    sums = [(0, 2 * config.decoder_layers_per_block[-1] * widest**2)]
    for out, before, layers, _ in _blocks(config):
        sums.append((out * before + out**2 if out != before else 0, 2 * layers * out**2))
    doublings = [(False, False), *zip(*_doublings(config), strict=True)]
    for (early, late), (upsample, in_time) in zip(sums, doublings, strict=True):
        work, total = work + early * others * width, total + early * others * whole
        if upsample:
            part = next(kept)
            width, whole = 2 * (part.end - part.begin), 2 * whole
            others *= 4 if in_time else 2
        work, total = work + late * others * width, total + late * others * whole
    return work / total


def _doublings(config: Any) -> tuple[Sequence[bool], Sequence[bool]]:
    """Of each up block, whether it doubles rows and columns, and then whether frames too."""
    in_time = [not spatio_only for spatio_only in config.decoder_spatio_only[::-1]]
    return config.decoder_spatio_temporal_scaling[::-1], in_time


def split(length: int, ranks: int, axis: int, share: Callable[[Band], float]) -> list[Band]:
    """A band for each of so many devices, with as little work as can be for the one that has most.

    length: of the axis, at least `ranks`. share: the work of a band, which grows with it.
    """

    def within(budget: float) -> list[Band]:
        made, begin = [], 0
        for rank in range(ranks):
            end = begin + 1
            last = length - (ranks - rank - 1)  # one latent is left for each after it
            while end < last and share(Band(axis, begin, end + 1)) <= budget:
                end += 1
            made.append(Band(axis, begin, end))
            begin = end
        return made

    low, high = 0.0, share(Band(axis, 0, length))
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle)[-1].end == length else (middle, high)
    return within(high)


@functools.lru_cache(maxsize=64)
def _bands_of(axis: int, length: int, ranks: int, config: Any) -> tuple[tuple[Band, ...], float]:
    """The bands of a picture, and the largest cost of one."""

    def share(band: Band) -> float:
        return cost(band, length, config)

    bands = tuple(split(length, ranks, axis, share))
    return bands, max(share(band) for band in bands)


def bands_of(size: tuple[int, int], count: int, config: Any) -> tuple[Band, ...]:
    """A picture of so many rows and columns of latents in bands of like work, `count` of them or,
    if those are fewer, as many as it has latents along its longer side.
    """
    axis, length = longest_axis(*size)
    return _bands_of(axis, length, min(count, length), config)[0]


def longest_axis(rows: int, columns: int) -> tuple[int, int]:
    """The axis along which a picture of so many latents is cut, and its length."""
    return (AXES[0], rows) if rows > columns else (AXES[1], columns)


@dataclass(frozen=True)
class Turn:
    """What devices decode at once: a window each, or one window together.

    Attributes:
        windows: as they were given, in order.
        bands: of the one window, that of each device; none where each has a window of its own.
    """

    windows: tuple[Any, ...]
    bands: tuple[Band, ...] = ()


def schedule(
    windows: Sequence[Any], size: tuple[int, int], ranks: int, config: Any, is_large: bool
) -> list[Turn]:
    """The turns that take least: first windows side by side, then the others in bands.

    Args:
        windows: in order, each with its kept `frames`, which stand for its work.
        size: rows and columns of latents.
        ranks: devices.
        config: the architecture.
        is_large: whether a device has no room for a whole window, so that all come in bands.
    """
    axis, length = longest_axis(*size)
    whole = [tuple(windows[first : first + ranks]) for first in range(0, len(windows), ranks)]
    aside = [Turn(each) for each in whole]
    if ranks == 1 or length < ranks:
        return aside
    bands, most = _bands_of(axis, length, ranks, config)

    def work(turns: Sequence[Turn]) -> float:
        return sum(
            max(window.frames for window in turn.windows) * (most if turn.bands else 1.0)
            for turn in turns
        )

    mixed = [
        aside[:count] + [Turn((window,), bands) for turn in whole[count:] for window in turn]
        for count in range(len(whole))
    ]
    return mixed[0] if is_large else min([aside, *reversed(mixed)], key=work)
