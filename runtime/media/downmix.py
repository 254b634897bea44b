"""One channel from many: a decoded block of sound of any layout to mono."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from av.audio.plane import AudioPlane

Wave = npt.NDArray[np.float32]

MAX_CHANNELS = 64
# In files that do not say which channel is which, as plain WAV files, by the order of Microsoft's
# WAVEFORMATEXTENSIBLE.
USUAL = {
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}
TYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
FRONT = ("FL", "FR")
CENTRE = "FC"
LOW = ("LFE", "LFE2")
FRONT_SHARE, CENTRE_SHARE, REST_SHARE = 1.0, 1.0, 0.5


def mix_weights(names: tuple[str, ...]) -> Wave:
    """What each channel counts in the mix, [channels], float32; their sum is 1, so none clips.

    names: FFmpeg's, such as FL, FR and FC; unknown ones may be of any name. Where there is a centre
    beside a front pair, the centre counts as much as the pair, and all other channels together half
    as much: a voice in the centre of 5.1 is at 0.4, -8 dB, and so is one in both front channels.
    Low-frequency channels are left out. Other layouts, stereo among them, are averaged.
    """
    if len(set(names)) != len(names):  # nobody said which is which
        names = USUAL.get(len(names), names)
    heard = [name not in LOW for name in names]
    if not any(heard) or len(set(names)) != len(names):
        return np.full(len(names), 1 / len(names), np.float32)
    if CENTRE not in names or not set(FRONT) <= set(names):
        return np.array(heard, np.float32) / np.float32(sum(heard))
    rest = sum(heard) - 3
    shares = [
        CENTRE_SHARE if name == CENTRE else FRONT_SHARE / 2 if name in FRONT else REST_SHARE / rest
        for name in names
        if name not in LOW
    ]
    weights = np.zeros(len(names))
    weights[heard] = shares
    return np.asarray(weights / weights.sum(), np.float32)


def samples_of(frame: Any) -> npt.NDArray[Any]:
    """All channels of a decoded PyAV frame, [channels, samples], as fractions of full scale.

    Whole numbers become float32; floating-point ones keep their type and may be anything.
    """
    channels, is_planar = frame.layout.nb_channels, frame.format.is_planar
    dtype = TYPES[frame.format.name.removesuffix("p")]
    count = frame.samples * (1 if is_planar else channels)
    # PyAV counts planes up to a null pointer, which from eight on lies beyond them: by its release
    # `frame.planes` has too many or raises, and `to_ndarray` crashes.
    planes: list[Any] = [AudioPlane(frame, i) for i in range(channels if is_planar else 1)]
    samples = np.stack([np.frombuffer(plane, dtype, count) for plane in planes])
    if not is_planar:
        samples = samples.reshape(-1, channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return np.asarray(samples / float(2 ** (8 * samples.itemsize - 1)), np.float32)
    return np.asarray(samples)


def mix(samples: npt.NDArray[Any], names: tuple[str, ...]) -> Wave:
    """[channels, samples] to mono float32, [samples], by `mix_weights`."""
    if len(samples) == 1:
        return np.asarray(samples[0], np.float32)
    return np.asarray(mix_weights(names) @ samples.astype(np.float32, copy=False), np.float32)
