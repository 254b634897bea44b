"""A face that answers: how soon a sound is seen, and how much faster than its voice it is made.

    python benchmarks/live.py [--folder RESULTS] [--ranks 1 4] [--precision fp8-attn]
        [--seconds 60] [--window 1.44] [--only model nano] [--add] [--tiny]

A voice is fed in blocks of 20 ms as it would be spoken, and chunks are taken as they come. `model`
has random weights at full size, 480x256 and 300 text tokens, on each number of GPUs. `nano` comes
with this package and runs on the CPU, at its own size or, where that falls behind, the next smaller
one that keeps up.

Of each session, the first window left out: `factor` is seconds of picture by seconds of making it,
waits for the voice apart. A frame's delay is from when its sound came until it was handed over;
`delay_max_s` is what a player has to wait at the beginning so as never to stop. `jitter_s` is the
standard deviation, between windows, of the time from the last sound of a window to its frames.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness import environment, sizes
from harness.measure import release
from magihuman import runtime

RATE, BLOCK_S = 16_000, 0.02
SIDES, TINY_SIDES = (160, 128, 96, 64), (32,)  # of nano, its own first
NANO = "A man with short black hair in a red shirt on a blue background looks into the camera"


class Windows:
    """A hook that notes how long each request takes, but for its waits."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._waited = threading.local()

    @contextmanager
    def span(self, name: str, request: int) -> Iterator[None]:
        """Time a request."""
        if name == "request":
            self._waited.seconds = 0.0
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        if name == "queue":
            self._waited.seconds += elapsed
        elif name == "request":
            self.seconds.append(elapsed - self._waited.seconds)


def voice(seconds: float) -> np.ndarray:
    """Syllables and pauses, int16."""
    times = np.arange(round(seconds * RATE)) / RATE
    loud = np.maximum(0, np.sin(2 * np.pi * 3 * times)) * (np.sin(2 * np.pi * 0.2 * times) > -0.8)
    return (loud * np.sin(2 * np.pi * 180 * times) * 12_000).astype(np.int16)


def spoken(seconds: float, ready: threading.Event) -> Iterator[np.ndarray]:
    """Blocks of it, each when it has been spoken."""
    ready.wait()
    samples, count = voice(seconds), round(BLOCK_S * RATE)
    start = time.monotonic()
    for index in range(0, len(samples), count):
        time.sleep(max(0.0, start + (index + count) / RATE - time.monotonic()))
        yield samples[index : index + count]


def session(
    engine: runtime.Engine, windows: Windows, prompt: str, options: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """One voice from its beginning to its end."""
    ready = threading.Event()
    source = runtime.LiveVoice(RATE, spoken(seconds, ready))
    face = Image.new("RGB", (options["width"], options["height"]), (120, 90, 70))

    def begin() -> None:
        windows.seconds.clear()
        ready.set()

    start = time.perf_counter()
    with engine.live(face, source, prompt, on_ready=begin, **options) as stream:
        first = next(stream)
        first_s = time.perf_counter() - start
        chunks = list(stream)
    made = [chunk for chunk in (first, *chunks) if not chunk.repeated]
    taken = dict(zip((chunk.index for chunk in made), windows.seconds, strict=True))
    whole = [chunk for chunk in made[1:] if not chunk.is_last] or made
    frames = [  # of a voice that a busy machine has held up, at least what making takes
        max(chunk.delay_s - index / chunk.fps, taken.get(chunk.index, 0.0))
        for chunk in chunks or [first]
        for index in range(len(chunk.frames))
    ]
    after_s = [chunk.delay_s - len(chunk.frames) / chunk.fps for chunk in whole]
    return {
        "width": options["width"],
        "height": options["height"],
        "voice_s": seconds,
        "first_chunk_s": first_s,
        "windows": len(made),
        "window_s": statistics.median(chunk.window_s for chunk in made),
        "making_s": statistics.median(taken[chunk.index] for chunk in whole),
        "factor": statistics.median(chunk.window_s / taken[chunk.index] for chunk in whole),
        "delay_median_s": statistics.median(frames),
        "delay_p99_s": float(np.quantile(frames, 0.99)),
        "delay_max_s": max(frames),
        "jitter_s": statistics.pstdev(after_s),
        "late": sum(chunk.late for chunk in (first, *chunks)),
        "repeated_frames": sum(chunk.repeated for chunk in chunks),
    }


def of_model(
    size: sizes.Size, precision: Any, ranks: int, window_s: float, seconds: float, folder: Path
) -> dict[str, Any]:
    """The model with random weights, on so many GPUs."""
    windows = Windows()
    options = {"precision": precision, "context_parallel": ranks, "hooks": [windows]}
    with runtime.load(sizes.source(size, folder), **options) as engine:
        width, height = size.pixels["256p"]
        asked = {"width": width, "height": height, "window_seconds": window_s}
        found = session(engine, windows, size.prompt, asked, seconds)
    release()
    return found


def of_nano(sides: tuple[int, ...], window_s: float, seconds: float) -> dict[str, Any]:
    """The model of this package on the CPU, at the largest size that keeps up, or the smallest."""
    windows, behind = Windows(), {}
    with runtime.load("nano", device="cpu", hooks=[windows]) as engine:
        for side in sides:
            asked = {"width": side, "height": side, "window_seconds": window_s}
            found = session(engine, windows, NANO, asked, seconds)
            keeps_up = found["factor"] >= 1 and not found["repeated_frames"]
            if keeps_up:
                break
            behind[f"{side}x{side}"] = found["factor"]
    return {
        "threads": torch.get_num_threads(),
        "keeps_up": keeps_up,
        "factors_of_sizes_that_fall_behind": behind,
        **found,
    }


def main() -> None:
    """Measure, and write the JSON anew with every session."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", default="fp8-attn")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--window", type=float, default=1.44)
    parser.add_argument("--only", nargs="+", choices=("model", "nano"), default=("model", "nano"))
    parser.add_argument("--add", action="store_true", help="go on from what the folder has")
    arguments = environment.arguments(parser)
    size, seconds = sizes.of(arguments.tiny), arguments.seconds
    figures: dict[str, Any] = {"text_tokens": size.layout.text, "block_s": BLOCK_S}
    if arguments.add:
        figures = json.loads((arguments.folder / "live.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in arguments.ranks if "model" in arguments.only else ():
            found = of_model(
                size, arguments.precision, ranks, arguments.window, seconds, Path(scratch)
            )
            figures.setdefault(arguments.precision, {})[str(ranks)] = found
            print(ranks, found, flush=True)
            figures["environment"] = environment.environment()
            environment.write("live", figures, arguments.folder)
    if "nano" in arguments.only:
        sides = TINY_SIDES if arguments.tiny else SIDES
        figures["nano"] = of_nano(sides, arguments.window, seconds)
        figures["nano"]["environment"] = environment.environment()
        print("nano", figures["nano"], flush=True)
        environment.write("live", figures, arguments.folder)


if __name__ == "__main__":
    main()
