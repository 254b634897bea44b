"""The video decoder's operators on a CPU: what their fake versions promise."""

from __future__ import annotations

import torch

from magihuman.kernels.decoder import ops as decoder_ops
from magihuman.kernels.decoder import reference as ref


def test_yuv420() -> None:
    rgb = torch.randint(0, 256, (3, 4, 6, 3), dtype=torch.uint8)
    assert torch.equal(decoder_ops.yuv420(rgb), ref.to_yuv420(rgb))
    torch.library.opcheck(decoder_ops.yuv420, (rgb,), test_utils=("test_schema", "test_faketensor"))
