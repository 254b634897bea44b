"""Whole clips of the full size in little GPU memory: what is held, and the seconds of each stage.

    python benchmarks/memory/memory_limit.py [--case NAME ...] [--sr-steps N] [--folder RESULTS]
        [--tiny]

Random weights, 5 s, prompt to frames. Each case has a process of its own, in which the engine has
PyTorch refused all memory beyond the limit, so that an overrun fails; loading is included. What is
held on the device is read every 20 ms, other processes' too; the driver's is what PyTorch has not
reserved. Figures are written after every phase, so that a case cut off leaves those it has.
Without a GPU, with --tiny, nothing is limited and memory is what the process has resident.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment, sizes
from harness.measure import (
    peak_allocated_bytes,
    peak_reserved_bytes,
    reserved_bytes,
    synchronize,
    used_bytes,
)
from magihuman import runtime
from magihuman.runtime import config
from magihuman.runtime.memory import estimate
from magihuman.runtime.memory.plan import GIB

FP8, INT8 = {"precision": "fp8"}, {"precision": "int8"}
TEXT_INT8 = {"text_precision": "int8"}  # else bf16
PORTABLE = {"kernels": "portable"}
CASES: dict[str, dict[str, Any]] = {
    "1080p bf16 in 40": {"sr": "1080p", "precision": "bf16", "memory_limit_gb": 40.0},
    "540p fp8 in 24": {"sr": "540p", "precision": "fp8", "memory_limit_gb": 24.0},
    "540p int8, text int8 in 24": {"sr": "540p", **INT8, **TEXT_INT8, "memory_limit_gb": 24.0},
    # The transformer stays, the text encoder moves.
    "256p int8 in 24": {**INT8, "memory_limit_gb": 24.0},
    "256p fp8 in 16": {**FP8, "memory_limit_gb": 16.0},
    "256p int8, text int8 in 16": {**INT8, **TEXT_INT8, "memory_limit_gb": 16.0},
}
# Run where they are named: by portable kernels; with frames in bands; with layers streamed; with
# nothing moved, to compare with.
OTHERS: dict[str, dict[str, Any]] = {
    "256p fp8, text int8 in 16": {**FP8, **TEXT_INT8, "memory_limit_gb": 16.0},
    "256p fp8, portable in 16": {**FP8, **PORTABLE, "memory_limit_gb": 16.0},
    "256p int8, portable in 16": {**INT8, **PORTABLE, "memory_limit_gb": 16.0},
    "1080p fp8, text int8 in 16": {"sr": "1080p", **FP8, **TEXT_INT8, "memory_limit_gb": 16.0},
    "1080p bf16 in 30": {"sr": "1080p", "precision": "bf16", "memory_limit_gb": 30.0},
    "540p fp8": {"sr": "540p", "precision": "fp8"},
}
STEPS = 5
PERIOD_S = 0.02


@dataclass
class Held:
    """The most that was held since the last look, by sampling."""

    device_bytes: int = 0
    reserved_bytes: int = 0
    driver_bytes: int = 0


class Sampler:
    """Looks at the device's memory from a thread of its own."""

    def __init__(self) -> None:
        self.whole, self.stages = Held(), dict[str, Held]()
        self._name = "load"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @contextmanager
    def span(self, name: str, request: int) -> Iterator[None]:
        """A hook of the engine."""
        outer, self._name = self._name, name
        try:
            yield
        finally:
            self._name = outer

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            before = reserved_bytes()
            used = used_bytes()
            reserved = reserved_bytes()
            for held in (self.whole, self.stages.setdefault(self._name, Held())):
                held.device_bytes = max(held.device_bytes, used)
                held.reserved_bytes = max(held.reserved_bytes, reserved)
                if before == reserved:  # else the two may be of different moments
                    held.driver_bytes = max(held.driver_bytes, used - reserved)


def run_case(
    size: sizes.Size,
    model: Path | runtime.synthetic,
    options: dict[str, Any],
    sr_steps: int,
    keep: Callable[[dict[str, Any]], object],
) -> None:
    """Load, one clip to compile and one as it then is. keep: is given all figures so far."""
    torch.zeros(1, device=size.device)
    context = used_bytes() - reserved_bytes()
    host = estimate.free_bytes(torch.device("cpu"))
    limit_gb = options.get("memory_limit_gb")
    found: dict[str, Any] = {
        "environment": environment.environment(),  # cases of several runs share a file
        "options": options,
        "limit_gib": limit_gb,
        "sr_steps": sr_steps,
        "first_request_sr_steps": 1,
        "context_at_start_gib": context / GIB,
        "host_free_at_start_gib": host / GIB,
    }
    sampler = Sampler()

    def phase(name: str, figures: object) -> None:
        found[name] = figures
        found.update(held(sampler, limit_gb))
        keep(found)
        print(
            f"{name} {json.dumps(figures)}; at most {found['device_gib']:.2f} GiB held", flush=True
        )

    try:
        print(f"context {context / GIB:.2f} GiB, host {host / GIB:.1f} GiB free", flush=True)
        start = time.perf_counter()
        engine = runtime.load(model, hooks=[sampler], **options)
        synchronize()
        plan = engine.memory_plan
        assert (plan is None) == (size.device.type == "cpu")
        found["plan"] = None if plan is None else plan.as_dict()
        found["kernels"] = engine.kernels
        phase("load_s", time.perf_counter() - start)
        if plan is not None:
            peak = f"{plan.peak_bytes / GIB:.2f} GiB and {plan.extra_s:.2f} s more expected"
            moves = {name: len(layers) for name, layers in plan.streamed.items()}
            print(f"streams {moves}, {plan.bands} bands; {peak}", flush=True)
        for name, steps in (("first_request_s", 1), ("request_s", sr_steps)):
            start = time.perf_counter()
            asked = (
                size.request if options.get("sr") is None else {**size.request, "sr_steps": steps}
            )
            video = engine.generate(size.prompt, seed=1, **asked)
            seconds = {**video.timings_s, "total": time.perf_counter() - start}
            found["frames"] = list(video.frames.shape)
            phase(name, seconds)
    finally:
        sampler.stop()


def held(sampler: Sampler, limit_gb: float | None) -> dict[str, Any]:
    """What was held so far, and whether that is within the limit."""
    reserved = peak_reserved_bytes()
    stages = dict(sampler.stages)
    driver = sampler.whole.driver_bytes
    figures: dict[str, Any] = {
        "max_reserved_gib": reserved / GIB,
        "max_allocated_gib": peak_allocated_bytes() / GIB,
        "driver_gib": driver / GIB,
        "device_gib": sampler.whole.device_bytes / GIB,
        "stages_gib": {
            name: {"device": one.device_bytes / GIB, "reserved": one.reserved_bytes / GIB}
            for name, one in stages.items()
        },
    }
    if limit_gb is not None:
        most = max(reserved + driver, sampler.whole.device_bytes)
        figures["is_within"] = most <= limit_gb * GIB
    return figures


def allowed(size: sizes.Size, options: dict[str, Any]) -> dict[str, Any]:
    """What this machine can: without a GPU neither a limit nor fp8."""
    return options if size.device.type == "cuda" else {"sr": options.get("sr")}


def main() -> None:
    """Every case in a process, and one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = {**CASES, **OTHERS}
    parser.add_argument("--case", action="append", choices=list(every))
    parser.add_argument("--sr-steps", type=int, default=STEPS)
    parser.add_argument("--one", choices=list(every), help=argparse.SUPPRESS)
    arguments = environment.arguments(parser)
    size = sizes.of(arguments.tiny)
    kept = arguments.folder / "memory_limit.json"
    cases: dict[str, Any] = json.loads(kept.read_text())["cases"] if kept.exists() else {}

    def keep(name: str, figures: dict[str, Any]) -> None:
        cases[name] = figures
        environment.write("memory_limit", {"cases": cases}, arguments.folder)

    if arguments.one is not None:
        # Seconds of every component and of every graph compiled.
        logging.basicConfig(format="%(relativeCreated)d ms %(message)s")
        logging.getLogger("magihuman").setLevel(logging.INFO)
        keep(arguments.one, {"failed": True})
        options = allowed(size, every[arguments.one])
        # Of a tiny size, clips are tiny after super-resolution too.
        config.SR_SIZES.update({name: size.pixels[name] for name in config.SR_SIZES})
        with tempfile.TemporaryDirectory() as folder:
            model = sizes.source(size, Path(folder))
            run_case(size, model, options, arguments.sr_steps, lambda f: keep(arguments.one, f))
        return
    missed = []
    for name in arguments.case or CASES:
        print(f"-- {name}", flush=True)
        command = [sys.executable, __file__, "--one", name, "--folder", str(arguments.folder)]
        command += ["--tiny"] * arguments.tiny
        start = time.perf_counter()
        done = subprocess.run([*command, "--sr-steps", str(arguments.sr_steps)])
        print(f"{name}: {time.perf_counter() - start:.1f} s in all", flush=True)
        case = json.loads(kept.read_text())["cases"][name]
        if done.returncode or "request_s" not in case or not case.get("is_within", True):
            missed.append(name)
    if missed:
        sys.exit(f"failed, or beyond the limit: {', '.join(missed)}")


if __name__ == "__main__":
    main()
