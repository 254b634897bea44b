"""How well a clip of the nano world shows and says what it should, measured on the clip alone.

Frames: uint8 [T, H, W, 3] of a head and shoulders, as `examples/nano` draws them, of any size. That
world takes its colours from `COLOURS`. On clips of anything else these figures mean nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from magihuman.runtime.config import SAMPLE_RATE_HZ
from magihuman.runtime.media import fit, open_image, psnr_db, read_audio, read_frames

Frames = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]
Colour = tuple[int, int, int]

# sRGB in 0 .. 255, by the word before "hair", "shirt" and "background" in a prompt.
COLOURS: dict[str, dict[str, Colour]] = {
    "hair": {
        "black": (34, 31, 40),
        "brown": (112, 66, 38),
        "blond": (236, 200, 108),
        "red": (200, 72, 30),
        "white": (232, 232, 238),
        "blue": (58, 96, 214),
    },
    "shirt": {
        "red": (206, 48, 52),
        "green": (44, 150, 84),
        "blue": (48, 92, 196),
        "yellow": (240, 200, 60),
        "white": (240, 240, 244),
        "black": (42, 42, 50),
    },
    "background": {
        "green": (150, 208, 160),
        "blue": (140, 190, 236),
        "yellow": (244, 226, 150),
        "pink": (246, 186, 204),
        "grey": (190, 194, 200),
        "purple": (190, 166, 226),
    },
}
MOUTH: Colour = (74, 18, 30)  # inside of an open one
# Boxes that a part fills however the head moves: left, right, top and bottom of the frame, 0 to 1.
REGIONS = {
    "hair": ((0.43, 0.57, 0.225, 0.255),),
    "shirt": ((0.30, 0.70, 0.93, 0.99),),
    "background": ((0.02, 0.11, 0.05, 0.5), (0.89, 0.98, 0.05, 0.5)),
}
MOUTH_REGION = (0.32, 0.68, 0.51, 0.68)
# Wider, dark skin would count: measured on the world's own clips, whose correlation was best so.
MOUTH_SPREAD = 20.0  # deviation, in RGB, of what belongs to a mouth
MOUTH_COLUMNS = 0.15  # of its region, the most open ones: how wide the mouth is does not count
FARTHEST = 60.0  # in RGB: what is farther from every colour has none
FRAMES_FOR_COLOUR = 8
MAX_LAG = 6  # frames: beyond one syllable of the nano world the next is found


@dataclass(frozen=True)
class Synchrony:
    """How the mouth goes with the sound.

    Attributes:
        correlation: of mouth opening and loudness, -1 to 1, at the lag where it is largest; 0 where
            one of them never changes.
        lag_frames: by which the mouth comes after the sound.
    """

    correlation: float
    lag_frames: int


@dataclass(frozen=True)
class ClipScore:
    """How well one clip shows and says what it should.

    Attributes:
        named: colours in the prompt, by part.
        found: colours in the picture, by part; None where it is none of those known.
        synchrony: of the picture with the clip's sound.
        first_frame_db: PSNR of the first frame with the reference image, where there is one.
        voice: synchrony of the picture with a given voice, where there is one.
    """

    named: dict[str, str]
    found: dict[str, str | None]
    synchrony: Synchrony
    first_frame_db: float | None = None
    voice: Synchrony | None = None

    @property
    def right(self) -> int:
        """How many of the named colours are where they belong."""
        return sum(self.found[part] == name for part, name in self.named.items())


def named_colours(prompt: str) -> dict[str, str]:
    """The colour of each part that an English prompt names."""
    colour_of = {}
    for part, colours in COLOURS.items():
        match = re.search(rf"\b({'|'.join(colours)}) {part}\b", prompt, re.IGNORECASE)
        if match is not None:
            colour_of[part] = match[1].lower()
    return colour_of


def found_colours(frames: Frames) -> dict[str, str | None]:
    """The colour of each part in a clip: the known one nearest to the median of its pixels."""
    picked = frames[np.linspace(0, len(frames) - 1, FRAMES_FOR_COLOUR).astype(int)]
    colour_of: dict[str, str | None] = {}
    for part, boxes in REGIONS.items():
        pixels = np.concatenate([box(picked, each).reshape(-1, 3) for each in boxes])
        middle = np.median(pixels, axis=0)
        names = list(COLOURS[part])
        away = np.linalg.norm(np.array(list(COLOURS[part].values())) - middle, axis=1)
        spread = np.abs(pixels - middle).mean()  # of noise, whose median is some colour too
        best = int(away.argmin())
        colour_of[part] = names[best] if away[best] + spread < FARTHEST else None
    return colour_of


def mouth_opening(frames: Frames) -> Array:
    """[T]: how high the mouth's inside is, in pixels."""
    region = box(frames, MOUTH_REGION).astype(np.float32)
    away = np.square(region - np.array(MOUTH, np.float32)).sum(-1)
    heights = np.sort(np.exp(-away / (2 * MOUTH_SPREAD**2)).sum(1), axis=1)  # [T, columns]
    highest: Array = heights[:, -max(1, int(heights.shape[1] * MOUTH_COLUMNS)) :].mean(1)
    return highest.astype(np.float64)


def loudness(wave: npt.NDArray[np.float32], sample_rate_hz: int, fps: int, frames: int) -> Array:
    """RMS of the sound in each video frame, averaged over neighbours by 1, 2, 1: [frames].

    wave: [samples] or [samples, channels]; silence follows where it ends early.
    """
    mono = wave.astype(np.float64).reshape(len(wave), -1).mean(1)
    length = round(frames * sample_rate_hz / fps)
    mono = np.pad(mono[:length], (0, max(0, length - len(mono))))
    edges = np.linspace(0, length, frames + 1).round().astype(int)[:-1]
    rms = np.sqrt(np.add.reduceat(np.square(mono), edges) * fps / sample_rate_hz)
    padded = np.pad(rms, 1, mode="edge")
    smooth: Array = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return smooth


def synchrony(opening: Array, sound: Array) -> Synchrony:
    """The best correlation of two series of one value a frame, at a lag of six frames at most."""
    best = Synchrony(0.0, 0)
    for lag in sorted(range(-MAX_LAG, MAX_LAG + 1), key=abs):  # of equals, the smallest
        late, early = opening[max(lag, 0) :], sound[max(-lag, 0) :]
        length = min(len(late), len(early))
        value = _correlation(late[:length], early[:length])
        if value > best.correlation:
            best = Synchrony(value, lag)
    return best


def score(
    frames: Frames,
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    fps: int,
    prompt: str = "",
    image: Frames | None = None,
    voice: tuple[npt.NDArray[np.float32], int] | None = None,
) -> ClipScore:
    """All that can be said of a clip.

    frames: uint8 [T, H, W, 3]. audio: float32 [samples, channels]. image: the reference, uint8
    [H, W, 3] of the clip's size. voice: the driving sound and its rate in Hz.
    """
    opening = mouth_opening(frames)

    def heard(wave: npt.NDArray[np.float32], rate_hz: int) -> Synchrony:
        return synchrony(opening, loudness(wave, rate_hz, fps, len(frames)))

    return ClipScore(
        named=named_colours(prompt),
        found=found_colours(frames),
        synchrony=heard(audio, sample_rate_hz),
        first_frame_db=None if image is None else psnr_db(frames[:1], image[None]),
        voice=None if voice is None else heard(*voice),
    )


def score_file(
    path: str | os.PathLike[str],
    prompt: str = "",
    image: str | os.PathLike[str] | None = None,
    voice: str | os.PathLike[str] | None = None,
) -> ClipScore:
    """`score` of an mp4, with the image and the voice that it was made from, where there were."""
    frames, fps = read_frames(Path(path))
    height, width = frames.shape[1:3]
    seconds = len(frames) / fps
    return score(
        frames,
        read_audio(path, SAMPLE_RATE_HZ, seconds),
        SAMPLE_RATE_HZ,
        fps,
        prompt,
        None if image is None else np.asarray(fit(open_image(image), width, height)),
        None if voice is None else (read_audio(voice, SAMPLE_RATE_HZ, seconds), SAMPLE_RATE_HZ),
    )


def box(frames: Frames, sides: tuple[float, float, float, float]) -> Frames:
    """A part of each frame, a pixel at least. sides: left, right, top and bottom, 0 to 1."""
    height, width = frames.shape[1:3]
    left, right, top, bottom = sides
    rows = slice(int(top * height), max(int(bottom * height), int(top * height) + 1))
    columns = slice(int(left * width), max(int(right * width), int(left * width) + 1))
    return frames[:, rows, columns]


def _correlation(a: Array, b: Array) -> float:
    if len(a) < 2 or a.std() < 1e-9 or b.std() < 1e-9:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
