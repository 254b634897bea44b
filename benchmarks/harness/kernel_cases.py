"""Fused kernels as a table, and what rewritten graphs hold: all that a new kernel adds to tests.

An entry of `CASES` is read by `tests/kernels` (the operator on a CPU, its schema, Triton's
interpreter, and what the compiler makes of it for Hopper), by
`tests/gpu/kernels/test_kernels.py` and by `benchmarks/suites/test_kernels.py`. Kernels whose
results are not compared by an error, as e4m3 values, have tests of their own there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from magihuman.kernels import head_norm, ops  # noqa: F401 - register torch.ops.magihuman
from magihuman.kernels import reference as ref
from magihuman.runtime.config import DiTConfig

Shape = dict[str, Any]
Results = tuple[Tensor, ...]

ODD_ROWS = (1, 63, 127, 4266, 14762)  # of which tiles divide none


@dataclass(frozen=True)
class KernelCase:
    """A fused kernel.

    Attributes:
        name: of the operator.
        module: the file with the kernel, below `magihuman.kernels`.
        kernel: the Triton function in it.
        launch: launches the kernel, also on tensors that are on no GPU, where the operator would
            not. Arguments are the module and those of the operator.
        reference: the plain-torch function, of the operator's arguments.
        exact: the same with less rounding, which both are compared with.
        draw: fresh arguments of the operator for a shape, tensors on this device, those that a
            compiled forward has in bf16 in this dtype.
        small_shapes: for a CPU. Results may be empty.
        odd_shapes: for a GPU; no vector or tile divides all of their sizes.
        full_shape: that of a model, for its rows by modality.
        work: bytes that a call reads and writes at a shape, or its FLOP.
        unit: which of them.
        group: of the benchmarks that it is among.
        loads, stores: bytes that a thread moves at once at the published model's shape, over all
            loads and stores of global memory.
        slack: how much larger the error may be than that of `reference`.
        floor: an error that is none, relative to the norm of the result.
    """

    name: str
    module: str
    kernel: str
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    exact: Callable[..., Any]
    draw: Callable[[Shape, torch.device, torch.dtype], tuple[Any, ...]]
    small_shapes: tuple[Shape, ...]
    odd_shapes: tuple[Shape, ...]
    full_shape: Callable[[ref.Counts, DiTConfig], Shape]
    work: Callable[[Shape], int]
    unit: Literal["bytes", "flops"]
    group: str
    loads: frozenset[int]
    stores: frozenset[int]
    slack: float = 1.1
    floor: float = 1e-7

    def loaded(self) -> Any:
        """The module with the kernel; needs Triton."""
        return importlib.import_module(f"magihuman.kernels.{self.module}")

    def launched(self, *arguments: Any) -> Results:
        """Results of the kernel itself."""
        return as_tuple(self.launch(self.loaded(), *arguments))

    def fused(self, *arguments: Any) -> Results:
        """Results of the operator: the kernel on a GPU, the reference on a CPU."""
        return as_tuple(getattr(torch.ops.magihuman, self.name)(*arguments))

    def plain(self, *arguments: Any) -> Results:
        """Results of `reference`."""
        return as_tuple(self.reference(*arguments))

    def precise(self, *arguments: Any) -> Results:
        """Results of `exact`."""
        return as_tuple(self.exact(*arguments))


def as_tuple(results: Any) -> Results:
    return results if isinstance(results, tuple) else (results,)


def as_counts(rows: list[int]) -> ref.Counts | None:
    """What a kernel takes for an operator's `modality_rows`."""
    return (rows[0], rows[1], rows[2]) if rows else None


def groupings(rows: int) -> Iterator[list[int]]:
    """No groups; three runs; runs of length 0 and 1."""
    third = rows // 3
    yield from ([], [rows - 2 * third, third, third], [0, 1, rows - 1], [rows, 0, 0])


# -- qk_norm_rope ------------------------------------------------------------------------------


def draw_qk_norm_rope(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """A projection and what goes with it.

    Its rows follow each other closely, or start at a stride that is odd or a multiple of 8.
    """
    rows, dim = shape["rows"], shape["dim"]
    heads, kv_heads, runs = shape["heads"], shape["kv_heads"], shape["runs"]
    columns = (heads + 2 * kv_heads) * dim + heads
    stride = {"close": columns, "odd": columns // 2 * 2 + 3, "eights": columns // 8 * 8 + 8}
    wide = torch.randn(rows, stride[shape.get("stride", "close")], device=device)
    qkv = wide.to(dtype)[:, :columns]
    norms = (0.1 * torch.randn(dim * (3 if runs else 1), device=device) for _ in "qk")
    angle = torch.randn(rows, 3 * dim // 8, device=device)
    return qkv, *norms, torch.cat((angle.sin(), angle.cos()), dim=1), runs, heads, kv_heads


def split_qkv(qkv: Tensor, *rest: Any) -> Results:
    """q, k and v, without the gates."""
    *tensors, runs, heads, kv_heads = rest
    return ref.split_qkv(qkv, *tensors, as_counts(runs), heads, kv_heads)[:3]


def qk_norm_rope_bytes(shape: Shape) -> int:
    """q, k and v read and written in bf16; the table and two weights."""
    rows, dim = shape["rows"], shape["dim"]
    columns = (shape["heads"] + 2 * shape["kv_heads"]) * dim
    return 2 * 2 * rows * columns + 4 * rows * 2 * (3 * dim // 8) + 4 * 2 * dim


QK_NORM_ROPE = KernelCase(
    name="qk_norm_rope",
    module="attention.qk_norm_rope",
    kernel="_qk_norm_rope",
    launch=lambda module, *arguments: module.qk_norm_rope(
        *arguments[:4], as_counts(arguments[4]), *arguments[5:]
    ),
    reference=split_qkv,
    exact=lambda qkv, *rest: split_qkv(qkv.float(), *rest),
    draw=draw_qk_norm_rope,
    small_shapes=tuple(
        {"rows": 5, "heads": heads, "kv_heads": kv, "dim": dim, "runs": runs, "stride": stride}
        for heads, kv, dim in ((10, 2, 128), (4, 2, 64), (3, 1, 32))
        for runs in ([], [2, 1, 2], [0, 1, 4], [5, 0, 0])
        for stride in ("odd", "eights")
    ),
    odd_shapes=tuple(
        {"rows": rows, "heads": heads, "kv_heads": kv_heads, "dim": dim, "runs": runs}
        for rows in ODD_ROWS
        for heads, kv_heads, dim in ((40, 8, 128), (10, 2, 128), (4, 2, 64), (4, 2, 32), (3, 1, 32))
        for runs in groupings(rows)
    ),  # row strides of 7208 to 163
    full_shape=lambda counts, config: {
        "rows": sum(counts), "heads": config.heads, "kv_heads": config.kv_heads,
        "dim": config.head_dim, "runs": [],
    },
    work=qk_norm_rope_bytes,
    unit="bytes",
    group="norms and activations",
    loads=frozenset({16}),
    stores=frozenset({16}),
)  # fmt: skip

# -- head_norm ---------------------------------------------------------------------------------


def draw_head_norm(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """The stream after the last layer, fp32 whatever the dtype, and two weights."""
    rows, channels = [shape["video"], shape["audio"], shape["text"]], shape["channels"]
    weights = (0.1 * torch.randn(channels, device=device) for _ in range(2))
    return 3 * torch.randn(sum(rows), channels, device=device), *weights, rows


def exact_head_norm(x: Tensor, *rest: Any) -> Results:
    """The formula in fp64."""
    *weights, rows = rest
    scale = (x.double().square().mean(-1, keepdim=True) + 1e-6) ** -0.5
    video, audio, _ = (x.double() * scale).split(rows)
    return video * (weights[0].double() + 1), audio * (weights[1].double() + 1)


def head_norm_shapes(rows: tuple[ref.Counts, ...], channels: tuple[int, ...]) -> tuple[Shape, ...]:
    """Each of these rows by modality, in rows of each of these lengths."""
    return tuple(
        {"video": video, "audio": audio, "text": text, "channels": length}
        for video, audio, text in rows
        for length in channels
    )


HEAD_NORM = KernelCase(
    name="head_norm",
    module="head_norm",
    kernel="_head_norm",
    launch=lambda module, *arguments: module.norm_rows(*arguments),
    reference=lambda *arguments: ref.head_norm(*arguments[:3], as_counts(arguments[3])),
    exact=exact_head_norm,
    draw=draw_head_norm,
    small_shapes=head_norm_shapes(
        ((2, 1, 2), (0, 1, 4), (4, 0, 1), (0, 0, 5), (3, 2, 0)),
        (100, 128, 200),  # below, at and above a power of two
    ),
    odd_shapes=head_norm_shapes(
        ((1, 1, 1), (61, 2, 0), (0, 63, 64), (4139, 0, 127), (14175, 126, 461), (0, 0, 9)),
        (100, 384, 5120, 5124),
    ),
    full_shape=lambda counts, config: head_norm_shapes((counts,), (config.hidden_size,))[0],
    work=lambda shape: 4 * shape["channels"] * (2 * (shape["video"] + shape["audio"]) + 2),
    unit="bytes",
    group="norms and activations",
    loads=frozenset({16}),
    stores=frozenset({16}),
)

CASES = {case.name: case for case in (QK_NORM_ROPE, HEAD_NORM)}


# -- graphs ------------------------------------------------------------------------------------
# Of the golden architecture: five layers.

# Places that each pass finds.
PASSES = {
    "add_rms_norm": 10,
    "qk_norm_rope": 5,
    "attention": 5,
    "activation": 5,
    "linear": 20,
    "epilogue": 15,
    "head_norm": 1,
}

# Calls of operators that stand outside of the layers, whatever is quantised; where `measure` splits
# a profile by layers, kernels of these names count as such.
OUTSIDE = {"head_norm": 1}

# Calls of operators, by the linears whose weights are in 8 bits: e4m3, or int8. Up and down
# projections read and write each other's type, whichever of them is not.
OPERATORS = {
    "none": {
        "norm": 10, "qk_norm_rope": 5, "gated_attention": 5, "linear": 5, "linear_activation": 5,
        "linear_add_": 10, **OUTSIDE,
    },
    "all": {
        "norm_fp8": 10, "qk_norm_rope": 5, "gated_attention": 5, "quantize_fp8": 5, "linear_fp8": 5,
        "linear_activation_fp8": 5, "linear_add_fp8_": 10, **OUTSIDE,
    },
    "all but down_proj": {
        "norm_fp8": 10, "qk_norm_rope": 5, "gated_attention": 5, "quantize_fp8": 5, "linear_fp8": 5,
        "linear_activation_fp8": 5, "linear_add_fp8_": 5, "linear_add_": 5, **OUTSIDE,
    },
    "all but up_gate_proj": {
        "norm_fp8": 5, "norm": 5, "qk_norm_rope": 5, "gated_attention": 5, "quantize_fp8": 10,
        "linear_fp8": 5, "linear_activation": 5, "linear_add_fp8_": 10, **OUTSIDE,
    },
    "all in int8": {
        "norm_int8": 10, "qk_norm_rope": 5, "gated_attention": 5, "quantize_int8": 10,
        "linear_int8": 5, "linear_activation_int8": 5, "linear_add_int8_": 10, **OUTSIDE,
    },
    "all but up_gate_proj in int8": {
        "norm_int8": 5, "norm": 5, "qk_norm_rope": 5, "gated_attention": 5, "quantize_int8": 10,
        "linear_int8": 5, "linear_activation": 5, "linear_add_int8_": 10, **OUTSIDE,
    },
}  # fmt: skip

# Calls of PyTorch's own operators that compute: embedders and heads.
ELEMENTWISE: dict[str, int] = {}
REDUCTIONS: dict[str, int] = {}
PLAIN = {"linear": 3 + 2, "cat": 1, **ELEMENTWISE, **REDUCTIONS}
