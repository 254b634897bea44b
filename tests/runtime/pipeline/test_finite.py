"""A clip that would be wrong is an error that names what made it so."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from sounds import write_sine
from torch import Tensor

import golden
from magihuman import runtime
from magihuman.graphs.decoder.compile import compile_decoder
from magihuman.graphs.decoder.passes.magnitude import with_magnitude
from magihuman.graphs.decoder.passes.trim import trim
from magihuman.graphs.decoder.replay import CompiledDecoder
from magihuman.runtime import NonFiniteError
from magihuman.runtime.config import TurboVAEConfig
from magihuman.runtime.model.turbo_vae import TurboVAE
from magihuman.runtime.pipeline.decode import decode_frames
from magihuman.runtime.pipeline.finite import Finite, largest

OPTIONS = {
    "seconds": 0.36, "width": 64, "height": 64, "steps": 3, "sr_width": 96, "sr_height": 96,
    "sr_steps": 2, "negative_prompt": "static",
}  # fmt: skip
BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.fixture(scope="module")
def loaded(tiny_dir):
    with runtime.load(tiny_dir, variant="base", sr="540p", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    voice = write_sine(tmp_path_factory.mktemp("voice") / "voice.wav", seconds=0.4)
    return {"image": Image.fromarray(pixels), "audio": voice}


@contextmanager
def spoilt(weight: Tensor, value: float) -> Iterator[None]:
    """One value of a weight, as a flipped bit on a disk would leave it."""
    before = weight.flatten()[0].clone()
    weight.view(-1)[0] = value
    try:
        yield
    finally:
        weight.view(-1)[0] = before


# Part of the engine, a weight of it, the component and the stage that are named, and the step.
PLACES = [
    ("text_encoder", "encoder.layers.0.mlp.down_proj.weight", "text encoder", "text", None),
    ("audio_vae", "encoder.layers.0.weight", "audio encoder", "audio", None),
    ("image_vae", "encoder.conv_in.weight", "image encoder", "image", None),
    ("dit", "block.layers.2.mlp.down_proj.weight", "transformer", "denoise", 1),
    ("dit", "final_linear_video.weight", "transformer", "denoise", 1),
    (
        "sr_dit", "block.layers.2.mlp.down_proj.weight", "super-resolution transformer",
        "super_resolve", 1,
    ),
    ("audio_vae", "decoder.layers.0.bias", "audio decoder", "decode_audio", None),
    ("turbo_vae", "decoder.conv_in.conv.weight", "video decoder", "decode_video", 1),
    ("turbo_vae", "decoder.conv_out.conv.bias", "video decoder", "decode_video", 1),
]  # fmt: skip


def weights_of(engine: runtime.Engine, part: str) -> dict[str, Tensor]:
    component = getattr(engine._parts, part)
    return dict(getattr(component, "model", component).named_parameters())


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("part", "name", "component", "stage", "step"), PLACES)
def test_one_bad_weight_is_named(
    loaded, inputs, tmp_path, part, name, component, stage, step, value
):
    path = tmp_path / "clip.mp4"
    with (
        spoilt(weights_of(loaded, part)[name], value),
        pytest.raises(NonFiniteError, match=f"from the {component} .stage {stage}") as raised,
    ):
        loaded.generate("hi", save=path, **OPTIONS, **inputs)
    error = raised.value
    assert (error.component, error.stage, error.step) == (component, stage, step)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_hands_no_wrong_chunk_over(loaded):
    weight = weights_of(loaded, "turbo_vae")["decoder.conv_in.conv.weight"]
    with (
        spoilt(weight, BAD[0]),
        loaded.generate_stream("hi", **OPTIONS) as stream,
        pytest.raises(NonFiniteError, match="step 1"),
    ):
        next(stream)


@pytest.mark.parametrize("step", [1, 3])
def test_the_first_bad_step_is_named(loaded, step):
    """Whatever follows it is bad, too."""
    model, calls = loaded._parts.dit, []

    def spoil(module, arguments, result):
        calls.append(0)
        if len(calls) == 2 * step - 1:  # with guidance, two calls a step
            result[1][0, 0] = float("inf")
        return result

    handle = model.register_forward_hook(spoil)
    try:
        with pytest.raises(NonFiniteError) as raised:
            loaded.generate("hi", **OPTIONS)
    finally:
        handle.remove()
    assert (raised.value.component, raised.value.step) == ("transformer", step)


def test_what_is_not_used_is_not_looked_at(loaded, inputs, plain):
    """The velocity of a given voice, and of the sound in super-resolution."""
    handles = [
        model.final_linear_audio.register_forward_hook(lambda *_: _[2] * float("nan"))
        for model in (loaded._parts.dit, loaded._parts.sr_dit)
    ]
    try:
        clip = loaded.generate("hi", **OPTIONS, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert np.array_equal(clip.frames, plain.frames) and np.array_equal(clip.audio, plain.audio)


@pytest.fixture(scope="module")
def plain(loaded, inputs):
    return loaded.generate("hi", **OPTIONS, **inputs)


def test_the_engine_stays_usable(loaded, inputs, plain):
    weight = weights_of(loaded, "dit")["final_linear_video.weight"]
    with spoilt(weight, BAD[0]), pytest.raises(NonFiniteError):
        loaded.generate("hi", **OPTIONS, **inputs)
    clip = loaded.generate("hi", **OPTIONS, **inputs)
    assert np.array_equal(clip.frames, plain.frames) and np.array_equal(clip.audio, plain.audio)


def test_verifying_finds_it_too(tiny_dir):
    options = {"seconds": 0.2, "width": 64, "height": 64, "steps": 2}
    with runtime.load(tiny_dir, device="cpu", compile=False) as engine:
        for part, name, component, *_ in (PLACES[0], *PLACES[3:5], *PLACES[6:]):
            with (
                spoilt(weights_of(engine, part)[name], BAD[0]),
                pytest.raises(NonFiniteError, match=f"from the {component}"),
            ):
                runtime.verify(engine, ["hi"], **options)


def test_the_error_goes_from_process_to_process():
    error = NonFiniteError("video decoder", "decode_video", 3)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.component, again.stage, again.step) == (
        str(error), "video decoder", "decode_video", 3,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 48, 4, 9, 33)])
def test_largest_is_finite_only_where_all_values_are(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert float(largest(x)) == float(x.abs().max())
    for value in BAD:
        for at in (0, x.numel() // 2, x.numel() - 1):
            worse = x.clone()
            worse.view(-1)[at] = value
            assert not np.isfinite(float(largest(worse)))


def test_watching_keeps_the_order_and_forgets_what_began_again():
    finite = Finite()
    finite.watch(torch.tensor([BAD[0]]), "first")
    finite.start()
    finite.watch(torch.ones(2), "second", 1)
    finite.watch(torch.tensor([1.0, BAD[1]]), "third", 2)
    finite.watch(None, "nothing")
    finite.watch(torch.tensor([BAD[0]]), "fourth", 3)
    with pytest.raises(NonFiniteError) as raised:
        finite.read().check("stage")
    assert (raised.value.component, raised.value.step) == ("third", 2)
    finite.read().check("stage")  # read once


# -- the rewritten decoder, on the CPU --------------------------------------------------------


@pytest.fixture(scope="module")
def vae() -> TurboVAE:
    """The golden decoder."""
    values = golden.META["turbo_vae"]["config"]
    values = {**values, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}
    vae = TurboVAE(TurboVAEConfig.from_dict(values, "golden"))
    data = golden.load("turbo_vae")
    weights = {key.removeprefix("w."): value for key, value in data.items() if key[:2] == "w."}
    vae.load_state_dict(weights, strict=True)
    return vae.eval().requires_grad_(False)


def test_the_graph_gives_the_magnitude_of_the_frames_it_keeps(vae):
    latents = torch.randn(1, 48, 7, 4, 6, generator=torch.Generator().manual_seed(1))
    latents = latents.contiguous(memory_format=torch.channels_last_3d)
    module, _ = compile_decoder(vae.decoder, vae.config, True, torch.float32)
    with torch.inference_mode():
        whole = with_magnitude(trim(module, 7, 0, 25))
        pixels, magnitude = whole(latents)
        bias = vae.decoder.conv_out.conv.bias.abs().max()
        # The bias is added afterwards, and so counts in both terms.
        assert float(pixels.abs().max()) <= float(magnitude) <= float(pixels.abs().max() + 3 * bias)
        assert torch.equal(pixels, trim(module, 7, 0, 25)(latents)[0])
        part = with_magnitude(trim(module, 7, 0, 4))
        assert float(part(latents)[1]) <= float(magnitude)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    """Of two windows."""
    return torch.randn(1, 48, 15, 4, 6, generator=torch.Generator().manual_seed(1))


def test_the_rewritten_decoder_tells_by_window(vae, latents):
    decoder = CompiledDecoder(vae.decoder, vae.config, budget_bytes=0, replays=False)
    clean = decode_frames(vae, latents, decoder=decoder)
    assert clean.shape == (57, 64, 96, 3)
    late = latents.clone()
    late[0, 0, 12, 0, 0] = float("nan")  # in the second window alone
    seen = []
    with pytest.raises(NonFiniteError) as raised:
        decode_frames(vae, late, decoder=decoder, on_window=lambda frames, planes: seen.append(0))
    assert (raised.value.component, raised.value.step) == ("video decoder", 2)
    assert len(seen) == 1


# A decoder is rewritten for each, in seconds; each weight and each value is once among the first.
FIRST, LAST = "conv_in.conv.weight", "conv_out.conv.bias"
PAIRS = [(FIRST, BAD[0]), (LAST, BAD[1]), (FIRST, BAD[2])]
MORE = [(LAST, BAD[0]), (FIRST, BAD[1]), (LAST, BAD[2])]


@pytest.mark.parametrize(
    ("name", "value"),
    [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.thorough) for pair in MORE)],
)
def test_the_rewritten_decoder_tells_of_a_bad_weight(vae, latents, name, value):
    with spoilt(vae.decoder.get_parameter(name), value):
        spoilt_decoder = CompiledDecoder(vae.decoder, vae.config, budget_bytes=0, replays=False)
    with pytest.raises(NonFiniteError, match="step 1"):
        decode_frames(vae, latents, decoder=spoilt_decoder)
