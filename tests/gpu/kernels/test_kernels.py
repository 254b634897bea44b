"""Every fused kernel against its reference, on a GPU: fresh inputs, poisoned outputs, odd shapes.

Errors are relative to the reference in fp32 over the same inputs, and may be at most a tenth larger
than those of the plain bf16 version.
"""

from __future__ import annotations

import pytest
import torch
from attending import exact_attention, gated_blockwise
from torch import Tensor

import golden
from harness import kernel_cases
from harness.kernel_cases import CASES
from magihuman.kernels import reference as ref

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman.kernels import add_rms_norm, ops
from magihuman.kernels.attention import (
    backends,
    head_gate,
    qkv_fp8,
)
from magihuman.kernels.attention import (
    fp8 as attention_fp8,
)
from magihuman.kernels.attention import (
    gluon as attention_gluon,
)
from magihuman.kernels.linear import activations

DEVICE = torch.device("cuda")
ROWS = [1, 63, 127, 4266, 14762]
SLACK = 1.1


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next is full of NaN."""
    torch.full((1 << 28,), float("nan"), device=DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def groupings(rows: int) -> list[ref.Counts | None]:
    """No groups; three runs; runs of length 0 and 1."""
    third = rows // 3
    return [None, (rows - 2 * third, third, third), (0, 1, rows - 1), (rows, 0, 0)]


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert golden.error(ours, exact) <= SLACK * golden.error(plain, exact) + 1e-7


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("channels", [128, 384, 5120])
def test_add_rms_norm(rows: int, channels: int) -> None:
    for counts in groupings(rows):
        x, delta = randn(rows, channels, dtype=torch.float32), randn(rows, channels)
        weight = 0.1 * randn(channels * (3 if counts else 1), dtype=torch.float32)
        total, normed = add_rms_norm.add_rms_norm(x, delta, weight, counts, torch.bfloat16)
        plain_total, plain = ref.add_norm(x, delta, weight, counts, torch.bfloat16)
        assert torch.equal(total, plain_total)
        assert_close(normed, plain, ref.rms_norm(x + delta, weight, counts))
        same, normed = add_rms_norm.add_rms_norm(x, None, weight, counts, torch.bfloat16)
        assert same is x
        exact = ref.rms_norm(x, weight, counts)
        assert_close(normed, exact.to(torch.bfloat16), exact)


SHAPES = [(case.name, shape) for case in CASES.values() for shape in case.odd_shapes]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_kernels_of_the_table(name: str, shape: kernel_cases.Shape) -> None:
    """Errors as of the plain version, layouts as fake versions promise; inputs stay as they are."""
    case = CASES[name]
    arguments = case.draw(shape, DEVICE, torch.bfloat16)
    exact, plain = case.precise(*arguments), case.plain(*arguments)
    before = [x.clone() for x in arguments if torch.is_tensor(x)]
    ours = case.fused(*arguments)
    meta = [x.to("meta") if torch.is_tensor(x) else x for x in arguments]
    promised = case.fused(*meta)
    for mine, bf16, right, fake in zip(ours, plain, exact, promised, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (fake.shape, fake.dtype, fake.stride())
        if mine.numel():
            allowed = case.slack * golden.error(bf16, right) + case.floor
            assert golden.error(mine, right) <= allowed
    after = [x for x in arguments if torch.is_tensor(x)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [340, 13652])
@pytest.mark.parametrize("apart", [0, 3])  # strides that vectors divide, and odd ones
def test_activations(rows: int, width: int, apart: int) -> None:
    padded = -(-width // 128) * 128
    x = (4 * randn(rows, 2 * width + apart))[:, : 2 * width]
    out = activations.swiglu7(x, padded)
    assert_close(out[:, :width], ref.swiglu7(x), ref.swiglu7(x.float()))
    assert (out[:, width:] == 0).all()
    out = activations.gelu7(x, 2 * width + 8)
    assert_close(out[:, : 2 * width], ref.gelu7(x), ref.gelu7(x.float()))
    assert (out[:, 2 * width :] == 0).all()


@pytest.mark.parametrize("rows", ROWS)
def test_head_gate(rows: int) -> None:
    x, gate = randn(rows, 40, 128), randn(rows, 47)[:, 3:43]
    exact = ref.head_gate(x.float(), gate)
    assert_close(head_gate.head_gate(x, gate), ref.head_gate(x, gate), exact)


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(40, 8, 128), (4, 2, 64), (4, 2, 32)])
def test_attention(name: str, rows: int, heads: int, kv_heads: int, dim: int) -> None:
    reason = backends.why_not(name, dim, DEVICE)
    if name == "cudnn" and rows == 1:
        reason = "cuDNN takes no single query with a mask"
    if reason is not None:
        pytest.skip(reason)
    q = randn(rows, heads, dim)
    q[: rows // 2] *= 3  # some rows with sharp peaks
    k, v = randn(rows, kv_heads, dim), randn(rows, kv_heads, dim)
    gate = randn(rows, heads + 3)[:, 1 : 1 + heads]
    for length in sorted({1, max(1, rows // 2), max(1, rows - 1), rows}):
        k[length:], v[length:] = 50.0, -1000.0  # must not be seen
        valid = torch.tensor(length, device=DEVICE, dtype=torch.int32)
        ours = backends.run(name, q, k, v, gate, valid)
        keys, values = k[:length], v[:length]
        exact = exact_attention(q, keys, values, gate)
        plain = ref.gated_attention(q, keys, values, gate)
        assert_close(ours, plain, exact)
        k[length:], v[length:] = 0.0, 0.0


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(40, 8, 128), (4, 2, 64), (3, 1, 32)])
def test_fp8_attention(rows: int, heads: int, kv_heads: int, dim: int) -> None:
    """From the projection to the gated heads: what is quantised, and what that costs."""
    reason = backends.why_not("gluon", dim, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    angle = randn(rows, 3 * dim // 8, dtype=torch.float32)
    rope = torch.cat((angle.sin(), angle.cos()), dim=1)
    for counts, length in zip(groupings(rows), (1, -(-rows // 2), rows, rows), strict=True):
        qkv = randn(rows, (heads + 2 * kv_heads) * dim + heads)
        qkv[length:] = 1e30  # must not be seen
        weights = [0.3 * randn(dim * (3 if counts else 1), dtype=torch.float32) for _ in range(2)]
        valid = torch.tensor(length, device=DEVICE, dtype=torch.int32)
        arguments = (*weights, rope, valid, counts, heads, kv_heads)
        ours, expected = qkv_fp8.qkv_fp8(qkv, *arguments), ref.qkv_fp8(qkv, *arguments)
        for mine, right in zip(ours[3:], expected[3:], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=0)
        for mine, right in zip(ours[:3], expected[:3], strict=True):
            steps = (codes_of(mine) - codes_of(right)).abs()  # from sums in another order
            assert steps.max() <= 1 and (steps != 0).sum() <= max(1, 1e-3 * steps.numel())
        gate = qkv[:, -heads:]
        outs = [attention_fp8.attention(*ours, gate, valid, None, n)[:length] for n in (2, 3)]
        careful = ref.attention_fp8(*expected, gate, valid)[:length]
        parts = ref.split_qkv(qkv[:length].float(), *weights, rope[:length], cut(counts, length),
                              heads, kv_heads)  # fmt: skip
        exact = exact_attention(*parts)
        # The kernel rounds weights below the largest so far, the reference below that of all.
        for out in outs:
            assert golden.error(out, exact) <= 1.05 * golden.error(careful, exact) + 1e-3


LOCAL_SHAPES = [
    # frames, tokens of each, reach, audio and text tokens: tiles of 128 divide none of them.
    (5, 137, 1, 9), (3, 50, 2, 1), (7, 64, 0, 200), (2, 510, 5, 33), (6, 300, 11, 130),
]  # fmt: skip


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(40, 8, 128), (4, 2, 64), (3, 1, 32)])
def test_frame_local_attention(heads: int, kv_heads: int, dim: int, is_fp8: bool) -> None:
    """Against the definition in fp32; valid lengths that cut the text."""
    reason = backends.why_not("gluon", dim, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    for frames, frame_tokens, reach, rest in LOCAL_SHAPES:
        local = ref.LocalAttention(frames, frame_tokens, reach)
        rows = frames * frame_tokens + rest
        angle = randn(rows, 3 * dim // 8, dtype=torch.float32)
        rope = torch.cat((angle.sin(), angle.cos()), dim=1)
        norms = [0.3 * randn(dim, dtype=torch.float32) for _ in range(2)]
        for length in sorted({frames * frame_tokens + 1, rows - rest // 2, rows}):
            qkv = randn(rows, (heads + 2 * kv_heads) * dim + heads)
            qkv[length:] = 1e4  # must not be seen
            valid = torch.tensor(length, device=DEVICE, dtype=torch.int32)
            q, k, v, gate = ref.split_qkv(qkv, *norms, rope, None, heads, kv_heads)
            wide = (q.float(), k.float(), v.float(), gate.float())
            exact = gated_blockwise(*wide, local, valid)[:length]
            if is_fp8:
                parts = ref.qkv_fp8(qkv, *norms, rope, valid, None, heads, kv_heads)
                careful = ref.attention_fp8(*parts, gate, valid, local)[:length]
                for n in (2, 3):
                    out = attention_fp8.attention(*parts, gate, valid, local, n)[:length]
                    assert golden.error(out, exact) <= 1.05 * golden.error(careful, exact) + 1e-3
            else:
                out = attention_gluon.attention(q, k, v, gate, valid, local)[:length]
                plain = ref.gated_attention(q, k, v, gate, local, valid)[:length]
                assert_close(out, plain, exact)


def codes_of(values: Tensor) -> Tensor:
    """Numbers of e4m3 values in their order; both zeros are 0."""
    codes = values.view(torch.uint8).int()
    return torch.where(codes < 128, codes, 128 - codes)


def cut(counts: ref.Counts | None, length: int) -> ref.Counts | None:
    """The runs of the first `length` rows."""
    if counts is None:
        return None
    video, audio = min(counts[0], length), min(counts[0] + counts[1], length)
    return video, audio - video, length - audio


@pytest.mark.parametrize("rows", [1, 63, 4266])
def test_linear_with_row_ranges_and_padded_rows(rows: int) -> None:
    for counts in groupings(rows):
        weight = randn(96 * (3 if counts else 1), 384)
        weight[:, 340:] = 0
        x = randn(rows, 384)
        out = ops.linear(x, weight[:, :340], list(counts or ()), "library")
        plain = ref.linear(x, weight, counts)
        exact = ref.linear(x.float(), weight.float(), counts)
        assert_close(out, plain, exact)
