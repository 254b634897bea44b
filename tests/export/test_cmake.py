"""The target `engines`: what it makes, when it makes it again, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

HERE = {"Python_EXECUTABLE": sys.executable, "MAGIHUMAN_SM": 89}


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_the_second_build_does_nothing(engines_build, tiny_dir):
    engines = engines_build.build / "engines"
    before = times(engines)
    assert len([name for name in before if name.endswith(".engine")]) == 4
    assert "Exporting" not in engines_build.make("engines")
    assert engines_build.configure(MAGIHUMAN_MODEL=tiny_dir).returncode == 0
    assert "Exporting" not in engines_build.make("engines")
    assert times(engines) == before


@pytest.mark.parametrize("change", ["weights", "sizes", "versions"])
def test_what_would_be_built_again(engines_build, tiny_dir, change):
    """Make is only asked, and then told that the engines are made."""
    weights = next((tiny_dir / "turbo_vae").glob("*.ckpt"))
    touched = weights.stat()
    try:
        if change == "weights":
            os.utime(weights)
        elif change == "sizes":
            configured = engines_build.configure(MAGIHUMAN_SIZES="64x64;96x64")
            assert configured.returncode == 0
        else:
            (engines_build.build / "engines.versions").write_text("{}")
        assert "Exporting engines" in engines_build.would_make("engines")
    finally:
        os.utime(weights, ns=(touched.st_atime_ns, touched.st_mtime_ns))
        if change == "sizes":
            engines_build.configure(MAGIHUMAN_SIZES="64x64")
        engines_build.make("engines-versions")
        (engines_build.build / "engines.stamp").touch()
    assert "Exporting" not in engines_build.make("engines")


def test_the_figures_are_in_the_manifest(engines_dir):
    verified = json.loads((engines_dir / "manifest.json").read_text())["verified"]
    files = [figure["file"] for figure in verified["figures"]]
    assert sorted(files) == [f"{k}-64x64.onnx" for k in ("first", "last", "middle", "single")]
    assert all(figure["ok"] and 0 < figure["error"] <= 1e-4 for figure in verified["figures"])
    assert "need a CUDA device" in verified["engines_not_run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is asked for; give -DMAGIHUMAN_MODEL=DIR"),
        ({"MAGIHUMAN_MODEL": "{empty}", **HERE}, "must hold turbo_vae/"),
        ({"MAGIHUMAN_MODEL": "{tiny}", **HERE, "MAGIHUMAN_SM": 90}, "got sm_90; full TensorRT"),
        ({"MAGIHUMAN_MODEL": "{tiny}", "Python_EXECUTABLE": "{bare}"}, "magihuman"),
        ({"MAGIHUMAN_NATIVE": "ON"}, "NvInferRuntime.h"),
    ],
)
def test_what_is_impossible_is_refused_when_configuring(
    cmake, tiny_dir, tmp_path, options, message
):
    pytest.importorskip("tensorrt_rtx", reason="it has wheels for Linux on x86-64 only")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    places = {"empty": tmp_path, "tiny": tiny_dir, "bare": bare}
    given = {name: str(value).format(**places) for name, value in options.items()}
    done = cmake.configure(**given)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
    assert not (cmake.build / "Makefile").exists()
