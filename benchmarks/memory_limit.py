"""Whole clips of the full size in little GPU memory: what is held, and the seconds of each stage.

    python benchmarks/memory_limit.py [--case NAME ...] [--sr-steps N] [--folder RESULTS]

Random weights, 5 s, prompt to frames. Each case has a process of its own, in which PyTorch is
refused all memory beyond the limit, so that an overrun fails; loading is included. What is held on
the device is read every 20 ms, other processes' too; the driver's is what PyTorch has not reserved.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import environment
from magihuman import runtime
from magihuman.runtime.memory_plan import CONTEXT_BYTES, GIB
from measure import PROMPT

CASES: dict[str, dict[str, Any]] = {
    "1080p bf16 in 40": {"sr": "1080p", "precision": "bf16", "memory_limit_gb": 40.0},
    "540p fp8 in 24": {"sr": "540p", "precision": "fp8", "memory_limit_gb": 24.0},
}
FREE = {"540p fp8": {"sr": "540p", "precision": "fp8"}}  # nothing moves: to compare with
STEPS = 5
PERIOD_S = 0.02


@dataclass
class Held:
    """The most that was held since the last look, by sampling."""

    device_bytes: int = 0
    reserved_bytes: int = 0


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
            free, total = torch.cuda.mem_get_info()
            for held in (self.whole, self.stages.setdefault(self._name, Held())):
                held.device_bytes = max(held.device_bytes, total - free)
                held.reserved_bytes = max(held.reserved_bytes, torch.cuda.memory_reserved())


def run_case(options: dict[str, Any], sr_steps: int) -> dict[str, Any]:
    """Load, one clip to compile and one as it then is."""
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    limit_gb = options.get("memory_limit_gb")
    if limit_gb is not None:
        share = (limit_gb * GIB - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(share)
    sampler = Sampler()
    try:
        start = time.perf_counter()
        engine = runtime.load(runtime.synthetic("distill"), hooks=[sampler], **options)
        torch.cuda.synchronize()
        load_s = time.perf_counter() - start
        found: dict[str, Any] = {"load_s": load_s}
        plan = engine.memory_plan
        assert plan is not None
        found["plan"] = plan.as_dict()
        print(f"loaded in {load_s:.1f} s; {plan.extra_s:.2f} s more expected", flush=True)
        for name, steps in (("first_request_s", 1), ("request_s", sr_steps)):
            start = time.perf_counter()
            video = engine.generate(PROMPT, seed=1, sr_steps=steps)
            found[name] = {**video.timings_s, "total": time.perf_counter() - start}
            print(name, json.dumps(found[name]), flush=True)
        engine.close()
    finally:
        sampler.stop()
    reserved = torch.cuda.max_memory_reserved()
    driver = max(held.device_bytes - held.reserved_bytes for held in sampler.stages.values())
    found |= {
        "limit_gib": limit_gb,
        "sr_steps": sr_steps,
        "first_request_sr_steps": 1,
        "frames": list(video.frames.shape),
        "context_at_start_gib": context / GIB,
        "max_reserved_gib": reserved / GIB,
        "max_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "driver_gib": driver / GIB,
        "device_gib": sampler.whole.device_bytes / GIB,
        "stages_gib": {
            name: {"device": held.device_bytes / GIB, "reserved": held.reserved_bytes / GIB}
            for name, held in sampler.stages.items()
        },
    }
    if limit_gb is not None:
        found["is_within"] = max(reserved + driver, sampler.whole.device_bytes) <= limit_gb * GIB
    return found


def main() -> None:
    """Every case in a process, and one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = {**CASES, **FREE}
    parser.add_argument("--folder", type=Path, default=environment.RESULTS)
    parser.add_argument("--case", action="append", choices=list(every))
    parser.add_argument("--sr-steps", type=int, default=STEPS)
    parser.add_argument("--one", choices=list(every), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        figures = run_case(every[arguments.one], arguments.sr_steps)
        (arguments.folder / "case.json").write_text(json.dumps(figures))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in arguments.case or CASES:
        print(f"-- {name}", flush=True)
        command = [sys.executable, __file__, "--one", name, "--folder", str(arguments.folder)]
        start = time.perf_counter()
        done = subprocess.run([*command, "--sr-steps", str(arguments.sr_steps)])
        made = arguments.folder / "case.json"
        results[name] = json.loads(made.read_text()) if done.returncode == 0 else {"failed": True}
        results[name]["process_s"] = time.perf_counter() - start
        made.unlink(missing_ok=True)
        print(environment.write("memory_limit", {"cases": results}, arguments.folder), flush=True)
    missed = [name for name, case in results.items() if not case.get("is_within", "plan" in case)]
    if missed:
        sys.exit(f"failed, or beyond the limit: {', '.join(missed)}")


if __name__ == "__main__":
    main()
