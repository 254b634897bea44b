"""Every model run once for given sizes of clips, so that no request waits for what that makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.memory import BASE, SR, TEXT
from magihuman.runtime.pipeline import Encoded, Pipeline
from magihuman.runtime.request import Request

Size = tuple[int, int, float]  # width and height in pixels, seconds


def requests_of(sizes: Iterable[Size], text_tokens: Sequence[int]) -> dict[Size, Request]:
    """A request of each size.

    Raises:
        InvalidRequestError: a size is none of a request, or a length not one of 1 to 640 tokens.
    """
    for length in text_tokens:
        if type(length) is not int or not 0 < length <= config.MAX_TEXT_TOKENS:
            raise InvalidRequestError(
                f"text_tokens must be whole numbers from 1 to {config.MAX_TEXT_TOKENS}, got"
                f" {length!r}"
            )
    return {
        (width, height, seconds): Request("-", width=width, height=height, seconds=seconds)
        for width, height, seconds in sizes
    }


@torch.inference_mode()
def warm(pipeline: Pipeline, text_tokens: Sequence[int]) -> None:
    """Run every model for a clip of the request's size and prompts of these lengths, over zeros.

    The loops take one step for each length, without guidance; the decoders run once.
    """
    plan = dataclasses.replace(
        pipeline.request.plan(pipeline.variant, pipeline.sr),
        steps=1,
        sr_steps=1,
        guidance=None,
        sr_guidance=None,
    )
    device, residency = pipeline.device, pipeline.components.residency
    shape = (1, config.LATENT_CHANNELS, plan.frames)
    f32 = torch.float32
    video = torch.zeros(*shape, plan.rows, plan.columns, dtype=f32, device=device)
    audio = torch.zeros(1, plan.audio, config.AUDIO_CHANNELS, dtype=f32, device=device)
    for length in text_tokens:
        with pipeline.encoders(), residency.present(TEXT):
            text = pipeline.text_encoder.encode(torch.zeros(1, length, dtype=torch.long))
        encoded = Encoded(plan, text, None, audio, video, None, None)
        with residency.present(BASE):
            pipeline.run_base(encoded)
        if pipeline.sr is not None:
            with residency.present(SR):
                pipeline.run_sr(encoded, video, audio)
    rows, columns = plan.sr_rows or plan.rows, plan.sr_columns or plan.columns
    pipeline.decode(torch.zeros(*shape, rows, columns, dtype=f32, device=device), audio)
