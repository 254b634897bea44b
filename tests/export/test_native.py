"""The parts of the native program that need neither a GPU nor TensorRT."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SOURCE = Path(__file__).parents[2] / "export" / "native" / "clip_test.cpp"
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")


@pytest.fixture(scope="module")
def clip_test(tmp_path_factory) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("native") / "clip-test"
    subprocess.run([compiler, *STRICT, str(SOURCE), "-o", str(program)], check=True)
    return program


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_every_frame_of_a_clip_comes_from_its_own_latent_once(clip_test):
    done = run(clip_test)
    assert done.returncode == 0, done.stderr


def test_manifests_and_latents_are_read_as_python_writes_them(clip_test, engines_dir, tmp_path):
    latents = torch.randn(1, 48, 9, 4, 6)
    save_file({"latents": latents}, tmp_path / "z.safetensors", metadata={"made": 'by "us"'})
    done = run(clip_test, engines_dir, tmp_path / "z.safetensors")
    assert done.returncode == 0, done.stderr
    first, *graphs, last = done.stdout.splitlines()
    builder = json.loads((engines_dir / "manifest.json").read_text())["builder"]
    assert first == f"bf16 tensorrt_rtx {builder['version']} 89"
    wanted = {"single": 7, "first": 8, "middle": 9, "last": 8}
    assert graphs == [f"{kind}-64x64.engine {t} 4 4" for kind, t in wanted.items()]
    assert last == f"48 9 4 6 {latents.flatten()[-1]:.6f}"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", lambda text: text[:-9], "manifest.json: not JSON at byte"),
        ("manifest.json", lambda text: text.replace(b"decoder", b"model", 1), "must be 'magihuman"),
        ("first-64x64.engine", lambda text: text[:-1], "first-64x64.engine must have"),
        ("z.safetensors", lambda text: text[:-4], "its tensor is cut short"),
        ("z.safetensors", lambda text: text[:5], "too short for safetensors"),
        ("z.safetensors", lambda text: text.replace(b"F32", b"F16"), "must be F32"),
    ],
)
def test_what_is_damaged_is_refused(clip_test, engines_dir, tmp_path, name, damage, message):
    folder = shutil.copytree(engines_dir, tmp_path / "engines")
    save_file({"latents": torch.zeros(1, 48, 2, 2, 2)}, folder / "z.safetensors")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    done = run(clip_test, folder, folder / "z.safetensors")
    assert done.returncode == 1 and message in done.stderr
