"""The model that is known by name, and the requests that suit a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sounds import write_sine
from typer.testing import CliRunner

from magihuman import runtime
from magihuman.runtime.cli.main import app
from magihuman.runtime.config import VARIANTS
from magihuman.runtime.evaluate.model_score import score_model
from magihuman.runtime.weights import shipped

CARD = Path(__file__).parents[3] / "examples" / "nano" / "MODEL_CARD.md"
SMALL = {"seconds": 0.2, "width": 96, "height": 64}


def generate(*arguments: object):
    command = ["generate", "-p", "hi", "--steps", "1", "--json", *map(str, arguments)]
    return CliRunner().invoke(app, command)


@pytest.fixture
def named(tiny_dir, tmp_path, monkeypatch):
    """The tiny model in the place of nano, with what suits it."""
    folder = tmp_path / "package" / "nano"
    shutil.copytree(tiny_dir, folder)
    (folder / shipped.SUITED).write_text(json.dumps(SMALL))
    monkeypatch.setattr(shipped, "NANO_FOLDER", folder)
    monkeypatch.delenv("MAGIHUMAN_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def test_without_a_model_the_shipped_one_makes_what_suits_it(named, tmp_path):
    result = generate("-o", tmp_path / "clip.mp4")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert (made["width"], made["height"], made["frames"]) == (96, 64, 5)


def test_what_is_asked_for_comes_first(named, tmp_path):
    result = generate("-o", tmp_path / "clip.mp4", "--width", 32, "--seconds", 0.4)
    made = json.loads(result.stdout)
    assert (made["width"], made["height"], made["frames"]) == (32, 64, 9)


def test_it_loads_by_name(named):
    with runtime.load("nano", device="cpu") as engine:
        assert engine.generate("hi", seconds=0.2, width=32, height=32, steps=1).duration_s == 0.2


def test_the_engine_makes_what_suits_the_model(named):
    """Keywords that are left out are the model's, one by one; a `Request` says all of it."""
    with runtime.load("nano", device="cpu") as engine:
        assert engine.defaults == SMALL
        video = engine.generate("hi", steps=1)
        assert (video.frames.shape, video.warnings) == ((5, 64, 96, 3), ())
        (*_, last) = engine.generate_stream("hi", steps=1, width=32)
        assert (last.frames.shape[1:], last.warnings) == ((64, 32, 3), ())
        whole = runtime.Request("hi", seconds=0.36, width=64, height=64, steps=1)
        assert engine.generate(whole).frames.shape == (9, 64, 64, 3)


def test_a_model_that_tells_nothing_has_the_standard_size(tiny_dir):
    with runtime.load(tiny_dir, device="cpu") as engine:
        assert engine.defaults == {"seconds": 5.0, "width": 480, "height": 256}


@pytest.mark.parametrize(
    ("asked", "beyond"),
    [
        ({"seconds": 0.2, "width": 96, "height": 64}, None),
        ({"width": 64, "height": 96}, None),  # as many pixels
        ({"seconds": 0.4}, "0.4 s are beyond"),
        ({"height": 96}, "96x96 pixels are beyond"),
        ({"seconds": 0.4, "width": 128}, "0.4 s and 128x64 pixels are beyond"),
    ],
)
def test_a_clip_beyond_what_the_model_has_learnt_comes_with_a_warning(named, asked, beyond):
    with runtime.load("nano", device="cpu") as engine:
        said = engine.generate("hi", steps=1, **asked).warnings
    assert len(said) == (beyond is not None)
    assert beyond is None or ("up to 0.2 s and 96x64 pixels" in said[0] and beyond in said[0])


def test_a_short_voice_is_not_beyond_it(named, tmp_path):
    """However many seconds are asked for, the clip is no longer than the voice."""
    voice = write_sine(tmp_path / "voice.wav", seconds=0.2)
    with runtime.load("nano", device="cpu") as engine:
        said = engine.generate("hi", steps=1, audio=voice, seconds=1).warnings
    assert not any("has learnt" in warning for warning in said)


def test_it_converts_by_name(named, tmp_path):
    made = runtime.convert("nano", tmp_path / "fp8")
    assert any(made.iterdir())


def test_a_folder_of_that_name_is_the_folder(named, tmp_path):
    assert shipped.model_folder("nano") == named
    (tmp_path / "nano").mkdir()
    assert shipped.model_folder("nano").resolve() == tmp_path / "nano"


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_package_without_the_weights_says_so(command, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "NANO_FOLDER", tmp_path / "absent")
    monkeypatch.delenv("MAGIHUMAN_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    if command == "generate":
        result = generate("-o", tmp_path / "clip.mp4")
    else:
        result = CliRunner().invoke(app, ["score", "--model", "nano"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "examples/nano/README.md" in result.stderr
    with pytest.raises(runtime.CheckpointError, match="give a model directory"):
        runtime.load("nano", device="cpu")


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"seconds": 3}', json.dumps({**SMALL, "width": "9"})]
)
def test_damaged_defaults_are_named(named, content):
    (named / shipped.SUITED).write_text(content)
    with pytest.raises(runtime.CheckpointError, match=r"request\.json"):
        shipped.suited("nano")


def test_standard_requests_are_those_of_the_library(tmp_path):
    request = runtime.Request("hi")
    assert request.plan(VARIANTS["distill"], None).warnings == ()
    assert shipped.suited(tmp_path) == {name: getattr(request, name) for name in shipped.STANDARD}
    assert shipped.suited("owner/name") == shipped.STANDARD


def test_nano_speaks():
    """Its first clips meet all thresholds; after a step of training none does (test_nano.py)."""
    with runtime.load("nano", device="cpu") as engine:
        assert score_model(engine, shipped.NANO_FOLDER, clips=2).broken == []


def test_nano_comes_whole_and_small():
    files = [file for file in shipped.NANO_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert (shipped.NANO_FOLDER / "README.md").read_text() == CARD.read_text()
    found = CliRunner().invoke(app, ["inspect", "nano", "--json"])
    states = {part["name"]: part["state"] for part in json.loads(found.stdout)["components"]}
    missing = {"base", "540p_sr", "1080p_sr"}
    assert states == {name: "missing" if name in missing else "ok" for name in states}


def test_prompts_to_try_are_the_models_own(named, tmp_path):
    assert shipped.prompts("nano") == shipped.prompts(tmp_path) == shipped.EXAMPLES
    (named / shipped.SUITED).write_text(json.dumps({**SMALL, "prompts": ["One.", "Two."]}))
    assert shipped.prompts("nano") == ("One.", "Two.")
    assert shipped.suited("nano") == SMALL
    assert len(shipped.prompts(shipped.Path(shipped.__file__).parent / "nano")) == 4


@pytest.mark.parametrize("given", [None, "One.", [1], [" "], ["x" * 1001], ["x"] * 21, {}])
def test_prompts_that_are_none_are_refused(named, given):
    (named / shipped.SUITED).write_text(json.dumps({**SMALL, "prompts": given}))
    if given is None:
        assert shipped.prompts("nano") == shipped.EXAMPLES
        return
    with pytest.raises(runtime.CheckpointError, match="prompts must be a list of at most 20"):
        shipped.prompts("nano")
