from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from magihuman.runtime import OutputError, Video
from magihuman.runtime.media.mp4 import check_output, read_frames

ROOT = Path(__file__).parents[3]


@pytest.fixture
def clip(tmp_path) -> Path:
    """Nine frames of one colour, 30 a second, and silence."""
    frames = np.full((9, 32, 64, 3), (200, 100, 50), np.uint8)
    return Video(frames, np.zeros((13230, 2), np.float32), 30, 44100).save(tmp_path / "clip.mp4")


def test_frames_and_their_rate_come_back(clip):
    """The rate is a whole number, whichever type PyAV has for it."""
    frames, fps = read_frames(clip)
    assert (frames.shape, frames.dtype) == ((9, 32, 64, 3), np.uint8)
    assert type(fps) is int and fps == 30
    # Even colours lose to the rounding of 8-bit YUV alone: see `test_colours_survive`.
    assert np.abs(frames.astype(int) - (200, 100, 50)).max() <= 3


def test_make_demo_tells_what_is_in_the_clip(clip):
    """The script that it runs, as make hands it over."""
    rule = f"facts: ; @'{sys.executable}' -c \"$$FACTS\" '{clip}'"
    done = subprocess.run(
        ["make", "--silent", f"--eval={rule}", "facts"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (f"{clip}: h264 64x32, 9 frames at 30/s, aac at 44100 Hz, 0.30 s\n")


@pytest.mark.parametrize("name", ["clip.avi", "clip", "clip.mp4.part", ".mp4"])
def test_the_name_must_end_in_mp4(tmp_path, name):
    with pytest.raises(OutputError, match=f"^the output's name must end in .mp4, got {name}$"):
        check_output(tmp_path / name)


def test_the_suffix_may_be_in_capitals(tmp_path):
    check_output(tmp_path / "CLIP.MP4")
    assert os.listdir(tmp_path) == []


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "no" / "clip.mp4")
    assert str(caught.value) == (
        f"the output's folder must exist, got {tmp_path / 'no'}; create it first"
    )


def test_the_folder_must_not_be_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the output's folder must exist"):
        check_output(tmp_path / "file" / "clip.mp4")


def test_the_output_must_not_be_a_folder(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(OutputError, match=r"must be a file, got the folder .*clip.mp4"):
        check_output(tmp_path / "clip.mp4")


def test_a_folder_that_takes_no_files_is_refused():
    # /proc refuses new files even to root, for whom permission bits mean nothing.
    with pytest.raises(OutputError, match=r"^the output's folder /proc cannot be written to: "):
        check_output(Path("/proc/clip.mp4"))


def test_too_long_a_name_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"one the disk takes, got x+.mp4: File name too long"):
        check_output(tmp_path / ("x" * 300 + ".mp4"))


def test_the_disk_must_have_room(tmp_path):
    # 10^9 frames of 4096x4096 at 2 bits a pixel are 4 PB, more than any disk here.
    with pytest.raises(OutputError, match=r"must have \d+ MiB free for this clip, got [\d.]+ MiB"):
        check_output(tmp_path / "clip.mp4", 10**9, 4096, 4096)
