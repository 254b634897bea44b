"""Clips that go on from others, and clips of windows, on the tiny model."""

from __future__ import annotations

import dataclasses
import json
import threading
import weakref

import numpy as np
import pytest
import torch
from sounds import write_sine

from magihuman import runtime
from magihuman.runtime.engine.long import STRIDE, cuts, plan
from magihuman.runtime.evaluate.clip_score import loudness
from magihuman.runtime.media import read_audio, read_frames, xmp_of
from magihuman.runtime.prompts import Scene
from magihuman.runtime.serving.record import OPTIONS

SMALL = {"width": 64, "height": 64, "steps": 1}
RATE, LATENT = 51_200, 2048


@pytest.fixture(scope="module")
def first(engine) -> runtime.Video:
    return engine.generate("A man nods.", seconds=0.36, **SMALL)


def like(a: np.ndarray, b: np.ndarray) -> float:
    """How two frames correlate."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


# -- one clip from another ------------------------------------------------------------------------


@pytest.fixture
def no_encoder(engine, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the image was encoded")

    monkeypatch.setattr(type(engine._parts.image_vae), "encode", refuse)


@pytest.mark.usefixtures("no_encoder")
def test_a_clip_goes_on_in_latent_space_and_encodes_nothing(engine, first):
    after = engine.generate("A man nods.", seconds=0.36, steps=1, continue_from=first)
    assert after.frames.shape == first.frames.shape  # the size is that of the clip
    assert len(after.audio) == len(first.audio)
    np.testing.assert_array_equal(after.tail.look, first.tail.look)
    same = engine.generate("A man nods.", seconds=0.36, steps=1, continue_from=first)
    assert (same.frames == after.frames).all()


def test_both_are_decoded_as_one(engine, first):
    """The end of the one is context for the other, so that no decoder sees a beginning there."""
    request = runtime.Request("hi", seconds=0.36, continue_from=first, **SMALL)
    with engine.hold(request) as pipeline:
        encoded = pipeline.encode(pipeline.prepare())
        video, audio = pipeline.sample(encoded)
        frames, wave = pipeline.decode(video, audio, before=encoded.tail)
        before = torch.from_numpy(first.tail.video), torch.from_numpy(first.tail.audio)
        whole, sound = pipeline.decode(
            torch.cat((before[0][:, :, :-1], video), 2), torch.cat((before[1][:, :-1], audio), 1)
        )
    assert first.tail.video.shape[2] == 3 and first.tail.audio.shape[1] == 9  # all of the first
    np.testing.assert_array_equal(frames, whole[len(first.frames) - 1 :])
    np.testing.assert_array_equal(wave, sound[8 * 1764 :])
    np.testing.assert_array_equal(video[:, :, :1], before[0][:, :, -1:])


def test_the_first_latent_is_the_last_one_less_the_drift(engine, first):
    from magihuman.runtime.pipeline.continuing import MAX_DRIFT

    drift = np.linspace(-1, 1, 48, dtype=np.float32)
    before = dataclasses.replace(first, tail=dataclasses.replace(first.tail, drift=drift))
    request = runtime.Request("hi", seconds=0.36, continue_from=before, **SMALL)
    with engine.hold(request) as pipeline:
        encoded = pipeline.encode(pipeline.prepare())
    found = encoded.image[0, :, 0].numpy()
    wanted = first.tail.video[0, :, -1] - drift.clip(-MAX_DRIFT, MAX_DRIFT)[:, None, None]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_what_no_engine_or_another_made_goes_on_from_its_last_frame(engine, first, tmp_path):
    path = first.save(tmp_path / "first.mp4")
    alien = dataclasses.replace(first.tail, maker="another")
    last = dataclasses.replace(first, frames=first.frames[-1:], tail=None)
    wanted = engine.generate("hi", seconds=0.2, image=_image(last.frames[-1]), **SMALL)
    for before in (last, dataclasses.replace(first, tail=alien)):
        made = engine.generate("hi", seconds=0.2, continue_from=before, **SMALL)
        assert (made.frames == wanted.frames).all()
    made = engine.generate("hi", seconds=0.2, continue_from=path, **SMALL)
    assert like(made.frames[0], wanted.frames[0]) > 0.8  # what H.264 leaves of noise


def _image(pixels: np.ndarray):
    from PIL import Image

    return Image.fromarray(pixels)


@pytest.mark.usefixtures("no_encoder")
def test_super_resolution_goes_on_too(tiny_dir):
    with runtime.load(tiny_dir, sr="540p", device="cpu") as sr:
        options = {"seconds": 0.36, "sr_width": 96, "sr_height": 96, "sr_steps": 1, "steps": 1}
        one = sr.generate("hi", width=64, height=64, **options)
        two = sr.generate("hi", continue_from=one, **options)
    assert one.tail.video.shape[3:] == (4, 4) and one.tail.sr_video.shape[3:] == (6, 6)
    assert two.frames.shape == one.frames.shape == (9, 96, 96, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"continue_from": 3}, "must be a Video or the path"),
        ({"continue_from": "none.mp4"}, "must be a file that exists"),
        ({"continue_from": "a.mp4", "image": "b.png"}, "both give the first frame"),
        ({"audio": np.zeros(100, np.float32)}, "mono float32 samples"),
        ({"audio": np.zeros((20_000, 2), np.float32)}, "mono float32 samples"),
        ({"audio": np.zeros(20_000)}, "mono float32 samples"),
        ({"audio": np.full(20_000, np.nan, np.float32)}, "finite"),
    ],
)
def test_what_cannot_be_gone_on_from(engine, options, message):
    with pytest.raises(runtime.InvalidRequestError, match=message):
        engine.generate("hi", **{**SMALL, "seconds": 0.2, **options})


def test_no_file_of_the_server_is_named_by_a_job():
    assert not {"continue_from", "image", "audio"} & OPTIONS


# -- windows --------------------------------------------------------------------------------------


def test_cuts_lie_in_pauses():
    loud = np.ones(400)
    for begin, end in ((60, 66), (130, 138), (280, 286)):
        loud[begin:end] = 0.0
    points = cuts(0, 396, 80, loud)
    assert points[0] == 0 and points[-1] == 396
    steps = np.diff(points)
    assert (steps % STRIDE == 0).all() and (steps <= 80).all() and (steps >= 8).all()
    assert points[1] in range(60, 66) and points[2] in range(130, 138)
    assert any(point in range(280, 286) for point in points)


@pytest.mark.parametrize("end", [8, 80, 84, 88, 160, 164, 1000, 4000])
@pytest.mark.parametrize("longest", [8, 12, 80, 124])
def test_whatever_is_cut_no_window_is_too_long_or_too_short(end, longest):
    random = np.random.default_rng(end)
    for loud in (None, np.ones(end + 5), random.random(end + 5), np.zeros(end + 5)):
        points = cuts(100, 100 + end, longest, None if loud is None else np.pad(loud, (100, 0)))
        steps = np.diff(points)
        assert points[0] == 100 and points[-1] == 100 + end
        assert (steps % STRIDE == 0).all() and (steps > 0).all() and (steps <= longest).all()


def test_scenes_share_a_voice():
    voice = np.zeros(101 * LATENT, np.float32)
    windows = plan([Scene("a", 1), Scene("b", 1), Scene("c", 60)], voice, 5)
    assert [(w.begin, w.end, w.scene) for w in windows] == [(0, 24, 0), (24, 48, 1), (48, 100, 2)]
    windows = plan([Scene("a", 1), Scene("b", 60), Scene("c", 60)], voice, 5)
    assert windows[-1].end == 100 and windows[-1].scene == 1


@pytest.fixture
def voice(tmp_path):
    return write_sine(tmp_path / "voice.wav", seconds=1.2)


LONG = {**SMALL, "window_seconds": 0.36, "seed": 7}


def test_a_long_clip(engine, voice, tmp_path):
    path = tmp_path / "long.mp4"
    frames, sound = [], []
    for chunk in engine.generate_long("A man nods.", audio=voice, save=path, **LONG):
        assert chunk.first_frame == sum(map(len, frames))
        assert len(chunk.audio) == len(chunk.frames) * 1764
        frames.append(chunk.frames)
        sound.append(chunk.audio)
        written, _ = read_frames(path)  # as far as it goes, although nothing has closed it
        assert len(written) == sum(map(len, frames))
    assert chunk.is_last and len(frames) >= 4
    whole, wave = np.concatenate(frames), np.concatenate(sound)
    assert len(whole) == 33  # 1.2 s, up to a whole latent
    nearest = [max(range(len(whole)), key=lambda i: like(frame, whole[i])) for frame in written]
    assert nearest == list(range(len(whole)))
    assert xmp_of(path) is not None  # the mark that a model has made it
    heard = read_audio(path, 44_100, 10)
    assert abs(len(heard) - len(wave)) <= 1024
    # No click: no step between two samples at a seam is larger than the largest elsewhere.
    steps = np.abs(np.diff(wave, axis=0)).max(1)
    seams = np.cumsum([len(part) for part in sound])[:-1]
    near = np.zeros(len(steps), bool)
    for seam in seams:
        near[seam - 4 : seam + 1768] = True
    assert steps[near].max() <= 2 * steps[~near].max()
    assert len(loudness(wave, 44_100, 25, len(whole))) == len(whole)


def test_the_windows_are_the_clips_that_go_on_from_each_other(engine):
    chunks = list(engine.generate_long("A man nods.", seconds=0.68, **LONG))
    one = engine.generate("A man nods.", seconds=0.32, seed=7, **SMALL)
    two = engine.generate("A man nods.", seconds=0.32, seed=8, continue_from=one, **SMALL)
    assert [len(chunk.frames) for chunk in chunks] == [8, 9]
    np.testing.assert_array_equal(chunks[0].frames, one.frames[:-1])
    np.testing.assert_array_equal(chunks[1].frames[1:], two.frames[1:])
    seam = (one.frames[-1].astype(int) + two.frames[0] + 1) // 2
    np.testing.assert_array_equal(chunks[1].frames[0], seam)
    np.testing.assert_array_equal(chunks[1].audio[1764:], two.audio[1764 : 9 * 1764])
    again = list(engine.generate_long("A man nods.", seconds=0.36, continue_from=one, **LONG))
    assert sum(len(chunk.frames) for chunk in again) == 8  # without the one that it goes on from


def test_no_window_is_kept(engine, monkeypatch):
    made = []
    original = engine.generate

    def generate(*arguments, **options):
        video = original(*arguments, **options)
        made.append(weakref.ref(video.frames))
        return video

    monkeypatch.setattr(engine, "generate", generate)
    for _ in engine.generate_long("A man nods.", seconds=1.6, **LONG):
        assert sum(frames() is not None for frames in made) <= 1
    assert len(made) >= 4


def test_what_was_finished_before_a_cancel_can_be_played(engine, tmp_path):
    cancel = threading.Event()
    path = tmp_path / "long.mp4"
    chunks = engine.generate_long("A man nods.", seconds=1.6, save=path, cancel=cancel, **LONG)
    done = sum(len(next(chunks).frames) for _ in range(2))
    cancel.set()
    with pytest.raises(runtime.Cancelled):
        next(chunks)
    assert len(read_frames(path)[0]) == done > 8 and xmp_of(path) is not None


def test_where_nothing_was_finished_there_is_no_file(engine, tmp_path):
    cancel = threading.Event()
    cancel.set()
    path = tmp_path / "long.mp4"
    with pytest.raises(runtime.Cancelled):
        next(engine.generate_long("A man nods.", seconds=1, save=path, cancel=cancel, **LONG))
    assert list(tmp_path.iterdir()) == []


def test_a_deadline_is_for_all_of_it(engine):
    with pytest.raises(runtime.DeadlineExceeded):
        list(engine.generate_long("A man nods.", seconds=3000, deadline_s=0.5, **LONG))


def test_a_long_clip_is_an_mp4(engine, tmp_path):
    with pytest.raises(runtime.OutputError, match=r"must end in \.mp4"):
        next(engine.generate_long("A man nods.", seconds=1, save=tmp_path / "long.webm", **LONG))


def test_prompts_change_with_scenes(engine, monkeypatch):
    asked = []
    original = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda r, **o: asked.append((r.prompt, r.seed)) or original(r, **o)
    )
    scenes = [runtime.Scene("one", 0.32), runtime.Scene("two", 0.64)]
    chunks = list(engine.generate_long(scenes, **LONG))
    assert asked == [("one", 7), ("two", 8), ("two", 9)]
    assert sum(len(chunk.frames) for chunk in chunks) == 25


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (" ", {}, "not blank"),
        ([], {}, "Scenes"),
        (["a"], {}, "Scenes"),
        ([Scene("a", 1)], {"seconds": 2}, "leave it out"),
        ("a", {"seconds": 1e9}, "seconds must be"),
        ("a", {"width": 1}, "width must be"),
        ("a", {"audio": "none.wav"}, "does not exist"),
        ("a", {"image": "b", "continue_from": "c"}, "both give"),
        ("a", {"window_seconds": 0.0}, "window_seconds"),
        ("a", {"window_seconds": 61}, "window_seconds"),
        ("a", {"seed": -1}, "seed must be"),
        ("a", {"seed": "x"}, "seed must be"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(engine, prompt, options, message):
    with pytest.raises(runtime.InvalidRequestError, match=message):
        engine.generate_long(prompt, **options)


# -- scripts --------------------------------------------------------------------------------------


def test_a_script_is_read(tmp_path):
    path = tmp_path / "script.txt"
    lines = [
        "\ufeff# two scenes",
        "",
        "3.2 A woman smiles.",
        json.dumps({"seconds": 5, "prompt": "a\nb"}),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert runtime.read_script(path) == [Scene("A woman smiles.", 3.2), Scene("a\nb", 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "1 to 10000 scenes"),
        (b"# a", "1 to 10000 scenes"),
        (b"3 a\nhello", "line 2: a scene must be seconds"),
        (b"3", "line 1: a scene's prompt"),
        (b"nan a", "line 1: a scene's seconds"),
        (b"0 a", "line 1: a scene's seconds"),
        (b"inf a", "line 1: a scene's seconds"),
        (b"{", "line 1: a scene must be"),
        (b'{"prompt": "a"}', "the keys"),
        (b'{"prompt": 3, "seconds": 3}', "a scene's prompt"),
        (b'{"prompt": "a", "seconds": true}', "a scene's seconds"),
        (b'{"a":' * 50_000, "line 1: a scene must be"),
        (b"\xff\xfe", "no UTF-8"),
        (b"a" * 2_000_000, "at most"),
    ],
)
def test_scripts_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "script.txt"
    path.write_bytes(text)
    with pytest.raises(runtime.InvalidRequestError, match=message):
        runtime.read_script(path)
    with pytest.raises(runtime.InvalidRequestError, match="can be read"):
        runtime.read_script(tmp_path)
