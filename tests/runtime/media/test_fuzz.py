"""Damaged files of all kinds end in a result or in `InvalidRequestError`, and in nothing else."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from images import (
    DISPLAY_P3,
    chunk,
    cmyk_profile,
    exif,
    grey_profile,
    iccp,
    matrix_profile,
    png,
)
from PIL import Image
from sounds import sine, wav, write_sine, write_track, write_wave

TESTS = Path(__file__).parents[2]
CASES = TESTS / "data" / "cases"


def image_seeds() -> list[bytes]:
    random = np.random.default_rng(0)

    def samples(depth: int, channels: int) -> np.ndarray:
        return random.integers(0, 2**depth, (9, 11, channels))

    grey, colour = chunk(b"tRNS", b"\0\1"), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))
    palette = chunk(b"PLTE", random.bytes(48)) + chunk(b"tRNS", random.bytes(16))
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 8\n49492a00\n"))
    turned = exif((0x011A, 5, 1, 26), (0x0112, 3, 1, 6), (0x8769, 4, 1, 8))
    seeds = [png(samples(depth, 1), depth, 0, grey) for depth in (1, 2, 4, 8, 16)]
    seeds += [png(samples(depth, 3), depth, 2, colour) for depth in (8, 16)]
    seeds += [png(samples(4, 1), 4, 3, palette), png(samples(8, 4), 8, 6, text)]
    seeds += [
        png(samples(8, 1), 8, 0, iccp(grey_profile(1.8)) + chunk(b"eXIf", turned)),
        png(samples(8, 3), 8, 2, iccp(matrix_profile(DISPLAY_P3, 2.2))),
    ]
    picture = Image.fromarray(random.integers(0, 256, (24, 32, 4), dtype=np.uint8))
    options = {"exif": b"Exif\0\0" + turned, "icc_profile": matrix_profile(DISPLAY_P3, 2.2)}
    for kind, mode, more in [
        ("JPEG", "RGB", options),
        ("JPEG", "CMYK", {"icc_profile": cmyk_profile(50.0)}),
        ("JPEG", "L", {"progressive": True}),
        ("WEBP", "RGBA", options),
        ("TIFF", "RGB", {"compression": "tiff_lzw", "icc_profile": options["icc_profile"]}),
        ("TIFF", "LAB", {}),
        ("GIF", "P", {"transparency": 3}),
        ("GIF", "RGB", {"save_all": True, "append_images": [picture.convert("RGB")]}),
        ("BMP", "RGB", {}),
        ("TGA", "RGBA", {}),
        ("PPM", "L", {}),
        ("ICO", "RGBA", {"sizes": [(16, 16)]}),
        ("PCX", "P", {}),
        ("SGI", "RGB", {}),
    ]:
        buffer = io.BytesIO()
        image = picture.convert("RGB").convert(mode) if mode in ("P", "CMYK") else picture
        if mode == "LAB":
            image = Image.new("LAB", (32, 24), (128, 100, 140))
        (image if image.mode == mode else image.convert(mode)).save(buffer, kind, **more)
        seeds.append(buffer.getvalue())
    return seeds + [
        path.read_bytes() for path in sorted(CASES.iterdir()) if path.suffix in PICTURES
    ]


PICTURES = (".png", ".jpg")


def sound_seeds(folder: Path) -> list[bytes]:
    tone = sine(16000, 0.4)
    seeds = [
        wav(tone[None], 16000),
        wav(np.stack([tone] * 6), 16000, mask=0x3F, is_float=True),
        wav(np.stack([tone] * 11), 16000),
    ]
    for path in (folder / "a.mp3", folder / "a.flac"):
        write_sine(path, 44100, 2, 0.4)
        seeds.append(path.read_bytes())
    seeds.append(write_wave(folder / "b.flac", np.stack([tone] * 6), 16000).read_bytes())
    for suffix in ("mkv", "mp4", "mov", "avi"):
        path = write_track(folder / f"c.{suffix}", [tone, tone], 16000, late_s=0.3)
        seeds.append(path.read_bytes())
    cases = [path for path in sorted(CASES.iterdir()) if path.suffix not in PICTURES]
    return seeds + [path.read_bytes() for path in cases]


@pytest.mark.parametrize("kind", ["image", "sound"])
def test_mutants(tmp_path, kind, request):
    folder = tmp_path / "seeds"
    folder.mkdir()
    (tmp_path / "made").mkdir()
    seeds = image_seeds() if kind == "image" else sound_seeds(tmp_path / "made")
    for index, seed in enumerate(seeds):
        (folder / f"{index:03}").write_bytes(seed)
    count = request.config.getoption("--fuzz-count")
    # In a process of their own: a decoder that crashes is a failure as well.
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(TESTS / "helpers" / "media" / "fuzz_child.py"),
        kind,
        str(folder),
    ]
    done = subprocess.run(
        [*command, "0", str(count)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    left = sorted(tmp_path.glob("mutant-*"))
    assert done.returncode == 0, f"{done.returncode} over {left}: {done.stderr[-4000:]}"
    # Some are still whole enough to be read, and some are not, or this would try nothing.
    assert 0.1 * count < int(done.stdout.split()[-1]) < 0.95 * count
