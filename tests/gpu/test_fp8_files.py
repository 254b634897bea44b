"""The tiny checkpoint on a GPU: converted, loaded, run in 8 bits; and what `verify` says of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from harness import weight_kinds
from magihuman import runtime
from magihuman.graphs import quantization
from magihuman.kernels import reference as ref
from magihuman.runtime.config import VARIANTS
from magihuman.runtime.evaluate import simulated
from magihuman.runtime.weights import PrecisionPolicy, checkpoint, tiny

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("cuda.bindings")

DEVICE = torch.device("cuda")
CLIP = {"seconds": 0.2, "width": 64, "height": 64}


@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("keep", ["none", "modality"])
def test_convert_load_generate(
    tiny_dir: Path, tmp_path: Path, keep: str, precision: str, kernels: str
) -> None:
    """The kernels get the weights that quantising while reading gives, and make the same clip."""
    folder = runtime.convert(tiny_dir, tmp_path / "narrow", precision=precision, keep_bf16=keep)
    with runtime.load(tiny_dir, transformer=folder, kernels=kernels) as engine:
        assert engine.precision == precision and engine.is_compiled
        clip = engine.generate("hi", **CLIP)
        again = engine.generate("hi", **CLIP)
        with engine.hold(runtime.Request("hi")) as pipeline:
            found = pipeline.components.dit.state_dict()
    assert np.array_equal(clip.frames, again.frames) and np.array_equal(clip.audio, again.audio)
    assert clip.frames.shape == (5, 64, 64, 3)

    model = checkpoint.load_dit(tiny_dir / "distill", VARIANTS["distill"], DEVICE, torch.bfloat16)
    dtype = PrecisionPolicy(precision).narrow
    quantization.quantize_model(model, quantization.quantized_linears(tiny.DIT, keep), dtype)
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        # The host's conversion and the device's round alike, to nearest even.
        assert value.is_cuda and value.dtype == wanted[key].dtype, key
        assert torch.equal(value.float(), wanted[key].float()), key

    options = {"precision": precision, "keep_bf16": keep, "kernels": kernels}
    with runtime.load(tiny_dir, **options) as engine:
        direct = engine.generate("hi", **CLIP)
    assert np.array_equal(clip.frames, direct.frames)
    with runtime.load(tiny_dir) as engine:
        assert engine.precision == "bf16"
        bf16 = engine.generate("hi", **CLIP)
    difference = np.abs(clip.frames.astype(int) - bf16.frames.astype(int)).mean()
    assert 0 < difference < 16  # of 255: PSNR was 28 dB, an error of 10, on a CPU


def test_an_artifact_in_the_plain_model(
    tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same rounded values in bf16 products: no further than those of activations in fp8."""
    folder = runtime.convert(tiny_dir, tmp_path / "fp8")
    with runtime.load(tiny_dir, transformer=folder, compile=False) as engine:
        assert engine.precision == "bf16" and not engine.is_compiled
        assert engine.generate("hi", **CLIP).frames.shape == (5, 64, 64, 3)
    assert "compile=False asks for the plain one" in caplog.text


@pytest.mark.parametrize("dtype", [ref.FP8, ref.INT8])
@pytest.mark.parametrize("counts", [None, (190, 63, 47)])
def test_the_simulation_sums_as_the_reference_does(
    counts: ref.Counts | None, dtype: torch.dtype
) -> None:
    x = torch.randn(300, 340, device=DEVICE)
    weight = torch.randn(128 * (3 if counts else 1), 340, device=DEVICE)
    operands = (*ref.quantize_rows(x, dtype), *quantization.quantize(weight, dtype))
    ours = simulated.scaled_linear(*operands, counts)
    theirs = ref.scaled_linear(*operands, counts)
    assert ours.dtype == torch.bfloat16
    # Sums in another order cross the middle between two bf16 numbers, 2^-8 apart, now and then.
    assert golden.error(ours, theirs) <= 3e-4


def test_verify_passes_healthy_weights(tiny_dir: Path) -> None:
    report = runtime.verify(tiny_dir, ["hi"], **CLIP)
    assert report.settings["device"] == "cuda:0"
    assert report.verdict == "pass" and report.suggested_keep_bf16 == []
    # Rounding two normally distributed operands to e4m3.
    assert all(0.03 < error.worst < 0.045 for error in report.per_linear.values())
    (clip,) = report.clips
    assert 0.005 < clip.video_error[-1] < 0.15 and 0.005 < clip.audio_error[-1] < 0.15


def test_verify_passes_healthy_weights_in_int8(tiny_dir: Path) -> None:
    report = runtime.verify(tiny_dir, ["hi"], precision="int8", **CLIP)
    assert report.verdict == "pass"
    assert all(0.008 < error.worst < 0.025 for error in report.per_linear.values())


def test_verify_names_what_is_broken(tiny_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    file = folder / "distill" / checkpoint.SINGLE_NAME
    state = load_file(file)
    names = weight_kinds.broken(state, tiny.DIT)
    save_file(state, file)
    report = runtime.verify(folder, ["hi"], **CLIP)
    assert report.verdict == "fail" and report.suggested_keep_bf16 == names
    assert all(report.per_linear[name].worst > 0.5 for name in names)
    rest = [error.worst for name, error in report.per_linear.items() if name not in names]
    assert max(rest) < 0.05
    again = runtime.verify(folder, ["hi"], keep_bf16=report.suggested_keep_bf16, **CLIP)
    assert again.verdict == "pass"
