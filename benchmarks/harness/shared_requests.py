"""Whole requests on some GPUs: from prompt to frames on the host, without a file."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

from harness import sizes
from harness.measure import peak_allocated_bytes, release, reset_peaks, rounds, synchronize
from magihuman import runtime

REPEATS = 5
LONG_S = 4.0  # a request that takes so much is repeated twice only
GIB = 2**30
# The last line that it prints counts: some builds of gloo print, too.
LOADING = """
import json, sys, time
from magihuman import runtime
folder, options = json.loads(sys.argv[1])
start = time.perf_counter()
with runtime.load(folder or runtime.synthetic("distill"), **options):
    seconds = time.perf_counter() - start
print(seconds)
"""


def fresh_load_s(source: Any, precision: str, clip: str, ranks: int) -> float:
    """Seconds of `load` in a new process, as a service has it: what starts GPUs is part of it."""
    options = {
        "precision": precision,
        "sr": None if clip == "256p" else clip,
        "context_parallel": ranks,
    }
    folder = None if isinstance(source, runtime.synthetic) else str(source)
    done = subprocess.run(
        [sys.executable, "-c", LOADING, json.dumps([folder, options])],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def measure(size: sizes.Size, source: Any, precision: Any, clip: str, ranks: int) -> dict[str, Any]:
    """Seconds of the first request and of warm ones, with the median of each stage, and of loading,
    where this process has used its GPU before.

    clip: its size, by name; ranks: GPUs.
    """
    reset_peaks()
    start = time.perf_counter()
    engine = runtime.load(
        source, precision=precision, sr=None if clip == "256p" else clip, context_parallel=ranks
    )
    synchronize()
    load_s = time.perf_counter() - start
    width, height = size.pixels[clip]
    options = dict(size.request)
    if clip != "256p":
        options |= {"sr_width": width, "sr_height": height}
    with engine:
        seconds, stages, repeats = [], [], 1 + rounds(REPEATS)
        while len(seconds) < repeats:
            start = time.perf_counter()
            video = engine.generate(size.prompt, seed=len(seconds), **options)
            seconds.append(time.perf_counter() - start)
            stages.append(video.timings_s)
            if len(seconds) == 2 and seconds[-1] > LONG_S:
                repeats = min(repeats, 3)
        found = {
            "load_s": load_s,
            "first_request_s": seconds[0],
            "prompt_to_frames_s": statistics.median(seconds[1:]),
            "all_s": seconds[1:],
            "stages_s": {
                name: statistics.median(each[name] for each in stages[1:]) for name in stages[0]
            },
            "frames": list(video.frames.shape),
            "peak_gib": peak_allocated_bytes() / GIB,
            "planned_gib": [plan.peak_bytes / GIB for plan in engine.rank_plans],
        }
    release()
    return found
