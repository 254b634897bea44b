"""The reference blocks against their formulas in float64, on fresh random inputs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import golden
from magihuman.export import exporting
from magihuman.graphs.transformer import compile as compiling
from magihuman.kernels import reference as ref
from magihuman.kernels.decoder import reference as decoder_reference
from magihuman.runtime import config

FP32 = 1e-6  # fp32 sums over a few hundred terms
BF16 = 2**-8  # one rounding to bf16, 8 bits of mantissa


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("counts", [None, (5, 3, 2), (10, 0, 0), (0, 9, 1), (1, 0, 9)])
def test_rms_norm(counts: ref.Counts | None) -> None:
    x, weight = 3 * randn(10, 48), randn(48 if counts is None else 144)
    own = weight.double().expand(10, -1) if counts is None else rows_of(weight, counts)
    scale = (x.double().square().mean(-1, keepdim=True) + 1e-6) ** -0.5
    out = ref.rms_norm(x, weight, counts)
    assert out.dtype == torch.float32
    assert golden.error(out, x.double() * scale * (own + 1)) <= FP32


def rows_of(weight: Tensor, counts: ref.Counts) -> Tensor:
    """The weight of each row, [N, ...], by plain indexing."""
    modality = [i for i, count in enumerate(counts) for _ in range(count)]
    return weight.double().unflatten(0, (3, -1))[modality]


@pytest.mark.parametrize("counts", [None, (5, 3, 2), (0, 9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(counts: ref.Counts | None, dtype: torch.dtype) -> None:
    x, weight = randn(10, 33), randn(7 if counts is None else 21, 33, dtype=dtype)
    own = weight.double().expand(10, 7, 33) if counts is None else rows_of(weight, counts)
    expected = torch.einsum("nk,nok->no", x.to(dtype).double(), own)
    out = ref.linear(x, weight, counts)
    assert out.dtype == dtype
    assert golden.error(out, expected) <= (FP32 if dtype == torch.float32 else BF16)


def exponents_apart(rows: int) -> Tensor:
    """A factor for each row, from 1e-30 to 1e30."""
    return torch.logspace(-30, 30, rows)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_rows_keep_three_bits(dtype: torch.dtype) -> None:
    x = (randn(16, 4096) * exponents_apart(16)).to(dtype)
    values, scale = ref.quantize_rows(x)
    assert (values.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    largest = x.double().abs().amax(-1)
    torch.testing.assert_close(scale.double() * 448, largest, rtol=FP32, atol=0)
    assert (values.float().abs().amax(-1) == 448).all()
    back = ref.dequantize_rows(values, scale)
    assert back.dtype == torch.float32
    for row in range(16):
        # Three bits of mantissa: uniform rounding errors of Gaussian numbers are 2.6e-2 of them.
        assert 0.024 < golden.error(back[row], x[row]) < 0.029


def test_quantised_rows_are_the_nearest_values() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = codes[codes.isfinite()].unique()
    assert codes.max() == ref.FP8_LIMIT
    x = randn(4, 512)
    values, scale = ref.quantize_rows(x)
    scaled = x.double() / scale.double()[:, None]
    nearest = (scaled[..., None] - codes).abs().amin(-1)
    # But for the rounding of the product, at most 448 * 2^-23.
    assert ((values.double() - scaled).abs() - nearest <= 1e-4).all()


def test_rows_that_have_no_scale_of_their_own() -> None:
    x = torch.stack((torch.zeros(4), torch.full((4,), 1e-38), torch.full((4,), 3e38)))
    x[1, 0], x[2, 0] = 0.0, -3e38
    values, scale = ref.quantize_rows(x)
    assert (values[0].float() == 0).all()
    assert (scale > 0).all() and (1 / scale).isfinite().all()
    assert golden.error(ref.dequantize_rows(values, scale)[1], x[1]) <= 2**-4
    assert (values[2].float() == torch.tensor([-448.0, 448, 448, 448])).all()


@pytest.mark.parametrize("counts", [None, (5, 3, 2), (0, 9, 1)])
def test_scaled_linear(counts: ref.Counts | None) -> None:
    outputs = 7 if counts is None else 21
    x, scale = ref.quantize_rows(randn(10, 64) * exponents_apart(10))
    weight, weight_scale = ref.quantize_rows(randn(outputs, 64) * torch.rand(outputs, 1))
    own = weight.double() * weight_scale.double()[:, None]
    own = own.expand(10, 7, 64) if counts is None else rows_of(own, counts)
    expected = torch.einsum("nk,nok->no", x.double() * scale.double()[:, None], own)
    out = ref.scaled_linear(x, scale, weight, weight_scale, counts)
    assert out.dtype == torch.bfloat16
    for row in range(10):
        assert golden.error(out[row], expected[row]) <= BF16


def test_rotation_turns_pairs_and_keeps_the_rest() -> None:
    x, angle = randn(6, 2, 32), randn(6, 12)
    out = ref.rotate(x, torch.cat((angle.sin(), angle.cos()), dim=-1)).double()
    pairs = torch.complex(x[..., :12].double(), x[..., 12:24].double())
    turned = pairs * torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[:, None]
    assert golden.error(out[..., :12], turned.real) <= FP32
    assert golden.error(out[..., 12:24], turned.imag) <= FP32
    assert (out[..., 24:] == x[..., 24:]).all()


def test_rope_table_of_known_coordinates() -> None:
    coords = torch.tensor(
        [
            [3.0, 2, 5, 8, 4, 6, 8, 4, 6],  # scale 1; h and w centred
            [4.0, 0, 0, 9, 1, 1, 5, 1, 1],  # time scale (5 - 1) / (9 - 1)
            [-7.0, 0, 0, 7, 1, 1, 1, 1, 1],  # scale 0: not rotated
        ]
    )
    bands = torch.tensor([1.0, 0.1])
    table = ref.rope_table(coords, bands)
    angles = torch.tensor(
        [[3.0, 0.3, 0.5, 0.05, 2.5, 0.25], [2.0, 0.2, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 0]]
    )
    torch.testing.assert_close(table, torch.cat((angles.sin(), angles.cos()), dim=-1))


@pytest.mark.parametrize("tokens", [1, 63, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = (randn(tokens, heads, 32, dtype=dtype) for heads in (6, 2, 2))
    keys, values = (x.double().repeat_interleave(3, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) / math.sqrt(32)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    out = ref.attention(q, k, v)
    assert out.dtype == dtype
    assert golden.error(out, expected) <= (FP32 if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("reach", [0, 1, 3, 50])
@pytest.mark.parametrize("others", [0, 1, 40])
def test_local_attention(reach: int, others: int) -> None:
    frames, frame_tokens = 5, 7
    video = frames * frame_tokens
    q, k, v = (randn(video + others, heads, 16) for heads in (4, 2, 2))
    frame = torch.arange(video + others) // frame_tokens
    is_video = torch.arange(video + others) < video
    near = (frame[:, None] - frame).abs() <= reach
    mask = near | ~is_video | ~is_video[:, None]
    keys, values = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) / 4
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, values)
    out = ref.attention(q, k, v, ref.LocalAttention(frames, frame_tokens, reach))
    assert golden.error(out, expected) <= FP32


def test_local_attention_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(45, heads, 16) for heads in (4, 2, 2))
    local = ref.LocalAttention(3, 12, 1)
    whole = ref.attention(q, k, v, local)
    monkeypatch.setattr(ref, "QUERY_BLOCK", 5)
    torch.testing.assert_close(ref.attention(q, k, v, local), whole)


def test_head_gate() -> None:
    x, gate = randn(5, 3, 8), 4 * randn(5, 3)
    expected = x.double() / (1 + (-gate.double()).exp())[..., None]
    assert golden.error(ref.head_gate(x, gate), expected) <= FP32


def test_clamped_activations() -> None:
    x = 8 * randn(40, 26)
    glu, lin = x[:, ::2].double().clamp(max=7), x[:, 1::2].double().clamp(-7, 7)
    expected = glu / (1 + (-1.702 * glu).exp()) * (lin + 1)
    assert golden.error(ref.swiglu7(x), expected) <= FP32
    y = x.double().clamp(max=7)
    assert golden.error(ref.gelu7(x), y / (1 + (-1.702 * y).exp())) <= FP32


def test_activations_are_bounded() -> None:
    x = torch.tensor([[1e4, 1e4, 1e4, -1e4, -1e4, 1e4, -0.5, 1e4]])
    assert ref.swiglu7(x).abs().max() <= 56
    assert ref.gelu7(x).abs().max() <= 7
    assert ref.swiglu7(x.bfloat16()).dtype == ref.gelu7(x.bfloat16()).dtype == torch.bfloat16


def test_rows_are_padded_to_whole_tiles() -> None:
    """Those of the model's activations among them."""
    widths = {1: 128, 128: 128, 129: 256, 13652: 13696, 20480: 20480}
    assert {width: ref.padded_width(width) for width in widths} == widths


def test_what_docstrings_name_is_there() -> None:
    """Of both references, in any module's text."""
    packages = [Path(name.__file__).parents[0] for name in (ref, compiling, config, exporting)]
    files = [file for package in packages for file in sorted(package.rglob("*.py"))]
    modules = {"reference": ref, "decoder_reference": decoder_reference}
    named = [
        (file.name, module, name)
        for file in files
        for module, name in re.findall(r"`((?:decoder_)?reference)\.(\w+)`", file.read_text())
    ]
    assert len(named) > 40
    assert [entry for entry in named if not hasattr(modules[entry[1]], entry[2])] == []
