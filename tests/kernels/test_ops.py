"""Operators on a CPU: the reference's values, in the layout that their fake versions promise."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import kernel_cases
from magihuman.kernels import int8, ops
from magihuman.kernels import reference as ref
from magihuman.kernels.decoder import ops as decoder_ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels.parallel import exchange

CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize(("columns", "stride"), [(5, 16), (48, 48)])
def test_quantisers(columns: int, stride: int) -> None:
    x, weight = torch.randn(6, columns), torch.randn(3 * columns)
    expected = ref.quantize_rows(ref.rms_norm(x, weight, (3, 2, 1)))
    for mine, right in zip(ops.norm_fp8(x, weight, [3, 2, 1]), expected, strict=True):
        assert torch.equal(mine.float(), right.float())
    torch.library.opcheck(ops.norm_fp8, (x, weight, [3, 2, 1]), test_utils=CHECKS)
    wide = torch.randn(6, columns + 3).bfloat16()[:, :columns]
    values, scale = ops.quantize_fp8(wide)
    assert values.stride() == (stride, 1)
    for mine, right in zip((values, scale), ref.quantize_rows(wide), strict=True):
        assert torch.equal(mine.float(), right.float())
    torch.library.opcheck(ops.quantize_fp8, (wide,), test_utils=CHECKS)


@pytest.mark.parametrize(("rows", "stride"), [(16, 16), (5, 8)])
def test_rows_of_fp8_products_start_at_multiples_of_16_bytes(rows: int, stride: int) -> None:
    """On the CPU, and by the fake version, as the kernel writes them."""
    (values, scale), (weight, weight_scale) = narrow(6, 20), narrow(3 * rows, 20)
    out = ops.linear_fp8(values, scale, weight, weight_scale, ROWS)
    assert (out.shape, out.stride()) == ((6, rows), (stride, 1))
    expected = ref.scaled_linear(values, scale, weight, weight_scale, (3, 2, 1))
    assert torch.equal(out, expected)


def test_the_cpu_needs_neither_route_nor_backend() -> None:
    """By default both are unset, by the schemas as by Python's signatures."""
    x, weight = torch.randn(6, 16), torch.randn(3 * 8, 16)
    counts = [3, 2, 1]
    expected = ref.linear(x, weight, (3, 2, 1))
    own = torch.ops.magihuman
    assert torch.equal(ops.linear(x, weight, counts), expected)
    assert torch.equal(own.linear(x, weight, counts, ops.UNSET), expected)
    assert torch.equal(own.linear_add_(torch.ones(6, 8), x, weight, counts), 1 + expected)
    q, k, v = (torch.randn(6, heads, 16) for heads in (4, 2, 2))
    gate, length = torch.randn(6, 4), torch.tensor(5, dtype=torch.int32)
    right = ref.gated_attention(q, k, v, gate, None, length)
    torch.testing.assert_close(own.gated_attention(q, k, v, gate, length, []), right)
    names = ("linear", "linear_activation", "linear_add_", "linear_fp8", "linear_add_fp8_")
    for name in (*names, "linear_activation_fp8", "gated_attention"):
        last = getattr(own, name).default._schema.arguments[-1]
        assert (last.name in ("route", "backend"), last.default_value) == (True, ops.UNSET)


ROWS = [3, 2, 1]
HEADS, KV_HEADS, DIM = 4, 2, 16
QKV_ROWS = (HEADS + 2 * KV_HEADS) * DIM + HEADS
LENGTH = torch.tensor(5, dtype=torch.int32)
Arguments = tuple[Any, ...]


def narrow(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 as `quantize_fp8` gives them, and their scales."""
    return ops.quantize_fp8(torch.randn(rows, columns))


def whole(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """As `narrow`, of whole numbers."""
    return int8.quantize_int8(torch.randn(rows, columns))


def video(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


def projection() -> Arguments:
    """A projection to q, k, v and gates, the norms' weights and the rotary table."""
    norms = (torch.randn(3 * DIM), torch.randn(3 * DIM))
    return torch.randn(6, QKV_ROWS).bfloat16(), *norms, torch.randn(6, 12)


def attended() -> Arguments:
    q, k, v = (torch.randn(6, heads, DIM).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v, torch.randn(6, HEADS).bfloat16(), LENGTH


def attended_fp8() -> Arguments:
    qkv, q_weight, k_weight, rope = projection()
    parts = ops.qkv_fp8(qkv, q_weight, k_weight, rope, LENGTH, ROWS, HEADS, KV_HEADS)
    return *parts, torch.randn(6, HEADS).bfloat16(), LENGTH


def padded_weight(rows: int, columns: int, padded: int) -> Tensor:
    """A weight in rows of whole tiles, as `compile.pad_weights` lays it out."""
    return torch.randn(rows, padded).bfloat16()[:, :columns]


# Calls of every operator, by name: of all rows alike and by modality, in each dtype and layout that
# a graph has.
CASES: dict[str, Callable[[], list[Arguments]]] = {
    "add_norm": lambda: [
        (torch.randn(6, 8), torch.randn(6, 8).bfloat16(), torch.randn(8), []),
        (torch.randn(6, 8), torch.randn(6, 8), torch.randn(24), ROWS),
    ],
    "norm": lambda: [
        (torch.randn(6, 8), torch.randn(8), [], torch.bfloat16),
        (torch.randn(6, 8), torch.randn(24), ROWS, torch.float32),
    ],
    "quantize_fp8": lambda: [(torch.randn(6, 5),), (torch.randn(6, 48).bfloat16()[:, :20],)],
    "norm_fp8": lambda: [
        (torch.randn(6, 5), torch.randn(5), []),
        (torch.randn(6, 16), torch.randn(48), ROWS),
    ],
    "qkv_fp8": lambda: [(*projection(), LENGTH, ROWS, HEADS, KV_HEADS)],
    "gated_attention": lambda: [(*attended(), []), (*attended(), [2, 2, 1], "gluon")],
    "gated_attention_fp8": lambda: [(*attended_fp8(), []), (*attended_fp8(), [2, 2, 1], "gluon")],
    "activation": lambda: [
        (torch.randn(6, 10).bfloat16(), "swiglu7", 16),
        (torch.randn(6, 16), "gelu7", 16),
    ],
    "linear": lambda: [
        (torch.randn(6, 8).bfloat16(), torch.randn(4, 8).bfloat16(), []),
        (torch.randn(6, 16).bfloat16(), padded_weight(12, 5, 16), ROWS, "library"),
    ],
    "linear_activation": lambda: [
        (torch.randn(6, 8).bfloat16(), torch.randn(10, 8).bfloat16(), [], "swiglu7", 16),
        (torch.randn(6, 8).bfloat16(), torch.randn(48, 8).bfloat16(), ROWS, "gelu7", 16),
    ],
    "linear_add_": lambda: [
        (torch.randn(6, 4), torch.randn(6, 8).bfloat16(), torch.randn(4, 8).bfloat16(), []),
        (torch.randn(6, 4), torch.randn(6, 16).bfloat16(), padded_weight(12, 5, 16), ROWS),
    ],
    "quantize_int8": lambda: [(torch.randn(6, 5),), (torch.randn(6, 48).bfloat16()[:, :20],)],
    "norm_int8": lambda: [
        (torch.randn(6, 5), torch.randn(5), []),
        (torch.randn(6, 16), torch.randn(48), ROWS),
    ],
    "linear_int8": lambda: [
        (*whole(6, 20), *whole(5, 20), []),
        (*whole(6, 20), *whole(24, 20), ROWS),
    ],
    "linear_activation_int8": lambda: [
        (*whole(6, 20), *whole(10, 20), [], "swiglu7", 16),
        (*whole(6, 20), *whole(48, 20), ROWS, "gelu7", 16),
    ],
    "linear_add_int8_": lambda: [
        (torch.randn(6, 4), *whole(6, 20), *whole(4, 20), []),
        (torch.randn(6, 4), *whole(6, 20), *whole(12, 20), ROWS),
    ],
    "linear_fp8": lambda: [
        (*narrow(6, 20), *narrow(5, 20), []),
        (*narrow(6, 20), *narrow(24, 20), ROWS),
    ],
    "linear_activation_fp8": lambda: [
        (*narrow(6, 20), *narrow(10, 20), [], "swiglu7", 16, torch.bfloat16),
        (*narrow(6, 20), *narrow(48, 20), ROWS, "gelu7", 16, ref.FP8),
    ],
    "linear_add_fp8_": lambda: [
        (torch.randn(6, 4), *narrow(6, 20), 0.0, *narrow(4, 20), []),
        (torch.randn(6, 4), narrow(6, 32)[0], None, 0.125, *narrow(12, 20), ROWS),
    ],
    "rows_to_heads": lambda: [
        (torch.randn(6, QKV_ROWS).bfloat16(), HEADS, KV_HEADS, ranks) for ranks in (1, 2)
    ],
    "heads_to_rows": lambda: [(torch.randn(6, HEADS * DIM // r).bfloat16(), r) for r in (1, 2)],
    "rows_to_heads_fp8": lambda: [
        (*projection()[:3], torch.randn(6 * ranks, 12), LENGTH, rows, HEADS, KV_HEADS, ranks)
        for ranks, rows in ((1, ROWS), (2, [9, 2, 1]))
    ],
    "gated_attention_fp8_to_rows": lambda: [
        (*attended_fp8(), [], 1), (*attended_fp8(), [2, 2, 1], 2, "gluon")
    ],
    "join_norm": lambda: [
        (video(2, 8, 3, 4, 5), None, None, None, "none", 1, 1, [False, False]),
        (
            video(2, 32, 3, 4, 5), video(2, 8, 3, 6, 8), torch.randn(8), 1e-8, "silu", 1, 0,
            [True, False],
        ),
    ],
    "join_norm_": lambda: [
        (video(2, 8, 3, 4, 5), None, None, 1e-8, "relu", 1, 1, [False, False], None),
        (
            video(2, 8, 3, 6, 8), video(2, 32, 3, 4, 5), torch.randn(8), 1e-8, "silu", 0, 1,
            [False, True], 1e-6,
        ),
    ],
    "join_frames": lambda: [
        (video(2, 8, 3, 4, 5), None, torch.randn(8), True, 1),
        (video(2, 8, 3, 4, 5).bfloat16(), video(2, 8, 3, 4, 5).bfloat16(), None, False, 0),
    ],
    "join_pixels": lambda: [
        (video(1, 16, 3, 4, 5), torch.randn(16), 3, 2, torch.uint8),
        (video(2, 12, 3, 4, 5), torch.randn(12), 3, 2, torch.float32),
    ],
    "yuv420": lambda: [(torch.randint(0, 256, (3, 4, 6, 3), dtype=torch.uint8),)],
    "conv": lambda: [
        (video(1, 8, 5, 4, 5), video(16, 8, 3, 3, 3), [0, 1, 1]),
        (video(2, 8, 3, 4, 5), video(32, 8, 1, 2, 2), [0, 1, 1]),
    ],
    "add_bias": lambda: [(video(2, 8, 3, 4, 5).bfloat16(), torch.randn(8))],
}  # fmt: skip


def drawn(case: kernel_cases.KernelCase) -> list[Arguments]:
    """Calls of an operator at all shapes for a CPU, in the dtypes of a compiled forward."""
    return [case.draw(shape, torch.device("cpu"), torch.bfloat16) for shape in case.small_shapes]


CASES |= {name: functools.partial(drawn, case) for name, case in kernel_cases.CASES.items()}


# PyTorch's functionalisation refuses these, and no graph of theirs goes through it.
RETURN_WHAT_THEY_CHANGE = {"linear_add_", "linear_add_fp8_", "linear_add_int8_"}


def registered() -> set[str]:
    return {
        name.removeprefix("magihuman::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("magihuman::")
    }


@pytest.mark.parametrize("name", sorted(RETURN_WHAT_THEY_CHANGE))
def test_operators_that_change_their_input_can_be_called_by_name(name: str) -> None:
    function = getattr(int8 if name.endswith("int8_") else ops, name)
    for (stream, *rest), (again, *_) in zip(CASES[name](), CASES[name](), strict=True):
        before = again.copy_(stream).clone()
        expected = getattr(torch.ops.magihuman, name)(again, *rest)
        assert function(stream, *rest) is stream
        assert torch.equal(stream, expected) and not torch.equal(stream, before)


@pytest.mark.parametrize("name", sorted(registered()))
def test_operators_are_as_they_are_registered(name: str) -> None:
    """Schemas say what is changed and what shares memory, fake versions have shapes and strides."""
    assert name in CASES, f"torch.ops.magihuman.{name} must have a case in CASES"
    operator = getattr(torch.ops.magihuman, name).default
    torch.manual_seed(0)
    for arguments in CASES[name]():
        is_narrow = any(isinstance(x, Tensor) and x.dtype == ref.FP8 for x in arguments)
        checks = {"test_schema", "test_autograd_registration", "test_faketensor"}
        if is_narrow:
            checks.remove("test_schema")  # PyTorch's cannot compare e4m3; that below does
        if name not in RETURN_WHAT_THEY_CHANGE:
            checks.add("test_aot_dispatch_dynamic")
        with exchange.apart():
            torch.library.opcheck(operator, arguments, test_utils=sorted(checks))
            assert_schema_holds(operator, arguments)


def assert_schema_holds(operator: Any, arguments: Arguments) -> None:
    """Inputs are changed only, and share memory with results just, where the schema says so."""
    declared = operator._schema.arguments
    tensors = {a.name: x for a, x in zip(declared, arguments, strict=False) if torch.is_tensor(x)}
    before = {name: x.clone() for name, x in tensors.items()}
    results = operator(*arguments)
    results = [results] if torch.is_tensor(results) else results
    returned = set(re.findall(r"Tensor\((\w)", str(operator._schema).rpartition(" -> ")[2]))
    for argument in declared:
        if argument.name in tensors:
            x, info = tensors[argument.name], argument.alias_info
            is_same = torch.equal(x.float(), before[argument.name].float())
            assert is_same or (info is not None and info.is_write), argument.name
            memory = x.untyped_storage().data_ptr()
            shares = any(result.untyped_storage().data_ptr() == memory for result in results)
            assert shares == (info is not None and bool(info.before_set & returned)), argument.name


@pytest.mark.parametrize("case", kernel_cases.CASES.values(), ids=lambda case: case.name)
def test_operators_on_a_cpu_are_their_references(case: kernel_cases.KernelCase) -> None:
    """Bit for bit, in the layout that their fake versions promise."""
    for arguments in drawn(case):
        meta = [x.to("meta") if torch.is_tensor(x) else x for x in arguments]
        results = case.fused(*arguments), case.plain(*arguments), case.fused(*meta)
        for mine, right, fake in zip(*results, strict=True):
            assert torch.equal(mine, right)
            assert (mine.dtype, mine.dtype) == (right.dtype, fake.dtype)
            assert (mine.shape, mine.stride()) == (fake.shape, fake.stride())


def test_every_case_is_one_of_an_operator() -> None:
    assert CASES.keys() == registered()
