"""Score the nano model that comes with the package: 64 held-out prompts, images and voices.

    python benchmarks/nano_score.py [--folder RESULTS] [--precisions bf16 fp8 int8] [--tiny]

Where a precision's kernels cannot run it is simulated in the plain model, as by `magihuman verify`.
With --tiny, one short clip of each kind.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from harness import environment
from magihuman import runtime
from magihuman.graphs import quantization
from magihuman.graphs.support import why_not
from magihuman.runtime.device import pick_device
from magihuman.runtime.evaluate.model_score import score_model
from magihuman.runtime.evaluate.simulated import Mode, Simulated
from magihuman.runtime.request import Request
from magihuman.runtime.weights import PrecisionPolicy
from magihuman.runtime.weights.shipped import NANO_FOLDER

TINY_SECONDS = 1.0


@contextmanager
def loaded(precision: PrecisionPolicy) -> Iterator[tuple[runtime.Engine, bool]]:
    """The model in a precision, and whether that is simulated."""
    with runtime.load(NANO_FOLDER, precision="bf16", compile=False) as engine:
        with engine.hold(Request("a man")) as pipeline:
            dit = pipeline.components.dit
        narrow, device = precision.narrow, pick_device(None)
        if narrow is not None and why_not(
            dit.config, precision.linear_dtype, device, fp8=precision.is_fp8
        ):
            names = quantization.quantized_linears(dit.config)
            attention = precision.is_fp8_attention
            with (
                Simulated(dit, names, attention, narrow) as simulation,
                simulation.running(Mode.NARROW),
            ):
                yield engine, True
            return
    with runtime.load(NANO_FOLDER, precision=precision.value) as engine:
        yield engine, False


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
        with loaded(PrecisionPolicy(precision)) as (engine, is_simulated):
            figures["device"] = str(engine.device)
            figures[precision] = asdict(score_model(engine, NANO_FOLDER, **asked))
        if is_simulated:
            figures.setdefault("simulated", []).append(precision)
        print(precision, figures[precision], flush=True)
    print(f"wrote {environment.write('nano_score', figures, arguments.folder)}")


if __name__ == "__main__":
    main()
