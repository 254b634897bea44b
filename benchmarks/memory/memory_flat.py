"""Whether a process that makes many clips of several sizes keeps its memory.

    python benchmarks/memory/memory_flat.py [--clips N] [--model nano] [--folder RESULTS] [--tiny]

On the GPU or, without one, on the CPU: clips of three sizes in turn, of a prompt alone, with an
image, with a voice and with both, each second one streamed, each third written to a file. After
every clip it reads what the process has resident, its threads and its open files, and on a GPU what
PyTorch has allocated and reserved and what the device has in use. A slope is that of a line through
the means of whole turns, by least squares, over the last two thirds of them, and has a standard
error; before that, caches fill. Results are named by the device.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io.wavfile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment
from harness.measure import allocated_bytes, device, reserved_bytes, resident_bytes, used_bytes
from magihuman import runtime

CLIPS = 300
SIZES = ((96, 96, 0.52), (128, 64, 0.84), (64, 96, 0.36))  # width, height, seconds
STEPS = 2
INPUTS = ((), ("image",), ("audio",), ("image", "audio"))
TURN = len(SIZES) * len(INPUTS)  # clips until all is as at first
TINY_CLIPS = 2 * TURN
PROMPT = "A man with short red hair in a blue shirt on a white background says: ba bu ko"
PAGE = 4096
LEAST = {"threads": 0.05, "files": 0.05}  # one that is about to end, now and then


def inputs(folder: Path) -> dict[str, Path]:
    """An image and a voice to give to requests."""
    paths = {"image": folder / "face.png", "audio": folder / "voice.wav"}
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(pixels).save(paths["image"])
    wave = np.sin(np.arange(14_400) / 48_000 * 2 * np.pi * 220) * 8000  # 0.3 s
    scipy.io.wavfile.write(paths["audio"], 48_000, wave.astype(np.int16))
    return paths


def clip(engine: Any, number: int, files: dict[str, Path], folder: Path) -> None:
    """Make the clip of this number and forget it."""
    width, height, seconds = SIZES[number % len(SIZES)]
    given = {name: files[name] for name in INPUTS[number // len(SIZES) % len(INPUTS)]}
    options = {"width": width, "height": height, "seconds": seconds, "steps": STEPS, **given}
    if number % 3 == 1:
        options["save"] = folder / "clip.mp4"
    if number % 2:
        with engine.generate_stream(PROMPT, seed=number, **options) as stream:
            frames = sum(len(chunk.frames) for chunk in stream)
    else:
        frames = len(engine.generate(PROMPT, seed=number, **options).frames)
    assert frames > 0


def now() -> dict[str, int]:
    """What the process has, in bytes and in numbers."""
    held = {
        "resident_bytes": resident_bytes("VmRSS"),
        "anonymous_bytes": resident_bytes("RssAnon"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
    }
    if torch.cuda.is_available():
        held |= {
            "allocated_bytes": allocated_bytes(),
            "reserved_bytes": reserved_bytes(),
            "device_bytes": used_bytes(),
        }
    return held


def slope(values: Sequence[int], least: float) -> dict[str, float | bool]:
    """Growth per clip over the last two thirds of all turns.

    least: what a turn may add, since it is the least that there can be.

    Returns the slope, its standard error, and the figure at both ends of the line. It is flat where
    it is within three standard errors of zero, or adds no more than `least`.
    """
    turns = len(values) // TURN
    means = np.reshape(values[-turns * TURN :], (turns, TURN)).mean(axis=1)
    kept = means[turns // 3 :]
    x = np.arange(len(kept)) * TURN
    fitted = np.polynomial.Polynomial.fit(x, kept, 1).convert()
    start, growth = (*fitted.coef, 0.0)[:2]
    residuals = kept - fitted(x)
    free = max(1, len(kept) - 2)
    error = math.sqrt(float(residuals @ residuals) / free / float(np.square(x - x.mean()).sum()))
    return {
        "per_clip": float(growth),
        "error": error,
        "from": float(start),
        "to": float(start + growth * x[-1]),
        "is_flat": bool(abs(growth) <= max(3 * error, least / TURN)),
    }


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--model", choices=("nano", "tiny"), default="nano")
    arguments = environment.arguments(parser)
    clips = TINY_CLIPS if arguments.tiny else arguments.clips
    is_tiny = arguments.tiny or arguments.model == "tiny"
    logging.getLogger("magihuman").setLevel(logging.ERROR)  # not that voices are short, each time
    name = "memory_flat_gpu" if torch.cuda.is_available() else "memory_flat_cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        if is_tiny:
            runtime.write_tiny(model)
        files, start = inputs(folder), time.perf_counter()
        held: dict[str, list[int]] = {key: [] for key in now()}
        with runtime.load(model if is_tiny else "nano", device=device()) as engine:
            for number in range(clips):
                clip(engine, number, files, folder)
                for key, value in now().items():
                    held[key].append(value)
        figures = {
            "model": "tiny" if is_tiny else "nano",
            "clips": clips,
            "sizes": SIZES,
            "measured_s": time.perf_counter() - start,
            "slopes": {key: slope(held[key], LEAST.get(key, PAGE)) for key in held},
            "after_each": held,
        }
    for key, found in figures["slopes"].items():
        print(key, json.dumps(found), flush=True)
    print(environment.write(name, figures, arguments.folder), f"{figures['measured_s']:.0f} s")


if __name__ == "__main__":
    main()
