"""The compiled forward against the plain one: error, seconds of 8 steps, share of each kernel.

    python benchmarks/compiled_forward.py [--folder RESULTS] [--layers N]

Random weights at full size, 480x256, 5 s, 300 text tokens: N = 4,266.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import environment
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.kernels.attention import backends
from magihuman.runtime import config
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import random_weights
from measure import (
    LAYOUT,
    STEPS,
    bare_8_steps_ms,
    by_kernel,
    by_layers,
    distilled_steps,
    error,
    example,
    kernels_ms,
    kinds_of,
    median_ms,
    one_expert,
)


def baseline_ms(model: Any, velocity: denoise.Velocity, steps: Any) -> dict[str, Any]:
    """The plain model through torch.compile with FlashAttention-3 in place of PyTorch's
    attention.
    """
    import time

    from magihuman.kernels import reference

    interface = __import__("fa3_fwd_interface")

    @torch.library.custom_op("benchmark::fa3", mutates_args=())
    def fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interface.flash_attn_func(q[None], k[None], v[None])[0].clone()

    @fa3.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.new_empty(q.shape)

    def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        out: Tensor = fa3(*(x.transpose(0, 1).contiguous() for x in (q, k, v)))
        return out.transpose(0, 1)

    original, forward = reference._fused_attention, model.forward
    reference._fused_attention = attention
    try:
        model.forward = torch.compile(forward, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        velocity_ms = median_ms(lambda: steps(velocity))
        seconds = time.perf_counter() - start
    finally:
        reference._fused_attention, model.forward = original, forward
    return {"torch_compile_fa3_8_steps_ms": velocity_ms, "with_compile_s": seconds}


def bare(model: DiT) -> list[Callable[[], object]]:
    """PyTorch's products and the fastest attention alone, of all layers.

    Random operands, all rows by the first of a modality layer's weights.
    """
    config, device = model.config, torch.device("cuda")
    rows = sum(LAYOUT.counts[:2]) + 320
    shape = (rows, config.heads, config.kv_heads, config.head_dim)
    backend = backends.fastest(*shape, device)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    q, k, gate = randn(*shape[:2], shape[3]), randn(rows, *shape[2:]), randn(rows, shape[1])
    length = torch.tensor(LAYOUT.tokens, device=device, dtype=torch.int32)
    inputs: dict[int, Tensor] = {}
    calls: list[Callable[[], object]] = []
    for layer in model.block.layers:
        for _, whole in one_expert(layer):
            if whole.shape[1] not in inputs:
                inputs[whole.shape[1]] = randn(rows, whole.shape[1])
            calls.append(partial(F.linear, inputs[whole.shape[1]], whole))
        calls.append(partial(backends.run, backend, q, k, k, gate, length))
    return calls


def round_linears(model: DiT) -> None:
    """The published bf16 model from one whose block linears are fp32, in place."""
    for name, parameter in model.named_parameters():
        if name.startswith("block.") and parameter.ndim == 2:
            parameter.data = parameter.data.to(torch.bfloat16)
    for layer in model.block.layers:
        layer.dtype = torch.bfloat16


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=environment.RESULTS)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--baseline", action="store_true", help="needs fa3-fwd")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    kept = [i for i in range(arguments.layers) if i in (0, 1, 2, 3, 36, 37, 38, 39)]
    arch = dataclasses.replace(
        config.DiTConfig(), num_layers=arguments.layers, modality_layers=tuple(kept)
    )
    video, sound, text = example(LAYOUT, arch.text_channels, device)
    figures: dict[str, Any] = {"layers": arguments.layers, "tokens": LAYOUT.tokens, "steps": STEPS}

    def steps(velocity: denoise.Velocity) -> tuple[Tensor, Tensor]:
        return distilled_steps(velocity, video, sound)

    with torch.inference_mode():
        model = random_weights.dit(arch, 0, device, torch.float32, "distill")
        exact = steps(denoise.velocity_of(model, LAYOUT, text, "v2"))
        round_linears(model)
        torch.cuda.reset_peak_memory_stats()
        plain = denoise.velocity_of(model, LAYOUT, text, "v2")
        expected = plain(video, sound)
        figures["plain_forward_ms"] = median_ms(lambda: plain(video, sound))
        compiled_forward = CompiledForward(model, arch, torch.bfloat16, device)
        compiled = denoise.velocity_of(model, LAYOUT, text, "v2", compiled_forward)
        actual = compiled(video, sound)
        report = next(iter(compiled_forward.reports().values()))
        figures["compile"] = dataclasses.asdict(report)
        print(json.dumps(figures), flush=True)
        figures["error"] = [error(a, b) for a, b in zip(actual, expected, strict=True)]
        print(figures["error"], flush=True)

        finals = [steps(velocity) for velocity in (plain, compiled)]
        figures["error_after_8_steps"] = {
            "compiled against plain": [error(b, a) for a, b in zip(*finals, strict=True)],
            "plain against fp32": [error(a, e) for a, e in zip(finals[0], exact, strict=True)],
            "compiled against fp32": [error(b, e) for b, e in zip(finals[1], exact, strict=True)],
        }
        figures["compiled_forward_ms"] = median_ms(lambda: compiled(video, sound))
        figures["compiled_8_steps_ms"] = median_ms(lambda: steps(compiled))
        figures["plain_8_steps_ms"] = median_ms(lambda: steps(plain), 2)
        if arguments.baseline:
            figures["baseline"] = baseline_ms(model, plain, steps)
        figures["ratio"] = figures["plain_8_steps_ms"] / figures["compiled_8_steps_ms"]
        figures["bare_8_steps_ms"] = bare_8_steps_ms(bare(model), lambda: steps(compiled))
        kernels = kernels_ms(lambda: compiled(video, sound))
        figures["kernels_ms"] = by_kernel(kernels)
        figures["layers_ms"] = by_layers(kernels, kinds_of(arch))
    figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(figures, indent=1))
    print(environment.write("compiled_forward", figures, arguments.folder))


if __name__ == "__main__":
    main()
