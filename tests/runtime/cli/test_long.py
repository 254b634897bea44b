from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from sounds import write_sine
from typer.testing import CliRunner
from video_client import until

from magihuman.runtime.cli.main import app
from magihuman.runtime.media import read_frames

SMALL = ("--width", 64, "--height", 64, "--steps", 1, "--window-seconds", 0.36)


def run(*arguments: object):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_long_clip_of_a_voice(tiny_dir, tmp_path):
    voice, path = write_sine(tmp_path / "voice.wav", seconds=0.9), tmp_path / "long.mp4"
    options = ("-m", tiny_dir, "-p", "hi", "-o", path, "--long", "--audio", voice)
    result = run(*options, *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["frames"], said["width"], said["height"], said["seed"]) == (25, 64, 64, 44)
    assert said["duration_s"] == 1.0 and said["timings_s"]["denoise"] > 0
    assert len(read_frames(path)[0]) == 25


def test_a_script_and_a_clip_that_goes_on(tiny_dir, tmp_path):
    script, path = tmp_path / "script.txt", tmp_path / "long.mp4"
    script.write_text("0.32 one\n0.32 two\n")
    result = run("-m", tiny_dir, "-o", path, "--script", script, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert f"{path}: 17 frames of 64x64, 0.68 s" in result.stdout
    after = tmp_path / "after.mp4"
    options = ("-m", tiny_dir, "-p", "hi", "-o", after, "--seconds", 0.2, "--steps", 1)
    result = run(*options, "--continue-from", path)
    assert result.exit_code == 0, result.stderr
    assert f"{after}: 5 frames of 64x64" in result.stdout  # the size of the clip before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --prompt or --script"),
        (["-p", "a", "--script", "s"], "either --prompt or --script"),
        (["--script", "none.txt"], "can be read"),
        (["--script", "s", "--seconds", "3"], "leave --seconds out"),
        (["-p", "a", "--continue-from", "none.mp4"], "must be a file that exists"),
        (["-p", "a", "--long", "--crf", "20"], "leave them out"),
        (["-p", "a", "--long", "--window-seconds", "100"], "window_seconds must be"),
    ],
)
def test_bad_input(tiny_dir, tmp_path, arguments, message):
    result = run("-m", tiny_dir, "-o", tmp_path / "a.mp4", *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "a.mp4").exists()


def test_what_was_finished_when_it_was_killed_can_be_played(tiny_dir, tmp_path):
    path = tmp_path / "long.mp4"
    command = [
        sys.executable,
        "-m",
        "magihuman.runtime.cli",
        "generate",
        "-m",
        tiny_dir,
        "-o",
        path,
    ]
    command += ["-p", "hi", "--long", "--seconds", 3600, *SMALL, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
    ) as process:
        try:
            until(lambda: path.exists() and path.stat().st_size > 20_000)
            process.kill()
            assert process.wait(300) == -signal.SIGKILL
        finally:
            process.kill()
    frames, fps = read_frames(path)
    assert len(frames) >= 8 and fps == 25
