"""The compiled forward against the plain one: error, seconds of 8 steps, share of each kernel.

    python benchmarks/compiled_forward.py [--folder RESULTS] [--layers N] [--baseline] [--tiny]

Random weights at full size, 480x256, 5 s, 300 text tokens: N = 4,266.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import environment, sizes
from harness.measure import (
    attention,
    bare_8_steps_ms,
    by_kernel,
    by_layers,
    compiled_forward,
    distilled_steps,
    error,
    example,
    flash_attention,
    kernels_ms,
    kinds_of,
    median_ms,
    one_expert,
    padded_rows,
    peak_allocated_bytes,
    reset_peaks,
)
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.model.tokens import Layout
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import random_weights


def baseline_ms(model: Any, velocity: denoise.Velocity, steps: Any) -> dict[str, Any]:
    """The plain model through torch.compile with FlashAttention-3 in place of PyTorch's
    attention; without a GPU, which is there to compile for, only through its tracing.
    """
    import time

    from magihuman.kernels import reference

    interface = flash_attention()
    backend = "inductor" if torch.cuda.is_available() else "eager"

    @torch.library.custom_op("benchmark::fa3", mutates_args=())
    def fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interface.flash_attn_func(q[None], k[None], v[None])[0].clone()

    @fa3.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.new_empty(q.shape)

    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        out: Tensor = fa3(*(x.transpose(0, 1).contiguous() for x in (q, k, v)))
        return out.transpose(0, 1)

    original, forward = reference._fused_attention, model.forward
    reference._fused_attention = attend
    try:
        model.forward = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
        start = time.perf_counter()
        velocity_ms = median_ms(lambda: steps(velocity))
        seconds = time.perf_counter() - start
    finally:
        reference._fused_attention, model.forward = original, forward
    return {"torch_compile_fa3_8_steps_ms": velocity_ms, "with_compile_s": seconds}


def bare(model: DiT, layout: Layout) -> list[Callable[[], object]]:
    """PyTorch's products and the fastest attention alone, of all layers.

    Random operands, all rows by the first of a modality layer's weights.
    """
    config, device = model.config, next(model.parameters()).device
    rows = padded_rows(layout)
    shape = (rows, config.heads, config.kv_heads, config.head_dim)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    q, k, gate = randn(*shape[:2], shape[3]), randn(rows, *shape[2:]), randn(rows, shape[1])
    length = torch.tensor(layout.tokens, device=device, dtype=torch.int32)
    attend = attention(q, k, k, gate, length)
    inputs: dict[int, Tensor] = {}
    calls: list[Callable[[], object]] = []
    for layer in model.block.layers:
        for _, whole in one_expert(layer):
            if whole.shape[1] not in inputs:
                inputs[whole.shape[1]] = randn(rows, whole.shape[1])
            calls.append(partial(F.linear, inputs[whole.shape[1]], whole))
        calls.append(attend)
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
    parser.add_argument("--layers", type=int, help="of the model; by default all")
    parser.add_argument("--baseline", action="store_true", help="needs fa3-fwd")
    arguments = environment.arguments(parser)
    size = sizes.of(arguments.tiny)
    device, layout, arch = size.device, size.layout, size.arch
    layers = arguments.layers or arch.num_layers
    kept = tuple(i for i in arch.modality_layers if i < layers)
    arch = dataclasses.replace(arch, num_layers=layers, modality_layers=kept)
    video, sound, text = example(layout, arch.text_channels, device)
    figures: dict[str, Any] = {"layers": layers, "tokens": layout.tokens, "steps": size.steps}

    def steps(velocity: denoise.Velocity) -> tuple[Tensor, Tensor]:
        return distilled_steps(velocity, video, sound, size.steps)

    with torch.inference_mode():
        model = random_weights.dit(arch, 0, device, torch.float32, "distill")
        exact = steps(denoise.velocity_of(model, layout, text, "v2"))
        round_linears(model)
        reset_peaks()
        plain = denoise.velocity_of(model, layout, text, "v2")
        expected = plain(video, sound)
        figures["plain_forward_ms"] = median_ms(lambda: plain(video, sound))
        forward = compiled_forward(model)
        compiled = denoise.velocity_of(model, layout, text, "v2", forward)
        actual = compiled(video, sound)
        report = next(iter(forward.reports().values()))
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
        figures["bare_8_steps_ms"] = bare_8_steps_ms(
            bare(model, layout), lambda: steps(compiled), size.steps
        )
        kernels = kernels_ms(lambda: compiled(video, sound))
        figures["kernels_ms"] = by_kernel(kernels)
        figures["layers_ms"] = by_layers(kernels, kinds_of(arch))
    figures["peak_gib"] = peak_allocated_bytes() / 2**30
    print(json.dumps(figures, indent=1))
    print(environment.write("compiled_forward", figures, arguments.folder))


if __name__ == "__main__":
    main()
