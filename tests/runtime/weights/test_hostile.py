"""Folders that lie: whatever their files say, a model is read, or it is a `CheckpointError`."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from safetensors.torch import save_file

from magihuman import runtime
from magihuman.runtime import CheckpointError
from magihuman.runtime.config import VARIANTS
from magihuman.runtime.exported import manifest as exported
from magihuman.runtime.memory.parts import text_part
from magihuman.runtime.weights import artifacts, checkpoint, load_image_vae, reading, shipped
from magihuman.runtime.weights.locate import IMAGE_FOLDER, TURBO_FOLDER
from magihuman.runtime.weights.wan_vae import WEIGHTS_NAME

CPU = torch.device("cpu")


@pytest.mark.skipif(not hostile.CAN_MEASURE, reason="needs Linux's /proc")
def test_whatever_its_json_says_a_model_is_read_or_refused(folders: Path, tmp_path: Path) -> None:
    """Every number times 10^6, every value of another kind, one at a time, and what is no JSON."""
    found = hostile.walk(shutil.copytree(folders, tmp_path / "models"), 0, 9)
    assert found["read"] > 600 and found["refused"] > found["read"] // 4
    assert found["grown"] <= hostile.GROWTH_BYTES and found["asked"] == 0
    assert found["longest"] < 5000  # letters of a message


# -- files and folders ----------------------------------------------------------------------------

NAMES = [
    "../distill/model.safetensors", "/etc/passwd", "", ".", "..", "a/b.safetensors", "a\\b",
    "./model.safetensors", "a\0b", "a" * 300, "\ud800", 7, None, ["model.safetensors"], {},
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_files_of_its_own_folder(
    name: object, tiny_dir: Path, tmp_path: Path
) -> None:
    """Also where the file is there, and a shard."""
    root = tmp_path / "models"
    for each in ("base", "distill"):
        shutil.copytree(tiny_dir / each, root / each)
    index = root / "base" / checkpoint.INDEX_NAME
    values = json.loads(index.read_text())
    values["weight_map"][next(iter(values["weight_map"]))] = name
    index.write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match="weight_map of tensor names to files in the same fol"
    ):
        checkpoint.scan(root / "base")


@pytest.mark.parametrize(
    "name", ["..", "../x", "/etc/passwd", "", ".", "a\0b", "a" * 300, "\ud800"]
)
def test_manifests_name_files_of_their_own_folder(name: str, folders: Path, tmp_path: Path) -> None:
    root = shutil.copytree(folders, tmp_path / "models")
    artifact, graphs = root / "artifact" / "manifest.json", root / "exported" / "manifest.json"
    hostile.rewrite(artifact, files={name: 7})
    with pytest.raises(CheckpointError, match="files must be names in the same folder"):
        artifacts.read_manifest(artifact.parent, "distill")
    values = json.loads(graphs.read_text())
    values["graphs"][0]["onnx"] = name
    graphs.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="a kind and the name of a file"):
        exported.read_manifest(graphs.parent)
    values["graphs"][0]["onnx"] = "single.onnx"
    values["files"][name] = values["files"]["single.onnx"]
    graphs.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="files must be names in the same folder"):
        exported.read_manifest(graphs.parent)


def test_a_model_in_the_hubs_cache_is_one_of_links(tiny_dir: Path, tmp_path: Path) -> None:
    """Each file is a link out of its folder, into one of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    for number, file in enumerate(sorted(f for f in tiny_dir.rglob("*") if f.is_file())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        link = snapshot / file.relative_to(tiny_dir)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{number:064x}", link.parent))
    with runtime.load(snapshot, variant="base", device="cpu") as engine:
        video = engine.generate("hi", seconds=0.2, width=32, height=32, steps=2)
    assert video.frames.shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    "kind", ["model", "transformer", "turbo_vae", "text_encoder", "audio_vae", "image_vae"]
)
@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "a" * 70_000, "a\0b", "\ud800"])
def test_a_path_that_no_file_system_has_is_one_that_is_not_there(
    kind: str, name: str, tiny_dir: Path
) -> None:
    arguments = {"model": tiny_dir, kind: name}
    with pytest.raises(CheckpointError, match="must be"):
        runtime.load(**arguments, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "cannot be read as JSON: maximum recursion"),
        (b'{"seconds": ' + b"9" * 5000 + b"}", "cannot be read as JSON: Exceeds the limit"),
        (b" " * reading.MOST_JSON_BYTES + b"{}", "must have at most 4194304 bytes, got 4194306"),
        (b'{"seconds": NaN, "width": 96, "height": 64}', "seconds must be a number from 0.2"),
        (b'{"seconds": 1e999, "width": 96, "height": 64}', "seconds must be a number from 0.2"),
        (b'{"seconds": 3, "width": 96000000, "height": 64}', "width must be a whole number"),
        (b'{"seconds": 3, "width": 96.5, "height": 64}', "width must be a whole number"),
        (b'{"seconds": -3, "width": 96, "height": 64}', "seconds must be a number from 0.2"),
        (b'{"seconds": 1' + b"0" * 400 + b', "width": 96, "height": 64}', "seconds must be a num"),
    ],
)
def test_what_suits_a_model_is_a_request(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / shipped.SUITED).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"request\.json:? {message}"):
        shipped.suited(tmp_path)


# -- sizes ----------------------------------------------------------------------------------------


def test_layers_are_compared_with_the_header_before_one_is_made(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_dir / "distill", tmp_path / "distill")
    hostile.rewrite(
        folder / checkpoint.ARCHITECTURE_NAME, num_layers=60
    )  # its files have 51 tensors
    monkeypatch.setattr(checkpoint, "DiT", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(CheckpointError, match="num_layers is 60, and its files hold 51 tensors"):
        checkpoint.load_dit(folder, VARIANTS["distill"], CPU, torch.bfloat16)
    for name in ("distill", "1080p_sr"):
        hostile.rewrite(folder / checkpoint.ARCHITECTURE_NAME, num_layers=10**6)
        with pytest.raises(CheckpointError, match="num_layers must be at most 1000, got 1000000"):
            checkpoint.dit_config(folder, VARIANTS[name])


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    """A sound one, of more tensors than any model has."""
    save_file(
        {f"{i:0200}": torch.zeros(0, dtype=torch.float32) for i in range(45_000)},
        tmp_path / checkpoint.SINGLE_NAME,
    )
    with pytest.raises(CheckpointError, match=r"its header has [0-9]+ bytes, and at most 8388608"):
        checkpoint.scan(tmp_path)


def test_a_shape_of_no_elements_may_have_any_sides(tmp_path: Path) -> None:
    """As a header says it, where no tensor of PyTorch could be."""
    header = {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / checkpoint.SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text)
    assert checkpoint.scan(tmp_path)["a"].size_bytes == 0
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.load_dit(tmp_path, VARIANTS["distill"], CPU, torch.bfloat16)


def _expanded(state: dict[str, torch.Tensor], key: str) -> None:
    """As many rows as a file of any size has; in the file is one value."""
    state[key] = torch.zeros(1, dtype=torch.float32).expand(state[key].shape)


ODD_TENSORS: dict[str, Callable[[dict[str, Any], str], object]] = {
    "one value for all": _expanded,
    "no values": lambda state, key: state.update(
        {key: torch.empty_like(state[key], device="meta")}
    ),
    "sparse": lambda state, key: state.update({key: state[key].to_sparse()}),
    "whole numbers": lambda state, key: state.update({key: state[key].long()}),
    "complex": lambda state, key: state.update({key: state[key].to(torch.complex64)}),
}


@pytest.mark.parametrize("odd", ODD_TENSORS)
def test_a_tensor_has_its_values_in_the_file(odd: str, tiny_dir: Path, tmp_path: Path) -> None:
    turbo = shutil.copytree(tiny_dir / TURBO_FOLDER, tmp_path / "turbo")
    image = shutil.copytree(tiny_dir / IMAGE_FOLDER, tmp_path / "image")
    saved = torch.load(turbo / checkpoint.TURBO_VAE_WEIGHTS, weights_only=True)
    ODD_TENSORS[odd](saved["ema_state_dict"], "module.decoder.conv_in.conv.weight")
    torch.save(saved, turbo / checkpoint.TURBO_VAE_WEIGHTS)
    state = torch.load(image / WEIGHTS_NAME, weights_only=True)
    ODD_TENSORS[odd](state, "encoder.conv1.weight")
    torch.save(state, image / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"conv_in\.conv\.weight must be a dense tensor"):
        checkpoint.load_turbo_vae(turbo, CPU, torch.float32)
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.weight must be a dense tensor"):
        load_image_vae(image, CPU, torch.float32)


@pytest.mark.parametrize("rows", [0, 10**9])
def test_a_picture_encoder_is_made_of_sound_sizes(rows: int, tmp_path: Path) -> None:
    tensor = torch.empty(rows, 0, dtype=torch.float32)
    torch.save({"encoder.conv1.weight": tensor}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=f"must have 1 to 4096 rows, got {rows}"):
        load_image_vae(tmp_path, CPU, torch.float32)


def test_what_is_compressed_is_not_unpacked(tmp_path: Path) -> None:
    """PyTorch compresses nothing; a thousandth of it could be in the file."""
    torch.save({"a": torch.zeros(3, dtype=torch.float32)}, tmp_path / "plain.ckpt")
    assert "a" in checkpoint.load_pickle(tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="damaged, cut short or holds more than tensors"):
        checkpoint.load_pickle(tmp_path / "packed.ckpt")


def test_weight_norms_fit_their_weights(tiny_dir: Path, tmp_path: Path) -> None:
    weight = torch.ones(6, 4, 7, dtype=torch.float32)
    for gain in (torch.ones(6), torch.ones(4, 1, 1), torch.ones(6, 4, 1), torch.ones(())):
        with pytest.raises(CheckpointError, match=r"weight_g must be \[6, 1, 1\], a norm for each"):
            checkpoint.fold_weight_norm({"a.weight_g": gain.float(), "a.weight_v": weight})
    with pytest.raises(CheckpointError, match="weight_g must be"):
        checkpoint.fold_weight_norm({"a.weight_g": torch.ones(6), "a.weight_v": torch.ones(6)})


def test_layers_of_an_encoder_have_numbers(tmp_path: Path) -> None:
    """Others are counted beside the layers."""
    keys = ("layers.0.a", "layers.x.a", "layers.99999.a", "layers.\u0661.a", "layers", "norm")
    tensors = {f"encoder.{key}": torch.zeros(2, dtype=torch.float32) for key in keys}
    save_file(tensors, tmp_path / checkpoint.SINGLE_NAME)
    part = text_part(tmp_path)
    assert (part.layer_bytes, part.total_bytes) == ((4,), 24)
