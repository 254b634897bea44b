"""A driving voice: sound of the rate the audio autoencoder takes, as long as the clip asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.media.downmix import Wave
from magihuman.runtime.media.sound import read_audio

MIN_DRIVING_S = 0.2
SPARE_S = 1.0  # read beyond the end, where a resampler has nothing to look ahead at
LOUD = 1.25  # of full scale: lossy formats go 2 dB beyond what they were made from


def open_driving_audio(
    path: str | os.PathLike[str] | Wave, seconds: float, *, formats: Sequence[str] | None = None
) -> tuple[Wave, str | None]:
    """Mono float32 samples at 51.2 kHz, cut to `seconds`, and a note on what may surprise.

    The note says where lengths differ, and where samples are so far beyond full scale that they may
    clip. path: or such samples, which are taken as they are. formats, and what is read: see
    `read_audio`; little beyond `seconds` is. Raises `InvalidRequestError` for what cannot be
    decoded or is shorter than 0.2 s.
    """
    if isinstance(path, np.ndarray):
        return path, None
    rate = config.LATENT_AUDIO_RATE_HZ
    samples = read_audio(path, rate, seconds + SPARE_S, formats)
    duration_s = len(samples) / rate
    if duration_s < MIN_DRIVING_S:
        raise InvalidRequestError(
            f"audio must be at least {MIN_DRIVING_S:g} s long, got {duration_s:.3f} s in"
            f" {os.fspath(path)}"
        )
    wanted = int(round(seconds * rate, 6))
    notes = []
    if len(samples) > wanted:
        notes.append(f"the audio is longer than the {seconds:g} s asked for and is cut there")
    elif wanted - len(samples) >= rate // config.FPS:
        notes.append(
            f"the clip is as long as its audio: {duration_s:.2f} s, not the {seconds:g} s asked for"
        )
    samples = samples[:wanted]
    peak = float(np.abs(samples).max(initial=0.0))
    if peak > LOUD:
        notes.append(
            f"the audio goes up to {peak:.2f} times full scale and may clip; scale it to -1 to 1"
        )
    return samples, "; ".join(notes) or None
