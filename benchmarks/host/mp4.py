"""How long an mp4 takes, and how soon after the last frame it is there; needs no GPU.

    python benchmarks/host/mp4.py [--folder RESULTS] [--tiny]

Clips of 5 s at 480x256, of a soft moving scene and of noise, which hardly compresses. Figures are
printed, and written where --folder is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment
from magihuman.kernels.decoder import reference as ref
from magihuman.runtime.media.mp4 import Mp4Writer, _Frames, _pictures

FPS, RATE = 25, 44100
PACE_S = 0.025  # from window to window: a GPU's, about
REPEATS = 5
PARTS = 5  # of a clip, converted one after another
Bytes = npt.NDArray[np.uint8]
Wave = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """A size of clips.

    Attributes:
        windows: frames finished after each of the video decoder's.
        repeats: how often each file is timed, after once that does not count.
    """

    width: int
    height: int
    windows: tuple[int, ...]
    repeats: int

    @property
    def frames(self) -> int:
        return self.windows[-1]


FULL = Clip(480, 256, (25, 53, 81, 109, 125), REPEATS)
TINY = Clip(64, 32, (4, 8, 10), 1)


def soft(clip: Clip = FULL) -> Bytes:
    """A still textured backdrop and a bright shape that sways before it."""
    height, width = clip.height, clip.width
    generator = np.random.default_rng(0)
    coarse = generator.integers(60, 180, (height // 8 + 1, width // 8 + 1, 3)).astype(np.float32)
    back = torch.from_numpy(coarse).permute(2, 0, 1)[None]
    back = torch.nn.functional.interpolate(back, (height, width), mode="bicubic")[0]
    texture = back.permute(1, 2, 0).numpy()
    t, y, x = np.ogrid[: clip.frames, :height, :width]
    distance = (x - width / 2 - 8 * np.sin(t / 9)) ** 2 + (y - height / 2 - 4 * np.cos(t / 7)) ** 2
    shape = np.exp(-distance / (height / 4) ** 2)[..., None].astype(np.float32)
    mixed = texture * (1 - shape) + np.array([210, 160, 130], np.float32) * shape
    return mixed.clip(0, 255).astype(np.uint8)


def noise(clip: Clip = FULL) -> Bytes:
    """Every byte drawn."""
    shape = (clip.frames, clip.height, clip.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def voice(clip: Clip = FULL) -> Wave:
    """Harmonics of 150 Hz that swell and fade, and some hiss."""
    t = np.arange(clip.frames * RATE // FPS) / RATE
    tone = sum(np.sin(2 * np.pi * 150 * k * t) / k for k in range(1, 30))
    wave = 0.2 * tone * np.sin(2 * np.pi * 1.5 * t) ** 2
    wave = wave + 0.01 * np.random.default_rng(0).standard_normal(len(t))
    return np.stack([wave, wave], axis=1).astype(np.float32)


def write(
    clip: Clip, frames: Bytes, planes: Bytes | None, wave: Wave, pace_s: float = 0
) -> dict[str, float]:
    """Seconds and CPU seconds of a file, MB, and seconds since the last frame was handed over.

    pace_s: wait so long before each of the clip's windows.
    """
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        count, height, width, _ = frames.shape
        with Mp4Writer(Path(folder) / "a.mp4", count, width, height, FPS, RATE) as writer:
            writer.add_sound(wave)
            begin = 0
            for end in clip.windows:
                time.sleep(pace_s)
                part = slice(begin, end)
                writer.add(frames[part], None if planes is None else planes[part])
                begin = end
            last = time.perf_counter()
            path = writer.finish()
        done = time.perf_counter()
        return {
            "s": done - start,
            "cpu_s": time.process_time() - cpu,
            "after_last_frame_s": done - last,
            "mb": path.stat().st_size / 1e6,
        }


def median(clip: Clip, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Of several runs, after one."""
    runs = [run() for _ in range(1 + clip.repeats)][1:]
    return {key: round(statistics.median(one[key] for one in runs), 4) for key in runs[0]}


def convert(frames: Bytes) -> dict[str, float]:
    """FFmpeg's way from RGB alone."""
    start = time.perf_counter()
    for frame in _pictures(_Frames(frames, None)):
        del frame
    return {"s": time.perf_counter() - start}


def measure(clip: Clip = FULL) -> dict[str, Any]:
    """Whole files and their parts, by content."""
    wave, silence = voice(clip), np.zeros((1024, 2), np.float32)
    dark = np.zeros((clip.frames, 32, 32, 3), np.uint8)
    found: dict[str, Any] = {"sound alone": median(clip, lambda: write(clip, dark, None, wave))}
    for name, frames in (("soft", soft(clip)), ("noise", noise(clip))):
        parts = [ref.to_yuv420(torch.from_numpy(part)).numpy() for part in np.split(frames, PARTS)]
        planes = np.concatenate(parts)
        runs: dict[str, Callable[[], dict[str, float]]] = {
            "conversion alone": lambda f=frames: convert(f),  # type: ignore[misc]
            "picture alone": lambda f=frames, p=planes: write(clip, f, p, silence),  # type: ignore[misc]
            "whole, from planes": lambda f=frames, p=planes: write(clip, f, p, wave),  # type: ignore[misc]
            "whole, from RGB": lambda f=frames: write(clip, f, None, wave),  # type: ignore[misc]
            "paced, from planes": lambda f=frames, p=planes: write(clip, f, p, wave, PACE_S),  # type: ignore[misc]
        }
        found[name] = {key: median(clip, run) for key, run in runs.items()}
    return found


def main() -> None:
    """Measure and print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="of the results; by default none are written")
    parser.add_argument("--tiny", action="store_true", help="small clips: to see that it runs")
    arguments = parser.parse_args()
    print(os.cpu_count(), "processors")
    figures = measure(TINY if arguments.tiny else FULL)
    for content, found in figures.items():
        print(content, json.dumps(found, indent=1))
    if arguments.folder is not None:
        print(environment.write("mp4", figures, arguments.folder))


if __name__ == "__main__":
    main()
