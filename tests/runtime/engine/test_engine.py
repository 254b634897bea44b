from __future__ import annotations

import logging
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from sounds import write_sine

from magihuman import runtime
from magihuman.runtime import (
    Cancelled,
    InvalidRequestError,
    MagiHumanError,
    OutputError,
    Progress,
    Request,
)
from magihuman.runtime.model.text_encoder import TextEncoder
from magihuman.runtime.weights.locate import TEXT_FOLDER
from magihuman.runtime.weights.t5gemma import load_text_encoder

# 9 frames, 3 latent ones; a short negative prompt, of which the tiny tokenizer makes few tokens.
SMALL = {"seconds": 0.36, "width": 64, "height": 96, "steps": 2, "negative_prompt": "static"}
SR = {"sr_width": 96, "sr_height": 128, "sr_steps": 2}


@pytest.fixture(scope="module")
def face() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    return write_sine(tmp_path_factory.mktemp("voice") / "voice.wav", seconds=0.4)


@pytest.fixture(scope="module")
def base(tiny_dir):
    with runtime.load(tiny_dir, variant="base", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def base_540p(tiny_dir):
    with runtime.load(tiny_dir, variant="base", sr="540p", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def large(base_540p):
    return base_540p.generate("hi", **SMALL, **SR)


class Spy:
    """Stands in front of a function: notes its arguments and results and passes them on."""

    def __init__(self, function) -> None:
        self.function, self.calls, self.results = function, [], []

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        self.results.append(self.function(*args, **kwargs))
        return self.results[-1]


def same(a: runtime.Video, b: runtime.Video) -> bool:
    return np.array_equal(a.frames, b.frames) and np.array_equal(a.audio, b.audio)


# -- every kind of clip -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["base", "distill"])
@pytest.mark.parametrize("sr", [None, "540p", "1080p"])
def test_every_line_up_makes_every_kind_of_clip(tiny_dir, face, voice, variant, sr):
    options = SMALL if sr is None else {**SMALL, **SR}
    width, height = (64, 96) if sr is None else (96, 128)
    clips = []
    with runtime.load(tiny_dir, variant=variant, sr=sr, device="cpu") as engine:
        for inputs in ({}, {"image": face}, {"audio": voice}, {"image": face, "audio": voice}):
            video = engine.generate("A woman says: hello!", **options, **inputs)
            assert video.frames.shape == (9, height, width, 3) and video.frames.dtype == np.uint8
            # 0.36 s are 10 audio latents, or 9 where the sound is given; 2048 samples each.
            latents = 9 if "audio" in inputs else 10
            assert video.audio.shape == (int(latents * 2048 * 441 / 512), 2)
            assert video.audio.dtype == np.float32 and np.isfinite(video.audio).all()
            assert (video.fps, video.sample_rate_hz, video.seed) == (25, 44100, 42)
            assert video.duration_s == 9 / 25
            assert video.frames.std() > 1 and video.audio.std() > 0
            clips.append(video)
    # Every input changes the picture, and the voice the sound.
    for i, one in enumerate(clips):
        for other in clips[:i]:
            assert not np.array_equal(one.frames, other.frames)
    assert not np.array_equal(clips[0].audio[: len(clips[2].audio)], clips[2].audio)
    # The face does not change the given sound: it is drawn before anything else.
    assert np.array_equal(clips[2].audio, clips[3].audio)


def test_super_resolution_keeps_the_base_models_sound(base, large):
    assert np.array_equal(base.generate("hi", **SMALL).audio, large.audio)


def test_fp32_is_near_bf16_but_not_the_same(tiny_dir, engine):
    with runtime.load(tiny_dir, precision="fp32", device="cpu") as exact:
        one = exact.generate("hi", **SMALL)
    other = engine.generate("hi", **SMALL)
    assert not np.array_equal(one.frames, other.frames)
    # bf16 rounds by 2^-9 in each linear of 5 layers, over 2 steps: a few percent of 255 at worst.
    assert np.abs(one.frames.astype(float) - other.frames).mean() < 8


# -- seeds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [set(), {"image"}, {"audio"}])
def test_the_same_seed_gives_the_same_clip_bit_for_bit(engine, face, voice, inputs):
    options = {**SMALL, **{k: {"image": face, "audio": voice}[k] for k in inputs}}
    first = engine.generate("hi", seed=7, **options)
    torch.manual_seed(1)  # nothing depends on the global generator
    assert same(first, engine.generate("hi", seed=7, **options))
    other = engine.generate("hi", seed=8, **options)
    assert not np.array_equal(first.frames, other.frames)
    assert not np.array_equal(first.audio, other.audio)


def test_a_fresh_engine_gives_the_same_clip(tiny_dir, engine):
    with runtime.load(tiny_dir, device="cpu") as other:
        assert same(other.generate("hi", **SMALL), engine.generate("hi", **SMALL))


def test_the_prompt_matters(engine):
    assert not same(engine.generate("hi", **SMALL), engine.generate("ho", **SMALL))


def test_a_request_object_is_the_same_as_its_arguments(engine):
    request = Request("hi", seed=3, **SMALL)
    assert same(engine.generate(request), engine.generate("hi", seed=3, **SMALL))
    with pytest.raises(InvalidRequestError, match="must stand alone, got seed, steps beside it"):
        engine.generate(request, seed=4, steps=1)


def test_the_callers_random_state_is_left_alone(engine):
    before = torch.random.get_rng_state()
    engine.generate("hi", **SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- progress and cancellation ----------------------------------------------------------------


def test_progress(base_540p):
    reports: list[Progress] = []
    video = base_540p.generate("hi", **SMALL, **SR, on_progress=reports.append)
    steps = [(r.stage, r.step, r.of) for r in reports]
    assert steps == [
        *[("denoise", i, 2) for i in range(3)],
        *[("super_resolve", i, 2) for i in range(3)],
        ("decode_video", 0, 9),
        ("decode_video", 9, 9),
    ]
    elapsed = [r.elapsed_s for r in reports]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0
    assert list(video.timings_s) == [
        "prepare", "queue", "text", "audio", "image", "image_sr", "denoise", "super_resolve",
        "decode_audio", "decode_video",
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in video.timings_s.values())


def test_decoding_reports_every_window(engine):
    reports: list[Progress] = []
    # 2 s are 13 latent frames, 49 frames: 25 of the first seven, 24 of the other six.
    engine.generate("hi", seconds=2, width=32, height=32, steps=1, on_progress=reports.append)
    decoded = [(r.step, r.of) for r in reports if r.stage == "decode_video"]
    assert decoded == [(0, 49), (25, 49), (49, 49)]


def test_cancelled_before_it_starts(engine):
    cancel = threading.Event()
    cancel.set()
    reports: list[Progress] = []
    with pytest.raises(Cancelled):
        engine.generate("hi", **SMALL, cancel=cancel, on_progress=reports.append)
    assert reports == []


@pytest.mark.parametrize(
    ("stage", "step"),
    [("denoise", 0), ("denoise", 1), ("super_resolve", 1), ("decode_video", 0)],
)
def test_cancelled_on_the_way(base_540p, large, stage, step):
    cancel = threading.Event()
    reports: list[tuple[str, int]] = []

    def stop(progress: Progress) -> None:
        reports.append((progress.stage, progress.step))
        if reports[-1] == (stage, step):
            cancel.set()

    with pytest.raises(Cancelled, match="the request was cancelled"):
        base_540p.generate("hi", **SMALL, **SR, on_progress=stop, cancel=cancel)
    assert reports[-1] == (stage, step)  # not a step further
    assert same(base_540p.generate("hi", **SMALL, **SR), large)


@pytest.mark.usefixtures("same_bytes")
def test_the_file_is_written_meanwhile(engine, tmp_path):
    video = engine.generate("hi", **SMALL, save=tmp_path / "clip.mp4")
    assert list(video.timings_s)[-3:] == ["decode_audio", "decode_video", "write"]
    again = video.save(tmp_path / "again.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == again.read_bytes()


def test_cancelled_between_windows_leaves_no_file(engine, tmp_path):
    cancel = threading.Event()

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.step) == ("decode_video", 25):
            cancel.set()

    options = {"seconds": 2, "width": 32, "height": 32, "steps": 1}
    with pytest.raises(Cancelled):
        engine.generate(
            "hi", **options, save=tmp_path / "clip.mp4", on_progress=stop, cancel=cancel
        )
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_sound_leaves_no_file(engine, tmp_path, monkeypatch):
    def fail(latents):
        raise ValueError("no sound")

    monkeypatch.setattr(engine._parts.audio_vae, "decode", fail)
    with pytest.raises(ValueError, match="no sound"):
        engine.generate("hi", **SMALL, save=tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(engine, tmp_path):
    reports: list[Progress] = []
    with pytest.raises(OutputError, match="folder must exist"):
        engine.generate(
            "hi", **SMALL, save=tmp_path / "no" / "clip.mp4", on_progress=reports.append
        )
    assert reports == []


def test_an_error_of_the_callback_leaves_the_engine_usable(engine):
    def fail(progress: Progress) -> None:
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        engine.generate("hi", **SMALL, on_progress=fail)
    assert len(engine.generate("hi", **SMALL).frames) == 9


# -- text and guidance ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        ({}, 2),
        ({"guidance": 3.0}, 2),
        ({"guidance": 1.0}, 1),
        ({"guidance": 1.0, "sr_guidance": 3.5}, 2),
        ({"guidance": 1.0, "sr_guidance": 1.0}, 1),
    ],
)
def test_the_negative_prompt_is_encoded_only_for_guidance(base_540p, monkeypatch, options, prompts):
    spy = Spy(TextEncoder.encode)
    monkeypatch.setattr(TextEncoder, "encode", lambda self, ids: spy(self, ids))
    base_540p.generate("hi", **SMALL, **SR, **options)
    tokenizer = base_540p._parts.text_encoder.tokenizer
    assert [tokenizer.decode(ids[0]) for _, ids in spy.calls] == ["hi", "static"][:prompts]


def test_a_distilled_model_never_sees_the_negative_prompt(engine, monkeypatch):
    spy = Spy(TextEncoder.encode)
    monkeypatch.setattr(TextEncoder, "encode", lambda self, ids: spy(self, ids))
    engine.generate("hi", **SMALL)
    assert len(spy.calls) == 1


def test_guidance_and_the_negative_prompt_matter(base):
    plain = base.generate("hi", guidance=1.0, **SMALL)
    other_negative = {**SMALL, "negative_prompt": "x"}
    assert same(plain, base.generate("hi", guidance=1.0, **other_negative))
    guided = base.generate("hi", **SMALL)
    assert same(guided, base.generate("hi", guidance=5.0, **SMALL))
    assert not same(guided, plain)
    assert not same(guided, base.generate("hi", guidance=4.0, **SMALL))
    assert not same(guided, base.generate("hi", **other_negative))


def test_super_resolution_guidance_matters(base_540p):
    options = {**SMALL, **SR, "guidance": 1.0}
    plain = base_540p.generate("hi", **options)
    guided = base_540p.generate("hi", sr_guidance=3.5, **options)
    assert not np.array_equal(plain.frames, guided.frames)
    assert np.array_equal(plain.audio, guided.audio)


def test_a_long_prompt_is_cut_with_a_warning(engine, caplog):
    """The tiny tokenizer makes a token of every byte."""
    with caplog.at_level(logging.WARNING, logger="magihuman"):
        video = engine.generate("a" * 700, **SMALL)
    note = "prompts are read up to 640 tokens: this one has 700, the last 60 are cut"
    assert video.warnings == (note,)
    assert caplog.messages == [note]
    assert engine.generate("a" * 640, **SMALL).warnings == ()


def test_far_too_long_a_prompt_works(engine):
    encoder = engine._parts.text_encoder
    ids, note = encoder.tokenize("a" * 20_000)
    assert ids.shape == (1, 8192) and "this one has 20000" in note
    assert encoder.encode(ids[:, :700]).shape == (640, encoder.channels)


def test_embeddings_pass_through_fp16(tiny_dir):
    """In fp32, so that the rounding shows: the bf16 of the engine's fits into fp16."""
    encoder = load_text_encoder(tiny_dir / TEXT_FOLDER, torch.device("cpu"), torch.float32)
    ids, note = encoder.tokenize("héllo 你好")
    embeddings = encoder.encode(ids)
    assert note is None and embeddings.shape == (len("héllo 你好".encode()), encoder.channels)
    with torch.no_grad():
        hidden = encoder.model(input_ids=ids, attention_mask=ids * 0 + 1).last_hidden_state[0]
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, hidden.half().float())
    assert not torch.equal(embeddings, hidden)


# -- given sound and picture ------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["base", "distill"])
def test_given_sound_is_kept(tiny_dir, voice, monkeypatch, variant):
    with runtime.load(tiny_dir, variant=variant, device="cpu") as engine:
        vae = engine._parts.audio_vae
        encode, decode = Spy(vae.encode), Spy(vae.decode)
        monkeypatch.setattr(vae, "encode", encode)
        monkeypatch.setattr(vae, "decode", decode)
        engine.generate("hi", audio=voice, **SMALL)
    (given,), ((decoded,),) = encode.results, decode.calls
    assert torch.equal(given, decoded)


@pytest.mark.parametrize("variant", ["base", "distill"])
def test_the_first_latent_frame_is_the_reference_image(tiny_dir, face, monkeypatch, variant):
    with runtime.load(tiny_dir, variant=variant, sr="1080p", device="cpu") as engine:
        encode = Spy(engine._parts.image_vae.encode)
        decode = Spy(engine._parts.turbo_vae.windows)
        monkeypatch.setattr(engine._parts.image_vae, "encode", encode)
        monkeypatch.setattr(engine._parts.turbo_vae, "windows", decode)
        engine.generate("hi", image=face, **SMALL, **SR)
    sizes = [(width, height) for _, width, height in encode.calls]
    assert sizes == [(64, 96), (96, 128)]
    ((latent,),) = decode.calls
    assert latent.shape == (1, 48, 3, 8, 6)
    assert torch.equal(latent[:, :, :1], encode.results[1])
    assert not torch.equal(latent[:, :, 1:2], encode.results[1])


def test_image_and_audio_paths_are_opened(engine, face, voice, tmp_path):
    face.save(tmp_path / "face.png")
    one = engine.generate("hi", image=str(tmp_path / "face.png"), audio=str(voice), **SMALL)
    assert same(one, engine.generate("hi", image=face, audio=voice, **SMALL))


def test_short_audio_sets_the_length(engine, voice):
    video = engine.generate("hi", audio=voice, **{**SMALL, "seconds": 5.0})
    assert len(video.frames) == 13  # 0.4 s are 10 latents, and clips have 4 n + 1 frames
    assert video.warnings == ("the clip is as long as its audio: 0.40 s, not the 5 s asked for",)


def test_a_voice_is_heard_to_its_end(engine, tmp_path, monkeypatch):
    """100 latents of sound would have 97 frames, 0.12 s less than it is long."""
    encode = Spy(engine._parts.audio_vae.encode)
    monkeypatch.setattr(engine._parts.audio_vae, "encode", encode)
    path = write_sine(tmp_path / "voice.wav", seconds=4.0)
    video = engine.generate("hi", audio=path, width=32, height=32, steps=1, seconds=4.0)
    ((samples, _),) = encode.calls
    assert np.abs(samples[-2048 - 500 : -2048]).max() > 0.4  # as loud as ever at 4 s
    assert len(video.frames) == 101 and len(video.audio) / 44100 == pytest.approx(4.04, abs=1e-3)
    assert video.warnings == ()


def test_all_warnings_are_kept_in_order(engine, voice, caplog):
    with caplog.at_level(logging.WARNING, logger="magihuman"):
        video = engine.generate("a" * 641, audio=voice, seconds=0.2, width=70, height=64, steps=1)
    starts = [
        "sizes are made in steps of 32",
        "the audio is longer than the 0.2 s",
        "prompts are read up",
    ]
    assert [w[: len(s)] for w, s in zip(video.warnings, starts, strict=True)] == starts
    assert caplog.messages == list(video.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "prompt must be text"),
        ({"guidance": 5.0}, "guidance must stay unset"),
        ({"sr_steps": 2}, "sr_steps needs an engine loaded with super-resolution"),
        ({"image": "no.png"}, "image must be a readable file"),
        ({"audio": "no.wav"}, "audio must be a readable file"),
        ({"image": 3}, "image must be a path or a PIL image"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(engine, monkeypatch, options, message):
    encode = Spy(TextEncoder.encode)
    monkeypatch.setattr(TextEncoder, "encode", encode)
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate(**{"prompt": "hi", **SMALL, **options})
    assert encode.calls == []


# -- the engine's life ------------------------------------------------------------------------


def test_a_closed_engine_refuses(tiny_dir):
    engine = runtime.load(tiny_dir, device="cpu")
    engine.close()
    engine.close()  # twice is fine
    with pytest.raises(MagiHumanError, match="the engine is closed; load another"):
        engine.generate("hi", **SMALL)


def test_leaving_the_with_block_closes(tiny_dir):
    with runtime.load(tiny_dir, device="cpu") as engine:
        pass
    with pytest.raises(MagiHumanError, match="the engine is closed"):
        engine.generate("hi", **SMALL)


def test_close_waits_for_a_running_request(tiny_dir):
    engine = runtime.load(tiny_dir, device="cpu")
    started, clips = threading.Event(), []

    def run() -> None:
        clips.append(engine.generate("hi", **SMALL, on_progress=lambda _: started.set()))

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    engine.close()
    thread.join()
    assert len(clips[0].frames) == 9


def test_threads_take_turns_and_get_their_own_clips(engine):
    expected = {seed: engine.generate("hi", seed=seed, **SMALL) for seed in (1, 2, 3)}
    clips, order = {}, []

    def run(seed: int) -> None:
        clips[seed] = engine.generate(
            "hi", seed=seed, **SMALL, on_progress=lambda _: order.append(seed)
        )

    threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(clips[seed], expected[seed]) for seed in expected)
    # One after another: the reports of a request are not mixed with another's.
    assert sum(a != b for a, b in pairwise(order)) == 2
