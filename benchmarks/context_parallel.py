"""Several GPUs against one, in one run: a forward, what its exchanges take, and whole requests.

    python benchmarks/context_parallel.py [--folder RESULTS] [--ranks 2 4]
        [--precision fp8-attn fp8 bf16] [--sizes 256p 540p 1080p] [--requests 256p 1080p] [--loads]
        [--add] [--tiny]

Random weights at full size, 5 s, 300 text tokens: a step at 480x256 (N = 4,266), one of
super-resolution at 896x512 (N = 14,762), and one at 1920x1088 (N = 65,706), whose layers attend
frame-locally. Milliseconds are of rank 0 for one of a few forwards in a row, as the loops call
them, to velocities on its GPU: calls, inputs and the gathering included. --requests adds whole
requests, from prompt to frames, in the first of the precisions, and --loads the seconds of `load`
for each of them in new processes.

The most GPUs and the first precision come first, and the JSON is written anew with every result,
so a run that is cut short has what matters most. With --add, what the folder has of the same GPUs
and day stays, and is not measured again. Without GPUs, with --tiny, the processes are on the CPU
and exchange through gloo. Kernels that exchange also wait for the other GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import super_resolution
import torch
from torch import Tensor

from harness import environment, shared_requests, sizes
from harness.measure import (
    Timed,
    by_kernel,
    compiled_forward,
    error,
    example,
    kernels_ms,
    release,
    rounds,
    synchronize,
)
from magihuman.graphs import quantization as fp8
from magihuman.graphs.transformer import (
    CompiledForward,
    CompileOptions,
    Context,
    compile_forward,
)
from magihuman.kernels.reference import LocalAttention, Sharding
from magihuman.runtime import config
from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.parallel.context_parallel import ContextParallel, Transformer
from magihuman.runtime.parallel.team import Team
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import random_weights
from magihuman.runtime.weights.precision import PrecisionPolicy

NAME = "context_parallel"  # of the results
PRECISIONS = ("fp8-attn", "fp8", "bf16")
SIZES = ("256p", *config.SR_SIZES)
CALLS, ROUNDS = 3, 3  # forwards in a row, and how often they are timed
WARM_S = 0.5  # before each timing, on the GPUs that it is of
LONG_S = 1.0  # a forward that takes so much is timed alone
# In the names of kernels; the first that is in one counts.
EXCHANGE = ("nccl", "_pack_heads", "_unpack_heads", "exchange")
LINK_BYTES = 2**28
LONG = ("kernels_ms", "compile")  # figures that are written only


@dataclass(frozen=True)
class Case:
    """A forward to measure.

    Attributes:
        precision: of its model.
        size: of its clip, by name.
    """

    precision: str
    size: str

    @property
    def is_local(self) -> bool:
        """Whether it has layers that attend frame-locally."""
        return self.size == "1080p"

    @property
    def model(self) -> str:
        """The name that its model has in a team."""
        return f"{self.precision}{' local' if self.is_local else ''}"

    def layout(self, size: sizes.Size) -> tokens.Layout:
        """Of its sequence."""
        return super_resolution.sr_layout(size, self.size)


def layers(cases: Sequence[Case]) -> list[Case]:
    """One case for each model that these cases have."""
    return list({case.model: case for case in cases}.values())


@dataclass
class Weights:
    """Random weights of a process, the same in every one; once for all precisions in fp8."""

    size: sizes.Size
    device: torch.device
    made: dict[bool, DiT] = field(default_factory=dict)

    def of(self, case: Case) -> DiT:
        """The model of a case, made now if need be."""
        is_narrow = PrecisionPolicy(case.precision).is_fp8
        if is_narrow not in self.made:
            model = random_weights.dit(self.size.arch, 0, self.device, torch.bfloat16, "distill")
            if is_narrow:
                fp8.quantize_model(model, fp8.quantized_linears(model.config))
                release()
            self.made[is_narrow] = model
        model = self.made[is_narrow]
        return super_resolution.with_local_layers(model) if case.is_local else model


def compiled(model: DiT, precision: str, team: Team | None = None) -> CompiledForward:
    """For the rows of this process, or for all."""
    return compiled_forward(
        model,
        fp8_attention=PrecisionPolicy(precision).is_fp8_attention,
        rank=team.rank if team else 0,
        ranks=team.ranks if team else 1,
    )


def rewrite(team: Team, size: sizes.Size, cases: Sequence[Case], models: dict[str, DiT]) -> None:
    """Leave the rewritten graphs of all cases in the cache of all processes: those for several
    GPUs, and those for one. Each takes one core 20 s, so every process has its share of them.
    """
    jobs = [(case, shared) for case in layers(cases) for shared in (True, False)]
    for case, is_shared in jobs[team.rank :: team.ranks]:
        layout, model = case.layout(size), models[case.model]
        sharding = Sharding.of(layout.counts, team.ranks) if is_shared else None
        local = LocalAttention(layout.frames, layout.frame_tokens, model.config.frame_reach)
        context = Context(
            model.config,
            layout.counts if sharding is None else sharding.own_counts(0),
            torch.bfloat16,
            team.device,
            local if case.is_local else None,
            sharding,
        )
        options = CompileOptions(
            attention_backend="gluon",  # any: nothing is measured for this
            linear_route="library",
            fp8_attention=PrecisionPolicy(case.precision).is_fp8_attention,
        )
        compile_forward(model, context, options)


def join(
    team: Team, weights: Weights, cases: Sequence[Case]
) -> tuple[ContextParallel, dict[str, Transformer]]:
    """What this process computes of a forward of each model."""
    named = {case.model: case for case in layers(cases)}
    models = team.agree(lambda: {name: weights.of(case) for name, case in named.items()})
    own = {
        name: Transformer(model, compiled(model, named[name].precision, team))
        for name, model in models.items()
    }
    team.agree(lambda: rewrite(team, weights.size, cases, models))

    def give_up() -> None:
        for transformer in own.values():
            assert transformer.compiled is not None
            transformer.compiled.release()

    return ContextParallel(team, own, release=give_up), own


def follow(team: Team, payload: tuple[bool, Sequence[tuple[str, str]]]) -> None:
    """All that the other processes do. payload: whether it is tiny, and the fields of the cases."""
    is_tiny, given = payload
    cases = [Case(*fields) for fields in given]
    shared, _ = join(team, Weights(sizes.of(is_tiny), team.device), cases)
    shared.follow()
    shared.close()


def link_gb_per_s(first: torch.device, second: torch.device) -> float:
    """Of a copy from the first GPU to the second."""
    source = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=first)
    target = torch.empty_like(source, device=second)
    timed = Timed(lambda: target.copy_(source), first)
    for _ in range(rounds(ROUNDS) + 1):
        timed()
    return LINK_BYTES / min(timed.times_ms) / 1e6


def heated_ms(run: Callable[[], object], device: torch.device) -> list[float]:
    """Device milliseconds of a call, several times, once the card is as warm as it makes it."""
    start = time.perf_counter()
    run()
    synchronize()
    calls = 1 if time.perf_counter() - start > LONG_S else rounds(CALLS)

    def several() -> None:
        for _ in range(calls):
            run()

    timed = Timed(several, device)
    end = start + WARM_S
    while device.type == "cuda" and time.perf_counter() < end:
        run()
        torch.cuda.synchronize()
    for _ in range(rounds(ROUNDS)):
        timed()
    return [ms / calls for ms in timed.times_ms]


def exchanges(run: Callable[[], object]) -> dict[str, Any]:
    """What the kernels of rank 0 take, and which share of it those that exchange."""
    kernels = kernels_ms(run)
    parts = dict.fromkeys(EXCHANGE, 0.0)
    for kernel, ms in kernels:
        part = next((part for part in EXCHANGE if part in kernel.lower()), None)
        if part is not None:
            parts[part] += ms
    share = sum(parts.values()) / sum(ms for _, ms in kernels)
    return {"exchange_ms": parts, "exchange_share": share, "kernels_ms": by_kernel(kernels)}


class Results:
    """Figures, printed and written as they come."""

    def __init__(self, folder: Path, keeps: bool) -> None:
        """keeps: whether to go on from what the folder has of the same GPUs."""
        self.figures: dict[str, Any] = {}
        self._folder, self._start = folder, time.perf_counter()
        path = folder / f"{NAME}.json"
        if keeps and path.exists():
            before = json.loads(path.read_text())
            facts = before.pop("environment")
            now = environment.environment()
            if all(facts.get(name) == now.get(name) for name in ("gpu", "date", "torch")):
                self.figures = before

    def has(self, *path: str) -> bool:
        """Whether there is a figure of milliseconds or seconds under these names."""
        place: Any = self.figures
        for name in path:
            place = place.get(name, {})
        return "ms" in place or "prompt_to_frames_s" in place

    def add(self, *path: str, **values: Any) -> None:
        """Under these names."""
        place = self.figures
        for name in path:
            place = place.setdefault(name, {})
        place.update(values)
        elapsed_s = time.perf_counter() - self._start
        shown = {name: value for name, value in values.items() if name not in LONG}
        print(f"{elapsed_s:.0f} s", *path, json.dumps(shown), flush=True)
        environment.write(NAME, self.figures, self._folder)


@dataclass
class Bench:
    """Forwards on one GPU, which are measured once, and on several."""

    weights: Weights
    results: Results
    made: dict[Case, Sequence[Tensor]] = field(default_factory=dict)  # by one GPU

    def measure(self, case: Case, together: ContextParallel, own: Transformer) -> None:
        """A case on all GPUs of a team and, where it has not been, on one."""
        place = ("forwards", case.size, case.precision)
        run = self.velocity(case, own.model, together.forward(case.model))
        ranks = str(together.team.ranks)
        ours = self.timed(run, *place, ranks)
        self.results.add(*place, ranks, **exchanges(run))
        if case not in self.made:
            alone = compiled(own.model, case.precision)
            self.made[case] = self.timed(self.velocity(case, own.model, alone), *place, "1")
            self.results.add(*place, "1", compile=reports(alone))
            alone.release()
        both = self.results.figures["forwards"][case.size][case.precision]
        self.results.add(
            *place,
            ranks,
            ratio=both["1"]["ms"] / both[ranks]["ms"],
            error=[error(a, b) for a, b in zip(ours, self.made[case], strict=True)],
            compile=reports(own.compiled),
        )
        together.release()
        release()

    def velocity(
        self, case: Case, model: DiT, forward: denoise.Forward
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """A step of a forward, over the same inputs every time."""
        layout = case.layout(self.weights.size)
        torch.manual_seed(layout.tokens)
        video, sound, text = example(layout, model.config.text_channels, self.weights.device)
        style: config.CoordinateStyle = "v2" if case.size == "256p" else "v1"
        return partial(denoise.velocity_of(model, layout, text, style, forward), video, sound)

    def timed(self, run: Callable[[], Sequence[Tensor]], *place: str) -> Sequence[Tensor]:
        """What it makes; its seconds go to this place of the results."""
        start = time.perf_counter()
        made = run()
        synchronize()
        first_s, times = time.perf_counter() - start, heated_ms(run, self.weights.device)
        self.results.add(*place, first_s=first_s, ms=statistics.median(times), all_ms=times)
        return made


def reports(forward: Any) -> dict[str, Any]:
    """What compiling did, by size."""
    return {str(size.modality_rows): dataclasses.asdict(r) for size, r in forward.reports().items()}


def measure_forwards(bench: Bench, ranks: int, cases: Sequence[Case], is_tiny: bool) -> None:
    """All cases on so many GPUs."""
    device = bench.weights.device
    devices = [device] * ranks
    if device.type == "cuda":
        devices = [torch.device("cuda", rank) for rank in range(ranks)]
    payload = is_tiny, [dataclasses.astuple(case) for case in cases]
    team = Team.start(devices, "context_parallel:follow", payload)
    with torch.inference_mode():
        together, own = join(team, bench.weights, cases)
        try:
            for case in cases:
                bench.measure(case, together, own[case.model])
        finally:
            together.close()


def machine(results: Results, ranks: int) -> None:
    """What GPUs there are, and what is between the first two."""
    facts: dict[str, Any] = {"gpus": [], "peer_access": False, "nccl": []}
    first = second = torch.device("cpu")
    if torch.cuda.is_available():
        first, second = (torch.device("cuda", rank) for rank in range(2))
        facts = {
            "gpus": [torch.cuda.get_device_name(rank) for rank in range(ranks)],
            "peer_access": torch.cuda.can_device_access_peer(0, 1),
            "nccl": list(torch.cuda.nccl.version()),
        }
    results.add(**facts, link_gb_per_s=link_gb_per_s(first, second))


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2], help="GPUs, 1 aside")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES, help="of forwards")
    parser.add_argument("--requests", nargs="*", choices=SIZES, default=(), help="whole ones")
    parser.add_argument("--loads", action="store_true", help="for requests, in new processes")
    parser.add_argument("--add", action="store_true", help="go on from what the folder has")
    arguments = environment.arguments(parser)
    every = sorted(arguments.ranks, reverse=True)
    there = torch.cuda.device_count()
    if torch.cuda.is_available() and every[0] > there:
        parser.error(f"--ranks must be at most the GPUs of this machine, {there}, got {every[0]}")
    size = sizes.of(arguments.tiny)
    results = Results(arguments.folder, arguments.add)
    machine(results, every[0])
    chosen = sorted(arguments.precision, key=PRECISIONS.index)
    cases = [Case(precision, clip) for precision in chosen for clip in arguments.sizes]
    bench = Bench(Weights(size, size.device), results)
    for ranks in every:
        left = [c for c in cases if not results.has("forwards", c.size, c.precision, str(ranks))]
        if left:
            measure_forwards(bench, ranks, left, arguments.tiny)
    del bench
    release()
    with tempfile.TemporaryDirectory() as scratch:
        source = sizes.source(size, Path(scratch))
        for clip in arguments.requests:
            for ranks in (*every, 1):
                if results.has("requests", clip, str(ranks)):
                    continue
                found = shared_requests.measure(size, source, chosen[0], clip, ranks)
                results.add("requests", clip, str(ranks), precision=chosen[0], **found)
            for ranks in (*every, 1) if arguments.loads else ():
                seconds = shared_requests.fresh_load_s(source, chosen[0], clip, ranks)
                results.add("requests", clip, str(ranks), fresh_load_s=seconds)


if __name__ == "__main__":
    main()
