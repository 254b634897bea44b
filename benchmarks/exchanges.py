"""Exchanges of rows for heads and back between GPUs: by stores to their memory, and through NCCL.

    python benchmarks/exchanges.py [--folder RESULTS] [--ranks N ...] [--tiny]

Rows of a process as at 480x256, 896x512 and 1920x1088, 40 and 8 heads of 128, bf16. Microseconds of
rank 0 for one exchange, of several captured in one graph: both ways in turns in one run, and what
they give is compared bit for bit. Without GPUs, with --tiny, gloo alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness import environment
from harness.measure import rounds
from magihuman.kernels.parallel import exchange
from magihuman.runtime.parallel.team import CLOSE, Team

HEADS, KV_HEADS, DIM = 40, 8, 128
TOKENS = {"256p": 4286, "540p": 14_784, "1080p": 65_728}
TINY_TOKENS = {"256p": 64}
LAYERS, ROUNDS = 20, 7  # exchanges in a graph, and how often it is timed
GIVES = ("rows_to_heads", "heads_to_rows")

Exchanged = Callable[[], Tensor]


def exchanges(team: Team, rows: int) -> dict[str, Exchanged]:
    """Both kinds, over random values of this process."""
    ranks = team.ranks
    generator = torch.Generator(team.device).manual_seed(team.rank)
    columns = (HEADS + 2 * KV_HEADS) * DIM + HEADS

    def randn(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=team.device)
        return x.to(torch.bfloat16)

    qkv, out = randn(rows, columns), randn(rows * ranks, HEADS * DIM // ranks)
    team.reserve(*exchange.room_bytes(rows, columns, HEADS * DIM, ranks, qkv.element_size()))
    return {
        GIVES[0]: partial(exchange.rows_to_heads, qkv, HEADS, KV_HEADS, ranks),
        GIVES[1]: partial(exchange.heads_to_rows, out, ranks),
    }


def replayed(run: Exchanged, device: torch.device) -> Callable[[], object]:
    """So many of them at once."""
    if device.type == "cpu":
        return lambda: [run() for _ in range(LAYERS)]
    with exchange.apart():
        run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(LAYERS):
            run()
    return graph.replay


def timed_us(run: Callable[[], object], device: torch.device) -> list[float]:
    """Microseconds of each exchange in a run, which is as long as that of the slowest process."""
    times = []
    for _ in range(2 + rounds(ROUNDS)):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / LAYERS * 1e6)
    return times[2:]


@torch.inference_mode()
def measure(team: Team, tokens: dict[str, int]) -> dict[str, Any]:
    """What every process does alike."""
    found: dict[str, Any] = {}
    peers = team._peers
    ways = ("stores", "nccl") if peers is not None else (team.exchange,)
    for clip, total in tokens.items():
        rows = -(-total // team.ranks)
        for kind, run in exchanges(team, rows).items():
            made, times = {}, {}
            for way in ways:
                exchange.connect(peers if way == "stores" else None)
                made[way] = run().clone()
                again = replayed(run, team.device)
                times[way] = timed_us(again, team.device)
            exchange.connect(peers)
            first = made[ways[0]]
            found.setdefault(clip, {"rows": rows})[kind] = {
                "bytes_sent": first.nbytes * (team.ranks - 1) // team.ranks,
                "same_bits": all(torch.equal(first, other) for other in made.values()),
                **{f"{way}_us": statistics.median(times[way]) for way in ways},
            }
    return found


def follow(team: Team, tokens: dict[str, int]) -> None:
    """All that the other processes do."""
    measure(team, tokens)
    while team.listen()[0] != CLOSE:
        pass
    team.close()


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    arguments = environment.arguments(parser)
    tokens = TINY_TOKENS if arguments.tiny else TOKENS
    figures: dict[str, Any] = {}
    for ranks in arguments.ranks:
        devices = [torch.device("cuda", rank) for rank in range(ranks)]
        if not torch.cuda.is_available():
            devices = [torch.device("cpu")] * ranks
        team = Team.start(devices, "exchanges:follow", tokens)
        figures[str(ranks)] = {"exchange": team.exchange, **measure(team, tokens)}
        team.close()
        print(ranks, figures[str(ranks)], flush=True)
    print(environment.write("exchanges", figures, arguments.folder))


if __name__ == "__main__":
    main()
