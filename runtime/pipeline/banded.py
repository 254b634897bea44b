"""Decoding windows of frames band by band, in less memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from magihuman.kernels.decoder.bands import Band, bands_of
from magihuman.runtime.config import TurboVAEConfig
from magihuman.runtime.pipeline.decode import Decoder, whole_picture


class BandedDecoder:
    """The `Decoder` that has another one decode each window in bands, and joins them.

    Pixels are those of the other, up to the order in which its kernels sum.
    """

    def __init__(self, decoder: Decoder, config: TurboVAEConfig, bands: int) -> None:
        """bands: of each window, at most."""
        self._decoder, self._config, self._bands = decoder, config, bands
        self.magnitude = decoder.magnitude

    def batch_of(self, rows: int, columns: int) -> int:
        return 1

    def prepare(self, calls: Iterable[tuple[Sequence[int], bool, int, int]]) -> None:
        """A band is made ready when it is decoded: more than one would take the memory of more."""

    def __call__(
        self, latents: Tensor, is_first: bool, skip: int, kept: int, band: Band | None = None
    ) -> Tensor:
        rows, columns = latents.shape[3:]
        bands = bands_of((rows, columns), self._bands, self._config) if band is None else (band,)
        parts, magnitudes = [], []
        for each in bands:
            # Copies: the next band may overwrite the decoder's own.
            parts.append(self._decoder(latents, is_first, skip, kept, each).clone())
            magnitudes.append(self._decoder.magnitude.clone())
        # The largest, and NaN where one is.
        self.magnitude = torch.stack(magnitudes).max()
        return whole_picture(parts, bands)
