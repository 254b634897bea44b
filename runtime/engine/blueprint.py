"""What is to be loaded: the files of a model found, and a place planned for each component."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from magihuman.runtime.engine.options import LoadOptions
from magihuman.runtime.memory import (
    GIB,
    VIDEO,
    Cap,
    Part,
    Placer,
    Residency,
    folder_parts,
    plan_placement,
    synthetic_parts,
)
from magihuman.runtime.request import ClipSize
from magihuman.runtime.weights import (
    TURBO_FOLDER,
    Paths,
    Synthetic,
    TransformerSpec,
    find,
    learnt,
    model_folder,
    plan,
)


@dataclass(frozen=True)
class Blueprint:
    """A model as it will be, before any of its weights are read.

    Attributes:
        options: what the caller asked for.
        paths: where each component lies; None for random weights.
        base: the base transformer.
        sr: the super-resolution transformer, if there is to be one.
        placer: brings each component to where the memory plan has it.
        vae_dtype: dtype of the autoencoders for images.
        learnt: longest and largest clip that the model was trained on, where its folder tells.
        follows: whether another process leads this one; then only the transformers and the video
            decoder are loaded, which both run.
    """

    options: LoadOptions
    paths: Paths | None
    base: TransformerSpec
    sr: TransformerSpec | None
    placer: Placer
    vae_dtype: torch.dtype
    learnt: ClipSize | None
    follows: bool

    @property
    def device(self) -> torch.device:
        """The device that everything runs on."""
        return self.placer.device

    @property
    def published_decoder(self) -> Path | None:
        """With vae='tensorrt', where the decoder lies from which the engines should be made."""
        if self.options.vae != "tensorrt" or isinstance(self.options.model, Synthetic):
            return None
        return model_folder(self.options.model) / TURBO_FOLDER


def draw(
    options: LoadOptions,
    device: torch.device,
    limit_bytes: int | None,
    follows: bool,
    captures: bool = True,
) -> Blueprint:
    """Find a model's files, check their headers, and plan where the weights will be.

    limit_bytes: of everything that the process holds on the device; None on a CPU.
    captures: whether graphs may be captured.

    Raises:
        InvalidRequestError: the transformers cannot be held as asked.
        CheckpointError: a file is missing, damaged, or does not fit.
        DeviceError: there is no way to run in the device's memory, or in the limit.
    """
    vae_dtype = options.vae_dtype(device)
    paths = find_paths(options)
    base, sr = plan_transformers(options, paths, device)

    def others() -> list[Part]:
        if paths is None:
            parts = synthetic_parts(vae_dtype, options.held_text)
        else:
            parts = folder_parts(
                paths.turbo_vae,
                paths.text_encoder,
                paths.audio_vae,
                paths.image_vae,
                vae_dtype.itemsize,
                is_engine=options.vae == "tensorrt",
                text_precision=options.held_text,
            )
        return [part for part in parts if not follows or part.name == VIDEO]

    limit_gb = options.memory_limit_gb
    transformers = options.for_transformers(device)
    is_asked, vae = limit_gb is not None, options.vae or "fast"
    memory = plan_placement(others, base, sr, limit_bytes, is_asked, transformers, captures, vae)
    cap = None if limit_gb is None else Cap(device, int(limit_gb * GIB))
    placer = Placer(memory, device, Residency(cap))
    trained = None if isinstance(options.model, Synthetic) else learnt(options.model)
    return Blueprint(options, paths, base, sr, placer, vae_dtype, trained, follows)


def find_paths(options: LoadOptions) -> Paths | None:
    """Where each component lies, downloaded where a hub has it; None for random weights."""
    if isinstance(options.model, Synthetic):
        return None
    return find(options.model, options.base, options.upscaler, options.overrides, options.revision)


def plan_transformers(
    options: LoadOptions, paths: Paths | None, device: torch.device
) -> tuple[TransformerSpec, TransformerSpec | None]:
    """How the base and the super-resolution transformer will be held, file headers checked."""
    asked = options.for_transformers(device)
    base = plan(options.base, None if paths is None else paths.dit, asked)
    sr = None
    if options.upscaler is not None:
        sr = plan(options.upscaler, None if paths is None else paths.sr, asked)
    if paths is not None:
        for spec in filter(None, (base, sr)):
            spec.scan()
    return base, sr
