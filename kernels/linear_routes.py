"""The ways to compute a linear and what follows it, and which of them is fastest for a shape.

`library` is PyTorch's product with a kernel after it; the other routes are tiles of the project's
own product, which does the rest in its epilogue.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from magihuman.kernels import nvrtc
from magihuman.kernels.matmul_sm90 import Epilogue, Tile, matmul
from magihuman.kernels.measured import Measurements
from magihuman.kernels.reference import Counts

LIBRARY = "library"
TILES = {
    "128x192": Tile(columns=192, blocks=1, group=17),
    "128x192 in pairs": Tile(columns=192, blocks=1, cluster_rows=2, group=8),
    "128x224 in pairs": Tile(columns=224, blocks=1, cluster_rows=2, group=8),
    "128x256": Tile(columns=256, blocks=1, group=8),
}
SMALL_FLOPS = 1e10  # a product below this takes microseconds, and measuring it tenths of a second
ROUNDS = 3
WARM_MS, TIMED_MS = 10, 30  # the card slows down as it heats; shorter runs would not see it


def why_not(x: Tensor, weight: Tensor, epilogue: Epilogue, counts: Counts | None) -> str | None:
    """Why the own product cannot take these operands; None where it can."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] != 9:
        return "it is written for sm_90"
    if not nvrtc.is_available():
        return "cuda-bindings is not installed"
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {weight.dtype}"
    columns = weight.shape[0] // (3 if counts else 1)
    width = columns * 4 if epilogue == "add" else columns * 2
    if epilogue != "swiglu7" and epilogue != "gelu7" and width % 16:
        return f"rows of {width} bytes do not start at multiples of 16"
    if x.stride(0) % 8 or weight.stride(0) % 8:
        return f"rows of {x.stride(0)} and {weight.stride(0)} elements are not multiples of 8"
    return None


def linear(x: Tensor, weight: Tensor, counts: Counts | None, route: str) -> Tensor:
    """`reference.linear`, on a GPU. See `ops.linear`."""
    out = x.new_empty(x.shape[0], weight.shape[0] // (3 if counts else 1))
    if route == LIBRARY:
        for rows, own, result in _runs(x, weight, counts, out):
            torch.mm(rows, own.t(), out=result)
    else:
        matmul(x, weight, out, counts, "store", TILES[route])
    return out


def linear_activation(
    x: Tensor, weight: Tensor, counts: Counts | None, kind: str, padded: int, route: str
) -> Tensor:
    """`reference.swiglu7` or `gelu7` of `linear`, [N, padded], columns beyond its own zeros."""
    from magihuman.kernels import activations

    if route == LIBRARY:
        product = linear(x, weight, counts, LIBRARY)
        return {"swiglu7": activations.swiglu7, "gelu7": activations.gelu7}[kind](product, padded)
    width = weight.shape[0] // (3 if counts else 1) // (2 if kind == "swiglu7" else 1)
    out = x.new_empty(x.shape[0], padded)
    if counts is not None and padded != width:  # there the next run's weight would follow
        out[:, width:].zero_()
        matmul(x, weight, out[:, :width], counts, cast(Epilogue, kind), TILES[route])
    else:
        matmul(x, weight, out, counts, cast(Epilogue, kind), TILES[route])
    return out


def linear_add(
    stream: Tensor, x: Tensor, weight: Tensor, counts: Counts | None, route: str
) -> None:
    """`stream += linear(x, weight)` with the product in fp32."""
    if route != LIBRARY:
        matmul(x, weight, stream, counts, "add", TILES[route])
        return
    for rows, own, result in _runs(x, weight, counts, stream):
        if x.dtype == torch.float32:
            result.addmm_(rows, own.t())
        else:
            torch.addmm(result, rows, own.t(), out_dtype=torch.float32, out=result)


def _runs(
    x: Tensor, weight: Tensor, counts: Counts | None, out: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of x, weight and rows of the result for each run that is not empty."""
    if weight.shape[1] != x.shape[1]:
        weight = weight.as_strided((weight.shape[0], x.shape[1]), weight.stride())
    if counts is None:
        return [(x, weight, out)]
    parts = zip(x.split(counts), weight.chunk(3), out.split(counts), strict=True)
    return [part for part in parts if part[0].shape[0]]


def fastest(
    epilogue: Epilogue, weight: Tensor, counts: Counts | None, rows: int, padded: int
) -> str:
    """The route that measured fastest for this shape on this GPU; measured once, then kept.

    Args:
        epilogue: what follows the product.
        weight: [M, K] or [3 M, K], on the device; the model's own, since the power that a product
            draws, and so its speed, depends on its operands.
        counts: rows of each run, or None.
        rows: of the other operand.
        padded: columns of the output of an activation.
    """
    depth, device = weight.shape[1], weight.device
    if not weight.is_cuda or 2 * rows * weight.numel() < SMALL_FLOPS:
        return LIBRARY
    x = torch.randn(rows, weight.stride(0), device=device).to(weight.dtype)
    x[:, depth:] = 0
    if why_not(x, weight, epilogue, counts) is not None:
        return LIBRARY
    names = [LIBRARY, *TILES]
    kept = Measurements(device)
    shape = f"{counts or rows} {tuple(weight.shape)}"
    key = f"linear {epilogue} {shape} of {', '.join(names)}"
    times = kept.get(key)
    if times is None:
        stream = torch.zeros(rows, weight.shape[0] // (3 if counts else 1), device=device)

        def run(route: str) -> None:
            if epilogue == "store":
                linear(x[:, :depth], weight, counts, route)
            elif epilogue == "add":
                linear_add(stream, x, weight, counts, route)
            else:
                linear_activation(x[:, :depth], weight, counts, epilogue, padded, route)

        times = _milliseconds(run, names, device)
        kept.put(key, times)
    return min(times, key=times.__getitem__)


def _milliseconds(
    run: Callable[[str], None], names: list[str], device: torch.device
) -> dict[str, float]:
    """Device time of one call by each route, in turns and each for long enough to heat the card."""

    def timed(name: str, calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run(name)
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / calls

    with torch.cuda.device(device):
        for name in names:
            run(name)  # compiles
        once = {name: timed(name, 2) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:
                timed(name, 1 + int(WARM_MS / once[name]))
                times[name].append(timed(name, 1 + int(TIMED_MS / once[name])))
    return {name: statistics.median(values) for name, values in times.items()}
