"""Every script of benchmarks/ runs, at a tiny size on the CPU, so that none rots."""

from __future__ import annotations

import pytest
import torch

import fp8
import measure
import sizes
from magihuman.graphs import quantization
from magihuman.runtime.weights import random_weights


@pytest.mark.parametrize("fp8_attention", [False, True])
def test_the_bound_of_fp8_has_every_product_and_attention(fp8_attention):
    size = sizes.TINY
    model = random_weights.dit(size.arch, 0, torch.device("cpu"), torch.bfloat16, "distill")
    quantization.quantize_model(model, quantization.quantized_linears(size.arch))
    calls = fp8.bare(model, size.layout, fp8_attention)
    assert len(calls) == 5 * size.arch.num_layers  # four linears and attention
    rows = 4 * 4 * 4 + 13 + 64  # video, audio, and text with the padding of its bucket
    for call in calls:
        result = call()
        assert result.shape[0] == rows and result.isfinite().all()


def test_the_bound_s_rows_are_those_of_the_compiled_forward():
    assert measure.padded_rows(measure.LAYOUT) == 32 * 8 * 15 + 126 + 320
