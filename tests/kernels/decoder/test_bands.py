"""Bands of a picture: what they need, how they are shared out, and when they are worth it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import golden
from magihuman.kernels.decoder import bands
from magihuman.kernels.decoder.bands import Band, Reach
from magihuman.runtime.config import TurboVAEConfig
from magihuman.runtime.model.turbo_vae import TurboVAE, decode_band, plan_windows
from magihuman.runtime.weights import random_weights, tiny

CONFIG = TurboVAEConfig()
CLIP = plan_windows(32, CONFIG)  # of 5 s


@pytest.fixture(scope="module")
def vae() -> TurboVAE:
    return random_weights.turbo_vae(tiny.TURBO_VAE, 0, torch.device("cpu"), torch.float32)


def test_the_reach_is_that_of_the_decoder(vae: TurboVAE) -> None:
    """A value is changed in one column of latents, and pixels change so far and no farther."""
    reach = Reach.of(tiny.TURBO_VAE)
    assert reach == Reach.of(CONFIG) == Reach(15, (8, 7, 6))
    column, length = 20, 41
    x = torch.randn(1, 48, 1, 1, length)
    changed = x.clone()
    changed[..., column] += 1
    with torch.inference_mode():
        differs = (vae.decoder(x, True) != vae.decoder(changed, True))[0, :, 0].any(0).any(0)
    found = differs.nonzero().flatten()
    first, last = int(found[0]), int(found[-1])
    assert 16 * (column - reach.latents) <= first < 16 * (column - reach.latents + 1)
    assert 16 * (column + reach.latents) <= last < 16 * (column + reach.latents + 1)


@pytest.mark.parametrize("short", [None, 0, 1, 2])
def test_a_band_needs_what_is_kept_before_upsamples_and_no_less(
    vae: TurboVAE, short: int | None
) -> None:
    """What lies beyond is NaN in a decode of the whole picture. One place less, and it is seen."""
    reach, begin, end = Reach.of(tiny.TURBO_VAE), 18, 21
    before = [far - (number == short) for number, far in enumerate(reach.before)]
    upsamplers = [block.upsamplers[0] for block in vae.decoder.up_blocks if block.upsamplers]
    handles = []
    for number, (module, far) in enumerate(zip(upsamplers, before, strict=True)):

        def poison(module, given, scale=2**number, far=far):
            x = given[0].clone()
            x[..., : scale * begin - far] = x[..., scale * end + far :] = torch.nan
            return x, *given[1:]

        handles.append(module.register_forward_pre_hook(poison))
    try:
        with torch.inference_mode():
            made = vae.decoder(torch.randn(1, 48, 1, 1, 40), True)
    finally:
        for handle in handles:
            handle.remove()
    assert made[..., 16 * begin : 16 * end].isfinite().all() == (short is None)


@pytest.mark.parametrize("axis", bands.AXES)
@pytest.mark.parametrize("first", [True, False])
def test_the_plain_decoder_s_bands_are_parts_of_the_whole(
    vae: TurboVAE, axis: int, first: bool
) -> None:
    shape = [1, 48, 2, 2, 2]
    shape[axis] = 40
    x = torch.randn(shape)
    reach = Reach.of(tiny.TURBO_VAE)
    with torch.inference_mode():
        whole = vae.decoder(x, first)
        for begin, end in ((0, 7), (18, 21), (33, 40)):
            ours = decode_band(vae.decoder, x, first, Band(axis, begin, end), reach)
            # Convolutions sum in an order that depends on the size.
            part = whole.narrow(axis, 16 * begin, 16 * (end - begin))
            assert golden.error(ours, part) < 3e-5


@pytest.mark.parametrize("length", [8, 30, 56, 120])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bands_cover_a_picture_with_like_work(length: int, ranks: int) -> None:
    def share(band: Band) -> float:
        return bands.cost(band, length, CONFIG)

    made = bands.split(length, ranks, 4, share)
    assert [band.begin for band in made] == [0, *(band.end for band in made[:-1])]
    assert made[-1].end == length and all(band.begin < band.end for band in made)
    costs = [share(band) for band in made]
    assert 1 / ranks <= max(costs) <= 1
    even = [Band(4, r * length // ranks, (r + 1) * length // ranks) for r in range(ranks)]
    assert max(costs) <= max(map(share, even))


def test_the_work_of_a_whole_picture_is_one() -> None:
    assert bands.cost(Band(4, 0, 30), 30, CONFIG) == pytest.approx(1)
    assert bands.cost(Band(4, 0, 15), 30, CONFIG) > 0.5
    parts = [bands.cost(Band(4, 40, end), 120, CONFIG) for end in range(41, 80)]
    assert parts == sorted(parts)


@pytest.mark.parametrize(
    ("size", "ranks", "windows"),
    [
        ((16, 30), 2, [2, 2, 0]),  # the last window, of a few frames, in bands; 0 stands for that
        ((16, 30), 4, [4, 0]),
        ((32, 56), 4, [4, 0]),
        ((56, 32), 4, [4, 0]),
        ((16, 30), 8, [5]),
        ((68, 120), 8, [0, 0, 0, 0, 0]),
        ((1, 3), 4, [4, 1]),  # too small for four bands
        ((16, 30), 1, [1, 1, 1, 1, 1]),
    ],
)
def test_windows_and_bands_take_turns(size, ranks, windows) -> None:
    turns = bands.schedule(CLIP, size, ranks, CONFIG, is_large=False)
    assert [0 if turn.bands else len(turn.windows) for turn in turns] == windows
    assert [window for turn in turns for window in turn.windows] == CLIP
    for turn in turns:
        assert not turn.bands or (len(turn.bands) == ranks and len(turn.windows) == 1)
        axis = 3 if size[0] > size[1] else 4
        assert all(band.axis == axis for band in turn.bands)


def test_large_pictures_come_in_bands_alone() -> None:
    turns = bands.schedule(CLIP, (68, 120), 4, CONFIG, is_large=True)
    assert [len(turn.windows) for turn in turns] == [1] * 5
    assert all(len(turn.bands) == 4 for turn in turns)


def test_without_upsamples_there_is_nothing_to_cut_but_latents_and_pixels() -> None:
    flat = dataclasses.replace(
        CONFIG,
        decoder_spatio_temporal_scaling=(False,) * 4,
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    assert Reach.of(flat) == Reach(1 + 5 * 2 + 3 * 2 + 1, ())
    assert len(bands.cuts(Band(3, 2, 4), 99, Reach.of(flat))) == 1
