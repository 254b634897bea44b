"""Manifests of exported decoders: what is accepted, and every reason to refuse one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from magihuman.runtime import CheckpointError, DeviceError, InvalidRequestError
from magihuman.runtime.exported import manifest as exported
from magihuman.runtime.exported.manifest import (
    Builder,
    check_builder,
    check_sources,
    read_manifest,
)
from magihuman.runtime.exported.tensorrt import TensorRTVAE, flavour_for
from magihuman.runtime.weights.checkpoint import turbo_vae_files
from magihuman.runtime.weights.tiny import TURBO_VAE

ENGINE = "first-64x64.engine"


@pytest.fixture
def folder(engines_dir, tmp_path) -> Path:
    return shutil.copytree(engines_dir, tmp_path / "engines")


def test_a_manifest_is_read_as_it_was_written(engines_dir, tiny_dir):
    found = read_manifest(engines_dir)
    assert exported.is_exported(engines_dir) and not exported.is_exported(tiny_dir / "turbo_vae")
    assert (found.decoder, found.target, found.dtype) == ("turbo_vae", "tensorrt", torch.bfloat16)
    assert found.config == TURBO_VAE
    assert {graph.kind: graph.dims for graph in found.graphs} == {
        kind: {"latents": (t, t, t), "height": (4, 4, 4), "width": (4, 4, 4)}
        for kind, t in {"single": 7, "first": 8, "middle": 9, "last": 8}.items()
    }
    check_sources(found, list(turbo_vae_files(tiny_dir / "turbo_vae")))
    assert found.builder is not None
    check_builder(found, found.builder)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / exported.MANIFEST_NAME
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


def resize(graph: dict[str, Any], name: str, sizes: list[int]) -> None:
    graph["dims"][name] = sizes


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read as JSON"),
        (edited(dict.clear), "must have format 'magihuman exported decoder', got None"),
        (
            edited(lambda v: v.update(format="magihuman transformer")),
            "got 'magihuman transformer'; it belongs to something else",
        ),
        (edited(lambda v: v.update(format_version=2)), "format_version 1, got 2; export it again"),
        (edited(lambda v: v.update(decoder="dit")), "decoder 'turbo_vae' or 'audio_vae', got 'dit"),
        (edited(lambda v: v.update(target="coreml")), "target 'onnx' or 'tensorrt', got 'coreml'"),
        (edited(lambda v: v.update(dtype="fp8")), "dtype 'bf16' or 'fp16' or 'fp32', got 'fp8'"),
        (edited(lambda v: v.pop("architecture")), "must have an architecture, got None"),
        (
            edited(lambda v: v["architecture"].pop("patch_size")),
            "architecture: the field patch_size is missing",
        ),
        (edited(lambda v: v.pop("builder")), "must have a builder with flavour, version and sm"),
        (edited(lambda v: v["builder"].update(sm="89")), "must have a builder with"),
        (edited(lambda v: v.pop("sources")), "must have sources, the hashes of the weights"),
        (edited(lambda v: v.update(graphs=[])), r"must have graphs, got \[\]"),
        (edited(lambda v: v["graphs"][0].pop("onnx")), "a graph is not as expected, TypeError"),
        (edited(lambda v: v["graphs"].append(7)), "a graph is not as expected, TypeError"),
        (
            edited(lambda v: resize(v["graphs"][1], "height", [4, 2, 4])),
            r"height of first-64x64.onnx must be fewest, best and most, got \[4, 2, 4\]",
        ),
        (
            edited(lambda v: resize(v["graphs"][1], "width", [2, 4])),
            r"must be fewest, best and most, got \[2, 4\]",
        ),
        (
            edited(lambda v: v["graphs"][1].update(engine=None)),
            "must have an engine where the target is tensorrt, and only there, got None",
        ),
        (
            edited(lambda v: v["graphs"][1]["dims"].pop("width")),
            "must have latents, height and width, got latents, height",
        ),
        (
            edited(lambda v: resize(v["graphs"][2], "latents", [8, 8, 8])),
            r"windows must be of the kinds .*, got 'middle' of \[8, 8, 8\] latents",
        ),
        (edited(lambda v: v["graphs"].pop()), "must have each of .* got single, first, middle;"),
        (
            edited(lambda v: resize(v["graphs"][3], "width", [4, 4, 8])),
            "must have each of single, first, middle, last once for every size",
        ),
        (edited(lambda v: v.pop("files")), "must have files, names to bytes and SHA-256"),
        (edited(lambda v: v["files"].pop(ENGINE)), f"got '{ENGINE}': None"),
        (
            edited(lambda v: v["files"].update({"../weights.bin": {"bytes": 1, "sha256": ""}})),
            "must be names in the same folder with bytes and SHA-256, got '../weights.bin'",
        ),
        (lambda f: (f / ENGINE).unlink(), f"{ENGINE} is missing; copy the folder whole"),
        (
            lambda f: (f / ENGINE).write_bytes((f / ENGINE).read_bytes()[:-1]),
            rf"{ENGINE} must have \d+ bytes, got \d+; copy the folder whole",
        ),
        (lambda f: flip(f / ENGINE), f"{ENGINE} must have the SHA-256 .* its bytes have changed"),
        (lambda f: flip(f / "weights.bin"), "weights.bin must have the SHA-256"),
    ],
)
def test_a_folder_that_is_not_as_it_was_written_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flavour": "tensorrt"}, "the flavour of TensorRT here is tensorrt, theirs tensorrt_rtx"),
        ({"version": "9.9"}, r"the version of TensorRT here is 9.9, theirs \d"),
        ({"sm": 120}, r"the GPU here is sm_120, theirs sm_89; export it again for \w+ .* sm_120"),
    ],
)
def test_engines_of_another_machine_are_refused(engines_dir, change, message):
    found = read_manifest(engines_dir)
    assert found.builder is not None
    with pytest.raises(CheckpointError, match=message):
        check_builder(found, Builder(**{**vars(found.builder), **change}))


def test_onnx_alone_is_no_engine(engines_dir, folder):
    def to_onnx(values: dict[str, Any]) -> None:
        values["target"] = "onnx"
        for graph in values["graphs"]:
            graph["engine"] = None

    edited(to_onnx)(folder)
    with pytest.raises(CheckpointError, match="must hold TensorRT engines, got ONNX alone"):
        check_builder(read_manifest(folder), Builder("tensorrt", "11", 90))


def test_other_weights_are_refused(engines_dir, tiny_dir, tmp_path):
    other = shutil.copytree(tiny_dir / "turbo_vae", tmp_path / "turbo_vae")
    flip(next(other.glob("*.ckpt")))
    with pytest.raises(CheckpointError, match=r"of SHA-256 \w+, got \w+; export it again from"):
        check_sources(read_manifest(engines_dir), list(turbo_vae_files(other)))


def test_sizes_beyond_those_exported_are_refused(folder):
    found = read_manifest(folder)
    found.check_size(4, 4)
    with pytest.raises(InvalidRequestError, match="exported size, 64x64, got 96x64; export that"):
        found.check_size(4, 6)

    def widen(values: dict[str, Any]) -> None:
        for graph in values["graphs"]:
            resize(graph, "width", [4, 6, 10])

    edited(widen)(folder)
    found = read_manifest(folder)
    found.check_size(4, 6)
    with pytest.raises(InvalidRequestError, match="64x64 to 160x64, got 192x64"):
        found.check_size(4, 12)


def test_engines_need_a_gpu(engines_dir):
    with pytest.raises(DeviceError, match="TensorRT engines need a CUDA device, got cpu"):
        TensorRTVAE(read_manifest(engines_dir), torch.device("cpu"))


def test_the_flavour_is_chosen_by_the_gpu():
    pytest.importorskip("tensorrt_rtx", reason="it has wheels for Linux on x86-64 only")
    assert flavour_for(89, None) == "tensorrt_rtx"
    with pytest.raises(DeviceError, match=r"for SM75, .*SM89, .*got sm_90; full TensorRT makes"):
        flavour_for(90, None)
