"""Milliseconds, joules and clocks of a forward, and of each product, attention and norm in it.

    python benchmarks/power.py [--folder RESULTS] [--rows N ...] [--tiny]

Random weights at full size, 480x256, 5 s, 300 text tokens: N = 4,266. A GPU that draws all the
power that it may is as fast as its work takes little energy, so each measurement has it busy with
the same work for a while; one request after a rest is measured beside. Power is NVML's.

The bound of a forward, of the same run: the library's products with one scale for all rows and
columns (in bf16 its plain ones), the fastest attention, and the bytes that the other operators of
a layer must move at the rate of a copy. Epilogues, embedders and heads count nothing in it. With
--rows the products and attentions in fp8 are measured at other heights too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from harness import environment, forward_parts, nvml, sizes
from harness.forward_parts import Call, Linear
from harness.measure import (
    COPY_BYTES,
    compiled_forward,
    distilled_steps,
    example,
    kernels_ms,
    release,
    replay,
)
from harness.sustained import Reading, after_rest, in_turns, sustained
from magihuman.graphs import quantization
from magihuman.graphs.cuda_graphs import bucket_of
from magihuman.kernels import reference as ref
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import random_weights

SETS = 3  # of operands, more than a cache holds
CALLS = 2 * SETS  # in a graph
FORWARD_S, FORWARD_WARM_S = 2.0, 0.5
RESTS = 3
BOUND_PRODUCTS = {"bf16": forward_parts.PLAIN, "fp8": forward_parts.TENSOR_WISE}


def type_of(precision: str) -> str:
    """Of a forward's linears."""
    return "bf16" if precision == "bf16" else "fp8"


class Bench:
    """What measurements share: sizes, the GPU, and its energy counter."""

    def __init__(self, size: sizes.Size) -> None:
        self.size, self.config, self.device = size, size.arch, size.device
        video, audio, text = size.layout.counts
        self.counts: ref.Counts = (video, audio, bucket_of(text))  # with the padding of text
        self.gpu = nvml.Gpu(size.device)

    def turns(self, builds: Mapping[str, Callable[[], Call]]) -> dict[str, Reading]:
        """Each of several calls in turns, over operands of its own."""
        sets = {
            name: [build() for _ in range(SETS)] * (CALLS // SETS) for name, build in builds.items()
        }
        return self.calls(sets)

    def calls(self, sets: Mapping[str, list[Call]]) -> dict[str, Reading]:
        """Each list of calls in turns; a reading is of one call."""
        runs = {name: replay(calls, keeps_outputs=True) for name, calls in sets.items()}
        readings = in_turns(runs, self.gpu, CALLS)
        runs.clear()
        release()
        return readings


def of_flops(reading: Reading, flops: int) -> dict[str, Any]:
    """A reading with what it means for tensor cores."""
    joules = reading.joules
    per_flop = None if joules is None else joules / flops * 1e12
    rate = flops / reading.ms / 1e9
    return {**reading.figures(), "tflops": rate, "picojoules_per_flop": per_flop}


def of_bytes(reading: Reading, moved: int) -> dict[str, Any]:
    """A reading with what it means for memory."""
    return {**reading.figures(), "bytes": moved, "tb_per_s": moved / reading.ms / 1e9}


# -- forwards ---------------------------------------------------------------------------------


def forwards(bench: Bench) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Figures of a forward in each precision, and milliseconds of its parts."""
    size = bench.size
    model = random_weights.dit(size.arch, 0, size.device, torch.bfloat16, "distill")
    figures, parts = {}, {}
    for precision in forward_parts.REST:
        if precision == "fp8":
            quantization.quantize_model(model, quantization.quantized_linears(size.arch))
            release()
        figures[precision], parts[precision] = forward(bench, model, precision)
        release()
        print(precision, json.dumps(figures[precision]), flush=True)
    return figures, parts


def forward(bench: Bench, model: DiT, precision: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Figures of a forward in one precision, and milliseconds of its parts."""
    size = bench.size
    video, sound, text = example(size.layout, size.arch.text_channels, size.device)
    compiled = compiled_forward(model, fp8_attention=precision == "fp8-attn")
    velocity = denoise.velocity_of(model, size.layout, text, "v2", compiled)
    one = partial(velocity, video, sound)
    steps = partial(distilled_steps, velocity, video, sound, size.steps)
    steps()
    steps_ms, joules = after_rest(steps, bench.gpu, size.device, RESTS)
    hot = sustained(one, bench.gpu, seconds=FORWARD_S, warm_s=FORWARD_WARM_S)
    parts = forward_parts.parts_ms(kernels_ms(one))
    compiled.release()
    rested = {"8_steps_ms": steps_ms, "joules": joules}
    return {"sustained": hot.figures(), "after_rest": rested}, parts


# -- parts ------------------------------------------------------------------------------------


def products(bench: Bench, rows: int, is_fp8: bool, own_counts: bool = True) -> dict[str, Any]:
    """Figures of every linear of the model, by route, and of the library's product of its shape.

    Linears with weights by modality (left out without `own_counts`) have the route that serves
    them, and the library's where no other linear has its shape.
    """
    figures: dict[str, Any] = {}
    measured = set[tuple[int, int]]()
    for linear, layers in forward_parts.linears(bench.config, bench.counts).items():
        if linear.counts is not None and not own_counts:
            continue
        shape = linear.columns, linear.depth
        found = product(bench, linear, rows, is_fp8, with_library=shape not in measured)
        measured.add(shape)
        figures[linear.name] = {
            "columns": linear.columns,
            "depth": linear.depth,
            "flops": linear.flops(rows),
            "layers": layers,
            **found,
        }
        print(rows, linear.name, json.dumps(found), flush=True)
    return figures


def product(
    bench: Bench, linear: Linear, rows: int, is_fp8: bool, with_library: bool
) -> dict[str, Any]:
    """Which route serves a linear, and readings by route and of the library."""
    given = [forward_parts.operands(linear, rows, bench.device, is_fp8) for _ in range(SETS)] * (
        CALLS // SETS
    )
    serves = forward_parts.serving(linear, given[0])
    names = forward_parts.route_names(is_fp8) if linear.counts is None else [serves]
    flops = {name: linear.flops(rows) for name in names}
    sets = {name: [forward_parts.own_call(linear, g, name) for g in given] for name in names}
    if with_library:
        for one in given:
            for name, (call, own_flops) in forward_parts.library_calls(linear, one).items():
                sets.setdefault(name, []).append(call)
                flops[name] = own_flops
    readings = bench.calls(sets)
    by = {name: of_flops(reading, flops[name]) for name, reading in readings.items()}
    return {"serves": serves, "by": by}


def attentions(bench: Bench, rows: int, tokens: int) -> dict[str, Any]:
    """Figures of attention in fp8 and by each backend of bf16."""
    config = bench.config
    flops = 4 * rows * tokens * config.heads * config.head_dim
    readings = bench.turns(forward_parts.attentions(config, rows, tokens, bench.device))
    return {name: of_flops(reading, flops) for name, reading in readings.items()}


def rest(bench: Bench) -> dict[str, Any]:
    """Figures of the operators that are neither linears nor attention, and of a copy."""
    cases = forward_parts.rest(bench.config, bench.counts, bench.size.layout.tokens, bench.device)
    copied = COPY_BYTES if bench.device.type == "cuda" else 2**20
    cases["copy"] = partial(copy, copied, bench.device), 2 * copied
    readings = bench.turns({name: build for name, (build, _) in cases.items()})
    return {name: of_bytes(reading, cases[name][1]) for name, reading in readings.items()}


def copy(count: int, device: torch.device) -> Call:
    """A copy of so many bytes within the device's memory."""
    source = torch.zeros(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return partial(target.copy_, source)


# -- what follows from them -------------------------------------------------------------------


def bound(figures: Mapping[str, Any], precision: str, layers: int, steps: int) -> dict[str, Any]:
    """Milliseconds that a forward takes at least, of these figures, and how near the forward is."""
    made = figures["products"][type_of(precision)]
    library = BOUND_PRODUCTS[type_of(precision)]
    tflops = {
        (own["columns"], own["depth"]): own["by"][library]["tflops"]
        for own in made.values()
        if library in own["by"]
    }
    products_ms = sum(
        own["layers"] * own["flops"] / tflops[own["columns"], own["depth"]] / 1e9
        for own in made.values()
    )
    allowed = [
        own["ms"]
        for name, own in figures["attention"].items()
        if name != "fp8" or precision == "fp8-attn"
    ]
    moved = {name: own["bytes"] for name, own in figures["norms"].items()}
    rest_bytes = forward_parts.rest_bytes(precision, layers, moved)
    parts = {
        "products_ms": products_ms,
        "attention_ms": layers * min(allowed),
        "rest_ms": rest_bytes / figures["norms"]["copy"]["tb_per_s"] / 1e9,
    }
    forward_ms = sum(parts.values())
    measured = figures["forward"][precision]
    return {
        **parts,
        "rest_bytes": rest_bytes,
        "forward_ms": forward_ms,
        "8_steps_ms": steps * forward_ms,
        "ratio": measured["sustained"]["ms"] / forward_ms,
    }


def joules_by_kernel(
    figures: Mapping[str, Any], precision: str, parts: Mapping[str, float]
) -> dict[str, Any]:
    """Of each part of a forward: its milliseconds in a profile, the watts of that part alone in a
    row, and both multiplied. Parts that were not measured alone draw what the forward draws.
    """
    watts = watts_of_parts(figures, precision)
    forward_watts = figures["forward"][precision]["sustained"]["watts"]
    found: dict[str, Any] = {}
    for part, ms in parts.items():
        drawn = watts.get(part, forward_watts)
        joules = None if drawn is None else drawn * ms / 1e3
        found[part] = {"ms": ms, "watts": drawn, "joules": joules}
    known = [own["joules"] for own in found.values() if own["joules"] is not None]
    for own in found.values():
        own["share"] = None if own["joules"] is None else own["joules"] / sum(known)
    return found


def watts_of_parts(figures: Mapping[str, Any], precision: str) -> dict[str, float | None]:
    """Of what serves each part."""
    made, norms = figures["products"][type_of(precision)], figures["norms"]
    first, second = list(forward_parts.REST[precision])[:2]
    attention = "fp8" if precision == "fp8-attn" else figures["bf16 attention"]
    found = {
        "norms": norms[first]["watts"],
        "q, k, v to attention": norms[second]["watts"],
        "quantising attention's output": norms["quantize_fp8"]["watts"],
        "attention": figures["attention"][attention]["watts"],
    }
    for name in ("qkv", "proj", "up", "down"):
        found[name] = made[name]["by"][made[name]["serves"]]["watts"]
    return found


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="other heights")
    arguments = environment.arguments(parser)
    bench = Bench(sizes.of(arguments.tiny))
    size, rows, tokens = bench.size, sum(bench.counts), bench.size.layout.tokens
    layers = size.arch.num_layers
    figures: dict[str, Any] = {"tokens": tokens, "rows": rows, "steps": size.steps}
    figures["without energy"] = bench.gpu.why_not
    with torch.inference_mode():
        figures["forward"], parts = forwards(bench)
        release()
        figures["products"] = {
            name: products(bench, rows, is_fp8=name == "fp8") for name in BOUND_PRODUCTS
        }
        figures["attention"] = attentions(bench, rows, tokens)
        figures["bf16 attention"] = forward_parts.serving_attention(size.arch, rows, size.device)
        figures["norms"] = rest(bench)
        print(json.dumps([figures["attention"], figures["norms"]]), flush=True)
        figures["joules by kernel"] = {
            name: joules_by_kernel(figures, name, own) for name, own in parts.items()
        }
        figures["bound"] = {name: bound(figures, name, layers, size.steps) for name in parts}
        print(json.dumps([figures["joules by kernel"], figures["bound"]], indent=1), flush=True)
        figures["other rows"] = {
            str(other): {
                "products": products(bench, other, is_fp8=True, own_counts=False),
                "attention": attentions(bench, other, other),
            }
            for other in arguments.rows
        }
    print(environment.write("power", figures, arguments.folder))


if __name__ == "__main__":
    main()
