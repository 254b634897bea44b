from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from magihuman import runtime
from magihuman.graphs.quantization import dequantize_model, quantize_model, quantized_linears
from magihuman.runtime import CheckpointError, InvalidRequestError, OutputError
from magihuman.runtime.cli.main import app
from magihuman.runtime.config import VARIANTS
from magihuman.runtime.weights import artifacts, checkpoint, converting
from magihuman.runtime.weights.tiny import DIT

CPU = torch.device("cpu")
SMALL = {"seconds": 0.2, "width": 64, "height": 64, "steps": 1}
FIRST = "weights-00001-of-00001.safetensors"
MANIFEST = artifacts.MANIFEST_NAME
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def fp8(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "distill"
    return runtime.convert(tiny_dir, folder, keep_bf16="modality")


@pytest.fixture(scope="module")
def int8(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "distill"
    return runtime.convert(tiny_dir, folder, precision="int8")


@pytest.fixture(scope="module")
def bf16(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "distill"
    return runtime.convert(tiny_dir, folder, precision="bf16")


def test_all_files_have_the_mode_that_the_umask_gives(tiny_dir, fp8, tmp_path):
    """Libraries that write weights have modes of their own."""
    (tmp_path / "any").touch()
    expected = {(tmp_path / "any").stat().st_mode}
    for folder in (fp8, tiny_dir):
        assert {path.stat().st_mode for path in folder.rglob("*") if path.is_file()} == expected


def published(tiny_dir: Path, name: str = "distill") -> torch.nn.Module:
    return checkpoint.load_dit(tiny_dir / name, VARIANTS[name], CPU, torch.bfloat16)


def assert_same(actual: torch.nn.Module, wanted: torch.nn.Module) -> None:
    own, other = actual.state_dict(), wanted.state_dict()
    assert own.keys() == other.keys()
    for key, value in own.items():
        assert value.dtype == other[key].dtype and value.stride() == other[key].stride(), key
        assert torch.equal(value.float(), other[key].float()), key


def read(folder: Path, variant: str = "distill") -> torch.nn.Module:
    return artifacts.load(artifacts.read_manifest(folder, variant), CPU)


# -- what is written --------------------------------------------------------------------------


def test_fp8_weights_are_those_that_quantising_gives(tiny_dir, fp8):
    wanted = published(tiny_dir)
    quantize_model(wanted, quantized_linears(DIT, "modality"))
    model = read(fp8)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.bfloat16 and name.endswith("down_proj.weight"):
            parameter.data = parameter.data.contiguous()  # laid out too; the published one is not
    assert_same(model, wanted)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_int8_weights_are_those_that_quantising_gives(tiny_dir, int8):
    wanted = published(tiny_dir)
    quantize_model(wanted, quantized_linears(DIT), torch.int8)
    assert_same(read(int8), wanted)
    manifest = json.loads((int8 / MANIFEST).read_text())
    assert (manifest["precision"], manifest["keep_bf16"]) == ("int8", "none")
    down = load_file(int8 / FIRST)["block.layers.2.mlp.down_proj.weight"]
    assert down.dtype == torch.int8 and down.shape == (128, 384) and not down[:, 340:].any()


def test_int8_weights_are_not_taken_for_those_of_fp8(tiny_dir, int8, tmp_path):
    """Neither where another precision is asked for, nor where the manifest has the wrong one."""
    with pytest.raises(InvalidRequestError, match="precision must be 'int8', as the artifact's"):
        runtime.load(tiny_dir, transformer=int8, precision="fp8", device="cpu")
    folder = Path(shutil.copytree(int8, tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"precision": "fp8"}))
    with pytest.raises(CheckpointError, match=r"must be torch.float8_e4m3fn, got I8"):
        artifacts.scan(artifacts.read_manifest(folder, "distill"))


def test_int8_weights_run_as_bf16_where_int8_cannot(tiny_dir, int8, caplog):
    """Rounded as they are, with a warning that names the precision."""
    with runtime.load(tiny_dir, transformer=int8, device="cpu") as engine:
        assert engine.precision == "bf16"
        own = engine._parts.dit.state_dict()
    wanted = published(tiny_dir)
    quantize_model(wanted, quantized_linears(DIT), torch.int8)
    dequantize_model(wanted)
    assert all(torch.equal(own[key], value) for key, value in wanted.state_dict().items())
    assert "the int8 weights of distill run as bf16, rounded as they are: there is no GPU" in (
        caplog.text
    )


def test_bf16_weights_are_the_published_ones_laid_out(tiny_dir, bf16):
    model = read(bf16)
    down = model.block.layers[2].mlp.down_proj.weight
    assert down.shape == (128, 340) and down.stride() == (384, 1)
    state, wanted = model.state_dict(), published(tiny_dir).state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in state.items())


def test_tensors_have_the_published_names_and_lie_as_the_kernels_want_them(fp8):
    state = load_file(fp8 / FIRST)
    down = state["block.layers.2.mlp.down_proj.weight"]
    assert down.dtype == torch.float8_e4m3fn and down.shape == (128, 384)
    assert not down[:, 340:].float().any()
    assert state["block.layers.2.mlp.down_proj.weight_scale"].shape == (128,)
    kept = state["block.layers.0.attention.linear_qkv.weight"]
    assert kept.dtype == torch.bfloat16
    scales = {key for key in state if key.endswith("weight_scale")}
    assert scales == {f"{name}.weight_scale" for name in quantized_linears(DIT, "modality")}


def test_the_manifest(tiny_dir, fp8):
    manifest = json.loads((fp8 / MANIFEST).read_text())
    source = tiny_dir / "distill" / "model.safetensors"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest["sources"] == {
        source.name: {"bytes": source.stat().st_size, "sha256": digest},
    }
    assert manifest["files"] == {FIRST: (fp8 / FIRST).stat().st_size}
    assert manifest["architecture"]["hidden_size"] == 128
    assert (manifest["variant"], manifest["precision"]) == ("distill", "fp8")
    assert (manifest["keep_bf16"], manifest["torch"]) == ("modality", torch.__version__)
    assert {"magihuman", "created", "format", "format_version"} <= manifest.keys()
    assert sorted(path.name for path in fp8.iterdir()) == [MANIFEST, FIRST]


def test_files_are_cut_at_the_limit_and_a_scale_stays_with_its_weight(
    tiny_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(converting, "SHARD_BYTES", 300_000)
    reports: list[tuple[str, int, int]] = []
    folder = runtime.convert(
        tiny_dir,
        tmp_path / "out",
        variant="base",  # of two files
        on_progress=lambda *r: reports.append(r),
    )
    files = sorted(folder.glob("*.safetensors"))
    count = len(files)
    assert count > 3 and files[-1].name == f"weights-{count:05d}-of-{count:05d}.safetensors"
    for file in files:
        state = load_file(file)
        assert sum(value.nbytes for value in state.values()) <= 300_000
        for key in state:
            assert not key.endswith("_scale") or key.removesuffix("_scale") in state
    wanted = published(tiny_dir, "base")
    quantize_model(wanted, quantized_linears(DIT))
    assert_same(read(folder, "base"), wanted)
    for stage in ("hash", "convert"):
        own = [(done, of) for name, done, of in reports if name == stage]
        assert own == sorted(own) and own[-1][0] == own[-1][1] > 0
    assert len(json.loads((folder / MANIFEST).read_text())["sources"]) == 2


# -- convert, load, generate ------------------------------------------------------------------


def test_bf16_makes_the_same_clip(tiny_dir, bf16, engine):
    with runtime.load(tiny_dir, transformer=bf16, device="cpu") as loaded:
        assert loaded.precision == "bf16"
        here = loaded.generate("hi", **SMALL)
    there = engine.generate("hi", **SMALL)
    assert (here.frames == there.frames).all() and (here.audio == there.audio).all()


@pytest.mark.parametrize("options", [{}, {"precision": "fp8"}, {"compile": False}])
def test_fp8_runs_as_bf16_where_its_kernels_cannot(tiny_dir, fp8, caplog, options):
    with runtime.load(tiny_dir, transformer=fp8, device="cpu", **options) as loaded:
        assert loaded.precision == "bf16" and not loaded.is_compiled
        wanted = published(tiny_dir)
        quantize_model(wanted, quantized_linears(DIT, "modality"))
        dequantize_model(wanted)
        state = wanted.state_dict()
        own = loaded._parts.dit.state_dict()
        assert own.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in own.items())
        assert loaded.generate("hi", **SMALL).frames.shape == (5, 64, 64, 3)
    reason = "compile=False asks for the plain one" if "compile" in options else "there is no GPU"
    (line,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert line == f"the fp8 weights of distill run as bf16, rounded as they are: {reason}"


def test_an_artifact_may_stand_in_the_models_folder(tiny_dir, bf16, tmp_path):
    """In place of a published folder; and beside one, for super-resolution."""
    leave_out = shutil.ignore_patterns("base", "distill", "540p_sr", "1080p_sr")
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model", ignore=leave_out))
    shutil.copytree(bf16, folder / "distill")
    upscaler = runtime.convert(tiny_dir, tmp_path / "sr", variant="1080p_sr")
    with runtime.load(folder, sr="1080p", sr_transformer=upscaler, device="cpu") as loaded:
        parts = loaded._parts
        assert torch.equal(
            parts.dit.final_linear_video.weight, read(bf16).final_linear_video.weight
        )
        assert parts.sr_dit.config.local_attention_layers == (0, 1, 2, 4)
        clip = loaded.generate("hi", sr_width=96, sr_height=96, sr_steps=1, **SMALL)
        assert clip.frames.shape == (5, 96, 96, 3)


# -- what load refuses ------------------------------------------------------------------------


def edit_manifest(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / MANIFEST).read_text())
        for name, change in changes.items():
            values[name] = change(values[name]) if callable(change) else change
        (folder / MANIFEST).write_text(json.dumps(values))

    return edit


def edit_tensors(change: Callable[[dict], object]) -> Edit:
    """Of the same size or not, as the manifest says."""

    def edit(folder: Path) -> None:
        state = load_file(folder / FIRST)
        change(state)
        save_file(state, folder / FIRST)
        edit_manifest(files={FIRST: (folder / FIRST).stat().st_size})(folder)

    return edit


def cut(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-1])


def without(name: str) -> Callable[[dict], dict]:
    return lambda values: {key: value for key, value in values.items() if key != name}


SCALES = "block.layers.2.mlp.down_proj.weight_scale"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: (f / MANIFEST).write_text("{"), f"{MANIFEST} cannot be read as JSON"),
        (lambda f: (f / MANIFEST).write_text("{}"), "of the format .*, got None; it belongs to so"),
        (edit_manifest(format="onnx"), "must be of the format .*, got 'onnx'; it belongs to"),
        (edit_manifest(format_version=0), "of format version 1, got 0; convert .* again"),
        (edit_manifest(variant="base"), "must be of the variant 'distill', got 'base'"),
        (edit_manifest(architecture=None), "architecture must have num_layers, hidden_size, "),
        (edit_manifest(architecture=without("kv_heads")), "architecture must have kv_heads; conve"),
        (edit_manifest(architecture=lambda a: {**a, "more": 1}), "unknown field.s. more"),
        (
            edit_manifest(architecture=lambda a: {**a, "num_layers": 6}),
            "does not fit the model: 12 missing: ",
        ),
        (
            edit_manifest(architecture=lambda a: {**a, "hidden_size": 256}),
            "does not fit the model: .* misshapen: adapter.video_embedder.weight is",
        ),
        (edit_manifest(precision="int4"), "precision of fp8 or int8 or bf16 .*, got 'int4'"),
        (edit_manifest(keep_bf16=None), "and a keep_bf16, got 'fp8' and None; convert"),
        (edit_manifest(keep_bf16="some"), "'modality' or a list of names, got 'some'; convert"),
        (edit_manifest(keep_bf16="none"), "does not fit the model: 8 missing: block.layers.0"),
        (edit_manifest(precision="bf16"), "does not fit the model: 12 unexpected: "),
        (edit_manifest(files={}), f"{MANIFEST} must have files"),
        (edit_manifest(files=[FIRST]), f"{MANIFEST} must have files"),
        (edit_manifest(files={"../" + FIRST: 1}), "must be names in the same folder .*'../wei"),
        (edit_manifest(files={FIRST: "1"}), "must be names in the same folder .*: '1'"),
        (edit_manifest(files=lambda f: {**f, "more": 3}), "more is missing; copy the folder whole"),
        (lambda f: (f / FIRST).unlink(), f"{FIRST} is missing; copy the folder whole, or convert"),
        (cut, rf"{FIRST} must have \d+ bytes, got \d+; copy the folder whole"),
        (edit_tensors(lambda s: s.pop(SCALES)), f"1 missing: {SCALES}$"),
        (edit_tensors(lambda s: s.update(more=torch.zeros(1))), "1 unexpected: more$"),
        (
            edit_tensors(lambda s: s.update({SCALES: s[SCALES].bfloat16()})),
            f"{SCALES} must be torch.float32, got BF16; convert",
        ),
    ],
)
def test_a_stale_partial_or_foreign_artifact_is_refused(tiny_dir, fp8, tmp_path, edit, message):
    folder = Path(shutil.copytree(fp8, tmp_path / "copy"))
    edit(folder)
    with pytest.raises(CheckpointError, match=message):
        runtime.load(tiny_dir, transformer=folder, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, "precision must be 'fp8', as the artifact's .*, got 'bf16'; leave"),
        ({"precision": "fp32"}, "precision must be 'fp8', as the artifact's .*, got 'fp32'; leave"),
        ({"precision": "fp8", "keep_bf16": "none"}, "keep_bf16 must be that of the artifact .*non"),
        (
            {"keep_bf16": "modality"},
            "keep_bf16 must go with precision='fp8', 'fp8-attn' or 'int8', got 'modality' with",
        ),
    ],
)
def test_an_artifact_decides_its_precision(tiny_dir, fp8, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        runtime.load(tiny_dir, transformer=fp8, device="cpu", **options)


def test_published_files_win_over_a_manifest_beside_them(tiny_dir, tmp_path):
    """Some hub repositories carry a manifest.json of their own."""
    folder = Path(shutil.copytree(tiny_dir / "distill", tmp_path / "distill"))
    (folder / MANIFEST).write_text("{}")
    runtime.load(tiny_dir, transformer=folder, device="cpu").close()


# -- what convert refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "720p"}, "variant must be one of 'base', .*, got '720p'"),
        ({"precision": "fp32"}, "precision must be one of 'fp8', 'int8', 'bf16', got 'fp32'"),
        ({"keep_bf16": ["nothing"]}, "keep_bf16 must name linears .*, got 'nothing'"),
        ({"precision": "bf16", "keep_bf16": "modality"}, "keep_bf16 must go with precision='fp8'"),
    ],
)
def test_a_wrong_argument_is_refused(tiny_dir, tmp_path, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        runtime.convert(tiny_dir, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_source_must_be_a_published_transformer(tiny_dir, fp8, tmp_path):
    with pytest.raises(CheckpointError, match="model must be a directory that holds distill, got"):
        runtime.convert(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="must hold the published files, got an artifact"):
        runtime.convert(fp8.parent, tmp_path / "out")
    shutil.copytree(tiny_dir / "distill", tmp_path / "distill")
    (tmp_path / "distill" / "magihuman.json").unlink()
    with pytest.raises(CheckpointError, match=r"does not fit the model: .* missing"):
        runtime.convert(tmp_path, tmp_path / "out")


def test_the_output_must_be_new_and_fit(tiny_dir, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match=r"must not exist yet, got .*there; name another"):
        runtime.convert(tiny_dir, tmp_path / "there")
    with pytest.raises(OutputError, match=r"folder must exist, got .*no; create it"):
        runtime.convert(tiny_dir, tmp_path / "no" / "out")
    usage = shutil._ntuple_diskusage(10**6, 10**6, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"must have 0.0 GiB free, got 0.0 GiB"):
        runtime.convert(tiny_dir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


# -- whole or not at all ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "raised", "message"),
    [
        (OSError(28, "No space left on device"), OutputError, "No space left .*; nothing is left"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("step", ["save_file", "sync", "hashed"])
def test_a_failure_midway_leaves_nothing(
    tiny_dir, tmp_path, monkeypatch, step, fault, raised, message
):
    monkeypatch.setattr(converting, "SHARD_BYTES", 200_000)
    original, calls = getattr(converting, step), []

    def fail_the_second_time(*arguments: object, **options: object) -> object:
        calls.append(step)
        if len(calls) == 2 or step == "hashed":
            raise fault
        return original(*arguments, **options)

    monkeypatch.setattr(converting, step, fail_the_second_time)
    with pytest.raises(raised, match=message):
        runtime.convert(tiny_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_made_meanwhile_is_not_replaced(tiny_dir, tmp_path):
    def make_it(stage: str, done: int, of: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(OutputError, match="out has been made by somebody else meanwhile"):
        runtime.convert(tiny_dir, tmp_path / "out", on_progress=make_it)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


SLOWLY = """
import time
from magihuman.runtime.weights import converting
from magihuman.runtime.cli.main import main

def stay(*arguments, **options):
    print("writing", flush=True)
    time.sleep(60)

converting.save_file = stay
main()
"""


def test_interrupting_the_command_leaves_nothing(tiny_dir, tmp_path):
    arguments = ["convert", "--model", str(tiny_dir), str(tmp_path / "out")]
    command = [sys.executable, "-c", SLOWLY, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        assert [path.name[:11] for path in tmp_path.iterdir()] == [".magihuman-"]
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and b"interrupted" in stderr
    assert not list(tmp_path.iterdir())


# -- the command ------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_convert_and_generate_as_commands(tiny_dir, tmp_path):
    keep = ("--keep-bf16", "block.layers.0.*,*.linear_proj")
    result = run("convert", "-m", tiny_dir, "--variant", "base", *keep, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["path"] == str(tmp_path / "out") and said["bytes"] > 10**6
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["keep_bf16"] == [
        "block.layers.0.*", "*.linear_proj",
    ]  # fmt: skip
    size = ("--seconds", "0.2", "--width", "64", "--height", "64", "--steps", "1")
    use = ("--transformer", tmp_path / "out", "--variant", "base", "--precision", "fp8")
    clip = tmp_path / "clip.mp4"
    result = run("generate", "-m", tiny_dir, "-p", "hi", "-o", clip, *size, *use, *keep)
    assert result.exit_code == 0, result.stderr
    assert clip.stat().st_size > 0


def test_what_the_command_says(tiny_dir, tmp_path):
    result = run("convert", "--model", tiny_dir, "--precision", "bf16", tmp_path / "out")
    assert result.exit_code == 0
    assert f"{tmp_path / 'out'}: distill in bf16, " in result.stdout
    assert "hash " in result.stderr and "convert " in result.stderr
    result = run("convert", "--model", tiny_dir, tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.startswith("error: the output must not exist")
    result = run("convert", "--model", tiny_dir, tmp_path / "new", "--keep-bf16", "modal")
    assert result.exit_code == 2 and "got 'modal'" in result.stderr


def test_inspect_knows_artifacts(fp8, bf16, tmp_path):
    shutil.copytree(fp8, tmp_path / "distill")
    shutil.copytree(bf16, tmp_path / "base")
    components = json.loads(run("inspect", tmp_path, "--json").stdout)["components"]
    found = {c["name"]: c for c in components}
    assert found["distill"]["state"] == "ok"
    assert found["distill"]["dtypes"] == {"F32": 43, "F8_E4M3": 12, "BF16": 8}
    assert "must be of the variant 'base', got 'distill'" in found["base"]["state"]
