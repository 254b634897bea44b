"""What the benchmarks share: sizes, inputs, device timing, and the ceilings of a GPU."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import kernel_cases
from magihuman.graphs.cuda_graphs import bucket_of
from magihuman.graphs.decoder.replay import CompiledDecoder
from magihuman.graphs.transformer.options import ReplayOptions
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.kernels import ops
from magihuman.kernels.attention import backends
from magihuman.runtime import config
from magihuman.runtime.model import tokens
from magihuman.runtime.pipeline import denoise

LAYOUT = tokens.Layout(frames=32, rows=16, columns=30, audio=126, text=300)  # 480x256, 5 s
PROMPT = ("A woman with red hair looks into the camera, smiles and says: good morning! " * 4)[:300]
STEPS = 8
REPEATS = 5
COPY_BYTES = 2**30  # far beyond any cache
GEMM_SIDE = 8192
# Kernels that no block has, and on the CPU operators.
OUTSIDE = ("at::native", "ffma", "sgemm", "aten::", *kernel_cases.OUTSIDE)
# Norms that open the halves of a layer: kernels, and on the CPU operators.
NORMS = ("_add_rms_norm", "_norm_rows", "magihuman::add_norm", "magihuman::norm")
CALLS = 4  # of a graph that measures a ceiling


def device() -> torch.device:
    """Where this machine measures: its first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -- memory: of the GPU or, where there is none, what this process has resident ----------------


def used_bytes() -> int:
    """Of the device's memory, by all processes; on the CPU by this one."""
    if not torch.cuda.is_available():
        return resident_bytes("VmRSS")
    free, total = torch.cuda.mem_get_info()
    return total - free


def allocated_bytes() -> int:
    """By tensors of this process."""
    if not torch.cuda.is_available():
        return resident_bytes("VmRSS")
    return torch.cuda.memory_allocated()


def reserved_bytes() -> int:
    """By PyTorch for tensors of this process."""
    if not torch.cuda.is_available():
        return resident_bytes("VmRSS")
    return torch.cuda.memory_reserved()


def peak_allocated_bytes() -> int:
    """The most since `reset_peaks`; on the CPU since the process started."""
    if not torch.cuda.is_available():
        return resident_bytes("VmHWM")
    return torch.cuda.max_memory_allocated()


def peak_reserved_bytes() -> int:
    """As `peak_allocated_bytes`."""
    if not torch.cuda.is_available():
        return resident_bytes("VmHWM")
    return torch.cuda.max_memory_reserved()


def reset_peaks() -> None:
    """Count peaks from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def resident_bytes(field: str) -> int:
    """Of this process's memory: a field of /proc/self/status, VmRSS now or VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


# -- inputs and models ------------------------------------------------------------------------


def error(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def example(
    layout: tokens.Layout, text_channels: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents [1, 48, T, H, W] and [1, A, 64], and text [L, C], all fp32."""
    text = torch.randn(layout.text, text_channels, device=device)
    video = torch.randn(1, 48, layout.frames, layout.rows, layout.columns, device=device)
    return video, torch.randn(1, layout.audio, 64, device=device), text


def padded_rows(layout: tokens.Layout) -> int:
    """Rows of the compiled forward, whose text is padded to a bucket."""
    video, audio, text = layout.counts
    return video + audio + bucket_of(text)


def compiled_forward(model: Any, **options: Any) -> CompiledForward:
    """The compiled forward of a transformer in bf16, where it is.

    On the CPU nothing is captured: the rewritten graph runs over the operators' references.
    """
    where = next(model.parameters()).device
    if where.type != "cuda":
        options |= {"replays": False, "budget_bytes": 0}
    return CompiledForward(model, model.config, torch.bfloat16, where, ReplayOptions(**options))


def compiled_decoder(vae: Any, **options: Any) -> CompiledDecoder:
    """The compiled decoder of frames, as `compiled_forward`."""
    if next(vae.parameters()).device.type != "cuda":
        options |= {"replays": False, "budget_bytes": 0}
    return CompiledDecoder(vae.decoder, vae.config, **options)


class PlainFlashAttention:
    """What the scripts call of fa3-fwd, in fp32 on the CPU."""

    @staticmethod
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q: [1, N, heads, D]; k, v: [1, M, kv heads, D]. Returns [1, N, heads, D] and, where asked
        for, the logarithms of the sums of exponentials, fp32 [1, heads, N].
        """
        queries, keys, values = (x[0].transpose(0, 1).float() for x in (q, k, v))
        groups = len(queries) // len(keys)
        keys, values = (x.repeat_interleave(groups, 0) for x in (keys, values))
        scores = queries @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
        out = (scores.softmax(-1) @ values).transpose(0, 1)[None].to(q.dtype)
        return (out, scores.logsumexp(-1)[None]) if return_attn_probs else out


def flash_attention() -> Any:
    """The interface of fa3-fwd; without a GPU, one of the same arithmetic."""
    if torch.cuda.is_available():
        return __import__("fa3_fwd_interface")
    return PlainFlashAttention


def attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, length: Tensor
) -> Callable[[], Tensor]:
    """A call of the fastest attention for these operands; on the CPU that of the reference."""
    backend = ""
    if q.is_cuda:
        backend = backends.fastest(*q.shape[:2], *k.shape[1:], q.device)
    return partial(ops.gated_attention, q, k, v, gate, length, [], backend)


def distilled_steps(
    velocity: denoise.Velocity, video: Tensor, audio: Tensor, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """The distilled model's loop, with the same noise every time."""
    generator = torch.Generator(video.device).manual_seed(1)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device)

    return denoise.distilled(velocity, video, audio, steps=steps, noise=noise)


def release() -> None:
    """Device memory that is no longer used is free for what comes next."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class Timed:
    """A callable that waits for the device; `times_ms` has the device time of every call.

    On the CPU, where a call has finished when it returns, it is the time of the host's clock.
    """

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self.times_ms: list[float] = []
        self._run, self._on_gpu = run, device.type == "cuda"

    def __call__(self) -> None:
        if not self._on_gpu:
            begin = time.perf_counter()
            self._run()
            self.times_ms.append(1e3 * (time.perf_counter() - begin))
            return
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._run()
        stop.record()
        torch.cuda.synchronize()
        self.times_ms.append(start.elapsed_time(stop))


def median_ms(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Device milliseconds of `run()`, median after two warm-ups; of one call on the CPU."""
    timed = Timed(run, device())
    warm_ups = rounds(3) - 1
    for _ in range(warm_ups + rounds(repeats)):
        timed()
    return statistics.median(timed.times_ms[warm_ups:])


def rounds(count: int) -> int:
    """How often something is timed: on the CPU once, since that time is no figure."""
    return count if torch.cuda.is_available() else 1


def one_expert(layer: nn.Module, multiple: int = 1) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each linear of a layer, and of its weight's rows those of the first modality, as many as a
    multiple allows, with what pads them.
    """
    experts = 3 if layer.has_modality_weights else 1
    own, mlp = layer.attention, layer.mlp
    for linear in (own.linear_qkv, own.linear_proj, mlp.up_gate_proj, mlp.down_proj):
        rows = len(linear.weight) // experts // multiple * multiple
        stride = linear.weight.stride()
        yield linear, linear.weight.as_strided((rows, stride[0]), stride)


def bare_8_steps_ms(
    calls: Sequence[Callable[[], object]], heat: Callable[[], object], steps: int = STEPS
) -> float:
    """Device milliseconds of eight times all calls, from replays of a graph: a bound of 8 steps.

    `heat` runs before each timing, so that the card is as warm as it is for the whole model. On the
    CPU the calls are made one by one.
    """
    run = replay(calls)
    times = []
    for _ in range(rounds(3)):
        heat()
        times.append(median_ms(lambda: [run() for _ in range(steps)], 1))
    return statistics.median(times)


def replay(
    calls: Sequence[Callable[[], object]], keeps_outputs: bool = False
) -> Callable[[], object]:
    """The replay of a graph of all calls, or on the CPU all calls.

    With `keeps_outputs` each call writes to memory of its own. What calls hold stays alive.
    """
    if not torch.cuda.is_available():
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    outputs = []
    with torch.cuda.stream(stream):
        for call in calls:  # kernels compile and libraries choose before anything is recorded
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                output = call()
                if keeps_outputs:
                    outputs.append(output)
                del output

    def run(held: object = (calls, outputs)) -> None:
        graph.replay()

    return run


def replay_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Device milliseconds of one call, from replays of a CUDA graph of all calls.

    Launching from the host does not count. Calls over different tensors, of more bytes together
    than a cache holds, read from memory; all outputs are kept, so that each call writes to memory
    of its own. On the CPU the calls are made one by one.
    """
    return median_ms(replay(calls, keeps_outputs=True)) / len(calls)


def kernels_ms(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and device milliseconds of every kernel of `run()`, in the order in which they ran.

    On the CPU, of every operator that no other calls.
    """
    kind = "CUDA" if torch.cuda.is_available() else "CPU"
    activities = [getattr(torch.profiler.ProfilerActivity, kind)]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize()
    events = [event for event in profile.events() if event.device_type.name == kind]
    if kind == "CPU":
        events = [event for event in events if event.cpu_parent is None]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e3) for event in events]


def by_kernel(kernels: Sequence[tuple[str, float]]) -> dict[str, tuple[int, float]]:
    """Calls and milliseconds of each kernel, the largest first."""
    sums: dict[str, tuple[int, float]] = {}
    for name, milliseconds in kernels:
        calls, total = sums.get(name[:90], (0, 0.0))
        sums[name[:90]] = (calls + 1, total + milliseconds)
    return dict(sorted(sums.items(), key=lambda item: -item[1][1])[:24])


def by_layers(kernels: Sequence[tuple[str, float]], kinds: Sequence[str]) -> dict[str, float]:
    """Milliseconds of each kind of layer of a compiled forward.

    kinds: the kind of each layer. Two norms open the halves of a layer; PyTorch's own kernels and
    fp32 products are the embedders and heads.
    """
    sums: dict[str, float] = {}
    norms = 0
    for name, milliseconds in kernels:
        norms += any(part in name for part in NORMS)
        is_outside = norms == 0 or any(part in name for part in OUTSIDE)
        kind = "embedders and heads" if is_outside else kinds[(norms - 1) // 2]
        sums[kind] = sums.get(kind, 0.0) + milliseconds
    return sums


def kinds_of(arch: config.DiTConfig) -> list[str]:
    """Name of each layer's kind."""
    names = []
    for layer in range(arch.num_layers):
        weights = "weights per modality" if layer in arch.modality_layers else "shared weights"
        names.append(f"{weights}, {'GELU7' if layer in arch.gelu7_layers else 'SwiGLU7'}")
    return names


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / replay_ms([lambda: target.copy_(source)] * CALLS) * 1e3


def gemm_rate() -> float:
    """FLOP a second of PyTorch's bf16 product of two large square matrices."""
    a, b = (
        torch.randn(GEMM_SIDE, GEMM_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    return 2 * GEMM_SIDE**3 / replay_ms([lambda: a @ b] * CALLS) * 1e3
