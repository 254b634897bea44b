"""`load`: check what is asked for, draw a blueprint of the model, build it, assemble an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

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
from magihuman.runtime.parallel import PeerFailed, Team, refuse_second
from magihuman.runtime.pipeline import Components
from magihuman.runtime.weights import PathLike, Synthetic

log = logging.getLogger("magihuman")

TEAM_BYTES = 2**30  # of each GPU, that connections of several take once they are made


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
    text_precision: config.TextPrecision | None = None,
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
        transformer, sr_transformer: folders, files or hub ids of transformers that lie elsewhere
            than in `model`: in the published layout, as `convert` makes them, in the layout of
            Diffusers, or one safetensors file.
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
        text_precision: of the text encoder's weights: "bf16" (default), or "int8" or "fp8", with a
            scale for each row, which takes half of the memory. Any device can.

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
            text_precision=text_precision,
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


def built(drawn: Blueprint) -> Engine:
    """The engine of a blueprint, of this process alone.

    Raises:
        CheckpointError, DeviceError: as `load`.
    """
    return assemble(read(drawn), drawn)


def read(drawn: Blueprint) -> Components:
    """The components of a blueprint.

    Raises:
        CheckpointError: a file is damaged, or is not what it should be.
        DeviceError: the device has no memory left.
    """
    try:
        return build(drawn)
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise DeviceError(
            f"{drawn.device} ran out of memory while loading; free it, or load without sr: {error}"
        ) from error


def load_together(options: LoadOptions, first: torch.device) -> Engine:
    """The engine of rank 0, or, under torchrun, of this rank. first: the device of rank 0."""

    def device(rank: int) -> torch.device:
        return first if first.type == "cpu" else pick_device(f"cuda:{(first.index or 0) + rank}")

    refuse_second()
    ranks = options.context_parallel
    if dist.is_torchelastic_launched():
        return load_in(Team.join(ranks, device(dist.get_node_local_rank())), options)
    return load_meanwhile([device(rank) for rank in range(ranks)], options)


def load_meanwhile(devices: Sequence[torch.device], options: LoadOptions) -> Engine:
    """The engine of rank 0, which reads its components while the other processes start.

    Raises:
        CheckpointError, DeviceError, InvalidRequestError: as `load`.
    """
    limit_bytes = check_on(options, devices[0])
    if limit_bytes is not None:
        limit_bytes -= TEAM_BYTES

    def draw(captures: bool) -> Blueprint:
        return blueprint.draw(options, devices[0], limit_bytes, False, captures)

    def meet() -> Drawn:
        team = Team.start(devices, f"{__name__}:{follow.__name__}", options.for_others())
        with leaving(team):
            return draw_in(team, lambda captures: first if captures else draw(False))

    first = draw(True)
    with ThreadPoolExecutor(1) as thread:
        meeting = thread.submit(meet)
        try:
            parts: Components | Exception = read(first)
        except Exception as error:  # told to all, once they are there
            parts = error
        except BaseException:
            meeting.result().team.lose("rank 0 was stopped")
            meeting.result().team.close()
            raise
        drawn = meeting.result()

    def engine() -> Engine:
        if isinstance(parts, Exception):
            raise parts
        # What was read is where the first blueprint has it.
        components = parts if drawn.blueprint is first else read(drawn.blueprint)
        return assemble(components, drawn.blueprint, drawn.team, drawn.plans)

    with leaving(drawn.team):
        return drawn.team.agree(engine)


def load_in(team: Team, options: LoadOptions) -> Engine:
    """This process's engine, once every process of the team has one.

    Raises:
        DeviceError: another process could not load.
    """

    def draw(captures: bool) -> Blueprint:
        limit_bytes = check_on(options, team.device)
        return blueprint.draw(options, team.device, limit_bytes, team.rank > 0, captures)

    with leaving(team):
        drawn = draw_in(team, draw)
        components = partial(read, drawn.blueprint)
        return team.agree(lambda: assemble(components(), drawn.blueprint, team, drawn.plans))


@contextmanager
def leaving(team: Team) -> Iterator[None]:
    """A context that leaves the team where it fails, as every process of it does.

    Raises:
        DeviceError: another process could not do its part.
    """
    try:
        yield
    except BaseException as error:
        team.close(tell=False)
        if isinstance(error, PeerFailed):
            raise DeviceError(f"another process could not load: {error}") from error
        raise


@dataclass(frozen=True)
class Drawn:
    """This process's blueprint, and the memory plans of all of a team; none on a CPU."""

    team: Team
    blueprint: Blueprint
    plans: list[MemoryPlan]


def draw_in(team: Team, draw: Callable[[bool], Blueprint]) -> Drawn:
    """What all processes of a team will load. Either all capture graphs, or none does.

    draw: gives this process's blueprint, with captures or without.
    """
    drawn = team.agree(lambda: draw(True))
    plans = team.gather(drawn.placer.plan)
    if len({plan is None or plan.replays for plan in plans}) > 1:
        drawn = team.agree(lambda: draw(False))
        plans = team.gather(drawn.placer.plan)
    made = [plan for plan in plans if plan is not None]
    for rank, plan in enumerate(made):
        if team.rank == 0:
            log.info("rank %d holds %s", rank, plan.held)
    return Drawn(team, drawn, made)


def follow(team: Team, options: LoadOptions) -> None:
    """All that a process does which rank 0 has started: load, and serve until rank 0 closes."""
    try:
        engine = load_in(team, options)
    except MagiHumanError as error:  # rank 0 says it too
        log.info("%s", error)
        return
    with engine:
        engine.follow()
