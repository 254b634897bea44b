from __future__ import annotations

import os
from pathlib import Path

import pytest

from magihuman.runtime import OutputError
from magihuman.runtime.media import check_output


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
