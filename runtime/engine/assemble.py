"""Loaded components to an engine: captured graphs where they can run, and a team's share."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from magihuman.graphs.support import why_not, why_not_decode
from magihuman.kernels.target import Kernels, target_of
from magihuman.runtime import config
from magihuman.runtime.engine.blueprint import Blueprint
from magihuman.runtime.engine.engine import Engine, EngineInfo
from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.memory import BASE, SR, MemoryPlan, Placer
from magihuman.runtime.model import DiT, TextEncoder, TurboVAE
from magihuman.runtime.parallel import Team, share
from magihuman.runtime.pipeline import BandedDecoder, Components, PlainDecoder
from magihuman.runtime.weights import TransformerSpec

if TYPE_CHECKING:
    from magihuman.graphs.transformer import CompiledForward

log = logging.getLogger("magihuman")


def assemble(
    components: Components,
    blueprint: Blueprint,
    team: Team | None = None,
    plans: Sequence[MemoryPlan] = (),
) -> Engine:
    """The engine of these components. team: of which this process is one. plans: those of all its
    processes.

    Raises:
        CheckpointError: the text encoder and the transformer belong to different models.
    """
    options, device = blueprint.options, blueprint.device
    check_widths(components)
    components = dataclasses.replace(components, learnt=blueprint.learnt)
    if options.compile:
        components = with_compiled_transformers(components, blueprint, team)
    if options.vae != "plain":
        components = with_compiled_decoder(components, blueprint)
    components = with_bands(components, blueprint.placer)
    is_compiled = components.forward is not None
    info = EngineInfo(
        variant=options.base,
        sr=options.sr,
        precision=blueprint.base.precision.value,
        device=device,
        is_compiled=is_compiled,
        kernels=target_of(options.kernels, device).kernels if is_compiled else None,
        memory_plan=blueprint.placer.plan,
        model=options.name,
        rank_plans=tuple(plans),
    )
    shared = None
    if team is not None:
        components, shared = share(components, team)
    if device.type == "cuda":
        components = dataclasses.replace(
            components,
            encode_stream=torch.cuda.Stream(device),
            sound_stream=torch.cuda.Stream(device),
        )
    return Engine(components, info, options.queue_limit, options.hooks, shared)


def check_widths(components: Components) -> None:
    """Raise `CheckpointError` unless the transformer takes what the text encoder makes."""
    encoder, channels = components.text_encoder, components.dit.config.text_channels
    if encoder is not None and encoder.channels != channels:
        raise CheckpointError(
            f"the text encoder's width must be the transformer's text_channels, {channels}, got"
            f" {encoder.channels}; they belong to different models"
        )


def with_compiled_transformers(
    components: Components, blueprint: Blueprint, team: Team | None
) -> Components:
    """Components whose transformers, and with the base one the text encoder, run as captured
    graphs, as far as this machine can.
    """
    placer, asked = blueprint.placer, blueprint.options
    common = components.encoding, asked.debug, asked.kernels, team
    forward = compiled(components.dit, blueprint.base, placer, BASE, *common)
    sr_forward = None
    if components.sr_dit is not None and blueprint.sr is not None:
        sr_forward = compiled(components.sr_dit, blueprint.sr, placer, SR, *common)
    encoder = components.text_encoder
    if forward is not None and encoder is not None:
        encoder = replayed(encoder, placer)
    captured = [each for each in (forward, sr_forward) if each is not None]
    return dataclasses.replace(
        components,
        forward=forward,
        sr_forward=sr_forward,
        text_encoder=encoder,
        captured=(*components.captured, *captured),
    )


def with_compiled_decoder(components: Components, blueprint: Blueprint) -> Components:
    """Components whose video decoder runs as captured graphs of fused kernels, where it can."""
    vae = components.turbo_vae
    is_possible = why_not_decode(blueprint.vae_dtype, blueprint.device) is None
    if not is_possible or not isinstance(vae, TurboVAE):
        return components
    from magihuman.graphs.decoder import CompiledDecoder

    decoder = CompiledDecoder(
        vae.decoder,
        vae.config,
        capturing=components.encoding,
        replays=blueprint.placer.replays_frames,
    )
    captured = (*components.captured, decoder)
    return dataclasses.replace(components, decoder=decoder, captured=captured)


def with_bands(components: Components, placer: Placer) -> Components:
    """Components whose windows of frames are decoded in bands where the memory plan wants it."""
    vae = components.turbo_vae
    if placer.bands == 1 or not isinstance(vae, TurboVAE):
        return components
    decoder = BandedDecoder(components.decoder or PlainDecoder(vae), vae.config, placer.bands)
    return dataclasses.replace(components, decoder=decoder)


def compiled(
    model: DiT,
    spec: TransformerSpec,
    placer: Placer,
    part: str,
    capturing: threading.Lock,
    debug: bool,
    kernels: Kernels = "auto",
    team: Team | None = None,
) -> CompiledForward | None:
    """The compiled forward of a transformer, or None, with one log line, where there is none.

    Args:
        model: the transformer.
        spec: how it is held.
        placer: has it where the memory plan wants it.
        part: its name in the memory plan.
        capturing: a lock to hold while a graph is captured.
        debug: whether to check before every replay that no weight has moved.
        kernels: "auto" or "portable", as of `load`.
        team: that shares each forward.
    """
    device = placer.device
    reason = why_not(model.config, spec.linear, device, kernels=kernels)
    if reason is not None:
        log.info("running the plain transformer: %s", reason)
        return None
    from magihuman.graphs.transformer import CompiledForward, ReplayOptions

    options = ReplayOptions(
        fp8_attention=spec.precision.is_fp8_attention,
        kernels=kernels,
        capturing=capturing,
        replays=placer.replays and not placer.moves(part),
        before_layer=placer.before_layer(part),
        debug=debug,
        rank=0 if team is None else team.rank,
        ranks=1 if team is None else team.ranks,
    )
    return CompiledForward(model, model.config, spec.linear, device, options)


def replayed(encoder: TextEncoder, placer: Placer) -> TextEncoder:
    """The encoder with captured graphs of short prompts, where its weights stay in their places and
    the plan has room for them.
    """
    window = encoder.model.config.encoder.sliding_window
    if not placer.replays_text or window < config.MAX_TEXT_TOKENS:
        return encoder
    from magihuman.graphs.text import ReplayedEncoder

    graphs = ReplayedEncoder(encoder.masked, encoder.model.dtype, placer.device)
    return dataclasses.replace(encoder, replayed=graphs)
