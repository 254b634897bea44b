"""Operators on a CPU: the reference's values, in the layout that their fake versions promise."""

from __future__ import annotations

import pytest
import torch

from magihuman.kernels import ops
from magihuman.kernels import reference as ref

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
