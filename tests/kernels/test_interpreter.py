"""The streaming kernels run on a CPU by Triton's interpreter, against their references.

In fp32: the interpreter truncates where a GPU rounds to bf16. It has to be asked for before Triton
is imported, hence the process of its own, which runs this file.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.kernel_cases import CASES, KernelCase
from magihuman.kernels import reference as ref
from magihuman.kernels.decoder import reference as decoder

pytest.importorskip("triton")

ROWS = 5
COUNTS: list[ref.Counts | None] = [None, (2, 1, 2), (0, 1, 4), (5, 0, 0)]


def test_kernels_in_the_interpreter_agree_with_their_references() -> None:
    paths = {"PYTHONPATH": str(Path(__file__).parents[2] / "benchmarks")}
    environment = os.environ | paths | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """The same formulas in fp32, but for the order of the sums: a few units in the last place."""
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def weight_of(columns: int, counts: ref.Counts | None) -> Tensor:
    return 0.1 * torch.randn(columns * (3 if counts else 1))


def in_wider_rows(columns: int) -> list[Tensor]:
    """Rows that do not follow each other closely: at an odd stride, and at a multiple of 8."""
    strides = (columns // 2 * 2 + 3, columns // 8 * 8 + 8)
    return [torch.randn(ROWS, stride)[:, :columns] for stride in strides]


def check_add_rms_norm() -> None:
    from magihuman.kernels.add_rms_norm import add_rms_norm

    for channels in (100, 128, 200):  # below, at and above a power of two
        for counts in COUNTS:
            x, delta = torch.randn(ROWS, channels), torch.randn(ROWS, channels)
            weight = weight_of(channels, counts)
            for change in (delta, None):
                ours = add_rms_norm(x, change, weight, counts, torch.float32)
                expected = ref.add_norm(x, change, weight, counts, torch.float32)
                for mine, right in zip(ours, expected, strict=True):
                    assert_close(mine, right)


def check_case(case: KernelCase) -> None:
    for shape in case.small_shapes:
        arguments = case.draw(shape, torch.device("cpu"), torch.float32)
        expected = case.plain(*arguments)
        for mine, right in zip(case.launched(*arguments), expected, strict=True):
            assert_close(mine, right)


def check_portable_products() -> None:
    """Of every epilogue and dtype of operands, over runs, odd sizes and a depth of whole blocks.

    Results in bf16 are truncated here, up to 2^-7 of each, where a GPU rounds them.
    """
    from magihuman.kernels.linear.matmul_portable import Tile, matmul

    tile = Tile(rows=16, columns=32, depth_bytes=64, stages=2, warps=4, group=2)
    wide = Tile(rows=16, columns=256, depth_bytes=64, stages=2, warps=4)  # added piece by piece
    shapes = [(37, 72, 50, None), (37, 128, 48, (20, 1, 16)), (20, 100, 270, (0, 20, 0))]
    functions = {"store": None, "gelu7": ref.gelu7, "swiglu7": ref.swiglu7, "add": None}
    dtypes = (torch.float32, torch.int8, torch.float8_e4m3fn)
    for (rows, depth, columns, counts), dtype in itertools.product(shapes, dtypes):
        x = torch.randn(rows, depth)
        weight = torch.randn(columns * (3 if counts else 1), depth) * 2 * depth**-0.5
        scales: tuple[Tensor, ...] = ()
        values = x, weight
        if dtype != torch.float32:
            (x, x_scale), (weight, scale) = (ref.quantize_rows(own, dtype) for own in values)
            scales = x_scale, scale
            values = ref.dequantize_rows(x, x_scale), ref.dequantize_rows(weight, scale)
        product = ref.per_modality(lambda a, b: a @ b.t(), *values, counts)
        for epilogue, function in functions.items():
            exact = product if function is None else function(product)
            before = torch.randn(exact.shape)
            if epilogue == "add":
                out, again = before.clone(), before.clone()
                matmul(x, weight, again, counts, epilogue, wide, *scales)
                assert float((again - before - exact).norm() / exact.norm()) < 0.012
            else:  # wider: what is beyond the product becomes zeros
                out = torch.full((rows, exact.shape[1] + 7), float("nan"), dtype=torch.bfloat16)
            matmul(x, weight, out, counts, epilogue, tile, *scales)
            ours = out.float() - before if epilogue == "add" else out[:, : exact.shape[1]].float()
            assert float((ours - exact).norm() / exact.norm()) < 0.012
            assert not out[:, exact.shape[1] :].any()


def check_activations() -> None:
    from magihuman.kernels.linear.activations import gelu7, swiglu7

    kernels = ((swiglu7, ref.swiglu7), (gelu7, ref.gelu7))
    for width, (ours, plain) in itertools.product((1, 21, 340, 1100), kernels):
        for x in in_wider_rows(2 * width):
            x *= 4  # in place: a product would follow closely
            expected = plain(x)
            assert_close(ours(x), expected)
            columns = expected.shape[1]
            padded = ours(x, columns + 28)
            assert_close(padded[:, :columns], expected)
            assert (padded[:, columns:] == 0).all()


def check_nan_stays() -> None:
    """A clamp that drops NaN would make a finite clip of a damaged weight."""
    from magihuman.kernels.decoder.channel_norm import Norm, channel_norm
    from magihuman.kernels.linear.activations import gelu7, swiglu7

    for ours, plain in ((swiglu7, ref.swiglu7), (gelu7, ref.gelu7)):
        x = torch.randn(ROWS, 48)
        x[1, 4] = x[2, 7] = float("nan")  # a gate and what is gated
        assert plain(x).isnan().sum() == 2
        assert torch.equal(ours(x).isnan(), plain(x).isnan())
    for activation in ("silu", "relu", "none"):
        x = video(1, 8, 2, 4, 6)
        x[0, 3, 1, 2, 4] = float("nan")
        norm = Norm(1e-8, activation, 0, 0)
        expected = decoder.join_norm(x, None, None, *norm)[0]
        assert expected.isnan().sum() == 8  # of the pixel
        assert torch.equal(channel_norm(x, None, None, norm).isnan(), expected.isnan())


def check_quantize() -> None:
    """Scales, and that values are in place: the interpreter's rounding to e4m3 loses carries."""
    from magihuman.kernels.linear.quantize import norm_rows, quantize_rows

    def check(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        assert_close(ours[1], expected[1])
        codes = [values.contiguous().view(torch.uint8).int() for values in (ours[0], expected[0])]
        assert (codes[0] - codes[1]).abs().max() <= 8  # a carry into the exponent

    for x in itertools.chain.from_iterable(map(in_wider_rows, (5, 100, 128, 200))):
        channels = x.shape[1]
        check(quantize_rows(x), ref.quantize_rows(x))
        for counts in COUNTS:
            rows, weight = x.contiguous(), weight_of(channels, counts)
            expected = ref.quantize_rows(ref.rms_norm(rows, weight, counts))
            values, scale = norm_rows(rows, weight, counts)
            check((values, scale), expected)
            stored = values.as_strided((ROWS, values.stride(0)), (values.stride(0), 1))
            assert (stored[:, channels:].float() == 0).all()


def check_quantize_int8() -> None:
    """Bit for bit, ties among the values; a row that is not finite has no scale."""
    from magihuman.kernels.linear.quantize import norm_rows, quantize_rows

    for x in itertools.chain.from_iterable(map(in_wider_rows, (5, 100, 128, 200))):
        x[2] = torch.arange(x.shape[1]) % 128 - 0.5  # halves, if the scale is 1
        x[2, 0], x[3] = ref.INT8_LIMIT, 0.0
        values, scale = quantize_rows(x, ref.INT8)
        expected, expected_scale = ref.quantize_rows(x, ref.INT8)
        assert torch.equal(values, expected) and torch.equal(scale, expected_scale)
        stored = values.as_strided((ROWS, values.stride(0)), (values.stride(0), 1))
        assert not stored[:, x.shape[1] :].any()
        for counts in COUNTS:
            rows, weight = x.contiguous(), weight_of(x.shape[1], counts)
            expected, expected_scale = ref.quantize_rows(
                ref.rms_norm(rows, weight, counts), ref.INT8
            )
            values, scale = norm_rows(rows, weight, counts, ref.INT8)
            assert_close(scale, expected_scale)
            assert (values.int() - expected.int()).abs().max() <= 1
    for bad in ("nan", "inf"):
        x = torch.randn(ROWS, 200)
        x[1, 3] = x[4, 150] = float(bad)
        scale = quantize_rows(x, ref.INT8)[1]
        assert (~scale.isfinite()).nonzero().flatten().tolist() == [1, 4]
        assert not ref.quantize_rows(x, ref.INT8)[1][[1, 4]].isfinite().any()


def check_qkv_fp8() -> None:
    """As `check_quantize`; whole blocks of keys, and those beyond the valid ones zeros."""
    from magihuman.kernels.attention.qkv_fp8 import qkv_fp8

    for rows, heads, kv_heads, dim in ((ROWS, 10, 2, 128), (130, 4, 2, 64), (3, 3, 1, 32)):
        angle = torch.randn(rows, 3 * dim // 8)
        rope = torch.cat((angle.sin(), angle.cos()), dim=1)
        length = torch.tensor(rows - 1, dtype=torch.int32)
        for counts in (None, (rows - 2, 1, 1)):
            qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim + heads)
            weights = weight_of(dim, counts), weight_of(dim, counts)
            arguments = (qkv, *weights, rope, length, counts, heads, kv_heads)
            for mine, right in zip(qkv_fp8(*arguments), ref.qkv_fp8(*arguments), strict=True):
                if mine.dtype == torch.float32:
                    assert_close(mine, right)
                    continue
                codes = [values.view(torch.uint8).int() for values in (mine, right)]
                assert (codes[0] - codes[1]).abs().max() <= 8


def check_portable_attention() -> None:
    """Frames that end inside of tiles and of blocks of keys, and that share one; a cut text."""
    from magihuman.kernels.attention.portable import Tile, attention

    heads, kv_heads, dim, tile = 2, 1, 32, Tile(16, 32, 4, 2)
    for frames, frame_tokens, reach, rest in ((0, 0, 0, 70), (3, 37, 1, 21), (2, 3, 1, 30)):
        local = ref.LocalAttention(frames, frame_tokens, reach) if frames else None
        rows, length = frames * frame_tokens + rest, frames * frame_tokens + rest - 5
        valid = torch.tensor(length, dtype=torch.int32)
        q, k, v = (torch.randn(rows, count, dim) for count in (heads, kv_heads, kv_heads))
        gate = torch.randn(rows, heads + 3)[:, 1 : 1 + heads]
        exact = ref.gated_attention(q, k, v, gate, local, valid)
        k[length:] = v[length:] = float("nan")  # must not be seen
        ours = attention(q, k, v, gate, valid, local, tile)
        assert_close(ours[:length], exact[:length])

        angle = torch.randn(rows, 3 * dim // 8)
        rope = torch.cat((angle.sin(), angle.cos()), dim=1)
        qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim + heads)
        norms = weight_of(dim, None), weight_of(dim, None)
        parts = ref.qkv_fp8(qkv, *norms, rope, valid, None, heads, kv_heads)
        exact = ref.attention_fp8(*parts, gate, valid, local).float()
        ours = attention(*parts[:3], gate, valid, local, tile, parts[3:]).float()
        # The interpreter's e4m3 of weights is up to a carry too small.
        assert ((ours - exact)[:length].norm() / exact[:length].norm()) < 0.12


def video(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


def check_channel_norm() -> None:
    from magihuman.kernels.decoder.channel_norm import Norm, channel_norm

    # Padding is where a frame is read, an activation what is made of it: each with another.
    padded = (("silu", (1, 1)), ("relu", (0, 0)), ("none", (0, 1)))
    for channels, (activation, pads), bias in itertools.product(
        (8, 24), padded, (None, torch.randn(24))
    ):
        whole = video(2, channels, 4, 4, 6)  # and a part of it
        delta = video(2, channels, 3, 3, 5)
        part_bias = None if bias is None else bias[:channels]
        for change, eps, other_eps in (
            (delta, 1e-8, 1e-6),
            (None, 1e-8, None),
            (delta, None, None),
        ):
            x = whole.clone()[:, :, 1:, :3, :5]
            inputs, norm = (x, change, part_bias), Norm(eps, activation, *pads, other_eps)
            expected = decoder.join_norm(*inputs, *norm)
            assert_close(channel_norm(*inputs, norm), expected[0])
            out = channel_norm(*inputs, norm, replace=True)
            for mine, right in zip((out, x), expected, strict=True):
                assert_close(mine, right)
        x, phases = video(1, channels, 2, 4, 6), video(1, 4 * channels, 2, 3, 4)
        placed = decoder.from_phases(phases)
        norm = Norm(1e-8, activation, *pads)
        expected = decoder.join_norm(placed, x, part_bias, *norm)[0]
        assert_close(channel_norm(phases, x, part_bias, norm, x_phases=True), expected)
        assert_close(channel_norm(x, phases, part_bias, norm, delta_phases=True), expected)


def check_frames() -> None:
    from magihuman.kernels.decoder.frames import join_frames, pixels, yuv420

    for channels, drop in ((8, 0), (24, 1)):
        for in_time, delta, bias in itertools.product((True, False), (True, False), (True, False)):
            shape = (2, channels * (2 if in_time else 1), 3, 3, 5)
            x, change = video(*shape), video(*shape) if delta else None
            channel_bias = torch.randn(shape[1]) if bias else None
            arguments = (x, change, channel_bias, in_time, drop)
            assert_close(join_frames(*arguments), decoder.join_frames(*arguments))
    x, bias = video(2, 16, 3, 3, 100), torch.randn(16)
    for dtype in (torch.float32, torch.uint8):
        mine, right = pixels(x, bias, 3, 2, dtype), decoder.join_pixels(x, bias, 3, 2, dtype)
        # A value next to a whole number may be truncated to either side of it.
        assert (mine.float() - right.float()).abs().max() <= (1 if dtype == torch.uint8 else 1e-5)
        assert (mine != right).float().mean() <= 1e-3 or dtype == torch.float32
    for size in ((1, 2, 2), (3, 6, 10), (2, 34, 70)):  # within a block, and beyond
        rgb = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
        assert torch.equal(yuv420(rgb), decoder.to_yuv420(rgb))


def check_head_pack() -> None:
    from magihuman.kernels.parallel.head_pack import pack_heads, unpack_heads

    for heads, kv_heads, dim, ranks in ((40, 8, 128, 2), (40, 8, 128, 8), (4, 2, 32, 2)):
        for qkv in in_wider_rows((heads + 2 * kv_heads) * dim + heads):
            for x in (qkv, qkv.bfloat16()):  # copied, hence as exact as the GPU
                packed = ref.pack_heads(x, heads, kv_heads, ranks)
                assert torch.equal(pack_heads(x, heads, kv_heads, ranks), packed)
                assert torch.equal(unpack_heads(packed), ref.unpack_heads(packed))


if __name__ == "__main__":
    # Fills what torch.empty returns with NaN: a kernel that leaves a place out is found.
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    for case in CASES.values():
        check_case(case)
    check_add_rms_norm()
    check_portable_products()
    check_activations()
    check_nan_stays()
    check_quantize()
    check_quantize_int8()
    check_qkv_fp8()
    check_portable_attention()
    check_channel_norm()
    check_frames()
    check_head_pack()
