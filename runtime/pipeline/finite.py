"""Whether what leaves each stage is finite, found on the device without a wait of its own.

Each tensor costs one reduction to the largest magnitude in it, which is NaN where a value is NaN
and infinite where one is infinite. They are copied to the host before the wait at a stage's end,
those of frames together with the frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from magihuman.runtime.errors import NonFiniteError

TRANSFORMER, SR_TRANSFORMER = "transformer", "super-resolution transformer"
TEXT_ENCODER, IMAGE_ENCODER = "text encoder", "image encoder"
AUDIO_ENCODER, AUDIO_DECODER, VIDEO_DECODER = "audio encoder", "audio decoder", "video decoder"


def largest(x: Tensor) -> Tensor:
    """The largest magnitude in a float tensor of any shape, as a scalar; NaN and infinity stay."""
    return torch.linalg.vector_norm(x, math.inf)


def check(magnitude: float, component: str, stage: str, step: int | None = None) -> None:
    """Raise `NonFiniteError` unless this, which `largest` gave, is finite.

    component: that made the tensor. stage: as in `Video.timings_s`. step: of the stage, from 1,
    where it has steps.
    """
    if not math.isfinite(magnitude):
        raise NonFiniteError(component, stage, step)


@dataclass(frozen=True)
class _Watched:
    component: str
    step: int | None


class Finite:
    """The magnitudes of a stage's tensors, in the order in which they were made."""

    def __init__(self) -> None:
        self._watched: list[_Watched] = []
        self._magnitudes: list[Tensor] = []

    def start(self) -> None:
        """Forget what has not been read: a stage begins, or begins again."""
        self._watched, self._magnitudes = [], []

    def watch(self, x: Tensor | None, component: str, step: int | None = None) -> None:
        """Reduce a tensor where there is one, without waiting. component, step: as for `check`."""
        if x is not None:
            self._magnitudes.append(largest(x).float())
            self._watched.append(_Watched(component, step))

    def read(self) -> Magnitudes:
        """Begin to copy all magnitudes to the host; the current stream's end says when they are
        there. They are not kept.
        """
        watched, magnitudes = self._watched, self._magnitudes
        self.start()
        host = torch.stack(magnitudes).to("cpu", non_blocking=True) if magnitudes else None
        return Magnitudes(watched, host)


@dataclass(frozen=True)
class Magnitudes:
    """Magnitudes on their way to the host: fp32, one for each tensor that was watched."""

    watched: list[_Watched]
    host: Tensor | None

    def check(self, stage: str) -> None:
        """Raise `NonFiniteError` for the first that is not finite, once they have arrived."""
        if self.host is not None:
            for watched, magnitude in zip(self.watched, self.host.tolist(), strict=True):
                check(magnitude, watched.component, stage, watched.step)
