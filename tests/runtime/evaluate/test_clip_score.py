"""The score of clips: of the nano world's own it is high, of noise and wrong sound it is not."""

from __future__ import annotations

import json
import random
import shutil
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from sounds import write_sine
from typer.testing import CliRunner

from magihuman import runtime
from magihuman.runtime.cli.main import app
from magihuman.runtime.evaluate import clip_score, model_score
from world import scene
from world.captions import Clip, caption

RATE_HZ, FPS, FRAMES = 51200, 25, 81


@pytest.fixture(scope="module")
def clips() -> list[tuple[Clip, str, np.ndarray, np.ndarray]]:
    """(clip, prompt, frames [T, H, W, 3], sound [n]) of the world itself."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    data = scene.make(5, FRAMES, rng, generator, size_px=96)
    frames = (data.frames * 255).byte().permute(0, 2, 3, 4, 1).numpy()
    sounds = data.sound.wave[:, : FRAMES * 2048].numpy()
    prompts = [caption(clip, rng, "en", full=True) for clip in data.clips]
    return list(zip(data.clips, prompts, frames, sounds, strict=True))


def test_clips_of_the_world_score_high(clips):
    for clip, prompt, frames, sound in clips:
        found = clip_score.score(frames, sound, RATE_HZ, FPS, prompt)
        wanted = {part: clip.names()[part] for part in clip_score.COLOURS}
        assert found.named == wanted
        assert found.found == wanted
        assert found.right == 3
        assert found.synchrony.lag_frames == 0
        # Of 36 other clips of the world: 0.87 to 0.99.
        assert found.synchrony.correlation > 0.85


def test_noise_scores_nothing(clips):
    _, prompt, frames, sound = clips[0]
    noise = np.random.default_rng(0).integers(0, 256, frames.shape, np.uint8)
    found = clip_score.score(noise, sound, RATE_HZ, FPS, prompt)
    assert found.right == 0
    # The largest of 13 correlations of 81 independent values, deviation 0.11 each.
    assert found.synchrony.correlation < 0.4
    hiss = np.random.default_rng(1).normal(0, 0.1, sound.shape).astype(np.float32)
    assert clip_score.score(frames, hiss, RATE_HZ, FPS).synchrony.correlation < 0.5


def test_colours_of_another_clip_are_not_right(clips):
    shown, asked = clips[0], clips[1]
    found = clip_score.score(shown[2], shown[3], RATE_HZ, FPS, asked[1])
    names = [(shown[0].names()[part], asked[0].names()[part]) for part in clip_score.COLOURS]
    assert found.right == sum(a == b for a, b in names) < 3


def test_late_sound_and_still_pictures_are_found(clips):
    _, _, frames, sound = clips[0]
    late = clip_score.score(frames, np.pad(sound, (3 * 2048, 0)), RATE_HZ, FPS).synchrony
    assert late.lag_frames == -3
    early = clip_score.score(frames, sound[2 * 2048 :], RATE_HZ, FPS).synchrony
    assert early.lag_frames == 2
    still = clip_score.score(frames[:1].repeat(FRAMES, 0), sound, RATE_HZ, FPS).synchrony
    assert still == clip_score.Synchrony(0.0, 0)


def test_shuffled_sound_does_not_go_with_the_mouth(clips):
    """As a model is scored: of two syllables, some lag fits some loud frames."""
    order = np.random.default_rng(2).permutation(FRAMES)
    found = [
        clip_score.score(
            frames, sound.reshape(FRAMES, 2048)[order].reshape(-1), RATE_HZ, FPS
        ).synchrony
        for _, _, frames, sound in clips
    ]
    assert statistics.fmean(model_score._in_time(each) for each in found) < 0.3
    assert statistics.fmean(each.correlation for each in found) < 0.6


def test_prompts_that_name_no_colour():
    assert clip_score.named_colours("A woman with hair in a bun in a Blue shirt, red of face") == {
        "shirt": "blue"
    }


@pytest.fixture
def mp4(clips, tmp_path):
    """A clip as a file, with its first frame and its sound beside it."""
    _, prompt, frames, sound = clips[0]
    path = tmp_path / "clip.mp4"
    stereo = np.stack((sound, sound), 1)
    runtime.Video(frames, model_score.resample(stereo), FPS, 44100).save(path)
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    wavfile.write(tmp_path / "voice.wav", RATE_HZ, sound)
    return path, prompt


def test_a_file_scores_as_its_clip(clips, mp4):
    path, prompt = mp4
    given = path.parent / "first.png", path.parent / "voice.wav"
    command = ["score", str(path), "--prompt", prompt, "--json"]
    command += ["--image", str(given[0]), "--audio", str(given[1])]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    direct = clip_score.score(clips[0][2], clips[0][3], RATE_HZ, FPS, prompt)
    assert found["found"] == direct.found
    # H.264 halves the colours' resolution, and a mouth is 10 pixels high.
    correlation = found["synchrony"]["correlation"]
    assert correlation == pytest.approx(direct.synchrony.correlation, abs=0.05)
    assert found["voice"]["correlation"] == pytest.approx(correlation, abs=0.02)
    assert found["first_frame_db"] > 28
    other = clip_score.score_file(path, image=path.parent / "first.png").first_frame_db
    assert other == pytest.approx(found["first_frame_db"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "either a clip or --model"),
        (("absent.mp4",), "absent.mp4"),
        (("a.mp4", "--model", "nano"), "not both"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["score", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


# -- models -----------------------------------------------------------------------------------


@pytest.fixture
def scored_dir(clips, tiny_dir, tmp_path):
    """The tiny model, whose clips are noise, with prompts and references of the world."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    place = folder / model_score.SCORE_FOLDER
    place.mkdir()
    (place / "prompts.txt").write_text("\n".join(clip[1] for clip in clips[:3]))
    for i in range(2):
        Image.fromarray(clips[i][2][0]).save(place / f"{i}.png")
        write_sine(place / f"{i}.wav", seconds=0.5)
        (place / f"{i}.wav").rename(place / f"{i}.flac")  # read by its content
    return folder


def test_a_model_of_noise_fails_every_threshold(scored_dir, monkeypatch):
    monkeypatch.setattr(model_score, "SIZE_PX", 64)
    monkeypatch.setattr(model_score, "SECONDS", 0.5)
    command = ["score", "--model", str(scored_dir), "--device", "cpu", "--clips", "2", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["prompts"] == found["references"] == 2
    assert len(found["broken"]) == len(model_score.LEAST) == 6
    # By far, not by a hair.
    assert found["colours"] < 0.4
    assert found["first_frame_db"] < 15
    assert found["image_db"] < 15
    assert found["sound_db"] < 4


def test_a_model_without_prompts_is_refused(tiny_dir, engine):
    with pytest.raises(runtime.CheckpointError, match=r"prompts\.txt"):
        model_score.score_model(engine, tiny_dir)


def test_thresholds():
    good = model_score.ModelScore(64, 4, 0.95, 0.8, 27.0, 0.75, 30.0, 10.0)
    assert good.broken == []
    bad = model_score.ModelScore(64, 4, 0.95, float("nan"), 27.0, 0.69, 30.0, 10.0)
    assert [sentence.split()[0] for sentence in bad.broken] == ["synchrony", "voice"]


def test_spectra_compare_sounds_without_phase():
    time = np.arange(RATE_HZ) / RATE_HZ
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    turned = np.sin(2 * np.pi * 440 * time + 1).astype(np.float32)
    # A click at either end apart, the magnitudes are equal.
    assert model_score.spectral_snr_db(turned, tone) > 15
    assert model_score.spectral_snr_db(tone, tone) > 100
    hiss = np.random.default_rng(0).normal(0, 0.7, tone.shape).astype(np.float32)
    assert model_score.spectral_snr_db(hiss, tone) < 1
