from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magihuman.runtime import InvalidRequestError, OutputError
from magihuman.runtime.media import spritesheet, thumbnail, write_mp4, write_thumbnail

AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def frames(count: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Each of one grey, brighter from frame to frame."""
    greys = np.linspace(40, 220, count).round().astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def clip(folder: Path, count: int, height: int = 32, width: int = 64) -> Path:
    sound = np.zeros((1764 * count, 2), np.float32)
    return write_mp4(folder / "clip.mp4", frames(count, height, width), sound, 25, 44100)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("count", [1, 2, 25, 130])
def test_the_thumbnail_is_the_frame_in_the_middle(tmp_path, count):
    image = opened(thumbnail(clip(tmp_path, count)))
    assert (image.format, image.size) == ("WEBP", (64, 32))
    expected = frames(count)[count // 2, 0, 0]
    # A step from one frame to the next is 1.4 of 255 at least, and both codecs lose some of that.
    assert np.abs(np.asarray(image).astype(int).mean(axis=(0, 1)) - expected).max() <= 3


def test_a_large_clip_is_scaled_down_in_its_aspect(tmp_path):
    assert opened(thumbnail(clip(tmp_path, 3, 64, 128), 32)).size == (32, 16)


def test_a_sheet_has_frames_at_even_distances(tmp_path):
    image = opened(spritesheet(clip(tmp_path, 80), frames=4))
    assert image.size == (128, 64)
    tiles = np.asarray(image).astype(int).reshape(2, 32, 2, 64, 3).mean(axis=(1, 3, 4))
    expected = frames(80)[[10, 30, 50, 70], 0, 0, 0].reshape(2, 2)
    assert np.abs(tiles - expected).max() <= 3


def test_a_sheet_of_a_short_clip_has_all_its_frames(tmp_path):
    assert opened(spritesheet(clip(tmp_path, 2))).size == (128, 32)


@pytest.mark.parametrize("name", ["a.webp", "a.JPG", "a.png"])
def test_a_thumbnail_says_that_a_model_has_made_it(tmp_path, name):
    path = write_thumbnail(tmp_path / name, frames(9))
    with Image.open(path) as image:
        assert np.abs(np.asarray(image).astype(int) - frames(9)[4]).max() <= 3
        xmp = image.info.get("xmp") or image.info["XML:com.adobe.xmp"].encode()
    assert re.search(f"DigitalSourceType>{re.escape(AI_GENERATED)}<", xmp.decode())
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.gif", "a", "a.mp4"])
def test_a_thumbnail_of_another_kind_is_refused(tmp_path, name):
    with pytest.raises(OutputError, match=f"one of .webp, .jpg, .jpeg, .png, got {name}$"):
        write_thumbnail(tmp_path / name, frames(1))


def test_a_thumbnail_needs_its_folder(tmp_path):
    with pytest.raises(OutputError, match="the thumbnail's folder must exist"):
        write_thumbnail(tmp_path / "no" / "a.png", frames(1))


@pytest.mark.parametrize("content", [None, b"", b"no clip", b"\0" * 4096])
def test_what_is_no_clip_has_no_thumbnail(tmp_path, content):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    for make in (thumbnail, spritesheet):
        with pytest.raises(InvalidRequestError, match=r"the clip .*clip\.mp4"):
            make(path)
