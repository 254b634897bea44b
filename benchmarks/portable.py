"""The portable kernels against `torch.compile` of the plain model: seconds of 8 steps in one run.

    python benchmarks/portable.py [--folder RESULTS] [--only NAME,...] [--tiles] [--tiny]

Random weights at full size, 480x256, 5 s, 300 text tokens: N = 4,266. Each precision with the tiles
of this GPU, and with those of an architecture that has 99 KiB of shared memory a block. What fails
is printed and recorded, and the others go on. --tiles also times attention with other tiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness import environment, measure, sizes
from harness.measure import (
    Timed,
    by_kernel,
    compiled_forward,
    distilled_steps,
    error,
    example,
    kernels_ms,
    median_ms,
    padded_rows,
    peak_allocated_bytes,
    release,
    replay_ms,
    reset_peaks,
    rounds,
)
from magihuman.graphs import quantization
from magihuman.kernels import ops
from magihuman.kernels import reference as ref
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import random_weights

ROUNDS = 5
COMPILED = "torch.compile"
SMALL = (8, 6)  # whose tiles fit 99 KiB
SMALL_E4M3 = (8, 9)
LIBRARIES = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A compiled forward to time.

    Attributes:
        weights: "bf16", or one of `DTYPES`, which its linears are quantised to.
        options: of `CompiledForward`.
        against: the case that its time and its error are compared with.
    """

    weights: str
    options: dict[str, Any]
    against: str | None = None


PORTABLE = {"kernels": "portable"}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
CASES = {
    "hopper bf16": Case("bf16", {}, COMPILED),
    "bf16": Case("bf16", PORTABLE, COMPILED),
    "bf16, 99 KiB": Case("bf16", PORTABLE | {"tiles_for": SMALL}, COMPILED),
    "int8": Case("int8", PORTABLE, "bf16"),
    "int8, 99 KiB": Case("int8", PORTABLE | {"tiles_for": SMALL}, "bf16"),
    "fp8": Case("fp8", PORTABLE, "bf16"),
    "fp8, 99 KiB": Case("fp8", PORTABLE | {"tiles_for": SMALL_E4M3}, "bf16"),
    "fp8, attention too": Case("fp8", PORTABLE | {"fp8_attention": True}, "bf16"),
}


def tried(figures: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; or None, with the error printed and in the figures of this name."""
    try:
        return work()
    except Exception as failure:
        traceback.print_exc()
        figures.setdefault(name, {})["failed"] = f"{type(failure).__name__}: {failure}"[:2000]
        return None


# -- the plain model --------------------------------------------------------------------------


def sdpa_ms(rows: int, heads: int, kv_heads: int, dim: int) -> dict[str, float]:
    """Milliseconds of PyTorch's attention by each of its backends that runs here."""
    device = measure.device()
    q, k, v = (
        torch.randn(1, count, rows, dim, device=device, dtype=torch.bfloat16)
        for count in (heads, kv_heads, kv_heads)
    )
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    times: dict[str, float] = {}
    for name, backend in LIBRARIES.items():
        if name == "math" and times:
            break  # whose weights take a gigabyte
        try:
            with sdpa_kernel(backend):
                times[name] = median_ms(attend)
        except RuntimeError as failure:
            print(f"no attention by {name}: {failure}", flush=True)
    return times


def compiled_plain(model: DiT, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The plain forward through torch.compile with this backend of PyTorch's attention; without a
    GPU, which is there to compile for, only through its tracing.

    Layer by layer, as is usual for models of many like layers: what is compiled for one serves all
    of its kind, and nothing worth a kernel lies between two.
    """
    inductor = "inductor" if torch.cuda.is_available() else "eager"
    # Another module than that which a forward of fused kernels captures, over the same weights.
    with torch.device("meta"):
        plain = DiT(model.config, next(iter(model.block.layers.parameters())).dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    for part in (plain.adapter, *plain.block.layers):
        part.compile(fullgraph=True, dynamic=False, backend=inductor)

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), sdpa_kernel(LIBRARIES[backend]):
            out: tuple[Tensor, Tensor] = plain(*arguments)
            return out

    return forward


# -- attention by itself ----------------------------------------------------------------------


def attention_figures(rows: int, arch: Any, has_tiles: bool) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of attention: every backend, and with `has_tiles` other tiles."""
    from magihuman.kernels.attention import backends, portable

    device, dim = torch.device("cuda"), arch.head_dim
    qkv = torch.randn(rows, arch.qkv_rows, device=device, dtype=torch.bfloat16)
    norms = [torch.zeros(dim, device=device) for _ in "qk"]
    rope = torch.zeros(rows, 6 * arch.rope_bands, device=device)
    length = torch.tensor(rows, device=device, dtype=torch.int32)
    shape = rope, [], arch.heads, arch.kv_heads
    bf16 = ops.qk_norm_rope(qkv, *norms, *shape)
    e4m3 = ops.qkv_fp8(qkv, *norms, rope, length, [], arch.heads, arch.kv_heads)
    gate = qkv[:, -arch.heads :]
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in (*backends.NAMES, *backends.PORTABLE):
        calls[f"bf16 {name}"] = partial(ops.gated_attention, *bf16, gate, length, [], name)
    # Of architectures that multiply e4m3, from sm_89 on.
    narrow = [name for name in backends.PORTABLE if int(name.rpartition("sm_")[2]) >= 89]
    for name in (backends.LOCAL, *narrow):
        calls[f"e4m3 {name}"] = partial(ops.gated_attention_fp8, *e4m3, gate, length, [], name)
    for queries, keys, warps, stages in TRIED if has_tiles else ():
        tile = portable.Tile(queries, keys, warps, stages)
        given = gate, length, None, tile
        name = f"{queries}x{keys}, {warps} warps, {stages} stages"
        calls[f"bf16 {name}"] = partial(portable.attention, *bf16, *given)
        calls[f"e4m3 {name}"] = partial(portable.attention, *e4m3[:3], *given, e4m3[3:])
    exact = {
        "bf16": ref.gated_attention(*bf16, gate),
        "e4m3": ref.attention_fp8(*e4m3, gate, length, None),
    }
    figures: dict[str, Any] = {}
    for name, call in calls.items():
        out = tried(figures, name, call)
        if out is None:
            continue
        milliseconds = replay_ms([call] * 4)
        figures[name] = {
            "ms": milliseconds,
            "tflops": 4 * rows**2 * arch.heads * dim / milliseconds / 1e9,
            "error": error(out, exact[name[:4]]),
        }
        print(name, figures[name], flush=True)
    return figures


TRIED = [
    (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
    (128, 64, 4, 3), (128, 32, 8, 3), (128, 32, 4, 3), (64, 128, 4, 2), (64, 64, 4, 2),
    (64, 64, 4, 3), (64, 64, 4, 4), (256, 64, 8, 2), (192, 64, 4, 2),
]  # fmt: skip


# -- all of it --------------------------------------------------------------------------------


def weights_of(arch: Any, device: torch.device, precision: str) -> DiT:
    """The model in a precision, with the same random weights in each, rounded layer by layer."""
    quantized: dict[str, torch.dtype] = {}
    if precision != "bf16":
        quantized = dict.fromkeys(quantization.quantized_linears(arch), DTYPES[precision])
    model, layers = random_weights.dit_by_layer(
        arch, 0, device, torch.bfloat16, "distill", quantized
    )
    for _ in layers:
        pass
    release()
    return model


def parser_of() -> argparse.ArgumentParser:
    """The command line beside what every script takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"of {', '.join([COMPILED, *CASES])}; split by ';'")
    parser.add_argument("--tiles", action="store_true", help="time attention with other tiles too")
    return parser


def velocities_of(
    chosen: list[str], size: sizes.Size, text: Tensor, figures: dict[str, Any]
) -> dict[str, denoise.Velocity]:
    """What computes a step of each case that can be compiled here."""
    layout, arch, device = size.layout, size.arch, size.device
    models: dict[str, DiT] = {}
    found: dict[str, denoise.Velocity] = {}
    if COMPILED in chosen:
        attention = sdpa_ms(layout.tokens, arch.heads, arch.kv_heads, arch.head_dim)
        fastest = min(attention, key=attention.__getitem__)
        models["bf16"] = weights_of(arch, device, "bf16")
        forward = compiled_plain(models["bf16"], fastest)
        found[COMPILED] = denoise.velocity_of(models["bf16"], layout, text, "v2", forward)
        figures[COMPILED] = {"attention": fastest, "attention_ms": attention}
    for name in chosen:
        if name == COMPILED:
            continue
        case = CASES[name]
        if case.weights not in models:
            models[case.weights] = weights_of(arch, device, case.weights)
        forward = compiled_forward(models[case.weights], **case.options)
        found[name] = denoise.velocity_of(models[case.weights], layout, text, "v2", forward)

        def prepared(name: str = name, forward: Any = forward) -> dict[str, Any]:
            forward.prepare(*layout.counts)
            report = next(iter(forward.reports().values()))
            return {"compile": dataclasses.asdict(report)}

        figures[name] = {}
        made = tried(figures, name, prepared)
        if made is None:
            del found[name]
        else:
            figures[name] |= made
            print(name, json.dumps(made), flush=True)
    return found


def compared(figures: dict[str, Any], finals: dict[str, Any]) -> None:
    """Put ratios of times and errors after all steps beside the figures of each case."""
    for name, case in CASES.items():
        other = case.against
        if other is None or name not in finals or other not in finals:
            continue
        own, theirs = figures[name]["8_steps_ms"], figures[other]["8_steps_ms"]
        figures[name][f"ratio to {other}"] = own / theirs
        figures[name][f"error against {other}"] = [
            error(a, b) for a, b in zip(finals[name], finals[other], strict=True)
        ]


def main() -> None:
    """Measure and write one JSON."""
    arguments = environment.arguments(parser_of())
    size = sizes.of(arguments.tiny)
    chosen = [COMPILED, *CASES] if arguments.only is None else arguments.only.split(";")
    video, sound, text = example(size.layout, size.arch.text_channels, size.device)
    figures: dict[str, Any] = {"tokens": size.layout.tokens, "steps": size.steps}
    finals: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        if size.device.type == "cuda":
            rows = padded_rows(size.layout)
            figures["attention"] = attention_figures(rows, size.arch, arguments.tiles)
        reset_peaks()
        velocities = velocities_of(chosen, size, text, figures)

        def steps(name: str) -> tuple[Tensor, Tensor]:
            return distilled_steps(velocities[name], video, sound, size.steps)

        for name in list(velocities):
            final = tried(figures, name, partial(steps, name))
            if final is None:
                del velocities[name]
            else:
                finals[name] = final
        timed = {name: Timed(partial(steps, name), size.device) for name in velocities}
        for _ in range(rounds(ROUNDS)):
            for name, run in timed.items():
                steps(name)  # the card comes to this one's temperature
                run()
        for name, run in timed.items():
            figures[name]["8_steps_ms"] = statistics.median(run.times_ms)
            kernels = kernels_ms(lambda name=name: velocities[name](video, sound))
            figures[name]["kernels_ms"] = by_kernel(kernels)
            print(name, figures[name]["8_steps_ms"], run.times_ms, flush=True)
            print(json.dumps(figures[name]["kernels_ms"]), flush=True)
        compared(figures, finals)
    figures["peak_gib"] = peak_allocated_bytes() / 2**30
    for name in [COMPILED, *CASES]:
        found = figures.get(name, {"failed": "not asked for"})
        shown = {k: v for k, v in found.items() if k not in ("compile", "kernels_ms")}
        print(f"{name}: {json.dumps(shown)}")
    print(environment.write("portable", figures, arguments.folder))


if __name__ == "__main__":
    main()
