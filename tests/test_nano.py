"""The training of the nano model: every stage for a moment; what it trains is what runs."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from autoencoders import sound, video
from diffusion import dit, prompts, sampler, transformer
from diffusion.distill import Matcher
from diffusion.stock import Clips, Pair, Stock
from magihuman import runtime
from magihuman.runtime import config
from magihuman.runtime.evaluate.model_score import SECONDS, score_model
from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.pipeline import denoise
from publish import reopen
from training import Average, Run, Standardized, finish, load, save
from world import scene
from world.captions import attributes, caption, draw
from world.voice import FRAME, speak, with_mouth

CPU = torch.device("cpu")
SIZE_PX, LATENTS = 32, 2
LENGTHS = dit.AUDIO
TRIAL = ("--batch", "2", "--size", str(SIZE_PX), "--stock", "4", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few clips at a time, to draw and to show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.stock.DRAWN", 4)
        patch.setattr("training.COUNTED_BATCHES", 4)
        patch.setattr("diffusion.preview.COUNT", 2)
        patch.setattr("diffusion.preview.AUDIO", 21)
        patch.setattr("diffusion.dit.AUDIO", (21, 9, 8))
        yield


def stage(out: Path, name: str, *options: str) -> None:
    before = sys.argv
    sys.argv = [
        "train.py",
        "--out",
        str(out),
        "--stage",
        name,
        "--minutes",
        "1e-4",
        *TRIAL,
        *options,
    ]
    try:
        train.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A step of every stage, and the model written from them."""
    folder = tmp_path_factory.mktemp("nano")
    for name in ("vae", "sound", "dit"):
        stage(folder, name)
    stage(folder, "distill", "--matching", "0.5")
    stage(folder, "export")
    return folder


@pytest.fixture(scope="module")
def engine(out):
    with runtime.load(out / "model", device="cpu") as loaded:
        yield loaded


@pytest.fixture
def clips() -> Clips:
    """Two clips of noise, with captions of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    latents = Pair(
        torch.randn(2, 48, 3, 4, 4, generator=generator),
        torch.randn(2, 9, 64, generator=generator),
    )
    latents.video[:, video.CHANNELS :] = 0
    texts = ["A woman says: ba", "A man with long red hair in a bun smiles and says: di do mu mu"]
    ids, _ = prompts.tokenize(prompts.train_tokenizer(), texts)
    return Clips(latents, ids, ids != prompts.PAD, torch.tensor([False, False]))


def whole(clips: Clips) -> sampler.Task:
    """Nothing given."""
    frames = clips.latents.video.shape[2]
    return sampler.Task(torch.ones(2, 1, frames, 1, 1), torch.ones(2, 1, 1))


# -- what is trained is what runs ---------------------------------------------------------------


def test_the_model_written_makes_clips(engine, tmp_path):
    clip = engine.generate(
        "A child in a red shirt says: ma", seconds=0.4, width=64, height=64, save=tmp_path / "a.mp4"
    )
    assert clip.frames.shape == (9, 64, 64, 3)
    assert (tmp_path / "a.mp4").stat().st_size > 1000


def test_components_fit_the_package(out):
    files = [file for file in (out / "model").rglob("*") if file.is_file()]
    parts = [file for file in files if file.parent.name != "score"]
    assert sum(file.stat().st_size for file in parts) <= 16e6
    assert sum(file.stat().st_size for file in files) <= 17e6
    assert (out / "model" / "README.md").read_text().startswith("---\nlicense: apache-2.0")


def test_its_folder_has_what_the_score_needs(out, engine, monkeypatch):
    monkeypatch.setattr("magihuman.runtime.evaluate.model_score.SIZE_PX", 32)
    monkeypatch.setattr("magihuman.runtime.evaluate.model_score.SECONDS", 0.4)
    found = score_model(engine, out / "model", clips=1)
    assert (found.prompts, found.references) == (1, 1)
    assert len(found.broken) == 6  # after a step of training


def test_latents_of_an_image_are_those_trained_on(out, engine):
    """Diffusers' encoder, from the published layout in fp16, against all frames at once."""
    from PIL import Image

    model = video.VideoAutoencoder()
    load(out / "vae.pt", model)
    data = scene.make(1, 21, random.Random(2), torch.Generator().manual_seed(2), size_px=SIZE_PX)
    pixels = (data.frames[:, :, :9] * 255).round()
    with torch.no_grad():
        latents = model.eval().encode(pixels / 255 * 2 - 1)
    assert latents.shape == (1, 48, 3, LATENTS, LATENTS)
    image = Image.fromarray(pixels[0, :, 0].byte().permute(1, 2, 0).numpy())
    with engine.hold(runtime.Request("-", seconds=0.4, width=64, height=64)) as pipeline:
        ours = pipeline.components.image_vae.encode(image, SIZE_PX, SIZE_PX)
    # fp16 weights, 2^-11 each, through some twenty layers.
    assert (ours - latents[:, :, :1]).norm() < 0.01 * latents[:, :, :1].norm()
    assert latents[:, : video.CHANNELS].std() > 0.05
    assert not ours[:, video.CHANNELS :].abs().max() > 1e-2


def test_all_frames_at_once_are_diffusers_chunks(out):
    from magihuman.runtime.model.image_encoder import wan_vae

    model = video.VideoAutoencoder()
    load(out / "vae.pt", model)
    model.eval()
    vae = wan_vae(video.WAN_BASE_DIM)
    vae.encoder, vae.quant_conv = model.encoder, model.quant_conv
    frames = torch.rand(1, 3, 13, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        theirs = model.norm(vae.encode(frames).latent_dist.mode()) * model.used
        ours = model.encode(frames)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # sums in another order


def test_frames_decode_as_in_training(out, engine):
    model = video.VideoAutoencoder()
    load(out / "vae.pt", model)
    latents = torch.randn(1, 48, 7, 4, 4, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        frames = model.eval().decode(latents, True)
    with engine.hold(runtime.Request("-", seconds=0.4, width=64, height=64)) as pipeline:
        ours, _ = pipeline.decode(latents, torch.zeros(1, 25, 64))
    theirs = ((frames[0] / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 3, 0).numpy()
    assert ours.shape == theirs.shape == (25, 64, 64, 3)
    assert abs(ours - theirs).max() < 3  # truncated, and from fp16 weights


def test_sound_goes_through_as_in_training(out, engine):
    model = sound.SoundAutoencoder()
    load(out / "sound.pt", model)
    wave = sound.voices(1, random.Random(3), torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents = model.eval().encode(wave)
    with engine.hold(runtime.Request("-", seconds=0.4, width=64, height=64)) as pipeline:
        oobleck = pipeline.components.audio_vae.model
        mean, std = oobleck.encode(wave)
        made, expected = oobleck.decode(latents), model.oobleck.decode(latents)
    assert (mean - latents).norm() < 0.01 * latents.norm()
    # The weights that make it are not zero, see `write`.
    assert std.mean() == pytest.approx(sound.ENCODER_STD, rel=0.1)
    assert (made - expected).norm() < 0.01 * expected.norm()


def test_a_batch_is_its_clips(clips):
    """The runtime's transformer, clip by clip, against all at once; padding is not seen."""
    model = dit.Model().eval()
    torch.manual_seed(5)
    for name, value in model.transformer.named_parameters():
        if value.ndim == 1 or "final" in name:
            torch.nn.init.normal_(value, std=0.1)  # which start as zeros
    with torch.no_grad():
        found = model(*clips.latents, clips)
        single = DiT(transformer.CONFIG, torch.float32)
        single.load_state_dict(model.transformer.dit.state_dict())
        for i in range(2):
            is_text = clips.is_text[i]
            ids = clips.ids[i, is_text][None]
            text = model.text(ids, torch.ones_like(ids, dtype=torch.bool))[0]
            layout = tokens.Layout(3, 4, 4, 9, len(text))
            velocity = denoise.velocity_of(single, layout, text, "v2")
            wanted = velocity(*(value[i : i + 1] for value in clips.latents))
            for ours, theirs in zip(found, wanted, strict=True):
                assert theirs.std() > 0.1
                # fp32 sums in another order, through eight layers.
                torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-3, atol=1e-4)


def test_prompts_embed_as_in_training(out, engine):
    model = dit.Model()
    facts = load(out / "distill.pt", model)
    text = caption(draw(random.Random(0)), random.Random(0))
    ids, count = prompts.tokenize(prompts.tokenizer_of(facts["tokenizer"]), [text])
    ours, _ = engine._parts.text_encoder.tokenize(text)
    assert ours.tolist() == ids[:, :count].tolist()
    with torch.no_grad():
        wanted = model.text(ids, ids != prompts.PAD)[0, :count]
    found = engine._parts.text_encoder.encode(ours)
    # The runtime encodes in bf16: 2^-9 a rounding, some ten of them a layer.
    assert (found - wanted).norm() < 0.05 * wanted.norm()


# -- the loops ---------------------------------------------------------------------------------


def test_the_sampler_is_the_runtimes(clips):
    """The same noise, in the same order; one clip, no free channel."""
    model = dit.Model().eval()
    torch.manual_seed(5)
    for head in (
        model.transformer.dit.final_linear_video,
        model.transformer.dit.final_linear_audio,
    ):
        torch.nn.init.normal_(head.weight, std=0.05)
    one = Clips(*(value[:1] for value in (clips.ids, clips.is_text, clips.is_free)), None)
    one = Clips(Pair(*(v[:1] for v in clips.latents)), *one[:3])
    task = sampler.Task(torch.ones(1, 1, 3, 1, 1), torch.ones(1, 1, 1))
    task.video[:, :, 0] = 0  # a reference image
    ours = sampler.sample(model, one, task, torch.Generator().manual_seed(9))

    generator = torch.Generator().manual_seed(9)
    used = (torch.arange(48) < video.CHANNELS).float().view(1, -1, 1, 1, 1)

    def noise(like):
        drawn = torch.randn(like.shape, generator=generator)
        return drawn * used if drawn.ndim == 5 else drawn

    def velocity(pictures, waves):
        v_video, v_sound = model(pictures, waves, one)
        # Free channels, which the runtime's sampler carries along, stay 0 by this velocity.
        return v_video * used + (1 - used) * pictures / sampler_level(), v_sound

    levels = iter(denoise.schedulers.sigmas(8).tolist())

    def sampler_level():
        return next(levels)

    start = noise(one.latents.video), noise(one.latents.sound)
    with torch.no_grad():
        wanted = denoise.distilled(
            velocity, *start, steps=8, noise=noise, image=one.latents.video[:, :, :1]
        )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_losses_fall(clips):
    torch.manual_seed(0)
    model = dit.Model()
    optimizer = dit.optimizer_of(model, 1e-3)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(60):
        noise = sampler.noise_like(clips.latents, generator)
        x = sampler.noised(clips.latents, noise, torch.tensor([0.5, 0.9]), whole(clips))
        velocity = model(*x, clips)
        pairs = zip(velocity, noise, clips.latents, strict=True)
        loss = sum(dit.losses(Pair(*(v - (n - c) for v, n, c in pairs)), whole(clips)))
        dit.step(model, optimizer, loss, 1e-3)
        found.append(loss.item())
    assert found[0] == pytest.approx(4, abs=0.4)  # of two streams: noise and latents, 1 each
    assert sum(found[-5:]) / 5 < 0.7 * found[0]


def test_unused_channels_are_not_read_nor_made(clips):
    model = dit.Model()
    optimizer = dit.optimizer_of(model, 1e-2)
    noise = sampler.noise_like(clips.latents, torch.Generator().manual_seed(1))
    velocity = model(*sampler.noised(clips.latents, noise, 0.5, whole(clips)), clips)
    errors = Pair(*(v - n for v, n in zip(velocity, noise, strict=True)))
    dit.step(model, optimizer, sum(dit.losses(errors, whole(clips))), 1e-2)
    adapter = model.transformer.dit.adapter.video_embedder.weight
    assert adapter[:, : 4 * video.CHANNELS].abs().max() > 0
    assert adapter[:, 4 * video.CHANNELS :].abs().max() == 0
    head = model.transformer.dit.final_linear_video.weight.view(4, 48, -1)
    assert head[:, : video.CHANNELS].abs().max() > 0
    assert head[:, video.CHANNELS :].abs().max() == 0


def test_given_latents_stay_and_have_no_loss(clips):
    free = clips._replace(is_free=torch.tensor([True, False]))
    task = sampler.draw_task(free, torch.Generator().manual_seed(0))
    assert task.sound[0] == 0  # its caption says nothing of it
    task = sampler.Task(task.video.clone(), torch.tensor([0.0, 1.0]).view(2, 1, 1))
    task.video[:] = 1
    task.video[1, :, 0] = 0
    noise = sampler.noise_like(clips.latents, torch.Generator().manual_seed(1))
    x = sampler.noised(clips.latents, noise, torch.tensor([0.7, 0.7]), task)
    assert torch.equal(x.sound[0], clips.latents.sound[0])
    assert torch.equal(x.video[1, :, 0], clips.latents.video[1, :, 0])
    assert not torch.allclose(
        x.video[1, : video.CHANNELS, 1], clips.latents.video[1, : video.CHANNELS, 1]
    )
    huge = Pair(torch.zeros_like(x.video), torch.zeros_like(x.sound))
    huge.video[1, :, 0], huge.sound[0] = 1e6, 1e6
    assert sum(dit.losses(huge, task)) == 0


def test_matching_pulls_to_the_teacher_and_not_if_the_critic_agrees(out, clips):
    run = Run("distill", out, 1.0, CPU)
    trainer = dit.Trainer(run, 1e-4, 2, SIZE_PX, 4)
    matcher = Matcher(trainer, compiled=False)
    made = Pair(*(value.clone().requires_grad_() for value in clips.latents))
    assert matcher.distance(made, clips, whole(clips)) == 0  # both are the model of `dit`
    for _ in range(3):
        matcher.learn(made, clips, whole(clips))
    moved = matcher.distance(made, clips, whole(clips))
    moved.backward()
    assert made.video.grad.abs().max() > 0
    assert all(value.grad is None for value in matcher.teacher.parameters())


@pytest.mark.filterwarnings("ignore")  # dynamo asks every tensor for its gradient
def test_layers_compile_in_one_graph(clips):
    model = dit.Model()
    wanted = model(*clips.latents, clips)
    for layer in model.transformer.dit.block.layers:
        layer.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    found = model(*clips.latents, clips)
    torch.testing.assert_close(found, wanted)
    sum(value.sum() for value in found).backward()


def test_free_voices_say_what_other_clips_say():
    """Those of the clip before, in its person's voice; the first of two at another speed."""
    rng = random.Random(1)
    looks = attributes([draw(rng) for _ in range(4)], CPU)
    own, others = (
        speak(
            looks["syllables"].roll(shift, 0),
            looks["person"].roll(shift, 0),
            21,
            torch.Generator().manual_seed(3),
        ).wave
        for shift in (0, 1)
    )
    found = scene.voices(looks, 21, torch.Generator().manual_seed(3), 0.5).wave
    assert [torch.equal(a, b) for a, b in zip(found, own, strict=True)] == [0, 0, 1, 1]
    assert [torch.equal(a, b) for a, b in zip(found, others, strict=True)] == [0, 1, 0, 0]


def test_clips_that_go_on_begin_in_the_midst_of_speech_and_pause():
    generator = torch.Generator().manual_seed(3)
    batch = scene.go_on(6, 37, random.Random(1), generator, size_px=SIZE_PX)
    assert batch.frames.shape == (6, 3, 37, SIZE_PX, SIZE_PX)
    assert batch.sound.wave.shape == (6, 37 * FRAME)
    opening = batch.sound.opening
    assert (opening[:, 0] > 0.2).sum() >= 2  # a clip's own first syllable is four frames later
    shut = (opening < 0.05).unfold(1, 5, 1).all(-1).any(1)  # for five frames
    assert shut.sum() >= 3
    # The mouth goes by what is heard, but at the edges, where it was smoothed over what is cut off.
    heard = with_mouth(*batch.sound[:1], *batch.sound[2:]).opening
    torch.testing.assert_close(opening[:, 1:-1], heard[:, 1:-1])


def test_sound_depends_on_its_latents_from_the_start():
    torch.manual_seed(0)
    model = sound.SoundAutoencoder()
    with torch.no_grad():
        a, b = model.oobleck.decode(torch.randn(2, 64, 4)).split(1)
    assert 0.01 < a.std() < 0.5  # speech has 0.2; a loud start is unlearnt first
    assert (a - b).std() > 0.5 * a.std()  # by PyTorch's own weights, 0.02 of it


def test_requests_are_as_long_as_what_is_trained_on():
    """A voice has a latent less than a clip of its length, see `open_driving_audio`."""
    clip = config.audio_latents(SECONDS)
    voice = int(SECONDS * config.LATENT_AUDIO_RATE_HZ) // sound.CONFIG.samples_per_latent
    assert voice == clip - 1
    assert {clip, voice} <= set(LENGTHS)


def test_tensor_cores_take_the_channels():
    """By eights, but for pixels: three colours of 2x2."""
    model = video.VideoAutoencoder()
    counts = {
        count
        for module in (model.encoder, model.quant_conv, model.decoder)
        for conv in module.modules()
        if isinstance(conv, torch.nn.Conv2d | torch.nn.Conv3d)
        for count in (conv.in_channels, conv.out_channels)
    }
    assert {count for count in counts if count % 8} == {12}


# -- files ------------------------------------------------------------------------------------


def test_a_stage_goes_on_from_its_file(out, tmp_path):
    for name in ("vae.pt", "sound.pt", "dit.pt"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    before = load(tmp_path / "dit.pt", dit.Model())
    stage(tmp_path, "dit")
    after = load(tmp_path / "dit.pt", dit.Model())
    assert after["steps"] > before["steps"] >= 1
    assert after["tokenizer"] == before["tokenizer"]
    assert (tmp_path / "dit.pt").stat().st_size < 12e6
    stage(tmp_path, "distill")  # without matching, from where `dit` is
    distilled = load(tmp_path / "distill.pt", dit.Model())
    assert distilled["tokenizer"] == before["tokenizer"]
    assert distilled["steps"] > after["steps"]  # which clips are drawn depends on it


def test_stages_go_on_from_a_model(out, tmp_path):
    folder = tmp_path / "again"
    reopen(out / "model", folder)
    stage(folder, "export")
    for path in sorted((out / "model").rglob("*")):
        again = folder / "model" / path.relative_to(out / "model")
        if not path.is_file() or again.read_bytes() == path.read_bytes():
            continue
        assert path.parent.name == "stable-audio-open-1.0"  # norms are taken anew, of fp16
        before, after = (load_file(file) for file in (path, again))
        assert before.keys() == after.keys()
        for key, value in before.items():
            torch.testing.assert_close(after[key].float(), value.float(), rtol=4e-3, atol=1e-3)
    stage(folder, "dit")
    with pytest.raises(SystemExit, match=r"without \*\.pt, got .* dit\.pt, sound\.pt"):
        reopen(out / "model", folder)


def test_other_latents_are_refused(out, tmp_path):
    for name in ("vae.pt", "sound.pt", "dit.pt"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    stage(tmp_path, "sound")
    with pytest.raises(SystemExit, match=r"remove dit\.pt and distill\.pt"):
        stage(tmp_path, "dit")


@pytest.mark.parametrize("sign", [1, -1])
def test_the_better_weights_are_kept_with_their_statistics(tmp_path, sign):
    model = torch.nn.Conv1d(1, 1, 1)
    torch.nn.init.ones_(model.weight)
    norm, average = Standardized(1), Average(model)
    average.values[0].fill_(3)
    generator = torch.Generator().manual_seed(0)
    best = finish(
        tmp_path / "a.pt",
        average,
        norm,
        lambda: norm(model(torch.randn(8, 1, 500, generator=generator))),
        lambda: sign * model.weight.item(),
    )
    wanted = 3 if sign > 0 else 1
    assert best == sign * wanted
    assert load(tmp_path / "a.pt", torch.nn.Conv1d(1, 1, 1)) == {}
    assert model.weight.item() == wanted
    assert norm.std.item() == pytest.approx(wanted, rel=0.05)  # of 16,000 samples: 0.6 percent
    assert norm.count == (4 if sign > 0 else 0)  # the last weights keep those of the training


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = torch.nn.Linear(2, 2)
    average, path = Average(model), tmp_path / "a.pt"
    save(path, average, steps=1)
    before = path.read_bytes()
    average.values[0][0, 0] = float("nan")
    with pytest.raises(SystemExit, match=r"a\.pt is kept as it was: weight are not finite"):
        save(path, average, steps=2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("name", "missing"), [("dit", "vae"), ("distill", "dit"), ("export", "vae")]
)
def test_stages_name_what_they_need(name, missing, tmp_path):
    with pytest.raises(
        SystemExit, match=rf"{missing}\.pt is missing: train --stage {missing} first"
    ):
        stage(tmp_path, name)


def test_held_out_colours_are_not_trained_on(out):
    rng = random.Random(0)
    drawn = [draw(rng) for _ in range(2000)]
    assert not any(clip.is_held_out for clip in drawn)
    assert draw(rng, held_out=True).is_held_out
    seen = {(clip.hair, clip.shirt, clip.background) for clip in drawn}
    assert len(seen) == 216 * 7 // 8
    lines = (out / "model" / "score" / "prompts.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 64


def test_the_stock_is_a_ring(out, monkeypatch):
    monkeypatch.setattr("diffusion.stock.GOING_ON", 0.0)
    stock = Stock(out, 5, SIZE_PX, prompts.train_tokenizer(), 0, CPU)
    assert stock.count == 8
    stock.refresh()
    first = stock.video[0].clone()
    assert first.std() > 0
    assert stock.video[4].std() == 0
    stock.refresh()
    assert torch.equal(stock.video[0], first)
    stock.refresh()
    assert not torch.equal(stock.video[0], first)
    for audio, frames in ((21, 6), (20, 5)):
        taken = stock.take(5, audio)
        assert taken.latents.video.shape == (5, 48, frames, LATENTS, LATENTS)
        assert taken.latents.sound.shape == (5, audio, 64)
    assert stock.is_free.sum() == 2
    monkeypatch.setattr("diffusion.stock.GOING_ON", 1.0)
    stock.refresh()
    assert stock.is_free.sum() == 5  # the captions of the four new ones say nothing of their sound


def test_the_architecture_is_read_back(out):
    from magihuman.runtime.config import VARIANTS
    from magihuman.runtime.weights.checkpoint import dit_config

    found = dit_config(out / "model" / "distill", VARIANTS["distill"])
    assert dataclasses.asdict(found) == dataclasses.asdict(transformer.CONFIG)
