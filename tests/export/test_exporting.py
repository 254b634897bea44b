"""What is written, what is refused, and that nothing is left of a failure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magihuman import export as package
from magihuman.export import exporting
from magihuman.export.cli import cli, export
from magihuman.export.exporting import VaeExport, export_audio, export_vae
from magihuman.export.sizes import Size
from magihuman.export.tensorrt import BuildError, build_engine
from magihuman.export.verify import verify
from magihuman.runtime.errors import (
    CheckpointError,
    DeviceError,
    InvalidRequestError,
    OutputError,
)
from magihuman.runtime.exported.manifest import read_manifest

assert export.__name__ in {command.callback.__name__ for command in cli.app.registered_commands}


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("text", "height", "width"),
    [
        ("480x256", (16, 16, 16), (30, 30, 30)),
        ("256x256:480x256:896x512", (16, 16, 32), (16, 30, 56)),
    ],
)
def test_sizes_are_pixels_in_steps_of_a_token(text, height, width):
    size = Size.parse(text)
    assert (size.height, size.width) == (height, width)
    assert str(size) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("480x272", "steps of 32 pixels, as clips are made, got 480x272; name 480x256"),
        ("0x32", "name 32x32"),
        ("480", "must be as 480x256, or fewest"),
        ("64x64:96x96", "must be as 480x256, or fewest"),
        ("96x96:64x64:128x128", "from fewest to best to most"),
    ],
)
def test_other_sizes_are_refused(text, message):
    with pytest.raises(InvalidRequestError, match=message):
        Size.parse(text)


@pytest.mark.parametrize(
    ("options", "raised", "message"),
    [
        ({"target": "coreml"}, InvalidRequestError, "target must be one of 'onnx', 'tensorrt'"),
        ({"dtype": "fp8"}, InvalidRequestError, "dtype must be one of 'bf16'"),
        ({"sm": 89}, InvalidRequestError, "sm must go with target='tensorrt', got 89"),
        ({"sizes": []}, InvalidRequestError, "sizes must be named, each once, got none"),
        ({"sizes": ["64x64", "64x64"]}, InvalidRequestError, "each once, got 64x64, 64x64"),
        ({"target": "tensorrt"}, DeviceError, "sm must be given on a machine without a GPU"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(
    tiny_dir, tmp_path, monkeypatch, options, raised, message
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(raised, match=message):
        export_vae(tiny_dir, tmp_path / "out", VaeExport(**options))
    with pytest.raises(OutputError, match="must not exist yet"):
        export_vae(tiny_dir, tmp_path)
    with pytest.raises(CheckpointError, match="must hold"):
        export_vae(tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_package_has_what_its_docstring_calls():
    assert package.export_vae is export_vae
    assert package.VaeExport(target="tensorrt").sizes == ("480x256",)
    with pytest.raises(AttributeError, match="has no attribute 'export_all'"):
        package.export_all  # noqa: B018


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_midway_leaves_nothing(tiny_dir, tmp_path, monkeypatch, fault):
    def fail(module: object, example: object, dims: object, path: Path, to: object) -> None:
        path.write_bytes(b"half a graph")
        raise fault

    monkeypatch.setattr(exporting, "write_onnx", fail)
    raised = OutputError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(raised):
        export_audio(tiny_dir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_interrupting_a_build_ends_it(engines_dir):
    manifest = read_manifest(engines_dir)
    steps: list[int] = []

    def interrupt(done: int, of: int) -> None:
        steps.append(done)
        raise KeyboardInterrupt

    shape = tuple((n, n, n) for n in (1, 48, 8, 4, 4))
    assert manifest.builder is not None
    with pytest.raises(KeyboardInterrupt):
        build_engine(engines_dir / "first-64x64.onnx", shape, manifest.builder, 2**30, interrupt)
    assert steps == [1]


def test_what_tensorrt_refuses_has_its_reason(engines_dir, tmp_path):
    manifest = read_manifest(engines_dir)
    assert manifest.builder is not None
    (tmp_path / "bad.onnx").write_bytes((engines_dir / "first-64x64.onnx").read_bytes())
    with pytest.raises(BuildError, match=r"cannot read bad.onnx: .*decoder.conv_in.conv.weight"):
        build_engine(tmp_path / "bad.onnx", ((1, 1, 1),), manifest.builder, 2**30)


@pytest.fixture(scope="module")
def sound(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "out"
    result = run("export", "--audio", "-m", tiny_dir, folder, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)["verified"]
    assert [figure["shape"] for figure in figures] == [[1, 64, 1], [1, 64, 126]]
    assert all(figure["ok"] and figure["error"] <= 1e-4 for figure in figures)
    return folder


def test_verifying_writes_its_figures_again(sound, tiny_dir):
    before = json.loads((sound / "manifest.json").read_text())
    assert verify(sound, tiny_dir).is_ok
    after = json.loads((sound / "manifest.json").read_text())
    assert after.pop("verified")["figures"] == before.pop("verified")["figures"]
    assert after == before


def test_a_graph_that_is_off_fails(sound, tiny_dir, tmp_path, monkeypatch):
    """Other weights under the same names and hashes: what verification is for."""
    from magihuman.runtime.weights import checkpoint

    def altered(folder: Path, device: object) -> object:
        model = original(folder, device)
        next(model.decoder.parameters()).mul_(1.01)
        return model

    original = checkpoint.load_audio_vae
    monkeypatch.setattr(checkpoint, "load_audio_vae", altered)
    folder = shutil.copytree(sound, tmp_path / "off")
    result = run("export", "--verify-only", "-m", tiny_dir, folder)
    assert result.exit_code == 1 and "FAIL" in result.stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    assert not any(figure["ok"] for figure in manifest["verified"]["figures"])


def test_verifying_against_other_weights_is_refused(sound, tiny_dir, tmp_path):
    other = shutil.copytree(tiny_dir / "stable-audio-open-1.0", tmp_path / "stable-audio-open-1.0")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = run("export", "--verify-only", "-m", tmp_path, sound)
    assert result.exit_code == 2 and "must have been exported from model.safetensors" in (
        result.stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of --vae and --audio must be given"),
        (("--vae", "--audio"), "one of --vae and --audio must be given"),
        (("--audio", "--target", "tensorrt"), "--audio must go without --target tensorrt"),
        (("--vae", "--size", "100x100"), "name 96x96"),
    ],
)
def test_options_that_do_not_go_together(tiny_dir, tmp_path, options, message):
    result = run("export", "-m", tiny_dir, *options, tmp_path / "out")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert exporting.SIZES == ("480x256",)
