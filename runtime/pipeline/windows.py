"""Windows of a picture that goes on for as long as its voice does: each is a request of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.media import ClipWriter
from magihuman.runtime.memory import VIDEO
from magihuman.runtime.pipeline.audio import LATENT_SAMPLES, Waveform
from magihuman.runtime.pipeline.components import Encoded, Prepared
from magihuman.runtime.pipeline.continuing import context_frames, first_latents, with_context
from magihuman.runtime.pipeline.decode import Frames, decode_frames
from magihuman.runtime.pipeline.pipeline import Pipeline
from magihuman.runtime.request import Tail


@dataclass
class Row:
    """What the windows of one picture hand on, each to the next.

    Attributes:
        prepared: the inputs of the first, which are read once.
        text, null_text, image, sr_image: as of `Encoded`, encoded once.
        tail: of the window before; None before the first.
    """

    prepared: Prepared | None = None
    text: Tensor | None = None
    null_text: Tensor | None = None
    image: Tensor | None = None
    sr_image: Tensor | None = None
    tail: Tail | None = None

    def begin_again(self) -> None:
        """Forget the windows, and keep what was read and encoded."""
        self.tail = None


class WindowPipeline(Pipeline):
    """One window: its voice is encoded while the one before it denoises, and what it goes on from
    is looked up once that has the device no more. It has no sound of its own.
    """

    def __init__(self, row: Row, *stages: Any) -> None:
        """row: of the window. stages: the arguments of `Pipeline`, the voice among the request."""
        super().__init__(*stages)
        self._row = row
        self._before: Tail | None = None

    def prepare(self) -> Prepared:
        """As `Pipeline.prepare` says, of the first window; of others the voice alone."""
        row, voice = self._row, self.request.audio
        assert isinstance(voice, np.ndarray)
        if row.prepared is None:
            if self.request.image is None:
                raise InvalidRequestError("image must be the picture to begin with, got None")
            row.prepared = super().prepare()
            return row.prepared
        plan = row.prepared.plan.with_audio(len(voice) // LATENT_SAMPLES)
        return dataclasses.replace(row.prepared, plan=plan, samples=voice, image=None)

    def encode(self, prepared: Prepared) -> Encoded:
        """As `Pipeline.encode` says, but for what another window has encoded."""
        encoded = super().encode(prepared)
        if encoded.image is not None:
            self._row.image, self._row.sr_image = encoded.image, encoded.sr_image
        return encoded

    def encode_text(self, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
        """As `Pipeline.encode_text` says, once for all windows."""
        row = self._row
        if row.text is None:
            row.text, row.null_text = super().encode_text(prepared)
        return row.text, row.null_text

    def sample(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """As `Pipeline.sample` says, from the end of the window before."""
        row = self._row
        tail = self._before = row.tail
        image, sr_image = row.image, row.sr_image
        if tail is not None:
            image, sr_image = first_latents(tail, self.device)
        made = super().sample(
            dataclasses.replace(encoded, image=image, sr_image=sr_image, tail=tail)
        )
        row.tail = self.tail
        return made

    @torch.inference_mode()
    def decode(
        self,
        video: Tensor,
        audio: Tensor,
        file: ClipWriter | None = None,
        on_window: Callable[[Frames, Waveform], None] | None = None,
        before: Tail | None = None,
    ) -> tuple[Frames, Waveform]:
        """Frames as `Pipeline.decode` gives them, and no sound; no other argument is looked at."""
        tail, parts, skipped = self._before, self.components, 0
        if tail is not None:
            video = with_context(video, tail.seen, 2)
            skipped = context_frames(tail)
        report = self.reporter("decode_video")
        with self.stage("decode_video", VIDEO):
            frames = decode_frames(
                parts.turbo_vae, video, report, parts.decoder, None, parts.distributed
            )
        return frames[skipped:], np.zeros((0, 2), np.float32)
