from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magihuman import runtime
from magihuman.graphs.quantization import is_quantized, quantize_model, quantized_linears
from magihuman.runtime import CheckpointError, InvalidRequestError
from magihuman.runtime.config import VARIANTS
from magihuman.runtime.engine import assemble
from magihuman.runtime.weights import checkpoint, random_weights, transformer
from magihuman.runtime.weights.tiny import DIT

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture
def capable(monkeypatch) -> None:
    """As on a device whose kernels take fp8; what they would compute is not asked for."""
    monkeypatch.setattr(transformer, "why_not", lambda *arguments, **options: None)
    monkeypatch.setattr(assemble, "compiled", lambda *arguments: None)


def assert_same(actual: torch.nn.Module, wanted: torch.nn.Module) -> None:
    own, other = actual.state_dict(), wanted.state_dict()
    assert own.keys() == other.keys()
    for key, value in own.items():
        assert value.dtype == other[key].dtype and value.stride() == other[key].stride(), key
        assert torch.equal(value.float(), other[key].float()), key


# -- published files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "keep"),
    [
        ("fp8", "none"),
        ("fp8", "modality"),
        ("fp8", ["*.down_proj"]),
        ("int8", "none"),
        ("int8", ["*.down_proj"]),
    ],
)
def test_published_weights_are_quantised_while_they_are_read(tiny_dir, capable, precision, keep):
    """The result is that of quantising the bf16 model."""
    options = {"precision": precision, "keep_bf16": keep, "device": "cpu"}
    dtype = torch.int8 if precision == "int8" else torch.float8_e4m3fn
    with runtime.load(tiny_dir, variant="base", sr="540p", **options) as loaded:
        assert loaded.precision == precision
        parts = {"base": loaded._parts.dit, "540p_sr": loaded._parts.sr_dit}
    for name, model in parts.items():
        wanted = checkpoint.load_dit(tiny_dir / name, VARIANTS[name], CPU, BF16)
        quantize_model(wanted, quantized_linears(DIT, keep), dtype)
        assert_same(model, wanted)
        assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("model", ["files", "synthetic"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            " needs the compiled transformer, and for distill there is no GPU; use"
            " precision='bf16'",
        ),
        (
            {"compile": False},
            " needs the compiled transformer, and for distill compile=False asks for"
            " the plain one; use precision='bf16'",
        ),
    ],
)
def test_8_bits_are_refused_where_they_cannot_run(tiny_dir, model, precision, options, message):
    reports: list[str] = []
    source = tiny_dir if model == "files" else runtime.synthetic("distill")
    with pytest.raises(InvalidRequestError) as caught:
        runtime.load(
            source,
            precision=precision,
            device="cpu",
            on_load=lambda name, done, of: reports.append(name),
            **options,
        )
    assert str(caught.value) == f"precision={precision!r}{message}"
    assert not reports  # nothing has been read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keep_bf16": "modality"},
            "must go with precision='fp8', 'fp8-attn' or 'int8', got 'modality' with None$",
        ),
        ({"keep_bf16": ["a"], "precision": "bf16"}, r"or 'int8', got \['a'\] with 'bf"),
        ({"keep_bf16": "all", "precision": "fp8"}, "must be 'none', 'modality' or a list of names"),
        ({"keep_bf16": ["a"], "precision": "int8"}, "must name linears of the blocks .*, got 'a'"),
        ({"precision": "int4"}, "precision must be one of .*int8.*, got 'int4'"),
        ({"keep_bf16": ["a"], "precision": "fp8"}, "must name linears of the blocks .*, got 'a'"),
        ({"sr_transformer": "x"}, "sr_transformer must go with sr, got 'x' without"),
    ],
)
def test_a_wrong_choice_is_refused(tiny_dir, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        runtime.load(tiny_dir, device="cpu", **options)


def test_keeping_nothing_may_be_said_of_any_precision(tiny_dir):
    with runtime.load(tiny_dir, keep_bf16="none", device="cpu") as loaded:
        assert loaded.precision == "bf16"


def test_a_transformer_may_lie_elsewhere(tiny_dir, tmp_path):
    other = tmp_path / "other"
    with runtime.load(tiny_dir, transformer=tiny_dir / "base", device="cpu") as loaded:
        wanted = checkpoint.load_dit(tiny_dir / "base", VARIANTS["base"], CPU, BF16)
        assert_same(loaded._parts.dit, wanted)
    with pytest.raises(
        runtime.CheckpointError, match=f"distill must be at the path given, {other}"
    ):
        runtime.load(tiny_dir, transformer=other, device="cpu")


# -- memory -----------------------------------------------------------------------------------


def test_bytes_on_the_device():
    """The sum that is checked against the GPU's memory, against the model that is then built."""
    for linear in (BF16, torch.float32):
        model = random_weights.dit(DIT, 0, CPU, linear, "base")
        size = sum(value.nbytes for value in model.state_dict().values())
        assert transformer.dit_bytes(DIT, linear) == size
    names = quantized_linears(DIT, "modality")
    model = random_weights.dit(DIT, 0, CPU, BF16, "base")
    quantize_model(model, names)
    size = sum(value.untyped_storage().nbytes() for value in model.state_dict().values())
    assert transformer.dit_bytes(DIT, BF16, names) == size


def test_fp8_attention_takes_the_weights_of_fp8(tiny_dir, tmp_path, capable, monkeypatch):
    """Published or converted; and says so to whoever compiles the forward."""
    asked = []
    monkeypatch.setattr(assemble, "compiled", lambda model, spec, *rest: asked.append(spec))
    folder = runtime.convert(tiny_dir, tmp_path / "fp8", variant="distill")
    for options in ({}, {"transformer": folder}, {"keep_bf16": "modality"}):
        with runtime.load(tiny_dir, precision="fp8-attn", device="cpu", **options) as loaded:
            assert loaded.precision == "fp8-attn"
            names = quantized_linears(DIT, options.get("keep_bf16", "none"))
            assert [n for n, m in loaded._parts.dit.named_modules() if is_quantized(m)] == names
    assert [spec.precision for spec in asked] == ["fp8-attn"] * 3
    bf16 = runtime.convert(tiny_dir, tmp_path / "bf16", variant="distill", precision="bf16")
    with pytest.raises(InvalidRequestError, match="precision must be 'bf16', as the artifact's"):
        runtime.load(tiny_dir, precision="fp8-attn", device="cpu", transformer=bf16)


def test_fp8_attention_needs_its_own_kernel(tiny_dir, monkeypatch):
    def reason(*arguments: object, fp8_attention: bool = False, **options: object) -> str | None:
        return "it has no kernel here" if fp8_attention else None

    monkeypatch.setattr(transformer, "why_not", reason)
    with pytest.raises(
        InvalidRequestError, match=r"precision='fp8-attn' needs .* it has no kernel"
    ):
        runtime.load(tiny_dir, precision="fp8-attn", device="cpu")


def test_a_damaged_file_is_known_before_anything_is_read(tiny_dir, tmp_path):
    folder = tmp_path / "distill"
    folder.mkdir()
    content = (tiny_dir / "distill" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    (folder / "magihuman.json").write_text(Path(tiny_dir, "distill", "magihuman.json").read_text())
    reports: list[str] = []
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        runtime.load(
            tiny_dir, transformer=folder, device="cpu", on_load=lambda *r: reports.append(r[0])
        )
    assert not reports
