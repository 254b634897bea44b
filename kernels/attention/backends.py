"""Which attention kernels this machine can run, and which of them is fastest for a shape.

`gluon` and `triton` belong to this project and have the head gate in their epilogue. `fa3` is
FlashAttention-3 from the distribution `fa3-fwd`, `cudnn` PyTorch's binding of cuDNN; both are
followed by a gate kernel. These four are tried on Hopper. `portable sm_86` and its like are the
portable kernel with the tiles of that architecture, which every GPU from sm_80 on can run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from magihuman.kernels.attention import portable
from magihuman.kernels.jit import UNSET
from magihuman.kernels.jit.measured import Measurements
from magihuman.kernels.reference import LocalAttention
from magihuman.kernels.target import PORTABLE_FROM, Capability, Target, name_of, nearest

NAMES = ("gluon", "triton", "fa3", "cudnn")
LOCAL = "gluon"  # the backend of frame-local attention, and of that over e4m3, on Hopper
PORTABLE = tuple(f"portable {name_of(one)}" for one in portable.ARCHITECTURES)
GLUON_TRITON = "3.6"  # others up to 3.9 compile the kernels, but none of them has run one
REPEATS, CALLS = 5, 4
LONG_ROWS = 2**15  # a call takes a tenth of a second, and a few tell


def why_not(name: str, dim: int, device: torch.device) -> str | None:
    """Why a backend cannot run heads of `dim` on this device; None where it can."""
    if name not in (*NAMES, *PORTABLE):
        return f"there is no backend {name!r}; there are {', '.join((*NAMES, *PORTABLE))}"
    if device.type != "cuda":
        return "it needs a GPU"
    capability = torch.cuda.get_device_capability(device)
    if name in ("gluon", "triton", *PORTABLE):
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if dim not in (32, 64, 128):
            return f"it takes heads of 32, 64 or 128, not {dim}"
        if name in PORTABLE and capability < PORTABLE_FROM:
            return f"it needs sm_80 or newer, this GPU is {name_of(capability)}"
        if capability[0] != 9 if name == "gluon" else name == "triton" and capability < (9, 0):
            return f"it is written for sm_90, this GPU is {name_of(capability)}"
        version = importlib.metadata.version("triton")
        if name == "gluon" and not version.startswith(f"{GLUON_TRITON}."):
            return f"it is written for triton {GLUON_TRITON}, whose Gluon changes, not {version}"
    if name == "fa3" and importlib.util.find_spec("fa3_fwd_interface") is None:
        return "fa3-fwd is not installed"
    if name == "fa3" and (capability[0] != 9 or dim % 8):
        return "it needs sm_90 and heads of a multiple of 8"
    if name == "cudnn" and (capability < (8, 0) or dim % 8 or dim > 128):
        return "it needs sm_80 and heads of a multiple of 8, up to 128"
    return None


def names_for(target: Target) -> tuple[str, ...]:
    """The backends of a set of kernels."""
    return (portable_for(target.capability),) if target.is_portable else NAMES


def portable_for(capability: Capability) -> str:
    """The portable backend with the tiles of a GPU of this capability."""
    return f"portable {name_of(nearest(capability, portable.ARCHITECTURES))}"


def local_for(target: Target, dim: int, device: torch.device) -> str:
    """The backend of attention that is frame-local, or over e4m3: that for Hopper where it can run.

    dim: of a head.
    """
    if not target.is_portable and why_not(LOCAL, dim, device) is None:
        return LOCAL
    return portable_for(target.capability)


def usable(dim: int, device: torch.device, target: Target | None = None) -> list[str]:
    """The backends of a set of kernels, by default Hopper's, that can run heads of `dim` here."""
    names = NAMES if target is None else names_for(target)
    return [name for name in names if why_not(name, dim, device) is None]


def run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    length: Tensor,
    local: LocalAttention | None = None,
) -> Tensor:
    """`reference.gated_attention` over the first `length` keys, by the backend `name`.

    Of the backends for Hopper one computes frame-local attention, whichever is asked for.

    Args:
        name: one of `NAMES` or `PORTABLE`.
        q: [N, heads, D] bf16 contiguous, on a GPU.
        k, v: [N, kv_heads, D] bf16 contiguous.
        gate: [N, heads] of a float dtype, any row stride.
        length: int32 scalar on the device, 1 to N.
        local: shape of frame-local attention, or None for all tokens.

    Returns:
        [N, heads, D] in q's dtype; rows from `length` on mean nothing.

    Raises `ValueError` where `name` is no backend, or not chosen yet.
    """
    if name in PORTABLE:
        tile = portable.tile_of(_capability_of(name), q.dtype)
        return portable.attention(q, k, v, gate, length, local, tile)
    if name == LOCAL or local is not None:
        from magihuman.kernels.attention import gluon as attention_gluon

        return attention_gluon.attention(q, k, v, gate, length, local)
    if name == "triton":
        from magihuman.kernels.attention import triton as attention_triton

        return attention_triton.attention(q, k, v, gate, length)
    if name == UNSET:
        raise ValueError(
            f"the backend of attention must be chosen before it runs on a GPU, got {UNSET!r}; give"
            " the graph to compile.specialize with one first"
        )
    if name not in NAMES:
        raise ValueError(
            f"the backend of attention must be one of {', '.join(NAMES)}, got {name!r}, which is"
            f" none of {', '.join(PORTABLE)} either"
        )
    from magihuman.kernels.attention.head_gate import head_gate

    library: Callable[..., Tensor] = {"fa3": _fa3, "cudnn": _cudnn}[name]
    return head_gate(library(q, k, v, length), gate)


def run_fp8(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor],
    gate: Tensor,
    length: Tensor,
    local: LocalAttention | None,
) -> Tensor:
    """`reference.attention_fp8`, on a GPU, by the backend `name`.

    name: `LOCAL` or one of `PORTABLE`; scales: of q times k, and of v; the others as those of
    `gated_attention_fp8`. Raises `ValueError` where `name` is no such backend, or not chosen yet.
    """
    if name in PORTABLE:
        tile = portable.tile_of(_capability_of(name), q.dtype)
        return portable.attention(q, k, v, gate, length, local, tile, scales)
    if name != LOCAL:
        raise ValueError(
            f"the backend of attention over e4m3 must be chosen before it runs on a GPU, {LOCAL} or"
            f" one of {', '.join(PORTABLE)}, got {name!r}"
        )
    from magihuman.kernels.attention import fp8 as attention_fp8

    return attention_fp8.attention(q, k, v, *scales, gate, length, local)


def _capability_of(name: str) -> Capability:
    """The capability in the name of a portable backend."""
    return portable.ARCHITECTURES[PORTABLE.index(name)]


def _fa3(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """Attention without gates by FlashAttention-3; arguments and result as those of `run`."""
    from fa3_fwd_interface import flash_attn_with_kvcache

    out: Tensor = flash_attn_with_kvcache(
        q[None], k[None], v[None], cache_seqlens=length.view(1), num_splits=1
    )
    return out[0].contiguous()


def _cudnn(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """Attention without gates by cuDNN, whose mask is [N, N]; as `_fa3` otherwise."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = q.shape[0]
    valid = (torch.arange(k.shape[0], device=k.device) < length).expand(1, 1, rows, -1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid, enable_gqa=True)
    return out[0].transpose(0, 1).contiguous()


def fastest(
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    device: torch.device,
    target: Target | None = None,
) -> str:
    """The backend that measured fastest for this shape on this GPU; measured once, then kept.

    rows: tokens; heads, kv_heads: of queries and of keys; dim: of a head; target: whose backends
    are tried, by default Hopper's. Raises `RuntimeError` where no backend can run,
    `torch.OutOfMemoryError` where there is memory for none.
    """
    names = usable(dim, device, target)
    if not names:
        asked = NAMES if target is None else names_for(target)
        reasons = "; ".join(f"{name}: {why_not(name, dim, device)}" for name in asked)
        raise RuntimeError(f"no attention kernel can run here: {reasons}")
    if rows >= LONG_ROWS and len(names) > 1:
        # Its mask is rows x rows: 8 GiB at 1080p, for one that the others beat at 14,762 rows.
        names = [name for name in names if name != "cudnn"]
    if len(names) == 1:
        return names[0]

    def measure() -> dict[str, float]:
        times, out_of_memory = dict[str, float](), None
        for name in names:
            try:
                times[name] = _milliseconds(name, rows, heads, kv_heads, dim, device)
            except torch.OutOfMemoryError as error:  # of cuDNN, whose mask is rows x rows
                out_of_memory = str(error)
        if not times:
            raise torch.OutOfMemoryError(out_of_memory)
        return times

    key = f"attention rows={rows} heads={heads}/{kv_heads} dim={dim} of {','.join(names)}"
    return Measurements(device).fastest(key, measure, names)


def _milliseconds(
    name: str, rows: int, heads: int, kv_heads: int, dim: int, device: torch.device
) -> float:
    """Device time of one call of `run`, from replays of a graph of several calls.

    The host's time does not count. Arguments as those of `fastest`.
    """
    generator = torch.Generator(device).manual_seed(0)  # that of the process stays as it is

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    q, gate = normal(rows, heads, dim), normal(rows, heads)
    k, v = (normal(rows, kv_heads, dim) for _ in "kv")
    length = torch.tensor(rows, device=device, dtype=torch.int32)
    repeats, calls = (REPEATS, CALLS) if rows < LONG_ROWS else (3, 1)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run(name, q, k, v, gate, length)  # compiles
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            # NCCL's watchdog asks for events meanwhile, which must not break it.
            for _ in range(calls):
                run(name, q, k, v, gate, length)
        times = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            stop.record(stream)
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times)
