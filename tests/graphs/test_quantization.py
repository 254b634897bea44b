from __future__ import annotations

import pytest
import torch

from magihuman.graphs import quantization, support
from magihuman.kernels.jit import nvrtc
from magihuman.kernels.reference import padded_width
from magihuman.runtime.config import DiTConfig
from magihuman.runtime.model.dit import DiT, Linear
from magihuman.runtime.weights import random_weights
from magihuman.runtime.weights.tiny import DIT

CPU = torch.device("cpu")
EVERY = 4 * DIT.num_layers
# e4m3 steps by 2^-3 of the power of two below a value: an error of 2^-3 / sqrt(12) of that power in
# the mean, and a value is 1.4 times it. Measured.
GAUSSIAN_ERROR = 0.0263
# A row's largest of 1024 is 3.5 standard deviations: its steps are 0.028, and 1 / sqrt(12) of that
# is the error.
INT8_GAUSSIAN_ERROR = 0.0080


@pytest.fixture
def model() -> DiT:
    return random_weights.dit(DIT, 0, CPU, torch.bfloat16, "distill")


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual.float() - wanted.float()).norm() / wanted.float().norm())


# -- which linears ----------------------------------------------------------------------------


def test_the_names_are_the_models_linears(model):
    own = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    assert quantization.linears(DIT) == own
    assert quantization.quantized_linears(DIT) == own
    assert len(quantization.quantized_linears(DiTConfig())) == 160


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("none", EVERY),
        ([], EVERY),
        ("modality", EVERY - 8),
        (["block.layers.2.mlp.down_proj"], EVERY - 1),
        (("*.down_proj", "block.layers.2.*"), EVERY - 8),
        (["block.layers.[!4].*"], 4),
    ],
)
def test_what_stays_bf16(keep, left):
    names = quantization.quantized_linears(DIT, keep)
    assert len(names) == left
    if keep == "modality":
        assert {int(name.split(".")[2]) for name in names} == {1, 2, 3}
    if keep == ("*.down_proj", "block.layers.2.*"):
        assert not any(name.endswith("down_proj") or ".2." in name for name in names)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("all", "keep_bf16 must be 'none', 'modality' or a list of names, got 'all'"),
        (
            ["*.down_proj", "*.down"],
            r"or match some, such as '.*' or '\*.down_proj', got '\*.down'",
        ),
        (["block.layers.5.mlp.down_proj"], "must name linears of the blocks .*layers.5"),
        (["final_linear_video"], "got 'final_linear_video'"),
        ([3], "got 3"),
        (["*"], "keep_bf16 must leave a linear to quantise, got .*; use precision='bf16'"),
    ],
)
def test_a_wrong_choice_is_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        quantization.quantized_linears(DIT, keep)


# -- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width"), [(5, 128), (3, 340), (quantization.BLOCK_ROWS + 7, 16)])
def test_a_weight_is_rounded_row_by_row_and_laid_out_for_the_kernels(rows, width):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).bfloat16()
    weight[1] = 0
    values, scale = quantization.quantize(weight)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert values.shape == weight.shape and scale.shape == (rows,)
    assert values.stride() == (padded_width(width), 1) and values.data_ptr() % 16 == 0
    stored = values.as_strided((rows, padded_width(width)), values.stride())
    assert not stored[:, width:].float().any()
    assert values.float().isfinite().all() and (scale > 0).all() and scale.isfinite().all()
    amax = weight.float().abs().amax(1)
    assert torch.allclose(scale[amax > 0], amax[amax > 0] / 448)
    assert (values.float().abs().amax(1)[amax > 0] == 448).all()
    back = quantization.dequantize(values, scale)
    assert back.dtype == torch.bfloat16 and back.is_contiguous() and not back[1].any()
    # Half the step of e4m3, 2^-4 of a value, and of the smallest ones, 2^-10 of the scale; then
    # bf16, 2^-9.
    allowed = weight.float().abs() * (2**-4 + 2**-8) + scale[:, None] * 2**-9
    assert ((back.float() - weight.float()).abs() <= allowed).all()


@pytest.mark.parametrize(("rows", "width"), [(5, 128), (3, 340), (quantization.BLOCK_ROWS + 7, 16)])
def test_a_weight_in_int8_is_laid_out_alike(rows, width):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).bfloat16()
    weight[1] = 0
    values, scale = quantization.quantize(weight, torch.int8)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    assert values.shape == weight.shape and scale.shape == (rows,)
    assert values.stride() == (padded_width(width), 1) and values.data_ptr() % 16 == 0
    stored = values.as_strided((rows, padded_width(width)), values.stride())
    assert not stored[:, width:].any()
    amax = weight.float().abs().amax(1)
    assert torch.allclose(scale[amax > 0], amax[amax > 0] / 127) and scale[1] > 0
    assert (values.abs().amax(1)[amax > 0] == 127).all() and not values[1].any()
    back = quantization.dequantize(values, scale)
    # Half a step of the row, then bf16, 2^-9.
    allowed = scale[:, None] * 0.501 + weight.float().abs() * 2**-8
    assert ((back.float() - weight.float()).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.float8_e4m3fn, GAUSSIAN_ERROR), (torch.int8, INT8_GAUSSIAN_ERROR)]
)
def test_the_error_of_gaussian_weights(dtype, wanted):
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scale = quantization.quantize(weight, dtype)
    back = quantization.dequantize(values, scale)
    assert error(back, weight) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_model_is_quantised_in_place_and_back(model, dtype):
    wanted = GAUSSIAN_ERROR if dtype == torch.float8_e4m3fn else INT8_GAUSSIAN_ERROR
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = quantization.quantized_linears(DIT, "modality")
    quantization.quantize_model(model, names, dtype)
    assert quantization.quantized_dtypes(model) == dict.fromkeys(names, dtype)
    quantized = {n for n, module in model.named_modules() if quantization.is_quantized(module)}
    assert quantized == set(names)
    state = model.state_dict()
    assert state.keys() == before.keys() | {f"{name}.weight_scale" for name in names}
    for key, value in before.items():
        if key.removesuffix(".weight") in quantized:
            assert state[key].dtype == dtype and state[key].shape == value.shape
        else:
            assert state[key].dtype == value.dtype and torch.equal(state[key], value)
    assert not any(parameter.requires_grad for parameter in model.parameters())

    quantization.dequantize_model(model)
    state = model.state_dict()
    assert state.keys() == before.keys()
    for key, value in before.items():
        assert state[key].dtype == value.dtype
        if key.removesuffix(".weight") in quantized:
            assert error(state[key], value) == pytest.approx(wanted, rel=0.3)
        else:
            assert torch.equal(state[key], value)
    quantization.dequantize_model(model)  # nothing is left to do
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_no_bf16_weight_outlives_its_turn(model, monkeypatch):
    """When a linear is quantised, those before it are held in fp8 alone."""
    held = []
    original = quantization.quantize_linear

    def watch(linear, weight, dtype):
        original(linear, weight, dtype=dtype)
        held.append(sum(p.untyped_storage().nbytes() for p in model.parameters()))

    monkeypatch.setattr(quantization, "quantize_linear", watch)
    quantization.quantize_model(model, quantization.linears(DIT))
    assert held == sorted(held, reverse=True) and len(set(held)) == EVERY


# -- where it can run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "bindings", "reason"),
    [
        ((9, 0), True, None),
        ((7, 5), True, "the kernels need sm_80 or newer, this GPU is sm_75"),
        ((8, 6), True, "the fp8 kernels need sm_89 or newer, this GPU is sm_86"),
        ((8, 9), False, None),
        ((10, 0), False, None),
        (
            (9, 0),
            False,
            "the fp8 kernels need cuda-bindings: pip install 'magihuman[cuda]', or use"
            " kernels='portable'",
        ),
    ],
)
def test_what_fp8_needs(monkeypatch, capability, bindings, reason):
    """The GPU is made up here; the rules are real."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(nvrtc, "is_available", lambda: bindings)
    gpu = torch.device("cuda:0")
    assert support.why_not(DiTConfig(), torch.bfloat16, gpu, fp8=True) == reason
    assert support.why_not(DiTConfig(), torch.bfloat16, gpu, fp8=True, kernels="portable") == (
        None if capability >= (8, 9) else reason
    )
    if capability >= (8, 0):
        assert support.why_not(DiTConfig(), torch.bfloat16, gpu) is None
    assert support.why_not(DiTConfig(), torch.bfloat16, CPU, fp8=True) == "there is no GPU"
