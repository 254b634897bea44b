"""The components of an engine, read from files or drawn at random, each to where the memory plan
has it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn

from magihuman.runtime import config
from magihuman.runtime.engine.blueprint import Blueprint
from magihuman.runtime.engine.options import OnLoad
from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.exported import is_exported, load_engines
from magihuman.runtime.memory import AUDIO, BASE, IMAGE, SR, TEXT, Placer
from magihuman.runtime.model import DiT, ImageVAE, Oobleck, OobleckConfig, TextEncoder, TurboVAE
from magihuman.runtime.pipeline import AudioVAE, Components, VideoDecoder
from magihuman.runtime.weights import (
    AUDIO_FOLDER,
    IMAGE_FOLDER,
    TEXT_FOLDER,
    TURBO_FOLDER,
    Paths,
    Synthetic,
    TransformerSpec,
    checkpoint,
    load_image_vae,
    load_text_encoder,
    random_weights,
)

log = logging.getLogger("magihuman")
Component = TypeVar("Component")


class Reporter:
    """Passes on how far loading has come, and logs the seconds that each component took."""

    def __init__(self, on_load: OnLoad | None) -> None:
        self._on_load: OnLoad = on_load or (lambda component, done, of: None)

    def timed(self, name: str, load: Callable[[], Component]) -> Component:
        """What `load` returns, with a report before and after."""
        self._on_load(name, 0, 0)
        start = time.perf_counter()
        component = load()
        log.info("loaded %s in %.1f s", name, time.perf_counter() - start)
        self._on_load(name, 1, 1)
        return component

    def reader(self, name: str) -> checkpoint.OnRead:
        """A callback for (bytes done, bytes in all) of a component."""
        return lambda done, of: self._on_load(name, done, of)


def build(blueprint: Blueprint) -> Components:
    """All components of a model; where it follows another process, those alone that both run.

    Raises:
        CheckpointError: a file is damaged, or is not what it should be.
    """
    report = Reporter(blueprint.options.on_load)
    model = blueprint.options.model
    source: FromFiles | AtRandom
    if blueprint.paths is not None:
        source = FromFiles(blueprint, blueprint.paths, report)
    else:
        assert isinstance(model, Synthetic)
        source = AtRandom(blueprint, model)
    base, sr, follows = blueprint.base, blueprint.sr, blueprint.follows
    has_image = not follows and source.has_image_vae
    # Cheap components first, so that a damaged one is known before tens of gigabytes are read.
    return Components(
        turbo_vae=report.timed(TURBO_FOLDER, source.turbo_vae),
        audio_vae=None if follows else report.timed(AUDIO_FOLDER, source.audio_vae),
        image_vae=report.timed(IMAGE_FOLDER, source.image_vae) if has_image else None,
        text_encoder=None if follows else report.timed(TEXT_FOLDER, source.text_encoder),
        dit=report.timed(base.variant.name, lambda: source.dit(base, BASE)),
        sr_dit=None if sr is None else report.timed(sr.variant.name, lambda: source.dit(sr, SR)),
        residency=blueprint.placer.residency,
    )


class FromFiles:
    """Components read from their files."""

    def __init__(self, blueprint: Blueprint, paths: Paths, report: Reporter) -> None:
        self._blueprint, self._paths, self._report = blueprint, paths, report
        self._placer = blueprint.placer

    @property
    def has_image_vae(self) -> bool:
        """Whether the image encoder, which may be absent, is there."""
        return self._paths.image_vae is not None

    def turbo_vae(self) -> VideoDecoder:
        """The video decoder: the published one, or one of exported engines."""
        folder, device = self._paths.turbo_vae, self._placer.device
        published = self._blueprint.published_decoder
        if published is not None:
            return load_engines(folder, published, device)
        if is_exported(folder):
            raise CheckpointError(
                f"{folder} must hold the published decoder, got an exported one; load it with"
                " vae='tensorrt'"
            )
        return checkpoint.load_turbo_vae(folder, device, self._blueprint.vae_dtype)

    def audio_vae(self) -> AudioVAE:
        """The autoencoder for sound, in fp32."""
        model = checkpoint.load_audio_vae(self._paths.audio_vae, self._placer.rest(AUDIO))
        return _placed_audio_vae(self._placer, model)

    def image_vae(self) -> ImageVAE:
        """The encoder of reference images."""
        path = self._paths.image_vae
        assert path is not None
        device, dtype = self._placer.rest(IMAGE), self._blueprint.vae_dtype
        return _placed_image_vae(self._placer, load_image_vae(path, device, dtype))

    def text_encoder(self) -> TextEncoder:
        """The text encoder, over activations in bf16."""
        path, device = self._paths.text_encoder, self._placer.rest(TEXT)
        precision = self._blueprint.options.held_text
        encoder = load_text_encoder(path, device, torch.bfloat16, precision, self._placer.device)
        return _placed_text_encoder(self._placer, encoder, encoder.model.encoder.layers)

    def dit(self, spec: TransformerSpec, part: str) -> DiT:
        """A transformer; part: its name in the memory plan."""
        rest = self._placer.rest(part) if self._placer.moves(part) else None
        model = spec.read(self._placer.device, self._report.reader(spec.variant.name), rest)
        return _placed_dit(self._placer, part, model, model.block.layers)


class AtRandom:
    """Components at full size, of random weights.

    They are made on the device, whatever rests elsewhere afterwards: a CPU would take minutes.
    """

    has_image_vae = True

    def __init__(self, blueprint: Blueprint, model: Synthetic) -> None:
        self._placer, self._vae_dtype = blueprint.placer, blueprint.vae_dtype
        self._seed, self._device = model.seed, blueprint.device
        self._text_precision = blueprint.options.held_text

    def turbo_vae(self) -> TurboVAE:
        """The video decoder."""
        sizes = config.TurboVAEConfig()
        return random_weights.turbo_vae(sizes, self._seed, self._device, self._vae_dtype)

    def audio_vae(self) -> AudioVAE:
        """The autoencoder for sound, in fp32."""
        model = random_weights.audio_vae(OobleckConfig(), self._seed, self._device)
        return _placed_audio_vae(self._placer, model)

    def image_vae(self) -> ImageVAE:
        """The encoder of reference images."""
        vae = random_weights.image_vae(self._seed, self._device, self._vae_dtype)
        return _placed_image_vae(self._placer, vae)

    def text_encoder(self) -> TextEncoder:
        """The text encoder, over activations in bf16."""
        encoder, layers = random_weights.text_encoder(
            self._seed, self._device, torch.bfloat16, self._text_precision
        )
        return _placed_text_encoder(self._placer, encoder, layers)

    def dit(self, spec: TransformerSpec, part: str) -> DiT:
        """A transformer; part: its name in the memory plan."""
        model, layers = random_weights.dit_by_layer(
            spec.config,
            self._seed,
            self._device,
            spec.linear,
            spec.variant.name,
            spec.quantized_dtypes,
        )
        return _placed_dit(self._placer, part, model, layers)


def _placed_audio_vae(placer: Placer, model: Oobleck) -> AudioVAE:
    vae = AudioVAE(model)
    placer.place(AUDIO, vae.model)
    return vae


def _placed_image_vae(placer: Placer, vae: ImageVAE) -> ImageVAE:
    placer.place(IMAGE, vae.model)
    return vae


def _placed_text_encoder(
    placer: Placer, encoder: TextEncoder, layers: Iterable[nn.Module]
) -> TextEncoder:
    """The encoder where the plan has it. layers: its own, which may get their weights when they are
    asked for.
    """
    if not placer.moves(TEXT):
        for _ in layers:
            pass
        return encoder
    runs = encoder.model.encoder
    placer.place(TEXT, encoder.model, list(runs.layers), runs, layers)
    return encoder


def _placed_dit(placer: Placer, part: str, model: DiT, layers: Iterable[nn.Module]) -> DiT:
    """A transformer where the plan has it, laid out as kernels want it if it comes to rest
    elsewhere, since its weights are not moved after that.

    layers: its own, which may get their weights when they are asked for.
    """
    if not placer.moves(part):
        for _ in layers:
            pass
        return model
    from magihuman.graphs.transformer import pad_weights

    def padded() -> Iterator[nn.Module]:
        for layer in layers:
            pad_weights(layer, model.config)
            yield layer

    placer.place(part, model, list(model.block.layers), model.block, padded())
    return model
