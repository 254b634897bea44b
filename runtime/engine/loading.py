"""Check what is asked for, find and read the model, and assemble an engine."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist

from magihuman.graphs.quantization import KEEP_NONE, KeepBf16
from magihuman.graphs.support import why_not, why_not_decode
from magihuman.runtime import config
from magihuman.runtime.device import pick_device
from magihuman.runtime.engine import build
from magihuman.runtime.engine.engine import Engine
from magihuman.runtime.errors import (
    CheckpointError,
    DeviceError,
    InvalidRequestError,
    MagiHumanError,
    one_of,
)
from magihuman.runtime.hooks import Hooks
from magihuman.runtime.memory import (
    BASE,
    GIB,
    SR,
    VIDEO,
    Cap,
    Part,
    Placer,
    check_limit,
    folder_parts,
    limit_of,
    plan_placement,
    synthetic_parts,
)
from magihuman.runtime.model import DiT, TextEncoder, TurboVAE
from magihuman.runtime.parallel import PeerFailed, Team
from magihuman.runtime.pipeline import Components, Forward
from magihuman.runtime.weights import (
    AUDIO_FOLDER,
    IMAGE_FOLDER,
    TEXT_FOLDER,
    TURBO_FOLDER,
    PathLike,
    PrecisionPolicy,
    TransformerOptions,
    TransformerSpec,
    find,
    model_folder,
    plan,
    random_weights,
)

log = logging.getLogger("magihuman")
Made = TypeVar("Made")

OF_RANK_0 = ("team", "device", "on_load", "hooks")  # arguments of `load` that are not the others'


def load(
    model: PathLike | random_weights.Synthetic,
    *,
    variant: str | None = None,
    sr: str | None = None,
    precision: config.Precision | None = None,
    keep_bf16: KeepBf16 | None = None,
    compile: bool = True,  # noqa: A002 - what everybody calls it
    vae: config.Vae | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    transformer: PathLike | None = None,
    sr_transformer: PathLike | None = None,
    turbo_vae: PathLike | None = None,
    text_encoder: PathLike | None = None,
    audio_vae: PathLike | None = None,
    image_vae: PathLike | None = None,
    memory_limit_gb: float | None = None,
    on_load: build.OnLoad | None = None,
    queue_limit: int = 64,
    hooks: Sequence[Hooks] = (),
    debug: bool = False,
    context_parallel: int = 1,
    team: Team | None = None,
) -> Engine:
    """Load a model and return an engine ready to generate.

    Args:
        model: a directory with the published folders; "nano", the small model that comes with this
            package; a Hugging Face hub id ("owner/name"; the offline mode of huggingface_hub is
            honoured), or `synthetic()` for random weights without files.
        variant: "distill" (default: 8 steps, no guidance) or "base" (32 steps with guidance).
        sr: None, "540p" or "1080p": super-resolve every clip.
        precision: of the linears in the transformers: "bf16" as published, "fp32", or "fp8", which
            needs a Hopper GPU; "fp8-attn" is "fp8" with attention over fp8 queries, keys and values
            too. By default that of a converted transformer, else "bf16".
        keep_bf16: with fp8, the linears that stay bf16: "none" (default), "modality" (the layers
            with weights for each modality), or names and patterns such as "block.layers.7.*". A
            layer whose `linear_qkv` is kept has attention in bf16.
        compile: run the transformers as captured graphs of fused kernels where this machine can
            (`magihuman doctor` says); False runs the plain model.
        vae: how frames are decoded: "fast", by fused kernels and captured graphs, which needs a
            Hopper GPU, "plain", or "tensorrt", on the engines of a folder that `magihuman export`
            wrote, which turbo_vae names. By default "fast" where this machine can, else "plain".
        device: a torch device; by default the first GPU, else the CPU.
        revision: of the hub repository.
        transformer, sr_transformer: folders of transformers that lie elsewhere than in `model`, in
            the published layout or as `convert` makes them.
        turbo_vae, text_encoder, audio_vae, image_vae: paths of components that lie elsewhere than
            in `model`; for the last three also hub ids. Without an image encoder, requests with an
            image are refused.
        memory_limit_gb: GiB (2^30 bytes) of the GPU's memory to stay below, loading included, with
            clips of the default sizes; by default what is free. What has no room rests in pinned
            host memory and comes for its stage, whole or layer by layer; `Engine.memory_plan`
            tells. Where everything has room nothing moves.
        on_load: called with (component, bytes done, bytes in all) while weights are read.
        queue_limit: requests that may wait for the one that runs; one more raises `QueueFull`.
        hooks: told of every request and stage, see `runtime/hooks.py`.
        debug: before every replay of a captured graph, check that no weight has moved in memory.
        context_parallel: GPUs of this host that work on each request together, from `device` on; it
            must divide the transformer's key/value heads. Each holds the transformers and the video
            decoder, the first all else too. In a process that torchrun started, those that it
            started with it; else processes are started here.
        team: of which this process is one, where `load` starts it; not for callers.

    Raises:
        InvalidRequestError: an argument is not one of those above.
        CheckpointError: a file is missing, damaged, or does not fit.
        DeviceError: the device is not there, or there is no way to run in its memory, or in the
            limit; nothing large has been read then.
    """
    given = {name: value for name, value in locals().items() if name not in OF_RANK_0}
    is_synthetic = isinstance(model, random_weights.Synthetic)
    default = model.variant if isinstance(model, random_weights.Synthetic) else "distill"
    name = default if variant is None else variant
    one_of("variant", name, config.BASE_VARIANTS)
    if type(queue_limit) is not int or queue_limit < 0:
        raise InvalidRequestError(
            f"queue_limit must be a whole number from 0 up, got {queue_limit!r}"
        )
    one_of("sr", sr, (None, *config.SR_SIZES))
    if vae == "tensorrt" and (turbo_vae is None or is_synthetic):
        raise InvalidRequestError(
            "vae='tensorrt' must go with a model directory and turbo_vae, a folder of engines, got"
            f" {model!r} and {turbo_vae!r}; magihuman export writes one"
        )
    policy = None if precision is None else PrecisionPolicy.of(precision)
    if vae is not None:
        one_of("vae", vae, get_args(config.Vae))
    if not (policy and policy.is_fp8) and keep_bf16 not in (None, KEEP_NONE):
        raise InvalidRequestError(
            f"keep_bf16 must go with precision='fp8' or 'fp8-attn', got {keep_bf16!r} with"
            f" {precision!r}"
        )
    if sr is None and sr_transformer is not None:
        raise InvalidRequestError(
            f"sr_transformer must go with sr, got {os.fspath(sr_transformer)!r} without"
        )
    if is_synthetic and name != default:
        raise InvalidRequestError(
            f"variant must be {default!r}, as the synthetic model's, got {name!r}"
        )
    check_limit(memory_limit_gb)
    target = pick_device(device)
    limit_bytes = limit_of(memory_limit_gb, target)
    chosen = config.VARIANTS[name]
    upscaler = None if sr is None else config.upscaler(sr)
    vae_dtype = (policy or PrecisionPolicy.BF16).vae_dtype(target)
    reason = why_not_decode(vae_dtype, target)
    if vae == "fast" and reason is not None:
        raise InvalidRequestError(
            f"vae='fast' needs a Hopper GPU and bf16, and here {reason}; use vae='plain', or leave"
            " it out"
        )
    if context_parallel != 1 and team is None:
        _check_context_parallel(context_parallel, vae, memory_limit_gb)
        return _load_together(context_parallel, target, given, on_load, hooks)
    options = TransformerOptions(target, policy, keep_bf16, compile, context_parallel)
    report = build.Reporter(on_load)
    follows = team is not None and team.rank > 0

    def placed(others: Callable[[], list[Part]]) -> Placer:
        def own() -> list[Part]:
            return [part for part in others() if not follows or part.name == VIDEO]

        asked = memory_limit_gb is not None
        placer = Placer(plan_placement(own, base, upscale, limit_bytes, asked, options), target)
        if memory_limit_gb is not None:
            placer.residency.cap = Cap(target, int(memory_limit_gb * GIB))
        return placer

    try:
        if isinstance(model, random_weights.Synthetic):
            base = plan(chosen, None, options)
            upscale = None if upscaler is None else plan(upscaler, None, options)
            placer = placed(lambda: synthetic_parts(vae_dtype))
            parts = build.synthesize(model, base, upscale, placer, vae_dtype, report, follows)
        else:
            overrides = {
                chosen.name: transformer,
                TURBO_FOLDER: turbo_vae,
                TEXT_FOLDER: text_encoder,
                AUDIO_FOLDER: audio_vae,
                IMAGE_FOLDER: image_vae,
            }
            if upscaler is not None:
                overrides[upscaler.name] = sr_transformer
            paths = find(model, chosen, upscaler, overrides, revision)
            base = plan(chosen, paths.dit, options)
            upscale = None if upscaler is None else plan(upscaler, paths.sr, options)
            for spec in filter(None, (base, upscale)):
                spec.scan()
            engines = model_folder(model) / TURBO_FOLDER if vae == "tensorrt" else None
            placer = placed(
                lambda: folder_parts(
                    paths.turbo_vae,
                    paths.text_encoder,
                    paths.audio_vae,
                    paths.image_vae,
                    vae_dtype.itemsize,
                    is_engine=vae == "tensorrt",
                )
            )
            parts = build.read(paths, base, upscale, placer, vae_dtype, engines, report, follows)
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise DeviceError(
            f"{target} ran out of memory while loading; free it, or load without sr: {error}"
        ) from error
    encoder, channels = parts.text_encoder, parts.dit.config.text_channels
    if encoder is not None and encoder.channels != channels:
        raise CheckpointError(
            f"the text encoder's width must be the transformer's text_channels, {channels}, got"
            f" {encoder.channels}; they belong to different models"
        )
    parts.residency = placer.residency
    if compile:
        parts.forward = compiled(parts.dit, base, placer, BASE, debug, parts, team)
        if parts.sr_dit is not None and upscale is not None:
            parts.sr_forward = compiled(parts.sr_dit, upscale, placer, SR, debug, parts, team)
        if parts.forward is not None and encoder is not None:
            parts.text_encoder = replayed(encoder, placer)
    if vae != "plain" and reason is None and isinstance(parts.turbo_vae, TurboVAE):
        from magihuman.graphs.decoder import CompiledDecoder

        decoder = CompiledDecoder(
            parts.turbo_vae.decoder,
            parts.turbo_vae.config,
            capturing=parts.encoding,
            replays=placer.replays,
        )
        parts.decoder = decoder
        parts.captured.append(decoder)
    return Engine(
        parts, chosen, sr, base.precision.value, target, queue_limit, hooks, team, placer.plan
    )


def _check_context_parallel(ranks: object, vae: str | None, limit_gb: float | None) -> None:
    if type(ranks) is not int or ranks < 1:
        raise InvalidRequestError(
            f"context_parallel must be a whole number from 1 up, got {ranks!r}"
        )
    if limit_gb is not None:
        raise InvalidRequestError(
            f"memory_limit_gb must go with context_parallel=1, got {limit_gb!r} with {ranks}: GPUs"
            " that work together hold all weights; leave one of the two out"
        )
    if vae == "tensorrt":
        raise InvalidRequestError(
            f"vae='tensorrt' must go with context_parallel=1, got {ranks}; use vae='fast' or"
            " 'plain'"
        )


def _load_together(
    ranks: int,
    first: torch.device,
    given: dict[str, Any],
    on_load: build.OnLoad | None,
    hooks: Sequence[Hooks],
) -> Engine:
    """`load` in every process of a team. first: the device of rank 0."""

    def device(rank: int) -> torch.device:
        return first if first.type == "cpu" else pick_device(f"cuda:{(first.index or 0) + rank}")

    if dist.is_torchelastic_launched():
        team = Team.join(ranks, device(dist.get_node_local_rank()))
    else:
        devices = [device(rank) for rank in range(ranks)]
        team = Team.start(devices, f"{__name__}:{follow.__name__}", given)
    return _load_in(team, given, on_load=on_load, hooks=hooks)


def _load_in(team: Team, given: dict[str, Any], **own: Any) -> Engine:
    """This process's engine, once every process has one."""
    try:
        return team.agree(lambda: load(**{**given, **own, "device": team.device, "team": team}))
    except BaseException as error:
        team.close(tell=False)  # all of them raise
        if isinstance(error, PeerFailed):
            raise DeviceError(f"another process could not load: {error}") from error
        raise


def follow(team: Team, given: dict[str, Any]) -> None:
    """All that a process does which rank 0 has started."""
    try:
        engine = _load_in(team, given)
    except MagiHumanError as error:  # rank 0 says it too
        log.info("%s", error)
        return
    with engine:
        engine.follow()


def compiled(
    model: DiT,
    spec: TransformerSpec,
    placer: Placer,
    name: str,
    debug: bool,
    parts: Components,
    team: Team | None = None,
) -> Forward | None:
    """The compiled forward of a transformer, or None, with one log line, where there is none.

    parts: that it will be one of, under a name in the memory plan.
    """
    device = placer.device
    reason = why_not(model.config, spec.linear, device)
    if reason is not None:
        log.info("running the plain transformer: %s", reason)
        return None
    from magihuman.graphs.transformer import CompiledForward

    forward = CompiledForward(
        model,
        model.config,
        spec.linear,
        device,
        fp8_attention=spec.precision.is_fp8_attention,
        capturing=parts.encoding,
        replays=placer.replays and not placer.moves(name),
        before_layer=placer.before_layer(name),
        debug=debug,
        rank=0 if team is None else team.rank,
        ranks=1 if team is None else team.ranks,
    )
    parts.captured.append(forward)
    return forward


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
