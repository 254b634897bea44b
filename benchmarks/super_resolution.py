"""Super-resolution at full size: seconds per stage, memory, against the plain model's step.

    python benchmarks/super_resolution.py [--folder RESULTS] [--sizes 540p 1080p]
        [--precisions bf16 fp8 fp8-attn] [--plain] [--tiny]

Random weights, clips of 5 s, 300 text tokens: 8 steps at 480x256 (N = 4,266), 5 steps at 896x512
(N = 14,762) or 1920x1088 (N = 65,706), frames decoded to the host. One set of weights stands for
both transformers, which differ in nothing else but the layers that attend frame-locally at 1080p.
With --plain, the plain model's step too, with FlashAttention-3 (needs fa3-fwd): at 1080p over both
ranges of keys of a frame apart, merged by their log-sum-exps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from harness import environment, sizes
from harness.measure import (
    Timed,
    compiled_decoder,
    compiled_forward,
    device,
    distilled_steps,
    error,
    example,
    flash_attention,
    release,
    reset_peaks,
    rounds,
    synchronize,
    used_bytes,
)
from magihuman.graphs import quantization
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.kernels import reference
from magihuman.kernels.reference import LocalAttention
from magihuman.runtime import config
from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.pipeline.decode import decode_frames
from magihuman.runtime.weights import random_weights
from magihuman.runtime.weights.precision import PrecisionPolicy

GIB = 2**30
SR_STEPS = 5
PRECISIONS = ("bf16", "fp8", "fp8-attn")
PUBLISHED_S = {"540p": 8.0, "1080p": 38.4}  # on one H100, by the authors


def sr_layout(measured: sizes.Size, size: str) -> tokens.Layout:
    """Of the super-resolution model's sequence."""
    width, height = measured.pixels[size]
    return dataclasses.replace(measured.layout, rows=height // 16, columns=width // 16)


def with_local_layers(model: DiT) -> DiT:
    """The same weights in the architecture of the 1080p model."""
    variant = config.VARIANTS["1080p_sr"]
    with torch.device("meta"):
        other = DiT(variant.architecture(model.config), torch.bfloat16)
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        theirs._parameters, theirs._buffers = mine._parameters, mine._buffers
    return other


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Device seconds, median after one run to warm up where there are several."""
    timed, repeats = Timed(run, device()), rounds(repeats)
    for _ in range(repeats + (repeats > 1)):
        timed()
    return statistics.median(timed.times_ms[repeats > 1 :]) / 1e3


def used_gib() -> float:
    """Of the device's memory, by all of this process."""
    return used_bytes() / GIB


class Stage:
    """One transformer at one size, compiled."""

    def __init__(self, measured: sizes.Size, model: DiT, size: str | None) -> None:
        self.measured = measured
        self.layout = measured.layout if size is None else sr_layout(measured, size)
        self.style: config.CoordinateStyle = "v2" if size is None else "v1"
        self.model, self.is_sr = model, size is not None
        torch.manual_seed(3)
        channels = model.config.text_channels
        self.video, self.sound, self.text = example(self.layout, channels, measured.device)

    def velocity(self, forward: CompiledForward | None) -> denoise.Velocity:
        return denoise.velocity_of(self.model, self.layout, self.text, self.style, forward)

    def loop(self, velocity: denoise.Velocity) -> object:
        if not self.is_sr:
            return distilled_steps(velocity, self.video, self.sound, self.measured.steps)
        steps = min(SR_STEPS, self.measured.steps)
        return denoise.super_resolve(velocity, None, self.video, self.sound, steps=steps)

    def measure(self, forward: CompiledForward) -> dict[str, Any]:
        """The loop's seconds, and what compiling did."""
        before = used_gib()
        start = time.perf_counter()
        velocity = self.velocity(forward)
        out = velocity(self.video, self.sound)
        synchronize()
        first_s = time.perf_counter() - start
        assert all(stream.isfinite().all() for stream in out)
        report = list(forward.reports().values())[-1]
        return {
            "tokens": self.layout.tokens,
            "first_forward_s": first_s,
            "graph_gib": used_gib() - before,
            "attention": report.attention,
            "linears": report.linears,
            "compile_s": report.seconds,
            "loop_s": seconds_of(
                lambda: self.loop(velocity), 1 if self.layout.tokens > 50_000 else 3
            ),
        }


@contextmanager
def flash_attention_3() -> Iterator[None]:
    """The plain model's attention through fa3-fwd."""
    interface = flash_attention()

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, probabilities: bool = False
    ) -> tuple[Tensor, Tensor] | Tensor:
        parts = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        return interface.flash_attn_func(*parts, return_attn_probs=probabilities)

    def full(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        made: Any = attend(q, k, v)
        return made[0].transpose(0, 1)

    def merged(q: Tensor, near: tuple[Tensor, Tensor], rest: tuple[Tensor, Tensor]) -> Tensor:
        (a, a_sum), (b, b_sum) = (attend(q, *keys, probabilities=True) for keys in (near, rest))
        share = torch.sigmoid(a_sum - b_sum)[0].t()[..., None]  # [rows, heads, 1]
        return (a[0] * share + b[0] * (1 - share)).to(q.dtype).transpose(0, 1)

    def ranges(
        q: Tensor, k: Tensor, v: Tensor, local: LocalAttention | None, valid: Tensor | None, _: Any
    ) -> Tensor:
        if local is None:
            return full(q, k, v, None).transpose(0, 1)
        frames, size, reach = local
        video = frames * size
        parts = []
        for frame in range(frames):
            near = slice(max(frame - reach, 0) * size, min(frame + reach + 1, frames) * size)
            rows = slice(frame * size, (frame + 1) * size)
            keys = [(k[:, part], v[:, part]) for part in (near, slice(video, None))]
            parts.append(merged(q[:, rows], *keys))
        parts.append(full(q[:, video:], k, v, None))
        return torch.cat(parts, dim=1).transpose(0, 1)

    original = reference._ranges
    reference._ranges = ranges
    try:
        yield
    finally:
        reference._ranges = original


def plain_step(stage: Stage, forward: CompiledForward) -> dict[str, Any]:
    """Seconds of a forward of both, and how far the compiled one is from the plain model's.

    Captured graphs are given up: at 1920x1088 the plain model needs their memory.
    """
    compiled = stage.velocity(forward)
    actual = compiled(stage.video, stage.sound)
    compiled_s = seconds_of(lambda: compiled(stage.video, stage.sound), 1)
    forward.release()
    release()
    with flash_attention_3():
        plain = stage.velocity(None)
        expected = plain(stage.video, stage.sound)
        seconds = seconds_of(lambda: plain(stage.video, stage.sound), 1)
    errors = [error(a, b) for a, b in zip(actual, expected, strict=True)]
    return {"plain_step_s": seconds, "compiled_step_s": compiled_s, "error": errors}


def decode(measured: sizes.Size, size: str) -> dict[str, float]:
    """Seconds from latents to frames on the host, and memory."""
    vae = random_weights.turbo_vae(measured.turbo_vae, 0, measured.device, torch.bfloat16)
    before = used_gib()
    decoder = compiled_decoder(vae)
    layout = sr_layout(measured, size)
    z = torch.randn(1, 48, layout.frames, layout.rows, layout.columns, device=measured.device)
    times = []
    for _ in range(1 + rounds(3)):
        synchronize()
        start = time.perf_counter()
        decode_frames(vae, z, decoder=decoder)
        times.append(time.perf_counter() - start)
    return {"s": statistics.median(times[1:]), "gib": used_gib() - before}


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=config.SR_SIZES, default=["540p", "1080p"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--plain", action="store_true", help="needs fa3-fwd")
    arguments = environment.arguments(parser)
    measured = sizes.of(arguments.tiny)
    kept = arguments.folder / "super_resolution.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    figures.pop("environment", None)

    def show(name: str, value: Any) -> None:
        print(name, json.dumps(value), flush=True)
        environment.write("super_resolution", figures, arguments.folder)

    with torch.inference_mode():
        for size in arguments.sizes:
            figures.setdefault(size, {"published_s": PUBLISHED_S[size]})["decode"] = decode(
                measured, size
            )
            release()
            show(f"{size} decode", figures[size]["decode"])
        narrow: DiT | None = None
        for name in arguments.precisions:
            if (
                narrow is None or not PrecisionPolicy(name).is_fp8_attention
            ):  # which takes the weights of fp8
                narrow = None
                release()
                before = used_gib()
                variant = config.VARIANTS["distill"]
                arch = variant.architecture(measured.arch)
                narrow = random_weights.dit(arch, 0, measured.device, torch.bfloat16, variant.name)
                if name != "bf16":
                    quantization.quantize_model(
                        narrow, quantization.quantized_linears(narrow.config)
                    )
                release()
                weights = used_gib() - before
            figures.setdefault("weights_gib", {})[name] = weights
            measure_precision(name, measured, narrow, arguments, figures, show)
            release()
    print(environment.write("super_resolution", figures, arguments.folder))


def measure_precision(
    name: str,
    measured: sizes.Size,
    model: DiT,
    arguments: argparse.Namespace,
    figures: dict[str, Any],
    show: Callable[[str, Any], None],
) -> None:
    """The base loop, and for each size its loop and the total."""
    is_narrow = PrecisionPolicy(name).is_fp8_attention

    forward = compiled_forward(model, fp8_attention=is_narrow)
    base = Stage(measured, model, None).measure(forward)
    figures.setdefault("256p", {})[name] = base
    show(f"256p {name}", base)
    for size in arguments.sizes:
        local = with_local_layers(model) if size == "1080p" else model
        forward_sr = forward
        if size == "1080p":
            forward_sr = compiled_forward(local, fp8_attention=is_narrow)
        stage = Stage(measured, local, size)
        reset_peaks()
        found = stage.measure(forward_sr)
        found["device_gib"] = used_gib()
        figures[size][name] = found
        show(f"{size} {name}", found)
        if arguments.plain and name == "bf16":
            found |= plain_step(stage, forward_sr)
            keys = ("plain_step_s", "compiled_step_s", "error")
            show(f"{size} plain", [found[key] for key in keys])
        del forward_sr, stage, local
        release()


if __name__ == "__main__":
    main()
