"""Score the nano model that comes with the package: 64 held-out prompts, images and voices.

    python benchmarks/nano_score.py [--folder RESULTS] [--precisions bf16 fp8] [--tiny]

fp8 needs a Hopper GPU. With --tiny, one clip of each kind.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from harness import environment
from magihuman import runtime
from magihuman.runtime.evaluate.model_score import score_model
from magihuman.runtime.weights.shipped import NANO_FOLDER


def main() -> None:
    """Score in each precision, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp8"), default=["bf16"])
    arguments = environment.arguments(parser)
    clips = 1 if arguments.tiny else None
    figures: dict[str, Any] = {}
    for precision in arguments.precisions:
        with runtime.load(NANO_FOLDER, precision=precision) as engine:
            figures["device"] = str(engine.device)
            figures[precision] = asdict(score_model(engine, NANO_FOLDER, clips))
        print(precision, figures[precision], flush=True)
    print(f"wrote {environment.write('nano_score', figures, arguments.folder)}")


if __name__ == "__main__":
    main()
