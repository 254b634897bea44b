"""`load`: check what is asked for, draw a blueprint of the model, build it, assemble an engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist

from magihuman.graphs.quantization import KeepBf16
from magihuman.graphs.support import why_not_decode
from magihuman.kernels.target import Kernels
from magihuman.runtime import config
from magihuman.runtime.device import neutral, pick_device
from magihuman.runtime.engine import blueprint
from magihuman.runtime.engine.assemble import assemble
from magihuman.runtime.engine.blueprint import Blueprint
from magihuman.runtime.engine.build import build
from magihuman.runtime.engine.callers import check_can_load
from magihuman.runtime.engine.engine import Engine
from magihuman.runtime.engine.options import LoadOptions, OnLoad
from magihuman.runtime.errors import DeviceError, InvalidRequestError, MagiHumanError
from magihuman.runtime.hooks import Hooks
from magihuman.runtime.memory import MemoryPlan, limit_of
from magihuman.runtime.parallel import PeerFailed, Team
from magihuman.runtime.weights import PathLike, Synthetic

log = logging.getLogger("magihuman")


def load(
    model: PathLike | Synthetic,
    *,
    variant: str | None = None,
    sr: str | None = None,
    precision: config.Precision | None = None,
    keep_bf16: KeepBf16 | None = None,
    compile: bool = True,  # noqa: A002 - what everybody calls it
    kernels: Kernels = "auto",
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
    on_load: OnLoad | None = None,
    queue_limit: int = 64,
    hooks: Sequence[Hooks] = (),
    debug: bool = False,
    context_parallel: int = 1,
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
            too; "int8" is 8 bits of integers. By default that of a converted transformer, else
            "bf16".
        keep_bf16: with 8 bits, the linears that stay bf16: "none" (default), "modality" (the layers
            with weights for each modality), or names and patterns such as "block.layers.7.*". A
            layer whose `linear_qkv` is kept has attention in bf16.
        compile: run the transformers as captured graphs of fused kernels where this machine can
            (`magihuman doctor` says); False runs the plain model.
        kernels: of the compiled transformers: "auto", those for Hopper on Hopper and the portable
            ones on every other GPU, or "portable", the latter everywhere. `Engine.kernels` tells.
        vae: how frames are decoded: "fast", by fused kernels and captured graphs, which needs an
            NVIDIA GPU from sm_80 on, "plain", or "tensorrt", on the engines of a folder that
            `magihuman export` wrote, which turbo_vae names. By default "fast" where this machine
            can, else "plain".
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

    Raises:
        InvalidRequestError: an argument is not one of those above.
        CheckpointError: a file is missing, damaged, or does not fit.
        DeviceError: the device is not there, or there is no way to run in its memory, or in the
            limit; nothing large has been read then.
        MagiHumanError: this process was forked from one that had loaded an engine.
    """
    return load_with(
        LoadOptions(
            model,
            variant=variant,
            sr=sr,
            precision=precision,
            keep_bf16=keep_bf16,
            compile=compile,
            kernels=kernels,
            vae=vae,
            device=device,
            revision=revision,
            transformer=transformer,
            sr_transformer=sr_transformer,
            turbo_vae=turbo_vae,
            text_encoder=text_encoder,
            audio_vae=audio_vae,
            image_vae=image_vae,
            memory_limit_gb=memory_limit_gb,
            on_load=on_load,
            queue_limit=queue_limit,
            hooks=hooks,
            debug=debug,
            context_parallel=context_parallel,
        )
    )


def load_with(options: LoadOptions) -> Engine:
    """`load`, in this process or in every one of a team."""
    options.check()
    check_can_load()
    with neutral():
        device = pick_device(options.device)
        if options.context_parallel == 1:
            return load_here(options, device)
        check_on(options, device)
        options.check_together()
        return load_together(options, device)


def check_on(options: LoadOptions, device: torch.device) -> int | None:
    """Bytes that the process may hold on this device; None on a CPU.

    Raises:
        InvalidRequestError: the device cannot do what is asked, whatever the model.
    """
    limit_bytes = limit_of(options.memory_limit_gb, device)
    reason = why_not_decode(options.vae_dtype(device), device)
    if options.vae == "fast" and reason is not None:
        raise InvalidRequestError(
            f"vae='fast' needs a GPU from sm_80 on and bf16, and here {reason}; use vae='plain', or"
            " leave it out"
        )
    return limit_bytes


def load_here(options: LoadOptions, device: torch.device) -> Engine:
    """The engine of this process alone.

    Raises:
        InvalidRequestError, CheckpointError, DeviceError: as `load`.
    """
    return built(blueprint.draw(options, device, check_on(options, device), follows=False))


def built(drawn: Blueprint, team: Team | None = None, plans: Sequence[MemoryPlan] = ()) -> Engine:
    """The engine of a blueprint.

    team: of which this process is one, whose rank 0 takes the requests. plans: of all of them.

    Raises:
        CheckpointError, DeviceError: as `load`.
    """
    device = drawn.device
    try:
        components = build(drawn)
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise DeviceError(
            f"{device} ran out of memory while loading; free it, or load without sr: {error}"
        ) from error
    return assemble(components, drawn, team, plans)


def load_together(options: LoadOptions, first: torch.device) -> Engine:
    """The engine of rank 0, or, under torchrun, of this rank. first: the device of rank 0."""

    def device(rank: int) -> torch.device:
        return first if first.type == "cpu" else pick_device(f"cuda:{(first.index or 0) + rank}")

    ranks = options.context_parallel
    if dist.is_torchelastic_launched():
        team = Team.join(ranks, device(dist.get_node_local_rank()))
    else:
        devices = [device(rank) for rank in range(ranks)]
        team = Team.start(devices, f"{__name__}:{follow.__name__}", options.for_others())
    return load_in(team, options)


def load_in(team: Team, options: LoadOptions) -> Engine:
    """This process's engine, once every process of the team has one.

    Raises:
        DeviceError: another process could not load.
    """
    try:
        drawn, plans = draw_in(team, options)
        return team.agree(lambda: built(drawn, team, plans))
    except BaseException as error:
        team.close(tell=False)  # all of them raise
        if isinstance(error, PeerFailed):
            raise DeviceError(f"another process could not load: {error}") from error
        raise


def draw_in(team: Team, options: LoadOptions) -> tuple[Blueprint, list[MemoryPlan]]:
    """This process's blueprint, and the plans of all. Either all capture graphs, or none does."""

    def draw(captures: bool) -> Blueprint:
        device = team.device
        limit_bytes = check_on(options, device)
        return blueprint.draw(options, device, limit_bytes, team.rank > 0, captures)

    drawn = team.agree(lambda: draw(True))
    plans = team.gather(drawn.placer.plan)
    if len({plan is None or plan.replays for plan in plans}) > 1:
        drawn = team.agree(lambda: draw(False))
        plans = team.gather(drawn.placer.plan)
    made = [plan for plan in plans if plan is not None]
    for rank, plan in enumerate(made):
        if team.rank == 0:
            log.info("rank %d holds %s", rank, plan.held)
    return drawn, made


def follow(team: Team, options: LoadOptions) -> None:
    """All that a process does which rank 0 has started: load, and serve until rank 0 closes."""
    try:
        engine = load_in(team, options)
    except MagiHumanError as error:  # rank 0 says it too
        log.info("%s", error)
        return
    with engine:
        engine.follow()
