"""Model folders that lie, and a process that reads them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from magihuman import runtime
from magihuman.runtime.exported import manifest as exported
from magihuman.runtime.model import window_kinds
from magihuman.runtime.weights.locate import AUDIO_FOLDER, TEXT_FOLDER, TURBO_FOLDER
from magihuman.runtime.weights.tiny import TURBO_VAE

CHILD = Path(__file__).parent / "model_child.py"
GROWTH_BYTES = 500 * 2**20
CAN_MEASURE = Path("/proc/self/clear_refs").exists()


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_exported(folder: Path) -> None:
    """A manifest as `magihuman export` writes it, of graphs that are none."""
    folder.mkdir()
    sides = {"height": (4, 4, 4), "width": (4, 4, 4)}
    graphs = [
        exported.Graph(kind, {"latents": (window.latents,) * 3, **sides}, f"{kind}.onnx")
        for kind, window in window_kinds(TURBO_VAE).items()
    ]
    for graph in graphs:
        (folder / graph.onnx).write_bytes(b"graph")
    facts = {"bytes": 5, "sha256": hashlib.sha256(b"graph").hexdigest()}
    values = {
        "format": exported.FORMAT,
        "format_version": exported.FORMAT_VERSION,
        "decoder": exported.TURBO_VAE,
        "target": "onnx",
        "dtype": "bf16",
        "architecture": dataclasses.asdict(TURBO_VAE),
        "opset": 20,
        "graphs": [dataclasses.asdict(graph) for graph in graphs],
        "files": {graph.onnx: facts for graph in graphs},
        "sources": {"checkpoint.ckpt": facts},
        "magihuman": "0",
    }
    (folder / exported.MANIFEST_NAME).write_text(json.dumps(values))


def write_folders(tiny_dir: Path, root: Path) -> None:
    """Every kind of folder that a model is read from, each sound."""
    for name in ("base", "distill", TURBO_FOLDER):
        shutil.copytree(tiny_dir / name, root / name)
    shutil.copytree(tiny_dir / AUDIO_FOLDER, root / "audio")
    shutil.copytree(tiny_dir / TEXT_FOLDER, root / "text")
    for name in ("generation_config.json", "special_tokens_map.json"):
        (root / "text" / name).write_text('{"max_length": 20, "eos_token": "<eos>"}')
    runtime.convert(tiny_dir, root / "artifact", keep_bf16=["block.layers.1.*", "*.down_proj"])
    write_exported(root / "exported")
    (root / "clips").mkdir()
    (root / "clips" / "request.json").write_text('{"seconds": 3.2, "width": 160, "height": 96}')


def walk(root: Path, first: int, end: int) -> dict[str, Any]:
    """What the process of `model_child.py` has found; its stdin says yes to everything."""
    answers = root.parent / "yes"
    answers.write_text("yes\n" * 100)
    with answers.open() as stdin:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", CHILD, root, *map(str, (GROWTH_BYTES, first, end))],
            stdin=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
