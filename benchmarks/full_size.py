"""The engine at full size with random weights: seconds per stage, memory, agreement with fp32.

    python benchmarks/full_size.py [--folder RESULTS] [--scratch DISK] [--tiny]

480x256, 5 s, 300 text tokens: a sequence of 4,266 tokens. Every component is resident: transformer,
text encoder, audio, image and video autoencoders. With --scratch, the transformer is also written
to that folder in the published layout (7 shards, 28.5 GiB) and loaded back.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from harness import environment, sizes
from harness.measure import (
    allocated_bytes,
    error,
    example,
    median_ms,
    peak_allocated_bytes,
    reset_peaks,
    resident_bytes,
    rounds,
    synchronize,
)
from magihuman import runtime
from magihuman.runtime import config
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.weights import checkpoint, random_weights

REPEATS = 3
SHARDS = 7
GIB = 2**30


def generation(size: sizes.Size, folder: Path, *, compiled: bool) -> dict[str, Any]:
    """Whole requests, first one apart; the same seed must give the same clip."""
    source = sizes.source(size, folder)
    start = time.perf_counter()
    engine = runtime.load(source, compile=compiled)
    synchronize()
    load_s = time.perf_counter() - start
    resident = allocated_bytes()
    reset_peaks()
    request = functools.partial(engine.generate, size.prompt, seed=1, **size.request)
    videos = [request() for _ in range(1 + rounds(REPEATS))]
    first, *rest = videos
    stages = {
        name: statistics.median(video.timings_s[name] for video in rest) for name in first.timings_s
    }
    assert all((video.frames == first.frames).all() for video in rest)
    assert all((video.audio == first.audio).all() for video in rest)
    start = time.perf_counter()
    rest[0].save(folder / "full_size.mp4")
    write_s = time.perf_counter() - start
    engine.close()
    return {
        "text_tokens": len(random_weights.byte_tokenizer()(size.prompt)["input_ids"]),
        "sequence_tokens": size.layout.tokens,
        "frames": list(first.frames.shape),
        "steps": config.VARIANTS["distill"].steps,
        "build_s": load_s,
        "first_request_s": first.timings_s,
        "median_s": stages,
        "mp4_s": write_s,
        "resident_gib": resident / GIB,
        "peak_gib": peak_allocated_bytes() / GIB,
        "same_seed_same_bits": True,
    }


def dit(size: sizes.Size, variant: config.Variant) -> DiT:
    """Random weights of a variant."""
    arch = variant.architecture(size.arch)
    return random_weights.dit(arch, 0, size.device, torch.bfloat16, variant.name)


def forward_times(size: sizes.Size) -> dict[str, Any]:
    """One forward of all layers, device events."""
    model = dit(size, config.VARIANTS["distill"])
    video, sound, text = example(size.layout, model.config.text_channels, size.device)
    velocity = denoise.velocity_of(model, size.layout, text, "v2")
    with torch.inference_mode():
        forward_ms = median_ms(lambda: velocity(video, sound))
        out = velocity(video, sound)
    assert all(stream.isfinite().all() for stream in out)
    return {"forward_ms": forward_ms, "output_std": [float(o.std()) for o in out]}


def against_fp32(size: sizes.Size) -> dict[str, Any]:
    """Two layers (a modality GELU7 one, a shared SwiGLU7 one) at full width, bf16 against fp32
    linears.

    Rounding weights and activations to bf16 costs up to 2^-9 relative an operand; errors of
    operands are independent, so a product of K terms carries about sqrt(2) 2^-9 / sqrt(3) of its
    own size, 1.6e-3.
    """
    small = dataclasses.replace(size.arch, num_layers=2, modality_layers=(0,), gelu7_layers=(0,))
    exact = random_weights.dit(small, 0, size.device, torch.float32, "check")
    rounded = random_weights.dit(small, 0, size.device, torch.bfloat16, "check")
    rounded.load_state_dict(exact.state_dict())  # the same weights, rounded
    video, sound, text = example(size.layout, small.text_channels, size.device)
    with torch.inference_mode():
        outputs = [
            denoise.velocity_of(model, size.layout, text, "v2")(video, sound)
            for model in (exact, rounded)
        ]
    errors = {name: error(b, a) for name, a, b in zip(("video", "audio"), *outputs, strict=True)}
    return {"layers": 2, "relative_error": errors}


def write_published_layout(size: sizes.Size, folder: Path) -> dict[str, Any]:
    """The base model as published: bf16 block linears, the rest fp32, 7 shards."""
    model = dit(size, config.VARIANTS["base"])
    state = model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(value.nbytes for value in state.values())
    parts: list[dict[str, torch.Tensor]] = [{}]
    for key, value in state.items():
        if sum(v.nbytes for v in parts[-1].values()) > total / SHARDS and len(parts) < SHARDS:
            parts.append({})
        parts[-1][key] = value
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file({key: value.cpu() for key, value in part.items()}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if size is not sizes.FULL:
        fields = dataclasses.asdict(size.arch)
        del fields["local_attention_layers"]  # the variant says
        (folder / checkpoint.ARCHITECTURE_NAME).write_text(json.dumps(fields))
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    checksum = float(sum(value.double().sum() for value in state.values()))
    return {"bytes": total, "largest_shard_bytes": largest, "tensors": len(state), "sum": checksum}


def load_published_layout(device: torch.device, folder: Path) -> dict[str, Any]:
    """Seconds, and growth of this process's memory."""
    torch.zeros(1, device=device)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    model = checkpoint.load_dit(folder, config.VARIANTS["base"], device, torch.bfloat16)
    synchronize()
    seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")
    total = float(sum(value.double().sum() for value in model.state_dict().values()))
    return {"seconds": seconds, "host_peak_growth_bytes": peak - before, "sum": total}


def read_published_layout(folder: Path) -> dict[str, Any]:
    """Load it in a fresh process: seconds and growth of host memory."""
    command = [sys.executable, __file__, "--read", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Run everything and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # a model; used by itself
    arguments = environment.arguments(parser)
    size = sizes.of(arguments.tiny)
    if arguments.read is not None:
        print(json.dumps(load_published_layout(size.device, arguments.read)))
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, measure in (
            ("against_fp32", against_fp32),
            ("forward", forward_times),
            ("generate", functools.partial(generation, folder=folder, compiled=False)),
            ("generate_compiled", functools.partial(generation, folder=folder, compiled=True)),
        ):
            figures[part] = measure(size)
            torch.cuda.empty_cache()
            print(part, json.dumps(figures[part]), flush=True)
    if arguments.scratch is not None:
        written = write_published_layout(size, arguments.scratch)
        torch.cuda.empty_cache()
        print("written", json.dumps(written), flush=True)
        read = read_published_layout(arguments.scratch)
        assert read["sum"] == written["sum"]
        figures["published_layout"] = {"written": written, "read": read}
        print("read", json.dumps(read), flush=True)
    print(environment.write("full_size", figures, arguments.folder))


if __name__ == "__main__":
    main()
