"""One forward on two GPUs against one, in one run: seconds, error, and what exchanges take.

    python benchmarks/context_parallel.py [--folder RESULTS] [--precision bf16 fp8 fp8-attn]
        [--tiny]

Random weights at full size, 5 s, 300 text tokens: 480x256 (N = 4,266), and a step of
super-resolution at 896x512 (N = 14,762). Milliseconds are of rank 0 for one of a few forwards in a
row, as the loops call them, to velocities on its GPU: calls, inputs and the gathering included.
Without GPUs, with --tiny, the processes are on the CPU and exchange through gloo.
Kernels that exchange also wait for the other GPU. The JSON is written anew with every result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness import environment, sizes
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
from magihuman.kernels.reference import Sharding
from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.parallel.context_parallel import ContextParallel, Transformer
from magihuman.runtime.parallel.team import Team
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import random_weights
from magihuman.runtime.weights.precision import PrecisionPolicy

RANKS = 2
CALLS, ROUNDS = 3, 3  # forwards in a row, and how often they are timed
WARM_S = 0.5  # before each timing, on the GPUs that it is of
EXCHANGE = ("nccl", "_pack_heads", "_unpack_heads")
LINK_BYTES = 2**28
LONG = ("kernels_ms", "compile")  # figures that are written only


def layouts(size: sizes.Size) -> dict[str, tokens.Layout]:
    """Of both sequences, by the clip's size in pixels."""
    found = {}
    for width, height in (size.pixels["256p"], size.pixels["540p"]):
        layout = dataclasses.replace(size.layout, rows=height // 16, columns=width // 16)
        found[f"{width}x{height}"] = layout
    return found


def build(team: Team, size: sizes.Size, precisions: Sequence[str]) -> dict[str, DiT]:
    """Random weights, the same in every process; once for all precisions in fp8."""
    made: dict[bool, DiT] = {}
    for is_narrow in sorted({PrecisionPolicy(precision).is_fp8 for precision in precisions}):
        model = random_weights.dit(size.arch, 0, team.device, torch.bfloat16, "distill")
        if is_narrow:
            fp8.quantize_model(model, fp8.quantized_linears(model.config))
            release()
        made[is_narrow] = model
    return {precision: made[PrecisionPolicy(precision).is_fp8] for precision in precisions}


def compiled(model: DiT, precision: str, team: Team | None = None) -> CompiledForward:
    """For the rows of this process, or for all."""
    return compiled_forward(
        model,
        fp8_attention=PrecisionPolicy(precision).is_fp8_attention,
        rank=team.rank if team else 0,
        ranks=team.ranks if team else 1,
    )


def rewrite(team: Team, size: sizes.Size, model: DiT, precision: str) -> None:
    """Leave a rewritten graph in the cache of all processes: that for two GPUs from rank 0, and
    meanwhile that for one from rank 1. Each takes one core 20 s.
    """
    sharding = Sharding.of(size.layout.counts, RANKS)
    rows = size.layout.counts if team.rank else sharding.own_counts(0)
    context = Context(
        model.config,
        rows,
        torch.bfloat16,
        team.device,
        sharding=None if team.rank else sharding,
    )
    options = CompileOptions(
        attention_backend="gluon",  # any, of all that is left open: nothing is measured for this
        linear_route="library",
        fp8_attention=PrecisionPolicy(precision).is_fp8_attention,
    )
    compile_forward(model, context, options)


def join(
    team: Team, size: sizes.Size, precisions: Sequence[str]
) -> tuple[ContextParallel, dict[str, Transformer]]:
    """What this process computes of a forward in each precision."""
    models = team.agree(partial(build, team, size, precisions))
    own = {name: Transformer(m, compiled(m, name, team)) for name, m in models.items()}
    team.agree(lambda: [rewrite(team, size, model, name) for name, model in models.items()])

    def give_up() -> None:
        for transformer in own.values():
            assert transformer.compiled is not None
            transformer.compiled.release()

    return ContextParallel(team, own, release=give_up), own


def follow(team: Team, payload: tuple[bool, Sequence[str]]) -> None:
    """The second process. payload: whether it is tiny, and the precisions."""
    is_tiny, precisions = payload
    shared, _ = join(team, sizes.of(is_tiny), precisions)
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
    calls = rounds(CALLS)

    def several() -> None:
        for _ in range(calls):
            run()

    timed = Timed(several, device)
    end = time.perf_counter() + WARM_S
    while device.type == "cuda" and time.perf_counter() < end:
        run()
        torch.cuda.synchronize()
    for _ in range(rounds(ROUNDS)):
        timed()
    return [ms / calls for ms in timed.times_ms]


def exchanges(run: Callable[[], object]) -> dict[str, Any]:
    """What the kernels of rank 0 take, and which share of it those that exchange."""
    kernels = kernels_ms(run)
    parts = {part: sum(ms for kernel, ms in kernels if part in kernel.lower()) for part in EXCHANGE}
    share = sum(parts.values()) / sum(ms for _, ms in kernels)
    return {"exchange_ms": parts, "exchange_share": share, "kernels_ms": by_kernel(kernels)}


def reports(forward: CompiledForward) -> dict[str, Any]:
    """What compiling did, by size."""
    return {str(size.modality_rows): dataclasses.asdict(r) for size, r in forward.reports().items()}


class Results:
    """Figures, printed and written as they come."""

    def __init__(self, folder: Path) -> None:
        self.figures: dict[str, Any] = {}
        self._folder, self._start = folder, time.perf_counter()

    def add(self, *path: str, **values: Any) -> None:
        """Under these names."""
        place = self.figures
        for name in path:
            place = place.setdefault(name, {})
        place.update(values)
        elapsed_s = time.perf_counter() - self._start
        shown = {name: value for name, value in values.items() if name not in LONG}
        print(f"{elapsed_s:.0f} s", *path, json.dumps(shown), flush=True)
        environment.write("context_parallel", self.figures, self._folder)


def measure(
    size: sizes.Size, precision: str, together: ContextParallel, own: Transformer, results: Results
) -> None:
    """Every size on two GPUs and on one."""
    model, device = own.model, next(own.model.parameters()).device
    assert own.compiled is not None
    alone = compiled(model, precision)
    for name, layout in layouts(size).items():
        video, sound, text = example(layout, model.config.text_channels, device)
        made, best = {}, {}
        for gpus, forward in (("2 GPUs", together.forward(precision)), ("1 GPU", alone)):
            velocity = denoise.velocity_of(model, layout, text, "v2", forward)
            run = partial(velocity, video, sound)
            start = time.perf_counter()
            made[gpus] = run()
            synchronize()
            first_s, times = time.perf_counter() - start, heated_ms(run, device)
            best[gpus] = statistics.median(times)
            results.add(precision, name, gpus, first_s=first_s, ms=best[gpus], all_ms=times)
            if gpus == "2 GPUs":
                results.add(precision, name, gpus, **exchanges(run))
        results.add(
            precision,
            name,
            tokens=layout.tokens,
            ratio=best["1 GPU"] / best["2 GPUs"],
            error=[error(a, b) for a, b in zip(made["2 GPUs"], made["1 GPU"], strict=True)],
        )
    seconds = {"2 GPUs": reports(own.compiled), "1 GPU": reports(alone)}
    results.add(precision, compile=seconds)
    alone.release()
    together.release()


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp8"])
    arguments = environment.arguments(parser)
    size = sizes.of(arguments.tiny)
    results = Results(arguments.folder)
    if size.device.type == "cuda":
        devices = [torch.device("cuda", rank) for rank in range(RANKS)]
        results.add(
            gpus=[torch.cuda.get_device_name(rank) for rank in range(RANKS)],
            link_gb_per_s=link_gb_per_s(*devices),
            peer_access=torch.cuda.can_device_access_peer(0, 1),
            nccl=list(torch.cuda.nccl.version()),
        )
    else:
        devices = [size.device] * RANKS
        results.add(gpus=[], link_gb_per_s=link_gb_per_s(*devices), peer_access=False, nccl=[])
    payload = (arguments.tiny, arguments.precision)
    team = Team.start(devices, "context_parallel:follow", payload)
    results.add(team=RANKS)
    with torch.inference_mode():
        together, own = join(team, size, arguments.precision)
        results.add(built=list(own))
        try:
            for precision, transformer in own.items():
                measure(size, precision, together, transformer, results)
        finally:
            together.close()


if __name__ == "__main__":
    main()
