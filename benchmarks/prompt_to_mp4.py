"""Whole requests at full size, warm: seconds from prompt to a finished mp4, and to the first frames
of a stream.

    python benchmarks/prompt_to_mp4.py [--folder RESULTS] [--precisions fp8 fp8-attn bf16]
        [--sr 540p] [--repeats N] [--tiny]

Random weights, 480x256, or what --sr makes of that, 5 s, 300 text tokens; every component is
resident. Pictures of random weights are noise, which is the most work there is for the mp4 encoder.
Rows are from one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import environment, sizes
from harness.measure import peak_allocated_bytes, release, reset_peaks, synchronize
from magihuman import runtime
from magihuman.runtime import config

REPEATS = 5
PRECISIONS = ("fp8", "fp8-attn", "bf16")
GIB = 2**30


def median_stages(all_timings: list[dict[str, float]]) -> dict[str, float]:
    """Of each stage."""
    return {
        name: statistics.median(timings[name] for timings in all_timings) for name in all_timings[0]
    }


def measure(
    size: sizes.Size, precision: Any, sr: Any, repeats: int, folder: Path
) -> dict[str, Any]:
    """One engine: requests that write a file, then streams that write none."""
    source = sizes.source(size, folder)
    start = time.perf_counter()
    engine = runtime.load(source, precision=precision, sr=sr)
    synchronize()
    load_s = time.perf_counter() - start
    with engine:
        start = time.perf_counter()
        engine.warmup([(*size.pixels["256p"], size.seconds)], [size.layout.text])
        warmup_s = time.perf_counter() - start
        path = folder / "clip.mp4"
        requests = []
        for seed in range(1 + repeats):
            path.unlink(missing_ok=True)
            start = time.perf_counter()
            video = engine.generate(size.prompt, seed=seed, save=path, **size.request)
            requests.append((time.perf_counter() - start, video.timings_s))
            assert path.stat().st_size > 0
        streams = []
        for seed in range(1 + repeats):
            start = time.perf_counter()
            with engine.generate_stream(size.prompt, seed=seed, **size.request) as stream:
                chunk = next(stream)
                streams.append((time.perf_counter() - start, len(chunk.frames)))
                assert sum(len(chunk.frames) for chunk in stream) + streams[-1][1] == len(
                    video.frames
                )
        return {
            "load_s": load_s,
            "warmup_s": warmup_s,
            "first_request_s": requests[0][0],
            "prompt_to_mp4_s": statistics.median(seconds for seconds, _ in requests[1:]),
            "all_s": [seconds for seconds, _ in requests[1:]],
            "stages_s": median_stages([stages for _, stages in requests[1:]]),
            "mp4_bytes": path.stat().st_size,
            "first_frames_s": statistics.median(seconds for seconds, _ in streams[1:]),
            "first_frames": streams[-1][1],
            "frames": list(video.frames.shape),
            "peak_gib": peak_allocated_bytes() / GIB,
        }


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--sr", choices=list(config.SR_SIZES), help="named so in the results")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = environment.arguments(parser)
    size = sizes.of(arguments.tiny)
    name = "prompt_to_mp4" if arguments.sr is None else f"prompt_to_mp4_{arguments.sr}"
    figures: dict[str, Any] = {
        "text_tokens": size.layout.text,
        "sequence_tokens": size.layout.tokens,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for precision in arguments.precisions:
            reset_peaks()
            figures[precision] = measure(
                size, precision, arguments.sr, arguments.repeats, Path(scratch)
            )
            release()
            print(precision, json.dumps(figures[precision]), flush=True)
            environment.write(name, figures, arguments.folder)


if __name__ == "__main__":
    main()
