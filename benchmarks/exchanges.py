"""Exchanges of rows for heads and back between GPUs: by stores to their memory, and through NCCL.

    python benchmarks/exchanges.py [--folder RESULTS] [--ranks N ...] [--tiny]

Rows of a process as at 480x256, 896x512 and 1920x1088, 40 and 8 heads of 128. Microseconds of rank
0 for one exchange, of several captured in one graph, both ways in turns in one run. In bf16 it is
the exchange alone, and what both ways give is compared bit for bit. Of those with attention over
e4m3, `narrowed` has the norms, rotation and rounding of q, k and v in it, `attended` attention, and
`attended, kept here` is attention that writes to this GPU alone and tells nobody. Without GPUs,
with --tiny, gloo alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from harness import environment
from harness.measure import error, rounds
from magihuman.kernels.parallel import exchange
from magihuman.runtime.parallel.team import CLOSE, Team

HEADS, KV_HEADS, DIM = 40, 8, 128
TOKENS = {"256p": 4286, "540p": 14_784, "1080p": 65_728}
TINY_TOKENS = {"256p": 64}
LAYERS, ROUNDS = 20, 7  # exchanges in a graph, and how often it is timed
KEPT = "attended, kept here"

Exchanged = Callable[[], Tensor]


def exchanges(team: Team, rows: int) -> dict[str, tuple[Exchanged, int]]:
    """All kinds, over random values of this process, and the bytes that each sends by stores."""
    ranks, device = team.ranks, team.device
    generator = torch.Generator(device).manual_seed(team.rank)
    columns, width = (HEADS + 2 * KV_HEADS) * DIM + HEADS, HEADS * DIM
    total = rows * ranks

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device)
        return x.to(dtype)

    qkv, out = randn(rows, columns), randn(total, width // ranks)
    team.reserve(*exchange.room_bytes(rows, columns, width, ranks, qkv.element_size()))
    norms, rope = randn(2, DIM, dtype=torch.float32), randn(total, 96, dtype=torch.float32)
    length = torch.tensor(total, dtype=torch.int32, device=device)

    def narrowed() -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = exchange.rows_to_heads_fp8(
            qkv, norms[0], norms[1], rope, length, [], HEADS, KV_HEADS, ranks
        )
        return made

    parts = [part.clone() for part in narrowed()]
    exchange.heads_to_rows(out, ranks)  # now all have theirs, and the room may be written to again
    narrow = (HEADS + KV_HEADS) * DIM + 2 * KV_HEADS * DIM + 2 * HEADS
    kinds: dict[str, tuple[Exchanged, int]] = {  # and the bytes of a row
        "rows_to_heads": (
            lambda: exchange.rows_to_heads(qkv, HEADS, KV_HEADS, ranks),
            2 * columns,
        ),
        "heads_to_rows": (lambda: exchange.heads_to_rows(out, ranks), 2 * width),
        "narrowed": (lambda: narrowed()[2], narrow),
        "attended": (
            lambda: exchange.gated_attention_fp8_to_rows(*parts, length, [], ranks, "gluon"),
            2 * width,
        ),
    }
    others = ranks - 1
    return {name: (run, rows * size * others // ranks) for name, (run, size) in kinds.items()}


def replayed(run: Exchanged, device: torch.device, is_kept: bool = False) -> Callable[[], object]:
    """So many of them at once. is_kept: nothing leaves this process."""
    if device.type == "cpu":
        return lambda: [run() for _ in range(LAYERS)]
    with exchange.apart():
        run()  # compiles
    graph = torch.cuda.CUDAGraph()
    kept = exchange.apart() if is_kept else nullcontext()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), kept:
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
        for kind, (run, sent) in exchanges(team, rows).items():
            made, times = {}, {}
            for way in ways:
                exchange.connect(peers if way == "stores" else None)
                made[way] = run().clone()
                again = replayed(run, team.device)
                times[way] = timed_us(again, team.device)
            exchange.connect(peers)
            first = made[ways[0]].float()
            figures = {"bytes_sent": sent} | {
                f"{way}_us": statistics.median(times[way]) for way in ways
            }
            figures["error"] = max(error(other.float(), first) for other in made.values())
            found.setdefault(clip, {"rows": rows})[kind] = figures
            if kind == "attended" and peers is not None:
                again = replayed(run, team.device, is_kept=True)
                found[clip][KEPT] = {"stores_us": statistics.median(timed_us(again, team.device))}
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
