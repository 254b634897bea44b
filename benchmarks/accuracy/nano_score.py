"""Score the nano model that comes with the package: 64 held-out prompts, images and voices.

    python benchmarks/accuracy/nano_score.py [--precisions bf16 fp8 int8] [--folder RESULTS]
        [--tiny]

Where a precision's kernels cannot run it is simulated in the plain model, as by `magihuman verify`.
With --tiny, one short clip of each kind.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment
from magihuman.runtime.evaluate.model_score import score_model
from magihuman.runtime.evaluate.precisions import loaded
from magihuman.runtime.weights import PrecisionPolicy
from magihuman.runtime.weights.shipped import NANO_FOLDER

TINY_SECONDS = 1.0


def main() -> None:
    """Score in each precision, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--precisions", nargs="+", choices=("bf16", "fp8", "int8"), default=["bf16"]
    )
    arguments = environment.arguments(parser)
    asked: dict[str, Any] = {"clips": 1, "seconds": TINY_SECONDS} if arguments.tiny else {}
    figures: dict[str, Any] = {}
    for precision in arguments.precisions:
        with loaded(NANO_FOLDER, PrecisionPolicy(precision)) as (engine, is_simulated):
            figures["device"] = str(engine.device)
            figures[precision] = asdict(score_model(engine, NANO_FOLDER, **asked))
        if is_simulated:
            figures.setdefault("simulated", []).append(precision)
        print(precision, figures[precision], flush=True)
    print(f"wrote {environment.write('nano_score', figures, arguments.folder)}")


if __name__ == "__main__":
    main()
