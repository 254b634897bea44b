"""fp8 linears against bf16: seconds of 8 steps, weights, error, share of each kernel.

    python benchmarks/fp8.py [--folder RESULTS] [--tiny]

Random weights at full size, 480x256, 5 s, 300 text tokens: N = 4,266.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness import environment, sizes
from harness.measure import (
    Timed,
    allocated_bytes,
    attention,
    bare_8_steps_ms,
    by_kernel,
    by_layers,
    compiled_forward,
    distilled_steps,
    error,
    example,
    kernels_ms,
    kinds_of,
    one_expert,
    padded_rows,
    rounds,
)
from magihuman.graphs import quantization
from magihuman.kernels import ops
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.model.tokens import Layout
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import random_weights

MODALITY = "fp8, modality layers bf16"
ATTENTION = "fp8, attention too"
KEPT = {"bf16": None, "fp8": "none", ATTENTION: "none", MODALITY: "modality"}
ROUNDS = 5


def bare(model: DiT, layout: Layout, fp8_attention: bool) -> list[Callable[[], object]]:
    """PyTorch's row-wise fp8 products and attention alone, of all layers. Random operands.

    Products of whole multiples of 16 columns, all rows by the first of a modality layer's weights.
    """
    config, device = model.config, next(model.parameters()).device
    heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
    rows = padded_rows(layout)
    length = torch.tensor(layout.tokens, device=device, dtype=torch.int32)
    qkv = torch.randn(rows, config.qkv_rows, device=device).bfloat16()
    gate, row_scale = qkv[:, -heads:], torch.ones(rows, 1, device=device)
    if fp8_attention:
        norms = (torch.zeros(dim, device=device) for _ in "qk")
        rope = torch.zeros(rows, 6 * config.rope_bands, device=device)
        parts = ops.qkv_fp8(qkv, *norms, rope, length, [], heads, kv_heads)
        attend: Callable[[], Tensor] = partial(
            ops.gated_attention_fp8, *parts, gate, length, [], "gluon"
        )
    else:
        q, k, v, _ = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim, heads], dim=1)
        q, k, v = (x.unflatten(1, (-1, dim)).contiguous() for x in (q, k, v))
        attend = attention(q, k, v, gate, length)
    inputs: dict[int, Tensor] = {}
    calls: list[Callable[[], object]] = []
    for layer in model.block.layers:
        for linear, whole in one_expert(layer, multiple=16):
            width = whole.shape[1]
            if width not in inputs:
                inputs[width] = ops.quantize_fp8(torch.randn(rows, width, device=device))[0]
            scale = linear.weight_scale[: len(whole)].view(1, -1)
            product = partial(torch._scaled_mm, out_dtype=torch.bfloat16)
            calls.append(partial(product, inputs[width], whole.t(), row_scale, scale))
        calls.append(attend)
    return calls


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    arguments = environment.arguments(parser)
    size = sizes.of(arguments.tiny)
    device, layout, arch = size.device, size.layout, size.arch
    video, sound, text = example(layout, arch.text_channels, device)
    figures: dict[str, Any] = {"tokens": layout.tokens, "steps": size.steps}
    velocities: dict[str, denoise.Velocity] = {}
    finals: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        for name, keep in KEPT.items():
            if name != ATTENTION:  # which is the last model's
                before = allocated_bytes()
                model = random_weights.dit(arch, 0, device, torch.bfloat16, "distill")
                if keep is not None:
                    quantization.quantize_model(model, quantization.quantized_linears(arch, keep))
                torch.cuda.empty_cache()
                weights_gib = (allocated_bytes() - before) / 2**30
            if keep == "none":
                narrow = model
            forward = compiled_forward(model, fp8_attention=name == ATTENTION)
            velocities[name] = denoise.velocity_of(model, layout, text, "v2", forward)
            one = velocities[name](video, sound)
            finals[name] = distilled_steps(velocities[name], video, sound, size.steps)
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
            return lambda: distilled_steps(velocities[name], video, sound, size.steps)

        timed = {name: Timed(steps(name), device) for name in velocities}
        for _ in range(rounds(ROUNDS)):
            for name, run in timed.items():
                steps(name)()  # the card comes to this one's temperature
                run()
        for name, run in timed.items():
            figures[name]["8_steps_ms"] = statistics.median(run.times_ms)
            kernels = kernels_ms(lambda name=name: velocities[name](video, sound))
            figures[name]["kernels_ms"] = by_kernel(kernels)
            figures[name]["layers_ms"] = by_layers(kernels, kinds_of(arch))
            print(name, figures[name]["8_steps_ms"], run.times_ms, flush=True)
        for name, is_narrow in (("fp8", False), (ATTENTION, True)):
            bound = bare_8_steps_ms(bare(narrow, layout, is_narrow), steps(name), size.steps)
            figures[name]["bare_8_steps_ms"] = bound
            print(name, "bare", bound, flush=True)
    print(json.dumps({n: [figures[n]["kernels_ms"], figures[n]["layers_ms"]] for n in KEPT}))
    print(environment.write("fp8", figures, arguments.folder))


if __name__ == "__main__":
    main()
