"""The Hopper product against fp64: every route and epilogue, odd shapes, runs, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import golden
from magihuman.kernels import reference as ref

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings")

from magihuman.kernels.linear import routes
from magihuman.kernels.linear.matmul_sm90 import Epilogue

DEVICE = torch.device("cuda")
FP8 = torch.float8_e4m3fn
SHAPES = [
    (1, 64, 16, None),
    (63, 200, 144, None),
    (127, 328, 400, (0, 1, 126)),
    (300, 328, 400, (200, 37, 63)),
    (300, 1032, 208, (300, 0, 0)),
    (4266, 5120, 7208, None),
    (4286, 5120, 1024, (3840, 126, 320)),
    (14762, 512, 5120, None),
]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def poisoned(rows: int, columns: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of `width` NaN, of which the first `columns` are to be written."""
    return torch.full((rows, width), float("nan"), device=DEVICE, dtype=dtype)[:, :columns]


@pytest.mark.parametrize("route", routes.TILES)
@pytest.mark.parametrize("epilogue", ["store", "gelu7", "swiglu7", "add"])
@pytest.mark.parametrize(("rows", "depth", "columns", "counts"), SHAPES)
def test_product(
    rows: int, depth: int, columns: int, counts: ref.Counts | None, epilogue: Epilogue, route: str
) -> None:
    x = poisoned(rows, depth, depth + 8, torch.bfloat16).copy_(randn(rows, depth))
    weight = randn(columns * (3 if counts else 1), depth) * 2 * depth**-0.5
    product = ref.per_modality(lambda a, b: a.double() @ b.double().t(), x, weight, counts)
    rounded = product.to(torch.bfloat16)
    tile = routes.TILES[route]
    if epilogue == "add":
        before = torch.randn(rows, columns, device=DEVICE)
        out, exact, plain = before.clone(), before + product, before + rounded.double()
    else:
        fn = {"store": lambda u: u, "gelu7": ref.gelu7, "swiglu7": ref.swiglu7}[epilogue]
        exact, plain = fn(product.float()), fn(rounded)
        width = exact.shape[1]
        out = poisoned(rows, width, -(-width // 8) * 8 + 8, torch.bfloat16)
    routes.matmul(x, weight, out, counts, epilogue, tile)
    assert golden.error(out, exact) <= 1.1 * golden.error(plain, exact) + 1e-7
    if epilogue != "add":
        written = -(-out.shape[1] // 8) * 8  # the copy engine writes 16 bytes at a time
        beyond = out.as_strided((rows, out.stride(0)), out.stride())[:, written:]
        assert beyond.isnan().all()


@pytest.mark.parametrize("route", routes.TILES)
@pytest.mark.parametrize("epilogue", ["store", "gelu7", "swiglu7", "add"])
@pytest.mark.parametrize(("rows", "depth", "columns", "counts"), SHAPES)
def test_fp8_product(
    rows: int, depth: int, columns: int, counts: ref.Counts | None, epilogue: Epilogue, route: str
) -> None:
    """Against fp64 over the same e4m3 operands: the rounding of the output, and of the sums."""
    x, x_scale = ref.quantize_rows(randn(rows, depth))
    weight, scale = ref.quantize_rows(randn(columns * (3 if counts else 1), depth) * depth**-0.5)
    wide = ref.padded_width(depth)
    x, weight = (F.pad(v.view(torch.uint8), (0, wide - depth)).view(FP8) for v in (x, weight))
    whole = ref.dequantize_rows(x, x_scale).double(), ref.dequantize_rows(weight, scale).double()
    product = ref.per_modality(lambda a, b: a @ b.t(), *whole, counts)
    tile = routes.TILES[route]
    dtypes = [torch.bfloat16, FP8] if epilogue in ("gelu7", "swiglu7") else [torch.bfloat16]
    for dtype in dtypes if epilogue != "add" else [torch.float32]:
        if epilogue == "add":
            out = torch.randn(rows, columns, device=DEVICE)
            exact, plain = out + product, out + product
        else:
            fn = {"store": lambda u: u, "gelu7": ref.gelu7, "swiglu7": ref.swiglu7}[epilogue]
            exact = fn(product.float())
            factor = ref.STATIC_SCALES[epilogue] if dtype == FP8 else 1.0
            # Rounded before the activation too, as the plain model's product is.
            plain = fn(product.to(torch.bfloat16).float())
            plain = (plain / factor).to(dtype).float() * factor
            width = -(-exact.shape[1] // 16) * 16
            out = torch.full((rows, width), 0x7F, device=DEVICE, dtype=torch.uint8).to(dtype)
            out = out[:, : exact.shape[1]]
        routes.matmul(x, weight[:, :depth], out, counts, epilogue, tile, x_scale, scale)
        ours = out.float() * (factor if epilogue != "add" else 1.0)
        # The tensor cores keep about 14 bits of a sum: 1.5e-3 at a depth of 5120.
        assert golden.error(ours, exact) <= 1.1 * golden.error(plain, exact) + 3e-3


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("route", routes.TILES)
@pytest.mark.parametrize("epilogue", ["store", "gelu7", "swiglu7", "add"])
@pytest.mark.parametrize("counts", [None, (9000, 100, 5000)])
def test_tiles_that_are_multiplied_faster_than_finished(
    counts: ref.Counts | None, epilogue: Epilogue, route: str, fp8: bool
) -> None:
    """A depth of one block: the product of the next tile is there long before the last is in
    memory, again and again, and some tiles have rows for one consumer only.
    """
    rows, depth, columns = 14_100, 64, 2112
    x, weight = randn(rows, depth), randn(columns * (3 if counts else 1), depth) / 8
    scales: tuple[Tensor, ...] = ()
    if fp8:
        (x, *a), (weight, *b) = ref.quantize_rows(x), ref.quantize_rows(weight)
        scales = a[0], b[0]
        product = ref.per_modality(
            lambda u, v: u @ v.t(),
            ref.dequantize_rows(x, scales[0]),
            ref.dequantize_rows(weight, scales[1]),
            counts,
        )
    else:
        product = ref.per_modality(lambda u, v: u @ v.t(), x.float(), weight.float(), counts)
    fn = {"store": lambda u: u, "add": lambda u: u, "gelu7": ref.gelu7, "swiglu7": ref.swiglu7}
    exact = fn[epilogue](product)
    dtype = torch.float32 if epilogue == "add" else torch.bfloat16
    for _ in range(20):
        out = torch.full_like(exact, 0.0 if epilogue == "add" else float("nan"), dtype=dtype)
        routes.matmul(x, weight, out, counts, epilogue, routes.TILES[route], *scales)
        assert golden.error(out, exact) <= 6e-3


@pytest.mark.parametrize("route", routes.TILES)
@pytest.mark.parametrize("counts", [None, (150, 1, 149)])
def test_fp8_product_of_odd_weights(route: str, counts: ref.Counts | None) -> None:
    """A run's scales begin anywhere: 323 rows are three heads of 64, k, v, and three gates."""
    x, x_scale = ref.quantize_rows(randn(300, 192))
    weight, scale = ref.quantize_rows(randn(323 * (3 if counts else 1), 192) / 14)
    # What lies behind the last scale is not the weight's.
    scale = F.pad(scale, (0, 1), value=float("nan"))[:-1]
    operands = routes.Quantized(x, x_scale), routes.Quantized(weight, scale)
    out = routes.scaled_linear(*operands, counts, route)
    whole = ref.dequantize_rows(x, x_scale).double(), ref.dequantize_rows(weight, scale).double()
    exact = ref.per_modality(lambda a, b: a @ b.t(), *whole, counts)
    assert golden.error(out, exact) <= 1.1 * golden.error(exact.to(torch.bfloat16), exact) + 1e-3


@pytest.mark.parametrize("route", [routes.LIBRARY, *routes.TILES])
@pytest.mark.parametrize("counts", [None, (150, 1, 149)])
def test_routes_agree_with_the_reference(route: str, counts: ref.Counts | None) -> None:
    """Through the operators, with a padded activation that the next product reads."""
    from magihuman.kernels import ops

    runs, experts = list(counts or ()), 3 if counts else 1
    x = randn(300, 256)
    up = randn(680 * experts, 256) / 16
    down = poisoned(256 * experts, 340, 384, torch.bfloat16).copy_(randn(256 * experts, 340) / 16)
    down.as_strided((len(down), 384), down.stride())[:, 340:] = 0
    stream = torch.randn(300, 256, device=DEVICE)

    hidden = ops.linear_activation(x, up, runs, "swiglu7", 384, route)
    plain = ref.swiglu7(ref.linear(x, up, counts))
    exact = ref.swiglu7(ref.linear(x.float(), up.float(), counts))
    assert golden.error(hidden[:, :340], exact) <= 1.1 * golden.error(plain, exact)
    assert (hidden[:, 340:] == 0).all()

    product = ref.linear(plain.float(), down.float(), counts)
    total = torch.ops.magihuman.linear_add_(stream.clone(), hidden, down, runs, route)
    assert golden.error(total, stream + product) <= 3e-3
    out = ops.linear(hidden, down, runs, route)
    assert golden.error(out, product) <= 5e-3


def test_what_the_own_product_does_not_take() -> None:
    x, weight = randn(8, 64), randn(32, 64)
    assert routes.why_not(x, weight, "store", None) is None
    assert "bfloat16" in str(routes.why_not(x.float(), weight.float(), "store", None))
    assert "16" in str(routes.why_not(x, randn(20, 64), "store", None))
    assert "multiples of 8" in str(routes.why_not(randn(8, 60), randn(32, 60), "add", None))
