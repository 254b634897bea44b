"""On a GPU too, a clip that would be wrong is an error that names what made it so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman import runtime
from magihuman.graphs.decoder.replay import CompiledDecoder
from magihuman.kernels import reference as ref
from magihuman.kernels.linear import activations
from magihuman.runtime import NonFiniteError
from magihuman.runtime.config import TurboVAEConfig
from magihuman.runtime.pipeline.decode import decode_frames
from magihuman.runtime.pipeline.finite import largest
from magihuman.runtime.weights import random_weights

DEVICE = torch.device("cuda")
SMALL = {"seconds": 2.0, "width": 64, "height": 96, "steps": 3}
BAD = (float("nan"), float("inf"))


@pytest.fixture(scope="module")
def engine(tiny_dir: Path):
    with runtime.load(tiny_dir, device="cuda") as loaded:
        yield loaded


@contextmanager
def spoilt(weight: Tensor, value: float) -> Iterator[None]:
    """One value of a weight, in place: captured graphs read it where it is."""
    before = weight.flatten()[0].clone()
    weight[(0,) * weight.ndim] = value
    try:
        yield
    finally:
        weight[(0,) * weight.ndim] = before


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("part", "name", "component", "stage"),
    [
        ("text_encoder", "encoder.layers.0.mlp.down_proj.weight", "text encoder", "text"),
        ("dit", "block.layers.2.mlp.down_proj.weight", "transformer", "denoise"),
        ("dit", "block.layers.2.mlp.up_gate_proj.weight", "transformer", "denoise"),
        ("dit", "block.layers.1.attention.linear_qkv.weight", "transformer", "denoise"),
        ("dit", "final_linear_video.weight", "transformer", "denoise"),
        ("audio_vae", "decoder.layers.0.bias", "audio decoder", "decode_audio"),
    ],
)
def test_one_bad_weight_is_named(
    engine: runtime.Engine, tmp_path: Path, part: str, name: str, component: str, stage: str,
    value: float,
) -> None:  # fmt: skip
    clean = engine.generate("hi", **SMALL)  # captures, where the machine does
    loaded = getattr(engine._parts, part)
    weight = dict(getattr(loaded, "model", loaded).named_parameters())[name]
    with spoilt(weight, value), pytest.raises(NonFiniteError) as raised:
        engine.generate("hi", save=tmp_path / "clip.mp4", **SMALL)
    assert (raised.value.component, raised.value.stage) == (component, stage)
    assert raised.value.step == (1 if part == "dit" else None)
    assert list(tmp_path.iterdir()) == []
    again = engine.generate("hi", **SMALL)
    assert np.array_equal(again.frames, clean.frames) and np.array_equal(again.audio, clean.audio)


@pytest.mark.parametrize("vae", ["plain", "fast"])
def test_the_decoder_is_named(tiny_dir: Path, tmp_path: Path, vae: str) -> None:
    """The fast decoder copies its weights, so they are spoilt before."""
    folder = tmp_path / "model"
    folder.mkdir()
    for each in tiny_dir.iterdir():
        (folder / each.name).symlink_to(each)
    (folder / "turbo_vae").unlink()
    (folder / "turbo_vae").mkdir()
    for file in (tiny_dir / "turbo_vae").iterdir():
        if file.suffix != ".ckpt":
            (folder / "turbo_vae" / file.name).write_bytes(file.read_bytes())
            continue
        content = torch.load(file, weights_only=True)
        content["ema_state_dict"]["module.decoder.mid_block.resnets.0.conv1.conv.bias"][0] = BAD[0]
        torch.save(content, folder / "turbo_vae" / file.name)
    try:
        engine = runtime.load(folder, device="cuda", vae=vae)
    except runtime.InvalidRequestError as error:  # "fast" needs Hopper
        pytest.skip(str(error))
    with engine:
        chunks = engine.generate_stream("hi", save=tmp_path / "clip.mp4", **SMALL)
        with pytest.raises(NonFiniteError) as raised:
            next(chunks)  # no chunk comes before the error
    assert (raised.value.component, raised.value.step) == ("video decoder", 1)
    assert not (tmp_path / "clip.mp4").exists()


@torch.inference_mode()
@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_compiled_decoder_tells_by_window(replays: bool, batch: int) -> None:
    config = dataclasses.replace(TurboVAEConfig(), decoder_block_out_channels=(64, 128, 256, 512))
    vae = random_weights.turbo_vae(config, 0, DEVICE, torch.bfloat16)
    decoder = CompiledDecoder(vae.decoder, vae.config, batch=batch, replays=replays)
    generator = torch.Generator(DEVICE).manual_seed(0)
    z = torch.randn(1, 48, 60, 4, 6, generator=generator, device=DEVICE)
    before = decode_frames(vae, z, decoder=decoder)
    late = z.clone()
    late[0, 0, 30, 0, 0] = float("nan")
    shown: list[int] = []
    with pytest.raises(NonFiniteError) as raised:
        decode_frames(
            vae, late, decoder=decoder, on_window=lambda frames, planes: shown.append(len(frames))
        )
    # The step is that of a group of windows, and those before it have been handed over.
    assert raised.value.step is not None and raised.value.step > 1
    assert len(shown) == raised.value.step - 1
    assert np.array_equal(decode_frames(vae, z, decoder=decoder), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_is_finite_only_where_all_values_are(dtype: torch.dtype) -> None:
    x = torch.randn(1, 192, 9, 33, 65, device=DEVICE).to(dtype)
    for layout in (x, x.contiguous(memory_format=torch.channels_last_3d), x[:, :, 2:5]):
        assert float(largest(layout)) == float(layout.abs().max())
        for value in (*BAD, -float("inf")):
            for at in ((0, 0, 0, 0, 0), (0, 100, 1, 20, 64), (0, 191, -1, -1, -1)):
                worse = layout.clone()
                worse[at] = value
                assert not np.isfinite(float(largest(worse)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamps_keep_nan(dtype: torch.dtype) -> None:
    x = torch.randn(300, 680, device=DEVICE).to(dtype)
    x[7, 4] = x[9, 7] = float("nan")
    for ours, plain in ((activations.swiglu7, ref.swiglu7), (activations.gelu7, ref.gelu7)):
        assert torch.equal(ours(x).isnan(), plain(x).isnan())
        assert plain(x).isnan().sum() == 2
