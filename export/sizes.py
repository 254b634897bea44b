"""Sizes that a decoder is exported for: one, or a range of them with the best between."""

from __future__ import annotations

import re
from dataclasses import dataclass

from magihuman.runtime.config import PATCH, VIDEO_STRIDE, latent_side
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.exported import Dims

FORM = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Size:
    """Latent rows and columns: fewest, best and most."""

    height: Dims
    width: Dims

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `480x256`, or `256x256:480x256:896x512`: pixels in steps of 32, as in clips."""
        parts = text.split(":")
        matches = [FORM.fullmatch(part) for part in parts]
        if len(parts) not in (1, 3) or not all(matches):
            raise InvalidRequestError(
                f"size must be as 480x256, or fewest, best and most as 256x256:480x256:896x512,"
                f" got {text!r}"
            )
        pixels = [(int(match[1]), int(match[2])) for match in matches if match is not None]
        step = PATCH * VIDEO_STRIDE[1]
        for width, height in pixels:
            if width % step or height % step or not width or not height:
                near = [max(side // step, 1) * step for side in (width, height)]
                raise InvalidRequestError(
                    f"size must be in steps of {step} pixels, as clips are made, got"
                    f" {width}x{height}; name {near[0]}x{near[1]}"
                )
        low, best, high = pixels * 3 if len(pixels) == 1 else pixels
        if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise InvalidRequestError(f"size must go from fewest to best to most, got {text!r}")
        widths, heights = ((low[i], best[i], high[i]) for i in (0, 1))
        return cls(_latents(heights), _latents(widths))

    @property
    def is_dynamic(self) -> bool:
        """Whether it is a range."""
        return self.height[0] != self.height[2] or self.width[0] != self.width[2]

    def __str__(self) -> str:
        """Return the text that `parse` reads as this size."""
        row, column = VIDEO_STRIDE[1:]
        pairs = zip(self.width, self.height, strict=True)
        texts = [f"{width * column}x{height * row}" for width, height in pairs]
        return ":".join(texts) if self.is_dynamic else texts[0]


def _latents(pixels: Dims) -> Dims:
    low, best, high = pixels
    return latent_side(low), latent_side(best), latent_side(high)
