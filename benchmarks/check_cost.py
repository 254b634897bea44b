"""What a whole request pays for looking for NaN in what its stages make.

    python benchmarks/check_cost.py [--folder RESULTS] [--precisions fp8-attn bf16] [--pairs N]
        [--tiny]

Random weights, 480x256, 5 s, 300 text tokens, warm, prompt to frames and sound in memory: without
an mp4, whose encoder's threads would be noise of more than what is looked for. Precisions that are
not named keep the figures that they have in the file.

The cost is found twice. Requests with the checks and without take turns, and the median difference
of neighbours has a standard error. Since that is of the size of the cost itself, the work is added
up too: the device's time in kernels and copies that the unchecked request does not run, by the
profiler, and the host's in the calls that launch and read them. Most of it runs beside other work,
so that their sum is a bound. Left out of the unchecked request is all but three copies of a number
for each group of windows.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx

from harness import environment, sizes
from harness.measure import compiled_decoder, kernels_ms, release, rounds, synchronize
from magihuman import runtime
from magihuman.graphs.cuda_graphs import Captures
from magihuman.graphs.decoder import replay
from magihuman.kernels.decoder import ops as decoder_ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.runtime.pipeline import audio, decode, finite

JOIN_PIXELS = torch.ops.magihuman.join_pixels.default
PAIRS = 15
BUDGET_BYTES = 8 * 2**30  # of graphs; those of 480x256 take 3 GiB
PRECISIONS = ("fp8-attn", "bf16")
NORMAL = 1.2533  # standard error of a median over that of a mean, sqrt(pi / 2)
Kernels = list[tuple[str, float]]  # name and milliseconds of each


class Switch:
    """An engine's checks, off inside `off`.

    The decoder of frames has the check in the graphs that it captures, so there is a second one
    that captures them without.
    """

    def __init__(self, engine: Any) -> None:
        parts = engine._parts
        checked = parts.decoder
        if checked is None:  # on the CPU, where no engine has one: to run the same code
            checked = compiled_decoder(parts.turbo_vae)
        unchecked = copy.copy(checked)  # of the same rewritten graphs, with captures of its own
        unchecked._captures = Captures(engine.device, BUDGET_BYTES, parts.encoding)
        unchecked._uncaptured = {}
        self._engine = engine
        self._zero = torch.zeros(
            (), device=engine.device
        )  # graphs read it for as long as they live
        self._unchecked = replace(parts, decoder=unchecked)
        engine._parts = replace(parts, decoder=checked)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Requests in here look for nothing."""
        with ExitStack() as stack:
            patch = mock.patch.object
            stack.enter_context(patch(finite.Finite, "watch", lambda *_: None))
            stack.enter_context(patch(audio, "largest", lambda _: 0.0))
            stack.enter_context(patch(replay, "with_magnitude", self._without_magnitude))
            stack.enter_context(patch(self._engine, "_parts", self._unchecked))
            yield

    def _without_magnitude(self, module: fx.GraphModule) -> fx.GraphModule:
        """In place of `with_magnitude`: the second result is a zero that costs nothing."""
        module.register_buffer("zero", self._zero)
        (pixels,) = module.graph.find_nodes(op="call_function", target=JOIN_PIXELS)
        (result,) = module.graph.find_nodes(op="output")
        with module.graph.inserting_before(result):
            result.args = ((pixels, module.graph.get_attr("zero")),)
        module.recompile()
        return module


class HostTime:
    """Milliseconds that the host spends in the checks' calls, as a request goes."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count in here."""
        with ExitStack() as stack:
            for owner, name in (
                (finite.Finite, "watch"),
                (finite.Finite, "read"),
                (finite.Magnitudes, "check"),
                (audio, "largest"),
                (decode, "check"),
            ):
                timed = self._timed(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.ms.append(1e3 * (time.perf_counter() - start))

        return run


def only_in_first(checked: Kernels, unchecked: Kernels) -> dict[str, tuple[int, float]]:
    """Calls and milliseconds, by name, of what one request runs and the other does not.

    Where both run a kernel, and one of them more often, the shortest are counted: its are of
    numbers, the others of latents and frames.
    """
    calls: tuple[dict[str, list[float]], ...] = (defaultdict(list), defaultdict(list))
    for request, kernels in zip(calls, (checked, unchecked), strict=True):
        for name, milliseconds in kernels:
            request[name].append(milliseconds)
    found = {}
    for name, times in calls[0].items():
        extra = len(times) - len(calls[1].get(name, ()))
        if extra > 0:
            found[name[:200]] = (extra, sum(sorted(times)[:extra]))
    return found


def difference(with_s: list[float], without_s: list[float]) -> dict[str, float]:
    """Of neighbours, in milliseconds: the median and its standard error."""
    ms = [1e3 * (a - b) for a, b in zip(with_s, without_s, strict=True)]
    spread = statistics.stdev(ms) if len(ms) > 1 else 0.0
    return {
        "difference_ms": statistics.median(ms),
        "difference_error_ms": NORMAL * spread / math.sqrt(len(ms)),
    }


def measure(size: sizes.Size, precision: Any, pairs: int, folder: Path) -> dict[str, Any]:
    """One engine: requests in turns, one of each kind profiled, and one whose host is timed."""
    with runtime.load(sizes.source(size, folder), precision=precision) as engine:
        engine.warmup([(*size.pixels["256p"], size.seconds)], [size.layout.text])
        switch, options = Switch(engine), size.request | {"steps": size.steps}

        def request() -> float:
            start = time.perf_counter()
            engine.generate(size.prompt, seed=1, **options)
            return time.perf_counter() - start

        def both(order: int) -> tuple[float, float]:
            """Seconds with and without."""
            if order % 2:
                with switch.off():
                    without_s = request()
                return request(), without_s
            with_s = request()
            with switch.off():
                return with_s, request()

        both(0)
        times = [both(order) for order in range(pairs)]
        with_s, without_s = ([pair[index] for pair in times] for index in range(2))
        checked = kernels_ms(request)
        with switch.off():
            unchecked = kernels_ms(request)
        host = HostTime()
        with host.counted():
            request()
    kernels = only_in_first(checked, unchecked)
    request_ms = 1e3 * statistics.median(with_s)
    kernels_total, host_total = sum(ms for _, ms in kernels.values()), sum(host.ms)
    found = difference(with_s, without_s)
    return {
        "request_ms": request_ms,
        "request_unchecked_ms": 1e3 * statistics.median(without_s),
        **found,
        "difference_percent": 100 * found["difference_ms"] / request_ms,
        "kernels_ms": kernels_total,
        "kernels_percent": 100 * kernels_total / request_ms,
        "host_ms": host_total,
        "bound_percent": 100 * (kernels_total + host_total) / request_ms,
        "kernels": kernels,
        "with_s": with_s,
        "without_s": without_s,
    }


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    arguments = environment.arguments(parser)
    size = sizes.of(arguments.tiny)
    kept = arguments.folder / "check_cost.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    figures.pop("environment", None)
    figures["shape"] = {
        "width": size.pixels["256p"][0],
        "height": size.pixels["256p"][1],
        "clip_s": size.seconds,
        "text_tokens": size.layout.text,
        "sequence_tokens": size.layout.tokens,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for precision in arguments.precisions:
            start = time.perf_counter()
            found = measure(size, precision, rounds(arguments.pairs), Path(scratch))
            synchronize()
            release()
            figures[precision] = found
            shown = {key: value for key, value in found.items() if not key.endswith("_s")}
            print(precision, json.dumps(shown), f"{time.perf_counter() - start:.0f} s", flush=True)
            environment.write("check_cost", figures, arguments.folder)


if __name__ == "__main__":
    main()
