"""Windows of frames decoded band by band: the same pixels in less memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from magihuman import runtime
from magihuman.graphs.decoder import CompiledDecoder
from magihuman.graphs.decoder.compile import compile_decoder
from magihuman.graphs.decoder.passes.crop import crop
from magihuman.graphs.decoder.passes.trim import trim
from magihuman.graphs.decoder.peak import peak_bytes
from magihuman.kernels.decoder.bands import Reach, bands_of, cut_latents, cuts
from magihuman.runtime import config
from magihuman.runtime.engine import assemble
from magihuman.runtime.memory import Clips, Placer, estimate, plan_memory, synthetic_parts
from magihuman.runtime.memory.outlook import specs_of
from magihuman.runtime.memory.plan import GIB, VIDEO, MemoryPlan, NoPlanError
from magihuman.runtime.model import TurboVAE
from magihuman.runtime.pipeline import BandedDecoder, PlainDecoder, decode_frames
from magihuman.runtime.weights import random_weights
from magihuman.runtime.weights.tiny import TURBO_VAE

CPU = torch.device("cpu")
BANDS = estimate.BANDS[1:]
# Longer than twice what a pixel depends on, and no multiple of any number of bands.
SIZES = [(2, 37), (35, 3)]
WINDOWS = [(True, 0, 5), (False, 4, 4)]  # whether it is the first, and frames skipped and kept


@pytest.fixture(scope="module")
def vae() -> TurboVAE:
    return random_weights.turbo_vae(TURBO_VAE, 1, CPU, torch.float32)


def latents(frames: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, config.LATENT_CHANNELS, frames, *size, generator=generator)


def assert_close(ours: Tensor, whole: Tensor) -> None:
    """Sums of another order round a level up or down now and then."""
    assert ours.shape == whole.shape and whole.float().std() > 10
    off = (ours.int() - whole.int()).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bands", BANDS)
def test_bands_make_the_frames_of_the_whole(vae, bands, size):
    plain, banded = PlainDecoder(vae), BandedDecoder(PlainDecoder(vae), TURBO_VAE, bands)
    assert len(bands_of(size, bands, TURBO_VAE)) == bands
    for window in WINDOWS:
        z = latents(2, size)
        assert_close(banded(z, *window), plain(z, *window))
        assert float(banded.magnitude) == pytest.approx(float(plain.magnitude), rel=1e-5)


@torch.inference_mode()
def test_a_picture_of_fewer_latents_than_bands(vae):
    z = latents(1, (2, 3))
    banded = BandedDecoder(PlainDecoder(vae), TURBO_VAE, 4)
    assert_close(banded(z, True, 0, 1), PlainDecoder(vae)(z, True, 0, 1))


@torch.inference_mode()
def test_one_band_may_be_asked_for(vae):
    z, (first, _) = latents(1, (2, 37)), bands_of((2, 37), 2, TURBO_VAE)
    banded = BandedDecoder(PlainDecoder(vae), TURBO_VAE, 3)
    assert torch.equal(banded(z, True, 0, 1, first), PlainDecoder(vae)(z, True, 0, 1, first))


@torch.inference_mode()
@pytest.mark.parametrize("column", [0, 36])
def test_what_is_not_finite_in_one_band_is_told(vae, column):
    z = latents(1, (2, 37))
    z[..., column] = float("nan")
    banded = BandedDecoder(PlainDecoder(vae), TURBO_VAE, 4)
    banded(z, True, 0, 1)
    assert not banded.magnitude.isfinite()
    with pytest.raises(runtime.NonFiniteError, match="video decoder"):
        decode_frames(vae, z, decoder=banded)


def test_a_clip_of_several_windows(vae):
    """By the plain decoder, and by the rewritten graph, launched as with little memory."""
    z = latents(9, (2, 17))
    whole = decode_frames(vae, z)
    rewritten = CompiledDecoder(vae.decoder, vae.config, replays=False, budget_bytes=0)
    for decoder in (PlainDecoder(vae), rewritten):
        ours = decode_frames(vae, z, decoder=BandedDecoder(decoder, TURBO_VAE, 3))
        assert_close(torch.from_numpy(ours), torch.from_numpy(whole))
    assert len({size.band for size in rewritten._uncaptured}) == 3


# -- the plan ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    return synthetic_parts(torch.bfloat16, "int8")


def planned(parts, limit_gib: float, size: str = "1080p", **options) -> MemoryPlan:
    specs = specs_of("distill", size, "int8")
    return plan_memory(parts, *specs, int(limit_gib * GIB), Clips(is_compiled=True, **options))


def test_windows_are_cut_where_they_have_no_room_else(parts):
    """Into as few bands as there is a plan for, without graphs of the decoder."""
    made = {limit: planned(parts, limit) for limit in (40, 20, 14)}
    assert [plan.bands for plan in made.values()] == [1, 2, 3]
    for limit, plan in made.items():
        assert plan.peak_bytes <= limit * GIB and plan.as_dict()["bands"] == plan.bands
        whole, placer = plan.bands == 1, Placer(plan, CPU)
        assert placer.bands == plan.bands
        assert placer.replays_frames == (whole and plan.replays and "decode" not in plan.spared)
    assert planned(parts, 14, "540p").bands == 1


def test_what_cannot_be_cut_is_not(parts):
    own = [part for part in parts if part.name == VIDEO]
    for options in ({"vae": "tensorrt"}, {"is_compiled": False}):
        with pytest.raises(NoPlanError, match="the stage decode takes"):
            plan_memory(parts, *specs_of("distill", "1080p", "int8"), 20 * GIB,
                        Clips(**({"is_compiled": True} | options)))  # fmt: skip
    assert planned(own, 60, ranks=2).bands == 1  # which share a window
    with pytest.raises(NoPlanError, match="the stage super_resolve takes"):
        planned(parts, 8)  # bands do not help


def test_the_plain_decoder_is_planned_with_its_own_memory(parts):
    fast, plain = (planned(parts, 60, vae=vae).stages[-1] for vae in ("fast", "plain"))
    assert fast.name == plain.name == "decode"
    assert plain.working_bytes - fast.working_bytes > 5 * GIB
    assert planned(parts, 60, vae="plain").bands == 1 < planned(parts, 30, vae="plain").bands


@pytest.mark.parametrize(("size", "bands"), [((68, 120), 4), ((32, 56), 2)])
def test_bands_take_the_share_of_memory_that_is_planned(size, bands):
    """As all tensors of the rewritten graph have it, at the published sizes of clips."""
    vae = random_weights.turbo_vae(TURBO_VAE, 1, CPU, torch.bfloat16)
    module, _ = compile_decoder(vae.decoder, TURBO_VAE, False)
    reach, whole = Reach.of(TURBO_VAE), torch.zeros((), dtype=torch.bfloat16)
    x = whole.expand(1, config.LATENT_CHANNELS, 9, *size)

    def peak(of, latents: Tensor) -> int:
        return peak_bytes(of, latents.contiguous(memory_format=torch.channels_last_3d))

    most = 0
    for band in bands_of(size, bands, TURBO_VAE):
        length, part = x.shape[band.axis], cut_latents(band, x.shape[band.axis], reach)
        cut = crop(trim(module, 9, 4, 28), band.axis, cuts(band, length, reach))
        most = max(most, peak(cut, x.narrow(band.axis, part.begin, part.end - part.begin)))
    pixels = 16 * size[1], 16 * size[0]
    frames = 3 * estimate.BYTES_PER_DECODED_PIXEL * pixels[0] * pixels[1]
    share = (estimate.decoding_bytes(*pixels, True, bands=bands) - frames) / (
        estimate.decoding_bytes(*pixels, True)
    )
    assert share - 0.15 < most / peak(trim(module, 9, 4, 28), x) <= share


def test_an_engine_decodes_as_its_plan_says(tiny_dir):
    with runtime.load(tiny_dir, device="cpu") as engine:
        for bands in (1, 2):
            placer = Placer(MemoryPlan(0, {}, True, (), 0, bands=bands), CPU)
            components = assemble.with_bands(engine._parts, placer)
            assert isinstance(components.decoder, BandedDecoder) == (bands > 1)
        assert assemble.with_bands(engine._parts, Placer(None, CPU)) is engine._parts
        clip = {"seconds": 0.2, "width": 640, "height": 32, "steps": 1}
        whole = engine.generate("hello", **clip)
        engine._parts = components
        ours = engine.generate("hello", **clip)
    assert_close(torch.from_numpy(np.asarray(ours.frames)), torch.from_numpy(whole.frames))
