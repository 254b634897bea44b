"""Fragmented MP4: what players get of a clip while it is made."""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from magihuman.runtime.media import FragmentWriter, psnr_db
from magihuman.runtime.media.clip import xmp_of
from magihuman.runtime.media.fragments import boxes

FPS, RATE = 25, 44100
WIDTH, HEIGHT = 96, 64
WINDOWS = (25, 1, 20)


def clip(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours that move, and a tone of its own in each ear."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    pictures = [
        np.stack([rows * 3 + 2 * t, columns * 2 + t, np.full_like(rows, 5 * t)], -1).clip(0, 255)
        for t in range(frames)
    ]
    seconds = np.arange(frames * RATE // FPS + 500) / RATE
    tones = [np.sin(2 * np.pi * pitch * seconds) / 2 for pitch in (440, 660)]
    return np.stack(pictures).astype(np.uint8), np.stack(tones, -1).astype(np.float32)


def write(path: Path, windows=WINDOWS) -> list[bytes]:
    """Write a clip, and return the file as it is after each window."""
    frames, audio = clip(sum(windows))
    files, done = [], 0
    with FragmentWriter(path, FPS, RATE) as writer:
        for index, count in enumerate(windows):
            is_last = index == len(windows) - 1
            end = None if is_last else (done + count) * RATE // FPS
            sound = audio[done * RATE // FPS : end]
            size = writer.add(frames[done : done + count], sound, is_last)
            done += count
            files.append(path.read_bytes())
            assert size == len(files[-1])
    return files


def decoded(file: bytes) -> tuple[np.ndarray, np.ndarray]:
    """All pictures of a file, and all of its sound."""
    with av.open(io.BytesIO(file)) as container:
        assert container.format.name.startswith("mov,mp4")
        pictures, sounds = [], []
        for frame in container.decode():
            if isinstance(frame, av.VideoFrame):
                assert frame.pts * frame.time_base * FPS == len(pictures)
                pictures.append(frame.to_ndarray(format="rgb24", src_colorspace="ITU709"))
            else:
                assert frame.pts == 1024 * len(sounds)
                sounds.append(frame.to_ndarray())
    return np.stack(pictures), np.concatenate(sounds, 1).T


def test_a_clip_in_fragments_is_the_clip(tmp_path):
    (*_, file) = write(tmp_path / "live.mp4")
    pictures, sound = decoded(file)
    frames, audio = clip(sum(WINDOWS))
    assert pictures.shape == frames.shape
    assert psnr_db(pictures, frames) > 27
    length = sum(WINDOWS) * RATE // FPS
    assert length <= len(sound) < length + 1024  # and not what is longer than the picture
    begin = 2048  # where the encoder's first block, which is not there, is heard no more
    assert np.abs(sound[begin:length] - audio[begin:length]).mean() < 0.02


def test_each_window_can_be_played_before_the_next_is_there(tmp_path):
    files = write(tmp_path / "live.mp4")
    whole, heard = decoded(files[-1])
    for file, frames in zip(files, np.cumsum(WINDOWS), strict=True):
        pictures, sound = decoded(file)
        assert np.array_equal(pictures, whole[:frames])
        assert len(sound) > (frames / FPS * RATE) - 3 * 1024
        assert np.array_equal(sound, heard[: len(sound)])
    assert all(after.startswith(before) for before, after in pairwise(files))


def test_a_fragment_for_each_window_begins_with_a_picture_of_its_own(tmp_path):
    (*_, file) = write(tmp_path / "live.mp4")
    kinds = [kind for kind, _ in boxes.boxes(file)]
    assert kinds == [b"ftyp", b"moov", b"uuid", *[b"moof", b"mdat"] * len(WINDOWS)]
    with av.open(io.BytesIO(file)) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    starts = [sum(WINDOWS[:index]) for index in range(len(WINDOWS))]
    assert all(keys[start] for start in starts)


def test_what_is_streamed_says_that_a_model_has_made_it(tmp_path):
    """From its first window on, for whoever keeps a part of it."""
    (first, *_) = write(tmp_path / "live.mp4")
    (tmp_path / "part.mp4").write_bytes(first)
    xmp = xmp_of(tmp_path / "part.mp4")
    assert xmp is not None and b"digitalsourcetype/trainedAlgorithmicMedia<" in xmp


def test_clips_of_one_picture(tmp_path):
    (file,) = write(tmp_path / "live.mp4", (1,))
    assert len(decoded(file)[0]) == 1


def test_the_file_is_new_and_the_users_own(tmp_path):
    path, other = tmp_path / "live.mp4", tmp_path / "other"
    other.write_text("left alone")
    path.symlink_to(other)
    write(path, (1,))
    assert not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert other.read_text() == "left alone"


def test_a_disk_that_is_full_is_said(tmp_path):
    frames, audio = clip(1)
    with FragmentWriter(tmp_path / "live.mp4", FPS, RATE) as writer:
        os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
        with pytest.raises(OSError, match="No space left"):
            writer.add(frames, audio, is_last=True)
        writer.close()  # and once more at the end


def test_units_get_their_lengths():
    units = b"\0\0\0\1\x67ab" + b"\0\0\1\x65c\0\0\3d" + b"\0\0\0\1\x41"
    expected = b"\0\0\0\3\x67ab" + b"\0\0\0\6\x65c\0\0\3d" + b"\0\0\0\1\x41"
    assert boxes.length_prefixed(units) == expected
