"""Components of an engine, read or made, each to where the memory plan has it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from magihuman.runtime import config
from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.exported import is_exported, load_engines
from magihuman.runtime.memory import AUDIO, BASE, IMAGE, SR, TEXT, Placer
from magihuman.runtime.model import DiT, ImageVAE, OobleckConfig, TextEncoder
from magihuman.runtime.pipeline import AudioVAE, Components, VideoDecoder
from magihuman.runtime.weights import (
    AUDIO_FOLDER,
    IMAGE_FOLDER,
    TEXT_FOLDER,
    TURBO_FOLDER,
    Paths,
    TransformerSpec,
    checkpoint,
    load_image_vae,
    load_text_encoder,
    random_weights,
)

log = logging.getLogger("magihuman")
Made = TypeVar("Made")
OnLoad = Callable[[str, int, int], None]  # (component, bytes done, of how many)


class Reporter:
    """Passes reading progress on and logs how long each component took."""

    def __init__(self, on_load: OnLoad | None) -> None:
        self._on_load: OnLoad = on_load or (lambda component, done, of: None)

    def timed(self, name: str, build: Callable[[], Made]) -> Made:
        self._on_load(name, 0, 0)
        start = time.perf_counter()
        part = build()
        log.info("loaded %s in %.1f s", name, time.perf_counter() - start)
        self._on_load(name, 1, 1)
        return part

    def reader(self, name: str) -> checkpoint.OnRead:
        return lambda done, of: self._on_load(name, done, of)


def read(
    paths: Paths,
    base: TransformerSpec,
    sr: TransformerSpec | None,
    placer: Placer,
    vae_dtype: torch.dtype,
    engines_of: Path | None,
    report: Reporter,
    follows: bool = False,
) -> Components:
    """All components from their files.

    engines_of: the model's folder where the video decoder is one of exported engines. follows:
    another engine, and so without what only that one runs.
    """
    device = placer.device

    def turbo_vae() -> VideoDecoder:
        if engines_of is not None:
            return load_engines(paths.turbo_vae, engines_of, device)
        if is_exported(paths.turbo_vae):
            raise CheckpointError(
                f"{paths.turbo_vae} must hold the published decoder, got an exported one; load it"
                " with vae='tensorrt'"
            )
        return checkpoint.load_turbo_vae(paths.turbo_vae, device, vae_dtype)

    def dit(spec: TransformerSpec, name: str) -> DiT:
        reader = report.reader(spec.variant.name)
        rest = placer.rest(name) if placer.moves(name) else None
        made = spec.read(device, reader, rest)
        return _placed_dit(placer, name, made, made.block.layers)

    def audio_vae() -> AudioVAE:
        made = AudioVAE(checkpoint.load_audio_vae(paths.audio_vae, placer.rest(AUDIO)))
        placer.place(AUDIO, made.model)
        return made

    def image_vae() -> ImageVAE:
        made = load_image_vae(_present(paths.image_vae), placer.rest(IMAGE), vae_dtype)
        placer.place(IMAGE, made.model)
        return made

    def text_encoder() -> TextEncoder:
        made = load_text_encoder(paths.text_encoder, placer.rest(TEXT), torch.bfloat16)
        placer.place(TEXT, made.model, made.model.encoder.layers, made.model.encoder)
        return made

    # Cheap components first, so that a damaged one is known before tens of gigabytes are read.
    return Components(
        turbo_vae=report.timed(TURBO_FOLDER, turbo_vae),
        audio_vae=None if follows else report.timed(AUDIO_FOLDER, audio_vae),
        image_vae=(
            None if follows or paths.image_vae is None else report.timed(IMAGE_FOLDER, image_vae)
        ),
        text_encoder=None if follows else report.timed(TEXT_FOLDER, text_encoder),
        dit=report.timed(base.variant.name, lambda: dit(base, BASE)),
        sr_dit=None if sr is None else report.timed(sr.variant.name, lambda: dit(sr, SR)),
    )


def _placed_dit(placer: Placer, name: str, model: DiT, made: Iterable[nn.Module]) -> DiT:
    """Laid out as kernels want it before it comes to rest, since it is not moved after that.

    made: its layers, which may get their weights when they are asked for.
    """
    if not placer.moves(name):
        for _ in made:
            pass
        return model
    from magihuman.graphs.transformer import pad_weights

    def padded() -> Iterator[nn.Module]:
        for layer in made:
            pad_weights(layer, model.config)
            yield layer

    placer.place(name, model, list(model.block.layers), model.block, padded())
    return model


def _present(path: Path | None) -> Path:
    assert path is not None
    return path


def synthesize(
    model: random_weights.Synthetic,
    base: TransformerSpec,
    sr: TransformerSpec | None,
    placer: Placer,
    vae_dtype: torch.dtype,
    report: Reporter,
    follows: bool = False,
) -> Components:
    """All components at full size, of random weights; follows: as for `read`."""
    seed, device = model.seed, placer.device

    def dit(spec: TransformerSpec, name: str) -> DiT:
        made, layers = random_weights.dit_by_layer(
            spec.config, seed, device, spec.linear, spec.variant.name, spec.quantized
        )
        return _placed_dit(placer, name, made, layers)

    # Made on the device, whatever rests elsewhere afterwards: a CPU would take minutes.
    def audio_vae() -> AudioVAE:
        made = AudioVAE(random_weights.audio_vae(OobleckConfig(), seed, device))
        placer.place(AUDIO, made.model)
        return made

    def image_vae() -> ImageVAE:
        made = random_weights.image_vae(seed, device, vae_dtype)
        placer.place(IMAGE, made.model)
        return made

    def text_encoder() -> TextEncoder:
        made = random_weights.text_encoder(seed, device, torch.bfloat16)
        placer.place(TEXT, made.model, made.model.encoder.layers, made.model.encoder)
        return made

    return Components(
        turbo_vae=report.timed(
            TURBO_FOLDER,
            lambda: random_weights.turbo_vae(config.TurboVAEConfig(), seed, device, vae_dtype),
        ),
        audio_vae=None if follows else report.timed(AUDIO_FOLDER, audio_vae),
        image_vae=None if follows else report.timed(IMAGE_FOLDER, image_vae),
        text_encoder=None if follows else report.timed(TEXT_FOLDER, text_encoder),
        dit=report.timed(base.variant.name, lambda: dit(base, BASE)),
        sr_dit=None if sr is None else report.timed(sr.variant.name, lambda: dit(sr, SR)),
    )
