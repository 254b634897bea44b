"""Whole requests on some GPUs: from prompt to frames on the host, without a file."""

from __future__ import annotations

import statistics
import time
from typing import Any

from harness import sizes
from harness.measure import peak_allocated_bytes, release, reset_peaks, rounds, synchronize
from magihuman import runtime

REPEATS = 5
LONG_S = 4.0  # a request that takes so much is repeated twice only
GIB = 2**30


def measure(size: sizes.Size, source: Any, precision: Any, clip: str, ranks: int) -> dict[str, Any]:
    """Seconds of loading, of the first request and of warm ones, with the median of each stage.

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
