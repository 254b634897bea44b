"""The video decoder: plain, through torch.compile, and compiled to fused operators; error and time.

    python benchmarks/vae_decode.py [--folder RESULTS] [--baseline] [--sizes 256p 540p 1080p]
        [--variants NAME ...] [--tiny]

Random weights at full size, clips of 5 s: 32 latent frames, 125 frames, windows of 8, 9, 9, 9 and 8
latents. A part that fails is reported as its error, and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import mp4
from harness import environment, sizes
from harness.measure import (
    allocated_bytes,
    by_kernel,
    compiled_decoder,
    error,
    kernels_ms,
    median_ms,
    peak_allocated_bytes,
    replay_ms,
    reset_peaks,
    rounds,
    synchronize,
    used_bytes,
)
from magihuman.graphs.decoder.compile import compile_decoder
from magihuman.graphs.decoder.replay import CompiledDecoder
from magihuman.kernels.decoder import reference as ref
from magihuman.runtime import config
from magihuman.runtime.media.mp4 import Mp4Writer
from magihuman.runtime.model.turbo_vae import TurboVAE
from magihuman.runtime.pipeline.audio import AudioVAE
from magihuman.runtime.pipeline.decode import _groups, _kind, decode_frames, frames_shape
from magihuman.runtime.weights import random_weights

NAMES = tuple(sizes.FULL.pixels)  # of sizes
GIB = 2**30
CONV_RATE = 650e12  # FLOP a second, predicted of cuDNN's convolutions
BANDWIDTH = 2.7e12  # bytes a second, predicted of the kernels between them

# Variants of the compiled decoder by name: options of `CompiledDecoder`.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one window at a time": {"batch": 1},
}
DEFAULT = "default"


def latents_of(measured: sizes.Size, size: str, seed: int = 0) -> Tensor:
    """Normalised latents of a clip, fp32."""
    width, height = measured.pixels[size]
    generator = torch.Generator(measured.device).manual_seed(seed)
    shape = (1, config.LATENT_CHANNELS, measured.latents, height // 16, width // 16)
    return torch.randn(shape, generator=generator, device=measured.device)


def vae_of(measured: sizes.Size, dtype: torch.dtype) -> TurboVAE:
    """bf16 weights are those of fp32, rounded."""
    return random_weights.turbo_vae(measured.turbo_vae, 0, measured.device, dtype)


def work_of(vae: TurboVAE, measured: sizes.Size, size: str) -> dict[str, float]:
    """FLOP of all convolutions of a clip, and bytes that must move between them, from shapes alone.

    Bytes: a convolution's result is read once and what follows it is written once; sums of residual
    blocks are written and read besides.
    """
    width, height = measured.pixels[size]
    flop, moved = 0, 0

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal flop, moved
        weight = module.weight
        flop += 2 * out.numel() * weight[0].numel()
        moved += 2 * (inputs[0].numel() + out.numel())

    with torch.device("meta"):
        decoder = type(vae.decoder)(vae.config)
    for module in decoder.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.register_forward_hook(count)
    for window in vae.plan(measured.latents):
        frames = window.end - window.begin
        shape = (1, config.LATENT_CHANNELS, frames, height // 16, width // 16)
        decoder(torch.empty(shape, device="meta"), window.is_first)
    return {"flop": flop, "bytes": moved}


def predicted_ms(work: dict[str, float]) -> float:
    """What the compiled decoder should take."""
    return 1e3 * (work["flop"] / CONV_RATE + work["bytes"] / BANDWIDTH)


def device_ms(vae: TurboVAE, z: Tensor, decoder: CompiledDecoder) -> float:
    """Device time of all windows, without the way to the host."""
    x = vae.denormalize(z)
    groups = list(_groups(vae.plan(z.shape[2]), decoder.batch_of(*z.shape[3:])))

    def run() -> None:
        for group in groups:
            latents = torch.cat([x[:, :, w.begin : w.end] for w in group])
            decoder(latents, *_kind(group[0]))

    return median_ms(run)


def plain_ms(
    vae: TurboVAE, z: Tensor, decode: Callable[[Tensor, bool], Tensor], repeats: int = 3
) -> float:
    """Device time of all windows and of their conversion to bytes."""

    def run() -> None:
        for window in vae.windows(z, decode):
            ref.to_uint8(window)

    return median_ms(run, repeats)


def frames_s(
    vae: TurboVAE, z: Tensor, decoder: CompiledDecoder | None, repeats: int = 5
) -> dict[str, float]:
    """Seconds until the frames are on the host: median, and of the first call."""
    times = []
    for _ in range(rounds(repeats) + 1):
        synchronize()
        start = time.perf_counter()
        decode_frames(vae, z, decoder=decoder)
        times.append(time.perf_counter() - start)
    return {"median": statistics.median(times[1:]), "first": times[0]}


def values_of(vae: TurboVAE, z: Tensor, decoder: CompiledDecoder | None) -> Tensor:
    """The decoder's own values of a clip, fp32 [1, 3, T, H, W]."""
    with torch.inference_mode():
        if decoder is None:
            return vae(z).float()
        found = decoder

        x = vae.denormalize(z)
        parts = [found(x[:, :, w.begin : w.end], *_kind(w)).clone() for w in vae.plan(z.shape[2])]
        return torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)


def errors(measured: sizes.Size, z: Tensor, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Relative L2 against the plain decoder in fp32, over the first 15 latents: all three kinds of
    windows.
    """
    z = z[:, :, :15]
    exact = values_of(vae_of(measured, torch.float32), z, None)
    vae = vae_of(measured, torch.bfloat16)
    found: dict[str, Any] = {"plain bf16": error(values_of(vae, z, None), exact)}
    for name, options in variants.items():
        with guarded(found, name):
            decoder = compiled_decoder(vae, dtype=torch.float32, **options)
            found[name] = error(values_of(vae, z, decoder), exact)
        torch.cuda.empty_cache()
    return found


def torch_compile_ms(vae: TurboVAE, z: Tensor) -> dict[str, float]:
    """The plain decoder through torch.compile, as published, without and with search."""
    found = {}
    start = time.perf_counter()
    backend = "inductor" if torch.cuda.is_available() else "eager"  # which there is to compile for
    compiled = torch.compile(vae.decoder, dynamic=False, backend=backend)
    for window in vae.windows(z, compiled):
        del window
    synchronize()
    found["compile_s"] = time.perf_counter() - start
    found["ms"] = plain_ms(vae, z, compiled)
    torch._dynamo.reset()
    return found


def mp4_after_last_frame(
    measured: sizes.Size, vae: TurboVAE, z: Tensor, decoder: CompiledDecoder
) -> dict[str, Any]:
    """Seconds from latents to frames, to sound, and to the file; three ways to run the sound."""
    audio_vae = AudioVAE(random_weights.audio_vae(measured.audio_vae, 0, measured.device))
    sound = torch.randn(1, measured.layout.audio, 64, device=measured.device)
    audio_vae.decode(sound)
    found: dict[str, Any] = {}
    for order in ("sound beside", "sound after", "sound first"):
        runs = []
        for _ in range(1 + rounds(3)):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(_request(vae, z, decoder, audio_vae, sound, order, Path(folder)))
        found[order] = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
    found["mp4 alone"] = mp4.measure(mp4.FULL if measured is sizes.FULL else mp4.TINY)
    return found


def _request(
    vae: TurboVAE, z: Tensor, decoder: CompiledDecoder, audio_vae: AudioVAE, sound: Tensor,
    order: str, folder: Path,
) -> dict[str, float]:  # fmt: skip
    synchronize()
    waves: list[Any] = []
    files: list[Mp4Writer] = []
    start = time.perf_counter()
    found = {}

    def decode_sound() -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if z.is_cuda else nullcontext():
            waves.append(audio_vae.decode(sound))
        files[0].add_sound(waves[0])
        found["sound"] = time.perf_counter() - start

    thread = threading.Thread(target=decode_sound)
    frames, height, width, _ = frames_shape(z)
    with Mp4Writer(folder / "a.mp4", frames, width, height, 25, 44100) as writer:
        files.append(writer)
        if order == "sound first":
            decode_sound()
        elif order == "sound beside":
            thread.start()
        decode_frames(vae, z, decoder=decoder, on_window=writer.add)
        found["frames"] = time.perf_counter() - start
        if order == "sound after":
            decode_sound()
        elif order == "sound beside":
            thread.join()
        writer.finish()
    found["mp4"] = time.perf_counter() - start
    found["mp4 after the last frame"] = found["mp4"] - found["frames"]
    return found


@contextmanager
def guarded(figures: dict[str, Any], name: str) -> Iterator[None]:
    """A part whose failure is a figure like others."""
    try:
        yield
    except Exception as failure:
        traceback.print_exc()
        figures[name] = {"failed": f"{type(failure).__name__}: {failure}"[:500]}
    torch.cuda.empty_cache()


def measure_size(
    measured: sizes.Size, size: str, baseline: bool, variants: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Everything of one size."""
    found: dict[str, Any] = {}
    z = latents_of(measured, size)
    vae = vae_of(measured, torch.bfloat16)
    found["work"] = work_of(vae, measured, size)
    found["predicted_ms"] = predicted_ms(found["work"])
    show(f"{size} work", found["work"] | {"predicted_ms": found["predicted_ms"]})
    with guarded(found, "plain"):
        reset_peaks()
        resident = allocated_bytes()
        milliseconds = plain_ms(vae, z, vae.decoder, 1 if size == "1080p" else 3)
        peak = (peak_allocated_bytes() - resident) / GIB
        found["plain"] = {"ms": milliseconds, "peak_gib": peak}
        show(f"{size} plain", found["plain"])
    # The default comes last, since its decoder stays for what follows.
    decoder: CompiledDecoder | None = None
    for name, options in sorted(variants.items(), key=lambda item: item[0] == DEFAULT):
        with guarded(found, name):
            found[name], made = measure_variant(vae, z, options)
            decoder = made if name == DEFAULT else None
            del made
        show(f"{size} {name}", found[name])
    if size == "1080p":  # whose convolutions are cut in time
        with guarded(found, "grey levels from the plain decoder's"):
            ours = decode_frames(vae, z, decoder=decoder or compiled_decoder(vae))
            decoder = None
            torch.cuda.empty_cache()
            away = abs(decode_frames(vae, z).astype("int16") - ours)
            found["grey levels from the plain decoder's"] = {
                "mean": float(away.mean()),
                "mean of the worst frame": float(away.mean(axis=(1, 2, 3)).max()),
            }
            show(f"{size} difference", found["grey levels from the plain decoder's"])
    if size == "256p":
        if DEFAULT in variants:
            with guarded(found, "profile"):
                found["profile"] = profile(vae, z, decoder or compiled_decoder(vae))
        with guarded(found, "mp4"):
            decoder = decoder or compiled_decoder(vae)
            found["mp4"] = mp4_after_last_frame(measured, vae, z, decoder)
            show(f"{size} mp4", found["mp4"])
    decoder = None
    if baseline:
        with guarded(found, "torch.compile"):
            found["torch.compile"] = torch_compile_ms(vae, z)
        show(f"{size} torch.compile", found["torch.compile"])
    return found


def measure_variant(
    vae: TurboVAE, z: Tensor, options: dict[str, Any]
) -> tuple[dict[str, Any], CompiledDecoder]:
    """Seconds to compile and capture, device time, frames on the host, and memory; the decoder."""
    torch.cuda.empty_cache()
    reset_peaks()
    before = used_bytes()
    start = time.perf_counter()
    decoder = compiled_decoder(vae, **options)
    found: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    host = frames_s(vae, z, decoder)
    found |= {"frames_s": host["median"], "first_s": host["first"]}
    found["device_ms"] = device_ms(vae, z, decoder)
    synchronize()
    found["device_gib"] = (used_bytes() - before) / GIB
    return found, decoder


def profile(vae: TurboVAE, z: Tensor, decoder: CompiledDecoder) -> dict[str, Any]:
    """Device milliseconds of each kernel of one clip, compactly."""
    decode_frames(vae, z, decoder=decoder)
    kernels = kernels_ms(lambda: decode_frames(vae, z, decoder=decoder))
    found: dict[str, Any] = {DEFAULT: by_kernel(kernels)}
    print(f"-- kernels of {DEFAULT}: {sum(ms for _, ms in kernels):.1f} ms")
    for kernel, (calls, milliseconds) in found[DEFAULT].items():
        print(f"{calls:5d} {milliseconds:8.3f} ms  {kernel}")
    middle = vae.denormalize(z)[:, :, 6:15], False, 4, 28
    decoder(*middle)
    one = kernels_ms(lambda: decoder(*middle))
    found[f"{DEFAULT}, middle window in order"] = [(k[:60], round(ms, 4)) for k, ms in one]
    return found


def convolutions(vae: TurboVAE, z: Tensor) -> list[dict[str, Any]]:
    """Every kind of convolution of a middle window: FLOP, calls, and milliseconds."""
    module, _ = compile_decoder(vae.decoder, vae.config, False)
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}

    class Recorder(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is torch.ops.magihuman.conv.default:
                x, weight, padding = args
                key = (tuple(x.shape), tuple(weight.shape), tuple(padding))
                found = kinds.setdefault(key, {"calls": 0})
                found["calls"] += 1
            return super().call_function(target, args, kwargs)

    x = vae.denormalize(z)[:, :, 6:15].contiguous(memory_format=torch.channels_last_3d)
    Recorder(module).run(x)
    table = []
    for (shape, weight_shape, padding), row in kinds.items():
        row |= {"x": shape, "weight": weight_shape}
        row |= _one_convolution(shape, weight_shape, padding, z.device)
        show("convolution", row)
        table.append(row)
    return table


def _one_convolution(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    padding: tuple[int, ...],
    device: torch.device,
) -> dict[str, Any]:
    def randn(*size: int) -> Tensor:
        made = torch.randn(size, device=device, dtype=torch.bfloat16)
        return made.contiguous(memory_format=torch.channels_last_3d)

    x, weight = randn(*shape), randn(*weight_shape) * 0.02
    run = functools.partial(torch.ops.magihuman.conv, x, weight, list(padding))
    milliseconds = replay_ms([run] * 4)
    flop = 2 * run().numel() * weight[0].numel()
    return {"flop": flop, "ms": milliseconds, "tflops": flop / milliseconds / 1e9}


def show(name: str, figures: Any) -> None:
    """One line at once, in case the run is cut off."""
    print(name, json.dumps(figures), flush=True)


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--baseline", action="store_true", help="torch.compile too, a minute more")
    arguments = environment.arguments(parser)
    measured = sizes.of(arguments.tiny)
    torch.backends.cudnn.allow_tf32 = False  # the fp32 decoder is the exact one
    variants = {name: dict(VARIANTS[name]) for name in arguments.variants}
    kept = arguments.folder / "vae_decode.json"  # sizes may be measured one after another
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    figures.pop("environment", None)
    figures |= {"latents": measured.latents, "cudnn": torch.backends.cudnn.version()}
    with torch.inference_mode():
        with guarded(figures, "convolutions"):
            table = convolutions(vae_of(measured, torch.bfloat16), latents_of(measured, "256p"))
            figures["convolutions"] = table
            total = sum(row["calls"] * row["ms"] for row in table)
            show("convolutions of a middle window, ms", total)
        with guarded(figures, "error"):
            figures["error"] = errors(measured, latents_of(measured, "256p"), variants)
            show("error", figures["error"])
        for size in arguments.sizes:
            chosen = variants if size == "256p" else {DEFAULT: variants.get(DEFAULT, {})}
            figures[size] = measure_size(
                measured, size, arguments.baseline and size != "1080p", chosen
            )
            environment.write("vae_decode", figures, arguments.folder)
    print(environment.write("vae_decode", figures, arguments.folder))


if __name__ == "__main__":
    main()
