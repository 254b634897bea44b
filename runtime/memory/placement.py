"""The memory plan of a model: what its stages need, and how its components come where they are."""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from magihuman.graphs.decoder import batch_of
from magihuman.graphs.support import why_not
from magihuman.runtime import config
from magihuman.runtime.errors import DeviceError, InvalidRequestError
from magihuman.runtime.memory import estimate
from magihuman.runtime.memory.offload import Offloaded, Residency, call_before_layers
from magihuman.runtime.memory.parts import dit_part, reading_bytes
from magihuman.runtime.memory.plan import (
    AUDIO,
    BASE,
    CONTEXT_BYTES,
    GIB,
    IMAGE,
    SR,
    TEXT,
    VIDEO,
    MemoryPlan,
    NoPlanError,
    Part,
    Stage,
    make_plan,
)
from magihuman.runtime.memory.speeds import H100, Speeds, speeds_of
from magihuman.runtime.model import Layout
from magihuman.runtime.request import Request
from magihuman.runtime.weights import TransformerOptions, TransformerSpec

log = logging.getLogger("magihuman")

CPU = torch.device("cpu")
DECODE = "decode"  # the stage
MARGIN_BYTES = GIB  # of a card, left free where no limit is given


@dataclass(frozen=True)
class Clips:
    """How clips of the default sizes run, for a plan.

    Attributes:
        is_compiled: whether the transformers and the video decoder run as captured graphs.
        share: of the activations of such clips, for smaller ones.
        ranks: processes that share each forward, and then all hold the transformers; the plan is
            that of one of them.
        captures: whether graphs may be captured.
        speeds: of the device.
        vae: what decodes frames, as of `load`.
        bands: in which a window of frames is decoded, one after another.
    """

    is_compiled: bool
    share: float = 1.0
    ranks: int = 1
    captures: bool = True
    speeds: Speeds = H100
    vae: config.Vae = "fast"
    bands: int = 1

    @property
    def cuttings(self) -> tuple[int, ...]:
        """In how many bands windows may be decoded, none first; exported engines take none."""
        can_cut = self.is_compiled and self.ranks == 1 and self.vae != "tensorrt"
        return estimate.BANDS if can_cut else (1,)


def plan_memory(
    others: Sequence[Part],
    base: TransformerSpec,
    sr: TransformerSpec | None,
    limit_bytes: int,
    clips: Clips,
) -> MemoryPlan:
    """The plan for clips of the default sizes. Where there is none since a window of frames has no
    room, windows are cut into as few bands as give one.

    Args:
        others: all parts but the transformers, that are on the device of this process.
        base, sr: the transformers.
        limit_bytes: of everything that the process holds on the device.
        clips: how they run.

    Raises:
        NoPlanError: there is none.
    """
    specs = [base] if sr is None else [base, sr]
    transformers = [dit_part(*named) for named in zip((BASE, SR), specs, strict=False)]
    if clips.ranks > 1:
        transformers = [dataclasses.replace(part, can_move=False) for part in transformers]
    parts = [*others, *transformers]
    *fewer, most = clips.cuttings
    for bands in fewer:
        try:
            return _plan_in(parts, specs, limit_bytes, dataclasses.replace(clips, bands=bands))
        except NoPlanError as error:
            if error.stage != DECODE:
                raise
    return _plan_in(parts, specs, limit_bytes, dataclasses.replace(clips, bands=most))


def _plan_in(
    parts: Sequence[Part], specs: Sequence[TransformerSpec], limit_bytes: int, clips: Clips
) -> MemoryPlan:
    """The plan with windows in as many bands as `clips` says; specs: of the transformers."""
    stages = [
        dataclasses.replace(
            stage,
            working_bytes=int(clips.share * stage.working_bytes),
            graph_bytes=int(clips.share * stage.graph_bytes),
        )
        for stage in stages_of(specs, parts, clips)
    ]
    reading, bus = max(reading_bytes(spec) for spec in specs), clips.speeds.copy_bytes_per_s
    made = make_plan(parts, stages, limit_bytes, reading, clips.captures, bus)
    return dataclasses.replace(made, bands=clips.bands)


def plan_placement(
    others: Callable[[], list[Part]],
    base: TransformerSpec,
    sr: TransformerSpec | None,
    limit_bytes: int | None,
    is_limit_asked: bool,
    options: TransformerOptions,
    captures: bool = True,
    vae: config.Vae = "fast",
) -> MemoryPlan | None:
    """Where weights will be; None on a CPU. Without a limit that was asked for, what is free may
    be too little for clips of the default sizes: there are smaller ones.

    Raises:
        NoPlanError: there is no plan.
        DeviceError: weights that are to rest in host memory have no room there.
    """
    if limit_bytes is None:
        return None
    reason = why_not(base.config, base.linear, options.device)
    is_compiled = options.compile and reason is None
    already = held_by_others(options.device) if is_limit_asked else []
    parts, plan, share = [*others(), *already], None, 1.0
    speeds = speeds_of(options.device)
    while plan is None:
        clips = Clips(is_compiled, share, options.ranks, captures, speeds, vae)
        try:
            plan = plan_memory(parts, base, sr, limit_bytes, clips)
        except NoPlanError as error:
            if options.ranks > 1 and share < 0.2:
                raise NoPlanError(
                    f"GPUs that work together must each hold the transformers, and {error.found}",
                    "free memory, use context_parallel=1, load without sr or with a smaller one, or"
                    " use precision='fp8'",
                ) from error
            if is_limit_asked or share < 0.2:
                raise
            if share == 1.0:
                log.warning("clips of the default size have no room, smaller ones may: %s", error)
            share -= 0.1
    check_host(plan)
    if plan.bands > 1:
        log.info("decoding windows of frames in %d bands, one after another", plan.bands)
    if plan.streamed:
        log.info("resting in host memory between stages: %s", ", ".join(plan.streamed))
    return plan


def limit_of(memory_limit_gb: float | None, device: torch.device) -> int | None:
    """Bytes that the process may hold on the device; None on a CPU.

    Raises:
        InvalidRequestError: the limit is no number above 0, or there is no GPU.
    """
    check_limit(memory_limit_gb)
    if device.type != "cuda":
        if memory_limit_gb is not None:
            raise InvalidRequestError(
                f"memory_limit_gb must go with a GPU, got {memory_limit_gb:g} with {device}"
            )
        return None
    free = estimate.free_bytes(device)
    if memory_limit_gb is None:
        return free + CONTEXT_BYTES - MARGIN_BYTES
    held = torch.cuda.memory_allocated(device)  # the limit counts it, and it is not free
    return min(int(memory_limit_gb * GIB), free + CONTEXT_BYTES + held)


def held_by_others(device: torch.device) -> list[Part]:
    """What this process holds on a GPU already, which a limit counts too."""
    size = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return [Part("other tensors of this process", size, can_move=False)] if size else []


class Cap:
    """For as long as it lives, PyTorch is refused what passes a limit; cached blocks go first."""

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        """limit_bytes: of everything that the process holds on the device."""
        total = torch.cuda.mem_get_info(device)[1]
        before = torch.cuda.get_per_process_memory_fraction(device)
        share = min(before, (limit_bytes - CONTEXT_BYTES) / total)
        torch.cuda.set_per_process_memory_fraction(share, device)
        lift = weakref.finalize(self, torch.cuda.set_per_process_memory_fraction, before, device)
        lift.atexit = False


def check_limit(memory_limit_gb: float | None) -> None:
    """Raise `InvalidRequestError` for what is no limit."""
    if memory_limit_gb is None:
        return
    is_number = isinstance(memory_limit_gb, (int, float)) and type(memory_limit_gb) is not bool
    if not is_number or not math.isfinite(memory_limit_gb) or memory_limit_gb <= 0:
        raise InvalidRequestError(
            f"memory_limit_gb must be a number of GiB above 0, got {memory_limit_gb!r}"
        )


def check_host(plan: MemoryPlan) -> None:
    """Raise `DeviceError` where what is to rest in host memory has no room there."""
    free = estimate.free_bytes(CPU)
    if plan.host_bytes > free:
        raise DeviceError(
            f"{plan.host_bytes / GIB:.1f} GiB of weights are to rest in host memory"
            f" ({', '.join(plan.streamed)}) and {free / GIB:.1f} GiB are free there; free host"
            " memory, or give a larger memory_limit_gb"
        )


def stages_of(
    specs: Sequence[TransformerSpec], parts: Collection[Part], clips: Clips
) -> list[Stage]:
    """What a request of default size goes through, as far as the parts are there: text, sound,
    image, denoising with the first of `specs`, super-resolution with the second, decoding. Of the
    processes that share each forward one's bytes are counted.
    """
    held, is_compiled, ranks = {part.name for part in parts}, clips.is_compiled, clips.ranks
    widened_bytes = sum(part.widened_bytes for part in parts)
    base = specs[0]
    sr = specs[1] if len(specs) > 1 else None
    request = Request("-")
    plan = request.plan(base.variant, None if sr is None else sr.variant.sr)
    width, height = plan.size_px
    sound = int(request.seconds * estimate.BYTES_PER_SECOND_OF_SOUND)
    stages = []
    if TEXT in held:
        graphs = estimate.TEXT_GRAPHS_BYTES + widened_bytes if is_compiled else 0
        working = estimate.TEXT_BYTES + widened_bytes
        text = Stage("text", (TEXT,), working, graph_bytes=graphs, spares_graphs=True)
        stages.append(text)
    if AUDIO in held:
        stages.append(Stage("audio", (AUDIO,), sound))
    if IMAGE in held:
        stages.append(Stage("image", (IMAGE,), width * height * estimate.BYTES_PER_IMAGE_PIXEL))
    sizes = [(plan.rows, plan.columns)]
    if plan.sr_rows is not None and plan.sr_columns is not None:
        sizes.append((plan.sr_rows, plan.sr_columns))
    names = (("denoise", BASE), ("super_resolve", SR))
    for (name, part), one, size in zip(names, specs, sizes, strict=False):
        layout = Layout(plan.frames, *size, plan.audio, config.MAX_TEXT_TOKENS)
        rows = max(one.config.mlp_widths(layer)[0] for layer in range(one.config.num_layers))
        working = estimate.denoising_bytes(layout.tokens, rows, is_compiled, ranks)
        stages.append(
            Stage(
                name,
                (part,),
                working,
                forwards=one.variant.steps * (1 if one.variant.guidance is None else 2),
                forward_s=forward_s(one, layout, clips.speeds) / ranks,
                graph_bytes=working if is_compiled else 0,
            )
        )
    is_rewritten = is_compiled and clips.vae != "plain"
    window = estimate.decoding_bytes(width, height, is_rewritten, ranks, clips.bands)
    decoders = tuple(name for name in (VIDEO, AUDIO) if name in held)
    # A graph is of several windows where they are small; without one they come one at a time.
    together = batch_of(*sizes[-1]) if ranks == 1 else 1
    kept = together * window if is_rewritten and clips.bands == 1 else 0
    frames = Stage(DECODE, decoders, window + sound, graph_bytes=kept, spares_graphs=True)
    return [*stages, frames]


def forward_s(spec: TransformerSpec, layout: Layout, speeds: Speeds = H100) -> float:
    """Seconds of a forward, roughly: what copies can hide behind."""
    arch, tokens = spec.config, layout.tokens
    linears = attention = 0.0
    for layer in range(arch.num_layers):
        up, down = arch.mlp_widths(layer)
        weights = arch.hidden_size * (arch.qkv_rows + arch.hidden_size + up + down)
        linears += 2.0 * tokens * weights
        seen = tokens
        if layer in arch.local_attention_layers:
            seen = min(tokens, (2 * arch.frame_reach + 1) * layout.frame_tokens)
        attention += 4.0 * tokens * seen * arch.hidden_size
    rate = speeds.linear_flops or spec.precision.flops
    return linears / rate + attention / speeds.attention_flops


@dataclass
class Placer:
    """Brings parts to where a plan has them, as they are read."""

    plan: MemoryPlan | None
    device: torch.device
    residency: Residency = field(default_factory=Residency)

    @property
    def replays(self) -> bool:
        """Whether graphs are captured, over weights that stay."""
        return self.plan is None or self.plan.replays

    @property
    def replays_text(self) -> bool:
        """Whether graphs of the text encoder are among those captured."""
        spares = self.plan is not None and "text" in self.plan.spared
        return self.replays and not spares and not self.moves(TEXT)

    @property
    def replays_frames(self) -> bool:
        """Whether graphs of the video decoder are among those captured."""
        spares = self.plan is not None and DECODE in self.plan.spared
        return self.replays and not spares and self.bands == 1

    @property
    def bands(self) -> int:
        """In how many bands each window of frames is decoded."""
        return 1 if self.plan is None else self.plan.bands

    def moves(self, name: str) -> bool:
        """Whether the part rests in host memory."""
        return self.plan is not None and name in self.plan.streamed

    def rest(self, name: str) -> torch.device:
        """The device that the part is read to."""
        return CPU if self.moves(name) else self.device

    def before_layer(self, name: str) -> Callable[[int], None] | None:
        """What a part that moves and has been placed calls before each layer; None for others."""
        return self.residency[name].before_layer if self.moves(name) else None

    def place(
        self,
        name: str,
        model: nn.Module,
        layers: Sequence[nn.Module] = (),
        runs: Any = None,
        loading: Iterable[nn.Module] | None = None,
    ) -> None:
        """Let a part that moves rest in pinned memory, and come for its layers.

        runs: the module that runs the layers. loading: the layers, where they get their weights
        when they are asked for.
        """
        if not self.moves(name):
            return
        assert self.plan is not None
        part = Offloaded(model, loading or layers, self.device, self.plan.streamed[name])
        if layers:
            call_before_layers(runs, layers, part.before_layer)
        self.residency.add(name, part)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what was made there before it came to rest
