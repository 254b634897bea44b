"""fp8 linears against bf16: seconds of 8 steps, weights, error, share of each kernel.

    python benchmarks/fp8.py [--folder RESULTS]

Random weights at full size, 480x256, 5 s, 300 text tokens: N = 4,266.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import environment
from magihuman.graphs import precision
from magihuman.graphs.replay import CompiledForward
from magihuman.runtime import config, denoise, random_weights
from measure import (
    LAYOUT,
    STEPS,
    Timed,
    by_kernel,
    by_layers,
    distilled_steps,
    error,
    example,
    kernels_ms,
    kinds_of,
)

KEPT = {"bf16": None, "fp8": "none", "fp8, modality layers bf16": "modality"}
ROUNDS = 5


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=environment.RESULTS)
    arguments = parser.parse_args()
    device, arch = torch.device("cuda"), config.DiTConfig()
    video, sound, text = example(LAYOUT, arch.text_channels, device)
    figures: dict[str, Any] = {"tokens": LAYOUT.tokens, "steps": STEPS}
    velocities: dict[str, denoise.Velocity] = {}
    finals: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        for name, keep in KEPT.items():
            before = torch.cuda.memory_allocated()
            model = random_weights.dit(arch, 0, device, torch.bfloat16, "distill")
            if keep is not None:
                precision.quantize_model(model, precision.quantized_linears(arch, keep))
            torch.cuda.empty_cache()
            weights_gib = (torch.cuda.memory_allocated() - before) / 2**30
            forward = CompiledForward(model, arch, torch.bfloat16, device)
            velocities[name] = denoise.velocity_of(model, LAYOUT, text, "v2", forward)
            one = velocities[name](video, sound)
            finals[name] = distilled_steps(velocities[name], video, sound)
            report = next(iter(forward.reports().values()))
            if name == "bf16":
                first = one
            figures[name] = {
                "weights_gib": weights_gib,
                "compile": dataclasses.asdict(report),
                "error of one forward": [error(a, b) for a, b in zip(one, first, strict=True)],
                "error after 8 steps": [
                    error(a, b) for a, b in zip(finals[name], finals["bf16"], strict=True)
                ],
            }
            print(name, json.dumps(figures[name]), flush=True)

        def steps(name: str) -> Callable[[], object]:
            return lambda: distilled_steps(velocities[name], video, sound)

        timed = {name: Timed(steps(name), device) for name in velocities}
        for _ in range(ROUNDS):
            for name, run in timed.items():
                steps(name)()  # the card comes to this one's temperature
                run()
        for name, run in timed.items():
            figures[name]["8_steps_ms"] = statistics.median(run.times_ms)
            kernels = kernels_ms(lambda name=name: velocities[name](video, sound))
            figures[name]["kernels_ms"] = by_kernel(kernels)
            figures[name]["layers_ms"] = by_layers(kernels, kinds_of(arch))
            print(name, figures[name]["8_steps_ms"], run.times_ms, flush=True)
    print(json.dumps({n: [figures[n]["kernels_ms"], figures[n]["layers_ms"]] for n in KEPT}))
    print(environment.write("fp8", figures, arguments.folder))


if __name__ == "__main__":
    main()
