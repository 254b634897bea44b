"""What becomes of a voice of 30 s with pauses, made by nano: mouth, joins, colours and memory.

    python benchmarks/accuracy/long_clip.py [--model FOLDER] [--seeds N] [--device cpu]
        [--ways long continued live] [--folder RESULTS] [--tiny]

The voice is what the model's own four say, in turn, with pauses between. It is given whole to
`generate_long`, in pieces that end in pauses to `generate` with `continue_from`, and to `live` at
once. Mouth and sound are compared in every 5 s: the worst stretch of all seeds counts. A join is
the larger of the steps to the first frame of a window and from it, over the median step of the
clip; the background is its mean colour in every window, against the first.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment
from harness.measure import resident_bytes
from magihuman import runtime
from magihuman.runtime import config
from magihuman.runtime.engine.long import Seam, cuts
from magihuman.runtime.evaluate.clip_score import (
    REGIONS,
    box,
    loudness,
    mouth_opening,
    synchrony,
)
from magihuman.runtime.media import read_audio
from magihuman.runtime.weights.shipped import NANO_FOLDER, prompts

RATE = config.LATENT_AUDIO_RATE_HZ
FRAME = RATE // config.FPS
SECONDS, STRETCH_S = 30.0, 5.0
PAUSES_S = (0.4, 0.8, 0.24, 0.6, 1.0)
SIZE: dict[str, int] = {}  # of the clips, where not the model's own
PIECE_S = 3.2  # of `continued`, at most: what the model has learnt

Wave = npt.NDArray[np.float32]
Frames = npt.NDArray[np.uint8]
Piece = tuple[Frames, int]  # a window's frames, and the bytes resident after it


def voice(folder: Path, seconds: float) -> Wave:
    """The four voices that come with the model, with pauses between: [samples] at 51.2 kHz."""
    own = [read_audio(folder / "score" / f"{i}.flac", RATE, 10.0) for i in range(4)]
    parts: list[Wave] = []
    for said, pause_s in zip(itertools.cycle(own), itertools.cycle(PAUSES_S), strict=False):
        heard = np.flatnonzero(np.abs(said) > 0.01)
        parts += [said[heard[0] : heard[-1]], np.zeros(round(pause_s * RATE), np.float32)]
        if sum(map(len, parts)) >= seconds * RATE:
            return np.concatenate(parts)[: round(seconds * RATE)]
    raise AssertionError("unreachable")


def long(engine: runtime.Engine, prompt: str, wave: Wave, seed: int) -> Iterator[Piece]:
    """By `generate_long`."""
    for chunk in engine.generate_long(prompt, audio=wave, seed=seed, **SIZE):
        yield chunk.frames, resident_bytes("VmRSS")


def continued(engine: runtime.Engine, prompt: str, wave: Wave, seed: int) -> Iterator[Piece]:
    """A clip for each piece of the voice, from the one before, whose last frame is its first.

    Pieces end in pauses, as somebody would cut a voice who hears it, and are put together as
    `generate_long` does its windows.
    """
    before: runtime.Video | None = None
    seam = Seam()
    stride = config.VIDEO_STRIDE[0]
    frames = (len(wave) // FRAME - 1) // stride * stride
    longest = round(PIECE_S * config.FPS)
    points = cuts(0, frames, longest, loudness(wave, RATE, config.FPS, frames + 1))
    for number, (first, last) in enumerate(itertools.pairwise(points)):
        part = wave[first * FRAME : (last + 1) * FRAME]
        asked = {"audio": part, "seed": seed + number, "seconds": (last - first) / config.FPS}
        before = engine.generate(prompt, continue_from=before, **asked, **SIZE)
        yield seam.add(before, is_last=last == points[-1]).frames, resident_bytes("VmRSS")


def live(engine: runtime.Engine, prompt: str, wave: Wave, seed: int) -> Iterator[Piece]:
    """By `live`, from a face that was made of the prompt; as fast as it comes."""
    face = Image.fromarray(engine.generate(prompt, seconds=0.64, seed=seed, **SIZE).frames[0])
    blocks = (wave[at : at + FRAME] for at in range(0, len(wave), FRAME))
    source = runtime.LiveVoice(RATE, blocks)
    with engine.live(face, source, prompt=prompt, seed=seed, **SIZE) as stream:
        for chunk in stream:
            if len(chunk.frames):
                yield chunk.frames, resident_bytes("VmRSS")


WAYS = {"long": long, "continued": continued, "live": live}


def figures_of(pieces: list[Piece], wave: Wave) -> dict[str, Any]:
    """Of one clip."""
    frames = np.concatenate([piece for piece, _ in pieces])
    opening = mouth_opening(frames)
    sound = loudness(wave, RATE, config.FPS, len(frames))
    stretch = round(STRETCH_S * config.FPS)
    starts = range(0, max(1, len(frames) - stretch // 2), stretch)
    found = [synchrony(opening[a : a + stretch], sound[a : a + stretch]) for a in starts]
    steps = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))
    joins = np.cumsum([len(piece) for piece, _ in pieces])[:-1]
    colours = [box(piece, REGIONS["background"][0]).mean((0, 1, 2)) for piece, _ in pieces]
    rss = [size for _, size in pieces]
    return {
        "seconds": len(frames) / config.FPS,
        "windows": len(pieces),
        "synchrony": [one.correlation for one in found],
        "lag": [one.lag_frames for one in found],
        "largest join": max(float(steps[j - 1 : j + 1].max()) for j in joins)
        / float(np.median(steps)),
        "background": max(float(np.abs(colour - colours[0]).max()) for colour in colours),
        "resident growth, bytes": rss[-1] - rss[len(rss) // 3],
    }


def summary(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of all clips, and the median stretch."""
    stretches = [value for clip in clips for value in clip["synchrony"]]
    return {
        "least synchrony": min(stretches),
        "median synchrony": statistics.median(stretches),
        "largest lag, frames": max(abs(lag) for clip in clips for lag in clip["lag"]),
        **{
            name: max(clip[name] for clip in clips)
            for name in ("largest join", "background", "resident growth, bytes")
        },
    }


def main() -> None:
    """Make the clips, print their figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=NANO_FOLDER)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=tuple(WAYS))
    parser.add_argument("--device", default=None)
    arguments = environment.arguments(parser)
    seconds, seeds = SECONDS, arguments.seeds
    if arguments.tiny:
        seconds, seeds = 6.6, 1
        SIZE.update(width=32, height=32, steps=1)
    wave = voice(arguments.model, seconds)
    said = prompts(arguments.model)
    figures: dict[str, Any] = {"voice_s": len(wave) / RATE}
    with runtime.load(arguments.model, device=arguments.device) as engine:
        figures["device"] = str(engine.device)
        for name in arguments.ways:
            clips = []
            for seed in range(seeds):
                prompt = said[seed % len(said)]
                pieces = list(WAYS[name](engine, prompt, wave, 1000 * seed))
                clips.append(figures_of(pieces, wave))
                print(name, seed, clips[-1], flush=True)
            figures[name] = {**summary(clips), "clips": clips}
            print(name, summary(clips), flush=True)
    print(f"wrote {environment.write('long_clip', figures, arguments.folder)}")


if __name__ == "__main__":
    main()
