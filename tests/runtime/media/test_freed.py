"""What PyAV makes goes once a file is written or read, and not when Python next looks for it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from magihuman.runtime.media import FragmentWriter, read_audio, read_frames, thumbnail, write_clip
from magihuman.runtime.media.clip import Output

HEAVY = (av.container.Container, av.codec.CodecContext, av.filter.Graph)
FRAMES = np.zeros((9, 32, 48, 3), np.uint8)
SOUND = np.zeros((9 * 1920, 2), np.float32)


def heavy() -> list[object]:
    return [thing for thing in gc.get_objects() if isinstance(thing, HEAVY)]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """As between two times at which Python looks."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def written(path: Path) -> Path:
    write_clip(Output(path), FRAMES, SOUND, 25, 48_000)
    return path


def fragments(path: Path) -> None:
    with FragmentWriter(path, 25, 48_000) as writer:
        writer.add(FRAMES, SOUND, is_last=True)


READ: dict[str, Callable[[Path], object]] = {
    "frames": read_frames,
    "sound": lambda path: read_audio(path, 48_000, 10.0),
    "thumbnail": thumbnail,
}


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_of_a_clip_that_is_written(tmp_path: Path, suffix: str) -> None:
    written(tmp_path / f"clip.{suffix}")
    assert not heavy()


@pytest.mark.usefixtures("uncollected")
def test_of_fragments(tmp_path: Path) -> None:
    fragments(tmp_path / "clip.mp4")
    assert not heavy()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("what", READ)
def test_of_a_file_that_is_read(tmp_path: Path, what: str) -> None:
    clip = written(tmp_path / "clip.mp4")
    gc.collect()
    READ[what](clip)
    assert not heavy()
