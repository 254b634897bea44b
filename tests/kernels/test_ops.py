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
