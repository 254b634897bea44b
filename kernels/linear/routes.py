"""The ways to compute a linear and what follows it, and which of them is fastest for a shape.

`library` is PyTorch's product with a kernel after it; the other routes are tiles of `matmul_sm90`
or, on other GPUs and over int8, of `matmul_portable`, which do the rest in their epilogue.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from magihuman.kernels.jit import UNSET, nvrtc
from magihuman.kernels.jit.measured import Measurements
from magihuman.kernels.linear import matmul_portable
from magihuman.kernels.linear.matmul_sm90 import (
    Epilogue,
    Tile,
    columns_of,
    compile_tiles,
    matmul,
    out_dtypes,
)
from magihuman.kernels.linear.quantize import quantize_rows
from magihuman.kernels.reference import FP8, INT8, LIMITS, STATIC_SCALES, Counts
from magihuman.kernels.target import HOPPER_CAPABILITY, Target

LIBRARY = "library"
TILES = {
    "128x192": Tile(columns=192, group=17),
    "128x192 in pairs": Tile(columns=192, cluster_rows=2, group=8),
    "128x256 in pairs": Tile(columns=256, cluster_rows=2, group=8),
}
SMALL_FLOPS = 1e10  # a product below this takes microseconds, and measuring it tenths of a second
ROUNDS = 2
# A product's speed on a hot card, which its power bounds, is another than on a cool one.
HEAT_MS, WARM_MS, TIMED_MS = 300, 60, 90


class Quantized(NamedTuple):
    """A matrix in 8 bits whose rows have a scale each, as `reference.quantize_rows` gives it."""

    values: Tensor  # [rows, K] e4m3 or int8, rows at multiples of 16 bytes
    scale: Tensor | float  # [rows] fp32, or one number for all rows


def why_not(x: Tensor, weight: Tensor, epilogue: Epilogue, counts: Counts | None) -> str | None:
    """Why Hopper's `matmul` cannot take these operands; None where it can.

    x: [N, K]; weight: [M, K], or [3 M, K] with `counts`.
    """
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] != 9:
        return "it is written for sm_90"
    if not nvrtc.is_available():
        return "cuda-bindings, or the compiler that it loads, is not installed"
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {weight.dtype}"
    columns = columns_of(weight, counts)
    width = columns * 4 if epilogue == "add" else columns * 2
    if epilogue != "swiglu7" and epilogue != "gelu7" and width % 16:
        return f"rows of {width} bytes do not start at multiples of 16"
    if x.stride(0) % 8 or weight.stride(0) % 8:
        return f"rows of {x.stride(0)} and {weight.stride(0)} elements are not multiples of 8"
    return None


def linear(x: Tensor, weight: Tensor, counts: Counts | None, route: str) -> Tensor:
    """`reference.linear`, on a GPU: [N, M] in x's dtype. Arguments as those of `ops.linear`."""
    out = x.new_empty(x.shape[0], columns_of(weight, counts))
    if route == LIBRARY:
        for rows, part, result in _runs(x, weight, counts, out):
            torch.mm(rows, part.t(), out=result)
    else:
        _matmul(x, weight, out, counts, "store", route)
    return out


def linear_activation(
    x: Tensor, weight: Tensor, counts: Counts | None, kind: str, padded: int, route: str
) -> Tensor:
    """`reference.swiglu7` or `gelu7`, by `kind`, of `linear`.

    Returns [N, padded] in x's dtype; columns beyond the activation's are zeros.
    """
    from magihuman.kernels.linear import activations

    if route == LIBRARY:
        product = linear(x, weight, counts, LIBRARY)
        return {"swiglu7": activations.swiglu7, "gelu7": activations.gelu7}[kind](product, padded)
    width = columns_of(weight, counts) // (2 if kind == "swiglu7" else 1)
    out = x.new_empty(x.shape[0], padded)
    if counts is None or route in matmul_portable.TILES:
        _matmul(x, weight, out, counts, cast(Epilogue, kind), route)
    else:
        _matmul(x, weight, out[:, :width], counts, cast(Epilogue, kind), route)
        out[:, width:].zero_()  # where the next run's weight has left something
    return out


def linear_add(
    stream: Tensor, x: Tensor, weight: Tensor, counts: Counts | None, route: str
) -> None:
    """`stream += linear(x, weight)`, stream [N, M] fp32.

    The library adds the product in fp32, the tiles round it to bf16 first, as the plain model does.
    """
    if route != LIBRARY:
        _matmul(x, weight, stream, counts, "add", route)
        return
    for rows, part, result in _runs(x, weight, counts, stream):
        if x.dtype == torch.float32:
            result.addmm_(rows, part.t())
        else:
            torch.addmm(result, rows, part.t(), out_dtype=torch.float32, out=result)


def scaled_linear(x: Quantized, weight: Quantized, counts: Counts | None, route: str) -> Tensor:
    """`reference.scaled_linear`, on a GPU: [N, M] bf16, rows at multiples of 16 bytes."""
    rows, columns = x.values.shape[0], columns_of(weight.values, counts)
    out = torch.empty(rows, -(-columns // 8) * 8, dtype=torch.bfloat16, device=x.values.device)
    out = out[:, :columns]
    _scaled_matmul(x, weight, out, counts, "store", route)
    return out


def scaled_linear_activation(
    x: Quantized,
    weight: Quantized,
    counts: Counts | None,
    kind: str,
    padded: int,
    out_dtype: torch.dtype,
    route: str,
) -> Tensor:
    """`reference.swiglu7` or `gelu7`, by `kind`, of `scaled_linear`.

    Returns [N, padded] in bf16, columns beyond the activation's zeros, or in e4m3 divided by
    `STATIC_SCALES`, where those columns mean nothing: what reads e4m3 stops before them. After
    int8 only bf16 is possible.
    """
    width = columns_of(weight.values, counts) // (2 if kind == "swiglu7" else 1)
    out = torch.empty(x.values.shape[0], padded, dtype=out_dtype, device=x.values.device)
    if route in matmul_portable.TILES:  # which writes the zeros too
        _scaled_matmul(x, weight, out, counts, cast(Epilogue, kind), route)
        return out
    _scaled_matmul(x, weight, out[:, :width], counts, cast(Epilogue, kind), route)
    if out_dtype != FP8:
        out[:, width:].zero_()
    return out


def scaled_linear_add(
    stream: Tensor, x: Quantized, weight: Quantized, counts: Counts | None, route: str
) -> None:
    """`stream += scaled_linear(x, weight)`, stream [N, M] fp32."""
    _scaled_matmul(x, weight, stream, counts, "add", route)


def _scaled_matmul(
    x: Quantized,
    weight: Quantized,
    out: Tensor,
    counts: Counts | None,
    epilogue: Epilogue,
    route: str,
) -> None:
    """`_matmul` of two matrices in 8 bits; the weight's scale is a tensor."""
    scale = cast(Tensor, weight.scale)
    _matmul(x.values, weight.values, out, counts, epilogue, route, x.scale, scale)


def _matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    counts: Counts | None,
    epilogue: Epilogue,
    route: str,
    x_scale: Tensor | float | None = None,
    weight_scale: Tensor | None = None,
) -> None:
    """The product by the tile of a route, of either kind.

    Raises `ValueError` for the library's, or for what is no route of these operands.
    """
    if route == UNSET:
        raise ValueError(
            f"a linear's route must be chosen before it runs on a GPU, got {UNSET!r}; give the"
            " graph to compile.route_linears first"
        )
    if route in matmul_portable.TILES:
        tile = matmul_portable.TILES[route]
        matmul_portable.matmul(x, weight, out, counts, epilogue, tile, x_scale, weight_scale)
    elif route in TILES and x.dtype != INT8:
        matmul(x, weight, out, counts, epilogue, TILES[route], x_scale, weight_scale)
    else:
        library = [] if weight_scale is not None else [LIBRARY]
        names = [*library, *([] if x.dtype == INT8 else TILES), *matmul_portable.TILES]
        kind = "bf16" if weight_scale is None else "int8" if x.dtype == INT8 else "e4m3"
        raise ValueError(
            f"the route of a linear over {kind} must be one of {', '.join(names)}, got {route!r};"
            " leave the choice to `fastest`"
        )


def _runs(
    x: Tensor, weight: Tensor, counts: Counts | None, out: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of x, their part of the weight, and rows of the result for each run that has rows."""
    if weight.shape[1] != x.shape[1]:
        weight = weight.as_strided((weight.shape[0], x.shape[1]), weight.stride())
    if counts is None:
        return [(x, weight, out)]
    parts = zip(x.split(counts), weight.chunk(3), out.split(counts), strict=True)
    return [part for part in parts if part[0].shape[0]]


def names_for(target: Target | None, dtype: torch.dtype) -> list[str]:
    """The routes of a set of kernels, by default Hopper's, for weights of a dtype."""
    library = [] if dtype in LIMITS else [LIBRARY]
    if (target is None or not target.is_portable) and dtype != INT8:
        return [*library, *TILES]
    return [
        *library,
        *matmul_portable.names_for(target.capability if target else HOPPER_CAPABILITY),
    ]


def fastest(
    epilogue: Epilogue,
    weight: Tensor,
    counts: Counts | None,
    rows: int,
    padded: int,
    scale: Tensor | None = None,
    target: Target | None = None,
) -> str:
    """The route that measured fastest for this shape on this GPU; measured once, then kept.

    Args:
        epilogue: what follows the product.
        weight: [M, K] or [3 M, K], on the device, of the model and not made up: the power that a
            product draws, and so its speed, depends on its operands.
        counts: rows of each run, or None.
        rows: of the other operand.
        padded: columns of the output of an activation.
        scale: of the weight's rows, [M] or [3 M] fp32, where it is in 8 bits. The library has no
            such route.
        target: whose routes are tried; by default Hopper's.
    """
    device = weight.device
    names = names_for(target, weight.dtype)
    if len(names) == 1 or not weight.is_cuda or 2 * rows * weight.numel() < SMALL_FLOPS:
        return names[0]
    # Not by the process's generator, which stays as it is.
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(
        rows, weight.stride(0), generator=generator, device=device, dtype=torch.bfloat16
    )
    x[:, weight.shape[1] :] = 0
    is_hopper = names[-1] in TILES
    if is_hopper and scale is None and why_not(x, weight, epilogue, counts) is not None:
        return LIBRARY

    def measure() -> dict[str, float]:
        is_activation = epilogue in STATIC_SCALES
        out_dtype = FP8 if is_activation and scale is not None else out_dtypes(epilogue)[0]
        if is_hopper:
            compile_tiles(TILES.values(), epilogue, scale is not None, out_dtype)
        run = _runner(epilogue, x, weight, counts, padded, scale)
        return _milliseconds(run, names, device)

    precision = {FP8: " fp8", INT8: " int8"}.get(weight.dtype, "")
    key = f"linear{precision} {epilogue} {counts or rows} {tuple(weight.shape)} of {names}"
    return Measurements(device).fastest(key, measure, names)


def _runner(
    epilogue: Epilogue,
    x: Tensor,
    weight: Tensor,
    counts: Counts | None,
    padded: int,
    scale: Tensor | None,
) -> Callable[[str], object]:
    """A call of what `fastest` measures, which takes the route.

    x: [rows, K'] bf16, as wide as the weight's rows are laid out.
    """
    # Only an addition has a stream: where memory is limited there is no room for one as wide as
    # what goes into an activation.
    columns = columns_of(weight, counts) if epilogue == "add" else 0
    stream = torch.zeros(x.shape[0], columns, dtype=torch.float32, device=x.device)
    if scale is None:
        if epilogue == "add":
            return lambda route: linear_add(stream, x, weight, counts, route)
        narrow = x[:, : weight.shape[1]]
        if epilogue == "store":
            return lambda route: linear(narrow, weight, counts, route)
        return lambda route: linear_activation(narrow, weight, counts, epilogue, padded, route)
    values = Quantized(*quantize_rows(x, weight.dtype))
    narrow_weight = Quantized(weight, scale)
    out_dtype = FP8 if weight.dtype == FP8 else torch.bfloat16
    if epilogue == "store":
        return lambda route: scaled_linear(values, narrow_weight, counts, route)
    if epilogue == "add":
        return lambda route: scaled_linear_add(stream, values, narrow_weight, counts, route)
    return lambda route: scaled_linear_activation(
        values, narrow_weight, counts, epilogue, padded, out_dtype, route
    )


def with_room(run: Callable[[str], object], names: list[str]) -> list[str]:
    """Run each route once, which compiles it; those for which there was memory.

    The library needs more than the others, for a product that it has yet to activate. Raises
    `torch.OutOfMemoryError` where there was memory for none.
    """
    fitting, failure = [], torch.OutOfMemoryError("there are no routes")
    for name in names:
        try:
            run(name)
        except torch.OutOfMemoryError as error:
            failure = error
        else:
            fitting.append(name)
    if not fitting:
        raise failure
    return fitting


def _milliseconds(
    run: Callable[[str], object], names: list[str], device: torch.device
) -> dict[str, float]:
    """Milliseconds on the device of a call by each route: the median of several turns.

    The card is heated first, and routes take turns, each for long enough that its clock follows.
    Routes for which there is no memory are left out.
    """

    def timed(name: str, calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run(name)
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / calls

    with torch.cuda.device(device):
        names = with_room(run, names)
        once = {name: timed(name, 2) for name in names}
        timed(names[0], 1 + int(HEAT_MS / once[names[0]]))
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:
                timed(name, 1 + int(WARM_MS / once[name]))
                times[name].append(timed(name, 1 + int(TIMED_MS / once[name])))
    return {name: statistics.median(values) for name, values in times.items()}
