"""The quantisers against their references, on a GPU: bits for one, single steps for the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from magihuman.kernels import int8, ops
from magihuman.kernels import reference as ref

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman.kernels.linear.quantize import norm_rows, quantize_rows

DEVICE = torch.device("cuda")
ROWS = [1, 63, 127, 4266]
CHANNELS = [128, 384, 5120]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch.empty returns is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def groupings(rows: int) -> list[ref.Counts | None]:
    """No groups; three runs; runs of length 0 and 1."""
    third = rows // 3
    return [None, (rows - 2 * third, third, third), (0, 1, rows - 1), (rows, 0, 0)]


def bits(values: Tensor) -> Tensor:
    """The codes of e4m3 values, in the order of their magnitude."""
    return values.contiguous().view(torch.uint8).int()


def codes(values: Tensor) -> Tensor:
    """`bits`, or the integers themselves."""
    return values.int() if values.dtype == ref.INT8 else bits(values)


def assert_padded_with_zeros(values: Tensor) -> None:
    rows, columns = values.shape
    stride = -(-columns // 16) * 16
    assert values.stride() == (stride, 1)
    assert values.data_ptr() % 16 == 0
    stored = values.as_strided((rows, stride), (stride, 1))
    assert (bits(stored[:, columns:]) == 0).all()


def assert_same_bits(x: Tensor) -> None:
    for dtype in (ref.FP8, ref.INT8):
        values, scale = quantize_rows(x, dtype)
        expected, expected_scale = ref.quantize_rows(x, dtype)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(bits(values), bits(expected))
        assert_padded_with_zeros(values)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("channels", [*CHANNELS, 13652, 1, 5, 16384])
def test_quantize_rows(rows: int, channels: int) -> None:
    assert_same_bits(randn(rows, channels))
    wide = randn(rows, channels + 8 + -channels % 128)
    wide[:, channels:] = float("nan")  # must not be read
    assert_same_bits(wide[:, :channels])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_magnitude(dtype: torch.dtype) -> None:
    """Rows of zeros, of subnormal numbers, and up to the largest."""
    exponents = torch.arange(-149, 128, dtype=torch.float64, device=DEVICE)
    x = randn(277, 5120, dtype=torch.float64).clamp(-1.9, 1.9) * exponents.exp2()[:, None]
    x = x.to(dtype)
    x[5] = 0.0
    x[6] = -0.0
    x[7] = torch.finfo(dtype).max
    assert_same_bits(x)


def test_ties_and_both_ends() -> None:
    """Every bf16 number within e4m3's limit, at scale 1: halfway cases and subnormals too."""
    codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16, device=DEVICE)
    x = codes.view(torch.bfloat16)
    x = x[x.float().abs() <= ref.FP8_LIMIT]
    x = torch.cat((x, x.new_zeros(-len(x) % 16)))
    rows = x.new_zeros(-(-len(x) // 16), 17)
    rows[:, :16] = x.unflatten(0, (-1, 16))
    rows[:, 16] = ref.FP8_LIMIT
    assert_same_bits(rows)


def test_halves_in_int8() -> None:
    """At scale 1: to the nearest even."""
    halves = torch.arange(-254, 255, device=DEVICE) / 2
    rows = torch.cat((halves, halves.new_full((1,), ref.INT8_LIMIT)))[None].repeat(3, 1)
    assert_same_bits(rows)
    assert quantize_rows(rows, ref.INT8)[1].eq(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels", [100, 5120])
def test_a_row_that_is_not_finite_has_no_scale_in_int8(bad: float, channels: int) -> None:
    x = randn(63, channels, dtype=torch.float32)
    x[5, 3] = x[62, channels - 1] = bad
    weight = 0.1 * randn(channels, dtype=torch.float32)
    for _, scale in (quantize_rows(x, ref.INT8), norm_rows(x, weight, None, ref.INT8)):
        assert (~scale.isfinite()).nonzero().flatten().tolist() == [5, 62]


@pytest.mark.parametrize("dtype", [ref.FP8, ref.INT8])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("channels", [*CHANNELS, 100, 13652])
def test_norm_rows(rows: int, channels: int, dtype: torch.dtype) -> None:
    for counts in groupings(rows):
        x = 3 * randn(rows, channels, dtype=torch.float32)
        x[rows // 2] = 0.0
        weight = 0.1 * randn(channels * (3 if counts else 1), dtype=torch.float32)
        values, scale = norm_rows(x, weight, counts, dtype)
        expected, expected_scale = ref.quantize_rows(ref.rms_norm(x, weight, counts), dtype)
        # Sums in another order and an approximate rsqrt: a few units in the last place.
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        # Such a unit moves a value over the middle between two numbers once in 1e5.
        steps = (codes(values) - codes(expected)).abs()
        assert steps.max() <= 1
        assert (steps != 0).sum() <= max(1, 1e-3 * steps.numel())
        assert_padded_with_zeros(values)


@pytest.mark.parametrize("columns", [384, 340])
def test_operators(columns: int) -> None:
    x, weight = randn(63, columns, dtype=torch.float32), randn(3 * columns, dtype=torch.float32)
    wide = randn(63, 400)[:, :columns]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.norm_fp8, (x, 0.1 * weight, [40, 20, 3]), test_utils=checks)
    torch.library.opcheck(ops.quantize_fp8, (wide,), test_utils=checks)
    torch.library.opcheck(int8.norm_int8, (x, 0.1 * weight, [40, 20, 3]), test_utils=checks)
    torch.library.opcheck(int8.quantize_int8, (wide,), test_utils=checks)


def test_no_rows_and_rows_too_long() -> None:
    values, scale = quantize_rows(randn(0, 384))
    assert values.shape == (0, 384) and scale.shape == (0,)
    with pytest.raises(ValueError, match="at most 32768, got 32784"):
        quantize_rows(randn(1, 32784))
    with pytest.raises(ValueError, match="pass a copy"):
        quantize_rows(randn(384, 16).T)
