"""The portable products against fp64: every tile, dtype and epilogue, odd shapes, runs, poisoned
outputs; and the transformer that runs on them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import golden
from magihuman.kernels import reference as ref

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman.kernels import int8, ops
from magihuman.kernels.linear import routes
from magihuman.kernels.linear.matmul_portable import TILES, matmul, names_for
from magihuman.kernels.linear.matmul_sm90 import Epilogue
from magihuman.kernels.target import E4M3_FROM, Target

DEVICE = torch.device("cuda")
BF16, FP8, INT8 = torch.bfloat16, ref.FP8, ref.INT8
CAPABILITY = torch.cuda.get_device_capability()
OWN = names_for(CAPABILITY)
DTYPES = [BF16, INT8, *([FP8] if CAPABILITY >= E4M3_FROM else [])]
EPILOGUES = ["store", "gelu7", "swiglu7", "add"]
SHAPES = [
    (1, 64, 16, None),
    (63, 200, 144, None),
    (127, 328, 402, (0, 1, 126)),
    (300, 341, 398, (200, 37, 63)),  # odd rows: loads of single values
    (300, 1032, 208, (300, 0, 0)),
    (4266, 5120, 7208, None),
    (4286, 5120, 1024, (3840, 126, 320)),
    (4286, 13652, 512, (3840, 126, 320)),
    (14762, 512, 5120, None),
]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def operands(
    rows: int, depth: int, columns: int, counts: ref.Counts | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """x, weight, scales if there are any, and the product in fp64."""
    x = randn(rows, depth)
    weight = randn(columns * (3 if counts else 1), depth) * 2 * depth**-0.5
    if dtype == BF16:
        x, weight = x.to(BF16), weight.to(BF16)
        scales: tuple[Tensor, ...] = ()
        exact = x.double(), weight.double()
    else:
        (x, x_scale), (weight, scale) = (ref.quantize_rows(own, dtype) for own in (x, weight))
        scales = x_scale, scale
        exact = tuple(ref.dequantize_rows(*own).double() for own in ((x, x_scale), (weight, scale)))
    return x, weight, scales, ref.per_modality(lambda a, b: a @ b.t(), *exact, counts)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "columns", "counts"), SHAPES)
def test_product(
    rows: int,
    depth: int,
    columns: int,
    counts: ref.Counts | None,
    dtype: torch.dtype,
    epilogue: Epilogue,
    name: str,
) -> None:
    x, weight, scales, product = operands(rows, depth, columns, counts, dtype)
    rounded = product.to(BF16)
    # Of int8 sums are exact. Of e4m3 Hopper's tensor cores keep about 14 bits of one, again and
    # again: 1.5e-3 at a depth of 5120.
    deep = max(1.0, depth / 5120)
    room = 3e-3 * deep if dtype == FP8 else 1e-4 if dtype == INT8 else 1e-7
    if epilogue == "add":
        before = randn(rows, columns)
        out, exact, plain = before.clone(), before + product, before + rounded.double()
        matmul(x, weight, out, counts, epilogue, TILES[name], *scales)
        assert golden.error(out, exact) <= 1.1 * golden.error(plain, exact) + room
        return
    fn = {"store": lambda u: u, "gelu7": ref.gelu7, "swiglu7": ref.swiglu7}[epilogue]
    exact, plain = fn(product.float()), fn(rounded)
    width = exact.shape[1]
    whole = torch.full((rows, width + 40), float("nan"), device=DEVICE, dtype=BF16)
    out = whole[:, : width + 24]  # of which the last 24 become zeros
    matmul(x, weight, out, counts, epilogue, TILES[name], *scales)
    assert golden.error(out[:, :width], exact) <= 1.1 * golden.error(plain, exact) + room
    assert (out[:, width:] == 0).all()
    assert whole[:, width + 24 :].isnan().all()


@pytest.mark.skipif(FP8 not in DTYPES, reason="needs sm_89")
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("epilogue", ["gelu7", "swiglu7"])
@pytest.mark.parametrize(("rows", "depth", "columns", "counts"), SHAPES[:5])
def test_an_activation_in_e4m3(
    rows: int,
    depth: int,
    columns: int,
    counts: ref.Counts | None,
    epilogue: Epilogue,
    name: str,
) -> None:
    x, weight, scales, product = operands(rows, depth, columns, counts, FP8)
    fn, factor = getattr(ref, epilogue), ref.STATIC_SCALES[epilogue]
    exact = fn(product.float())
    plain = (fn(product.to(BF16).float()) / factor).to(FP8).float() * factor
    out = torch.full((rows, exact.shape[1] + 5), 0x7F, device=DEVICE, dtype=torch.uint8).view(FP8)
    matmul(x, weight, out, counts, epilogue, TILES[name], *scales)
    ours = out.float() * factor
    width = exact.shape[1]
    assert golden.error(ours[:, :width], exact) <= 1.1 * golden.error(plain, exact) + 3e-3
    assert (ours[:, width:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OWN)
def test_values_behind_rows_are_read_only_where_they_are_zeros(
    name: str, dtype: torch.dtype
) -> None:
    """Of rows in wider memory, but for those that are padded to whole blocks."""
    x, weight, scales, product = operands(300, 340, 208, None, dtype)
    wide = torch.full((300, 400), 0x7F, device=DEVICE, dtype=torch.uint8)
    if dtype == BF16:
        poisoned = torch.full((300, 400), float("nan"), device=DEVICE, dtype=BF16)
    else:
        poisoned = wide.view(dtype)
    poisoned[:, :340] = x
    out = torch.empty(300, 208, device=DEVICE, dtype=BF16)
    matmul(poisoned[:, :340], weight, out, None, "store", TILES[name], *scales)
    assert golden.error(out, product) <= 1.1 * golden.error(product.to(BF16), product) + 3e-3
    padded = [F.pad(own.view(torch.uint8), (0, 44 * own.itemsize)) for own in (x, weight)]
    whole, rows = (own.view(dtype) for own in padded)
    again = torch.empty_like(out)
    matmul(whole, rows[:, :340], again, None, "store", TILES[name], *scales)
    assert golden.error(again, product) <= 1.1 * golden.error(product.to(BF16), product) + 3e-3


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_the_largest_values(name: str, dtype: torch.dtype) -> None:
    """Rows of 13652 numbers at the ends of the range: int32 holds their sum, and it is exact.

    Of e4m3 it is finite. Tensor cores cut products to the bits that they keep of the sum so far,
    and of numbers that all are alike lose as much again and again: a fifth, with 14 bits.
    """
    if dtype == BF16:
        pytest.skip("has no such end")
    end = ref.LIMITS[dtype]
    x = torch.full((130, 13652), end, device=DEVICE).to(dtype)
    weight = torch.full((130, 13652), -end, device=DEVICE).to(dtype)
    ones = torch.ones(130, device=DEVICE)
    out = torch.empty(130, 130, device=DEVICE, dtype=BF16)
    matmul(x, weight, out, None, "store", TILES[name], ones, ones)
    exact = torch.full_like(out, -end * end * 13652)
    if dtype == INT8:
        assert torch.equal(out, exact)
    else:
        assert golden.error(out, exact) <= 0.3


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_scale_or_row_stays(name: str, dtype: torch.dtype) -> None:
    x, weight, scales, _ = operands(70, 256, 64, None, dtype)
    if dtype == BF16:
        x[5, 7] = float("nan")
    else:
        scales[0][5] = float("nan")
    for epilogue in EPILOGUES:
        width = 32 if epilogue == "swiglu7" else 64
        out = torch.zeros(70, width, device=DEVICE, dtype=BF16 if epilogue != "add" else None)
        matmul(x, weight, out, None, epilogue, TILES[name], *scales)  # type: ignore[arg-type]
        assert out.isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("counts", [None, (150, 1, 149)])
def test_operators_agree_with_the_reference(name: str, counts: ref.Counts | None) -> None:
    """A layer's MLP as the rewritten graph has it in int8, and in bf16."""
    runs, experts = list(counts or ()), 3 if counts else 1
    stream = randn(300, 256)
    norm = 0.1 * randn(256 * experts)
    up, down = randn(680 * experts, 256) / 16, randn(256 * experts, 340) / 16

    narrow = [ref.quantize_rows(weight, INT8) for weight in (up, down)]
    rows = int8.norm_int8(stream, norm, runs)
    hidden = int8.linear_activation_int8(*rows, *narrow[0], runs, "swiglu7", 384, name)
    assert (hidden[:, 340:] == 0).all()
    quantized = int8.quantize_int8(hidden)
    total = int8.linear_add_int8_(stream.clone(), *quantized, *narrow[1], runs, name)
    expected_rows = ref.quantize_rows(ref.rms_norm(stream, norm, counts), INT8)
    expected = ref.swiglu7(ref.scaled_linear(*expected_rows, *narrow[0], counts))
    assert golden.error(hidden[:, :340], expected) <= 3e-3
    product = ref.scaled_linear(*ref.quantize_rows(expected, INT8), *narrow[1], counts)
    assert golden.error(total - stream, product) <= 6e-3
    out = int8.linear_int8(*quantized, *narrow[1], runs, name)
    assert golden.error(out, product) <= 6e-3

    x = ref.rms_norm(stream, norm, counts).to(BF16)
    wide = ops.linear_activation(x, up.to(BF16), runs, "swiglu7", 384, name)
    plain = ref.swiglu7(ref.linear(x, up.to(BF16), counts))
    assert golden.error(wide[:, :340], plain) <= 3e-3
    assert (wide[:, 340:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_fastest_is_chosen_among_the_targets_own(
    dtype: torch.dtype, epilogue: Epilogue, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGIHUMAN_CACHE", str(tmp_path))
    monkeypatch.setattr(routes, "SMALL_FLOPS", 0)
    x, weight, scales, _ = operands(300, 384, 256, None, dtype)
    target = Target("portable", CAPABILITY)
    scale = scales[1] if scales else None
    route = routes.fastest(epilogue, weight, None, len(x), 256, scale, target)
    assert route in routes.names_for(target, dtype)
