"""`magihuman evaluate`: precisions side by side, on nano; measures from elsewhere; bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from magihuman import runtime
from magihuman.runtime.cli.main import app
from magihuman.runtime.evaluate import Case, EvaluatedClip, Figures, evaluate, read_cases
from magihuman.runtime.evaluate.measures import (
    ColourDrift,
    FrameDifference,
    SoundDifference,
    standard_measures,
)

PROMPT = "A woman with long black hair in a yellow shirt on a pink background says: ho ba hu bu"
IN_FORM = """A woman nods.

Dialogue:
<Woman, English>: "Hello there."

Background Sound:
<Rain>"""


class Brightness:
    """A measure of a test's own."""

    name, unit = "brightness", "of 255"

    def of(self, clip: EvaluatedClip) -> float:
        return float(clip.video.frames.mean())


class Faulty(Brightness):
    name = "faulty"

    def of(self, clip: EvaluatedClip) -> float:
        return math.nan


def run(*arguments: object):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two prompts in bf16 and fp8, with what the command prints and writes."""
    folder = tmp_path_factory.mktemp("evaluation")
    file = folder / "prompts.txt"
    file.write_text(PROMPT + "\n")
    options = ("--prompts", file, "--precisions", "fp8", "bf16", "--seconds", 0.6, "--json")
    result = run(*options, "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), folder / "out"


# -- what is reported ---------------------------------------------------------------------------


def test_precisions_are_side_by_side(found):
    said, _ = found
    assert said["precisions"] == ["bf16", "fp8"] and said["simulated"] == ["fp8"]
    measures = said["measures"]
    assert list(measures) == [
        "mouth with sound", "mouth after sound", "named colours", "colour drift",
        "frames against bf16", "sound against bf16",
    ]  # fmt: skip
    for precision in ("bf16", "fp8"):
        assert measures["named colours"][precision] == 1
        assert measures["mouth with sound"][precision] > 0.7
        assert abs(measures["mouth after sound"][precision]) <= 1
        assert measures["colour drift"][precision] < 6
    assert measures["frames against bf16"]["bf16"] is None
    # Rounding to e4m3 is seen and heard, and is no other clip.
    assert 25 < measures["frames against bf16"]["fp8"] < 60
    assert 5 < measures["sound against bf16"]["fp8"] < 60
    assert "--asr" in said["not_measured"]["word error rate"] and said["failures"] == []
    assert [(clip["precision"], clip["seed"]) for clip in said["clips"]] == [
        ("bf16", 42),
        ("fp8", 42),
    ]


def test_clips_and_figures_are_written(found):
    said, folder = found
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert files == ["bf16/001.mp4", "evaluation.json", "fp8/001.mp4"]
    assert json.loads((folder / "evaluation.json").read_text()) == said


def test_the_table_and_a_measure_that_is_passed(tiny_dir):
    result = evaluate(
        tiny_dir,
        ["a", runtime.Prompt("b")],
        ["int8"],
        [Brightness(), FrameDifference(), Faulty()],
        seconds=0.2, width=32, height=32, steps=1, seed=5,
    )  # fmt: skip
    assert [clip.seed for clip in result.clips] == [5, 6]
    assert 0 < result.mean("brightness", "int8") < 255
    assert result.mean("frames against bf16", "int8") is None  # bf16 was not asked for
    assert len(result.failures) == 2 and "finite" in result.failures[0]
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_measure_of_another_package(tmp_path, tiny_dir, monkeypatch):
    (tmp_path / "others.py").write_text(
        "class Ones:\n    name, unit = 'ones', 'things'\n    def of(self, clip): return 1.0\n"
    )
    facts = tmp_path / "others-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[magihuman.measures]\nones = others:Ones\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "p.txt"
    file.write_text("a\n")
    small = ("--seconds", 0.2, "--width", 32, "--height", 32, "--steps", 1)
    result = run("--prompts", file, "-m", tiny_dir, "--precisions", "bf16", *small)
    assert result.exit_code == 0
    (row,) = [line for line in result.stdout.splitlines() if "ones" in line]
    assert "things" in row and "1.000" in row
    assert "mouth with sound not measured: install a mediapipe" in result.stdout
    (facts / "entry_points.txt").write_text("[magihuman.measures]\nones = others:Twos\n")
    result = run("--prompts", file, "-m", tiny_dir, *small)
    assert result.exit_code == 2 and "'ones'" in result.stderr and "Twos" in result.stderr


def test_colour_drift_by_hand():
    frames = np.full((75, 4, 4, 3), 100, np.uint8)
    frames[25:50, ..., 1] += 2
    frames[50:, :, :2, 2] -= 10  # half of the picture: 5 in the mean
    video = runtime.Video(frames, np.zeros((10, 2), np.float32), 25, 10)
    assert ColourDrift().of(EvaluatedClip(Case("-"), "bf16", video)) == 5


def test_differences_by_hand():
    frames, sound = np.full((2, 4, 4, 3), 100, np.uint8), np.ones((10, 2), np.float32)
    reference = runtime.Video(frames, sound, 25, 10)
    video = runtime.Video(frames + np.uint8(1), sound * np.float32(1.1), 25, 10)
    clip = EvaluatedClip(Case("-"), "fp8", video, reference)
    assert FrameDifference().of(clip) == pytest.approx(20 * math.log10(255))
    assert SoundDifference().of(clip) == pytest.approx(20, abs=0.01)
    assert FrameDifference().of(EvaluatedClip(Case("-"), "fp8", reference, reference)) == 100
    silent = runtime.Video(frames, sound * 0, 25, 10)
    assert SoundDifference().of(EvaluatedClip(Case("-"), "fp8", video, silent)) is None


def face(opening: float, size: float = 60.0, wide: float = 1.0) -> np.ndarray:
    """[468, 2]: a face around (100, 100), with what is looked at of it."""
    points = np.full((468, 2), 100.0)
    outline = {
        10: (0, -1), 152: (0, 1), 13: (0, 0.5 - opening), 14: (0, 0.5 + opening),
        33: (-0.5 * wide, -0.2), 133: (-0.2, -0.2), 362: (0.2, -0.2), 263: (0.5 * wide, -0.2),
        168: (0, -0.2), 6: (0, -0.1), 127: (-0.7, -0.2), 356: (0.7, -0.2),
    }  # fmt: skip
    for i, (x, y) in outline.items():
        points[i] += size * np.array((x, y))
    return points


def test_a_face_whose_mouth_goes_with_the_sound(tmp_path):
    time = np.arange(50)
    mouth = 0.1 * np.abs(np.sin(time / 4))
    points = np.stack([face(o, 60 + i / 5) + i for i, o in enumerate(mouth)])  # it nears and moves
    points[7] = np.nan  # a frame in which none is found
    loud = np.repeat(mouth, 40).astype(np.float32)
    wave = loud * np.where(np.arange(2000) % 2, 1, -1).astype(np.float32)
    video = runtime.Video(np.zeros((50, 4, 4, 3), np.uint8), np.stack([wave] * 2, 1), 25, 1000)
    measures = {m.name: m for m in standard_measures(tmp_path, landmarks=lambda frames: points)}
    clip = EvaluatedClip(Case("-"), "bf16", video)
    assert measures["mouth with sound"].of(clip) > 0.95
    assert measures["mouth after sound"].of(clip) == 0
    assert measures["face drift"].of(clip) == pytest.approx(0, abs=1e-6)


def test_a_face_that_changes_drifts(tmp_path):
    points = np.stack([face(0.1)] * 10 + [face(0.1, wide=1.3)] * 10)
    video = runtime.Video(np.zeros((20, 4, 4, 3), np.uint8), np.zeros((9, 2), np.float32), 25, 11)
    clip = EvaluatedClip(Case("-"), "bf16", video)

    def drift(points):
        measures = standard_measures(tmp_path, landmarks=lambda frames: points)
        return next(m for m in measures if m.name == "face drift").of(clip)

    # Of 8 points the inner corners, 0.2 of 1 and of 1.3 apart from the middle, and the temples move
    # by 0.7 - 0.7 / 1.3 in all.
    inner, outer = 0.2 - 0.2 / 1.3, 0.7 - 0.7 / 1.3
    heights = sum((h - h / 1.3) ** 2 for h in [-0.0125] * 7 + [0.0875])  # from their mean
    assert drift(points) == pytest.approx(math.sqrt((2 * inner**2 + 2 * outer**2 + heights) / 8))
    assert drift(np.full_like(points, np.nan)) is None


# -- files of prompts ---------------------------------------------------------------------------


def test_files_of_prompts(tmp_path):
    def read(text: str, name: str = "p.txt") -> list[Case]:
        (tmp_path / name).write_text(text)
        return read_cases(tmp_path / name)

    assert [case.prompt for case in read("one\ntwo\n")] == ["one", "two"]
    assert [case.prompt for case in read("one\nmore\n\n\ntwo\n")] == ["one\nmore", "two"]
    cases = read(f"{IN_FORM}\n\n{IN_FORM}\n")
    assert [case.prompt for case in cases] == [IN_FORM, IN_FORM]
    assert [line.words for line in cases[0].lines] == ["Hello there."]
    lines = [{"prompt": "x", "image": "a/b.png", "words": "你好"}, {"prompt": 'He says "no".'}]
    first, second = read("\n".join(map(json.dumps, lines)), "p.jsonl")
    assert first.image == tmp_path / "a/b.png" and first.lines[0].language == "Mandarin"
    assert second.lines[0].words == "no" and second.image is None


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("p.txt", "", (), "1 to 10000, got 0"),
        ("p.txt", " \n\n", (), "1 to 10000, got 0"),
        ("p.jsonl", '{"prompt": "a"}\nno json\n', (), "line 2: each line must be a JSON object"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": 3}\n', (), "line 2: prompt must be text"),
        ("p.jsonl", '{"prompt": "a", "imagge": "b"}', (), "no other keys"),
        ("p.jsonl", "[1]", (), "line 1"),
        ("p.jsonl", '{"prompt": "a", "image": "none.png"}', (), "none.png"),
        ("p.jsonl", '{"prompt": "a", "audio": "none.wav"}', (), "none.wav"),
        ("p.jsonl", '{"prompt": "a", "words": " "}', (), "words must be text that is not blank"),
        ("p.txt", "a", ("--precisions", "bf16", "fp4"), "'fp4'"),
        ("p.txt", "a", ("--seconds", "0"), "seconds"),
        ("p.txt", "a", ("--asr", "/none/asr"), "ASR model must be"),
        ("p.txt", "a", ("--out", "."), "must not exist yet"),
        ("p.txt", "a", ("-m", "/none"), "/none"),
        ("p.txt", "a", ("--variant", "fast"), "variant must be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_a_model_is_loaded(
    tmp_path, monkeypatch, name, text, options, message
):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("magihuman.runtime.engine.loading.load", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / name).write_text(text)
    result = run("--prompts", tmp_path / name, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.startswith("error: ")


def test_a_file_that_is_not_there(tmp_path):
    result = run("--prompts", tmp_path / "none.txt")
    assert result.exit_code == 2 and "none.txt" in result.stderr


@pytest.mark.parametrize(
    ("prompts", "precisions", "measures", "message"),
    [
        ("a", ["bf16"], None, "prompts must be a list"),
        ([], ["bf16"], None, "prompts must be a list"),
        (["a"], "bf16", None, "precisions must be a list"),
        (["a"], [], None, "precisions must be a list"),
        (["a"], ["fp32"], None, "'fp32'"),
        (["a"], ["bf16"], [Brightness(), Brightness()], "a name of its own"),
        (["a"], ["bf16"], [object()], "a name of its own"),
    ],
)
def test_bad_arguments(prompts, precisions, measures, message):
    with pytest.raises(runtime.InvalidRequestError, match=message):
        evaluate("nano", prompts, precisions, measures)


def test_a_keyword_that_is_none():
    with pytest.raises(runtime.InvalidRequestError, match="'sr'"):
        evaluate("nano", ["a"], sr="540p")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_interrupted_it_leaves_nothing(tmp_path, tiny_dir):
    (tmp_path / "p.txt").write_text("a\n" * 5000)
    kept = tmp_path / "tmp"
    kept.mkdir()
    command = [sys.executable, "-m", "magihuman.runtime.cli", "evaluate", "--prompts", "p.txt"]
    small = ["--seconds", "0.2", "--width", "32", "--height", "32", "--steps", "1"]
    with subprocess.Popen(
        [*command, "-m", str(tiny_dir), *small, "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(kept)},
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            for line in child.stderr:
                if line.startswith("bf16 2 of 5000"):
                    break
            assert list(tmp_path.glob(".magihuman-*/bf16/001.mp4"))
            child.send_signal(signal.SIGINT)
            said = child.stderr.read()
            assert child.wait(300) == 1 and "interrupted" in said
        finally:
            child.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt", "tmp"]
    assert not [path for path in kept.iterdir() if path.name.startswith("magihuman-")]


def test_figures_have_the_words(found):
    figures = Figures(Case(IN_FORM), 1, "bf16", {}, {})
    assert figures.to_dict()["words"] == "Hello there."
