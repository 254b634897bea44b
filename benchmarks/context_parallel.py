"""One forward on two GPUs against one, in one run: seconds, error, and what exchanges take.

    python benchmarks/context_parallel.py [--folder RESULTS] [--precision bf16 fp8 fp8-attn]

Random weights at full size, 5 s, 300 text tokens: 480x256 (N = 4,266), and a step of
super-resolution at 896x512 (N = 14,762). Milliseconds are of rank 0, from a call to velocities on
its GPU: calls, inputs and the gathering included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import environment
from magihuman.graphs import precision as fp8
from magihuman.graphs.replay import CompiledForward
from magihuman.runtime import config, denoise, random_weights, tokens
from magihuman.runtime.context_parallel import Shared, Transformer
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.team import Team
from magihuman.runtime.transformer import FP8_ATTENTION
from measure import LAYOUT, Timed, by_kernel, error, example, kernels_ms, release

RANKS = 2
LAYOUTS = {
    "480x256": LAYOUT,
    "896x512": tokens.Layout(frames=32, rows=32, columns=56, audio=126, text=300),
}
ROUNDS = 5
WARM_S = 0.5  # before each timing, on the GPUs that it is of
EXCHANGE = ("nccl", "_pack_heads", "_unpack_heads")
LINK_BYTES = 2**28


def build(precision: str, device: torch.device) -> DiT:
    """Full-size weights, the same in every process."""
    model = random_weights.dit(config.DiTConfig(), 0, device, torch.bfloat16, "distill")
    if precision != "bf16":
        fp8.quantize_model(model, fp8.quantized_linears(model.config))
    return model


def compiled(model: DiT, precision: str, team: Team | None = None) -> CompiledForward:
    """For the rows of this process, or for all."""
    return CompiledForward(
        model,
        model.config,
        torch.bfloat16,
        next(model.parameters()).device,
        fp8_attention=precision == FP8_ATTENTION,
        rank=team.rank if team else 0,
        ranks=team.ranks if team else 1,
    )


def shared(team: Team, model: DiT, precision: str) -> Shared:
    """What this process computes of a forward."""
    forward = compiled(model, precision, team)
    return Shared(team, {"dit": Transformer(model, forward)}, release=forward.release)


def follow(team: Team, precision: str) -> None:
    """The second process."""
    own = shared(team, build(precision, team.device), precision)
    own.follow()
    own.close()


def link_gb_per_s() -> float:
    """Of a copy from the first GPU to the second."""
    source = torch.zeros(LINK_BYTES, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    timed = Timed(lambda: target.copy_(source), torch.device("cuda"))
    for _ in range(ROUNDS):
        timed()
    return LINK_BYTES / min(timed.times_ms) / 1e6


def heated_ms(run: Callable[[], object]) -> float:
    """Device milliseconds of a call once the card is as warm as it makes it."""
    timed = Timed(run, torch.device("cuda"))
    end = time.perf_counter() + WARM_S
    while time.perf_counter() < end:
        timed()
    timed.times_ms.clear()
    for _ in range(ROUNDS):
        timed()
    return statistics.median(timed.times_ms)


def measure(precision: str) -> dict[str, Any]:
    """Every size on one GPU and on two."""
    devices = [torch.device("cuda", rank) for rank in range(RANKS)]
    start = time.perf_counter()
    team = Team.start(devices, "context_parallel:follow", precision)
    model = build(precision, devices[0])
    together = shared(team, model, precision)
    alone = compiled(model, precision)
    figures: dict[str, Any] = {}
    try:
        for name, layout in LAYOUTS.items():
            video, sound, text = example(layout, model.config.text_channels, devices[0])
            runs: dict[str, Callable[[], Any]] = {}
            for gpus, forward in (("1 GPU", alone), ("2 GPUs", together.forward("dit"))):
                velocity = denoise.velocity_of(model, layout, text, "v2", forward)
                runs[gpus] = partial(velocity, video, sound)
            made = {gpus: run() for gpus, run in runs.items()}
            torch.cuda.synchronize()
            print(
                precision, name, f"compiled after {time.perf_counter() - start:.0f} s", flush=True
            )
            times = {gpus: [heated_ms(run) for _ in range(2)] for gpus, run in runs.items()}
            kernels = kernels_ms(runs["2 GPUs"])
            exchange = {
                part: sum(ms for kernel, ms in kernels if part in kernel.lower())
                for part in EXCHANGE
            }
            best = {gpus: min(pair) for gpus, pair in times.items()}
            figures[name] = {
                "tokens": layout.tokens,
                "ms": best,
                "ms_twice": times,
                "ratio": best["1 GPU"] / best["2 GPUs"],
                "error": [error(a, b) for a, b in zip(made["2 GPUs"], made["1 GPU"], strict=True)],
                "exchange_ms": exchange,
                "exchange_share": sum(exchange.values()) / sum(ms for _, ms in kernels),
                "kernels_ms": by_kernel(kernels),
            }
            print(precision, name, json.dumps(figures[name]), flush=True)
        figures["compile"] = {
            str(size): dataclasses.asdict(report) for size, report in alone.reports().items()
        }
    finally:
        alone.release()
        together.close()
    return figures


def main() -> None:
    """Measure and write one JSON, anew after each precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=environment.RESULTS)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp8"])
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "gpus": [torch.cuda.get_device_name(rank) for rank in range(RANKS)],
        "link_gb_per_s": link_gb_per_s(),
        "peer_access": torch.cuda.can_device_access_peer(0, 1),
        "nccl": list(torch.cuda.nccl.version()),
    }
    print(json.dumps(figures), flush=True)
    for precision in arguments.precision:
        with torch.inference_mode():
            figures[precision] = measure(precision)
        release()
        print(environment.write("context_parallel", figures, arguments.folder), flush=True)


if __name__ == "__main__":
    main()
