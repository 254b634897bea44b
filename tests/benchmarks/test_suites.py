"""The suites run on a CPU, and their reports become history, picture and table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import history
import render_latency
import render_readme
from harness import measure

ROOT = Path(__file__).parents[2]
GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    """Of both suites, with as few rounds as it takes."""
    folder = tmp_path_factory.mktemp("report")
    options = ("--benchmark-only", "--benchmark-max-time=0.001", "--benchmark-min-rounds=1")
    files = (f"--benchmark-json={folder / 'report.json'}", f"--benchmark-storage={folder}")
    # -P: the repository's root stays off sys.path.
    suites = ("benchmarks/suites/test_kernels.py", "benchmarks/suites/test_model.py")
    command = (sys.executable, "-P", "-m", "pytest", *suites)
    # Beside other workers of pytest-xdist, benchmarks would be left out.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")}
    done = subprocess.run(
        [*command, *options, *files],
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "report.json").read_text())


def entry(commit: str, day: int, milliseconds: float, gpu: str | None = GPU) -> dict[str, Any]:
    """A report by hand: a kernel that moves 1e9 bytes, a product of 1e12 FLOP, a forward."""

    def benchmark(name: str, group: str, **info: Any) -> dict[str, Any]:
        info = {"size": "full", **info}
        if gpu is not None:
            info["device_ms"] = milliseconds
        stats = {"median": 2e-3 * milliseconds, "data": [1.0, 2.0]}
        return {"name": name, "group": group, "params": {}, "extra_info": info, "stats": stats}

    moved = {"bytes": 10**9, "bytes_per_s": 2e12, "ceiling_per_s": 2.5e12, "of_ceiling": 0.8}
    computed = {"flops": 10**12, "flops_per_s": 6e14, "ceiling_per_s": 7.5e14, "of_ceiling": 0.8}
    return {
        "machine_info": {"cpu": "Some CPU", "cores": 4, "gpu": gpu, "torch": "2.11.0"},
        "commit_info": {
            "id": commit * 10,
            "time": f"2026-11-{day:02d}T12:00:00+01:00",
            "dirty": False,
            "project": "folder",
        },
        "datetime": f"2026-12-{day:02d}T09:00:00+00:00",
        "benchmarks": [
            benchmark("test_activation[full-fused-gelu7]", "norms", **moved),
            benchmark("test_linear[full-qkv]", "linears", **computed),
            benchmark("test_forward[full-compiled]", "model", **computed),
        ],
    }


@pytest.mark.thorough
def test_the_kernels_are_measured_on_a_cpu(report):
    found = {benchmark["name"]: benchmark["extra_info"] for benchmark in report["benchmarks"]}
    assert "test_activation[tiny-reference-swiglu7]" in found
    assert not any("full" in name or "fused" in name for name in found)
    # 4 x 8/2 x 8/2 video tokens, 13 of audio, 32 of text; 4 heads of 32.
    rows = 4 * 4 * 4 + 13 + 32
    assert found["test_attention[tiny-reference]"]["flops"] == 4 * rows**2 * 4 * 32
    assert found["test_linear[tiny-library-bf16-proj]"]["flops"] == 2 * rows * 128 * 128
    norm = found["test_add_rms_norm[tiny-reference-add]"]
    assert norm["bytes"] == rows * 128 * (4 + 2 + 4 + 2) + 128 * 4
    assert norm["shape"] == {"rows": rows, "channels": 128}
    assert norm["device"] == "cpu" and "device_ms" not in norm


def test_the_model_is_measured_on_a_cpu(report):
    found = {
        benchmark["name"]: benchmark
        for benchmark in report["benchmarks"]
        if benchmark["group"] == "model"
    }
    assert found.keys() == {
        "test_forward[tiny-plain]", "test_steps[tiny-plain]", "test_decode_video[tiny]",
        "test_decode_audio[tiny]", "test_generate[tiny]",
    }  # fmt: skip
    for benchmark in found.values():
        assert benchmark["extra_info"]["device"] == "cpu" and benchmark["stats"]["median"] > 0


def test_the_norms_before_the_heads_are_of_no_layer():
    """In a profile by layers, whose norms open the halves of one; nor is what follows them."""
    profile = [("gemm", 1.0), ("_add_rms_norm", 2.0), ("_swiglu7", 4.0), ("_norm_rows", 8.0)]
    after = [("_head_norm", 16.0), ("sgemm", 32.0)]
    expected = {"embedders and heads": 1.0 + 16.0 + 32.0, "shared": 2.0 + 4.0 + 8.0}
    assert measure.by_layers(profile + after, ["shared"]) == expected


def test_a_report_says_what_it_was_measured_on(report):
    machine = report["machine_info"]
    assert machine["gpu"] is None and machine["torch"] and machine["cores"] > 0
    assert "node" not in machine


def test_an_entry_is_small_and_says_its_commit(report, tmp_path):
    commit = {"id": "0123456789", "time": "2026-11-22T12:00:00+00:00", "dirty": True}
    path = history.keep({**report, "commit_info": {**commit, "branch": "b"}}, tmp_path)
    assert "-0123456-dirty-" in path.name
    (kept,) = history.entries(tmp_path)
    assert kept["commit_info"] == commit
    for benchmark, whole in zip(kept["benchmarks"], report["benchmarks"], strict=True):
        assert whole["stats"].keys() - benchmark["stats"].keys() == {"data"}
        assert benchmark["stats"]["median"] == whole["stats"]["median"]
        assert {"options", "params"} & benchmark.keys() == set()


def test_entries_are_in_the_order_of_their_commits(tmp_path):
    for commit, day in (("b", 3), ("a", 9), ("c", 1)):
        history.keep(entry(commit, day, 1.0), tmp_path)
    assert [e["commit_info"]["id"][0] for e in history.entries(tmp_path)] == ["c", "b", "a"]
    assert (tmp_path / "2026-12-03-bbbbbbb-nvidia-h100-80gb-hbm3.json").is_file()


def test_an_entry_without_a_commit_is_refused(tmp_path):
    report = entry("a", 1, 1.0)
    report["commit_info"] |= {"id": "unversioned", "time": None}
    with pytest.raises(SystemExit, match="--commit"):
        history.keep(report, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_part_of_the_suites_does_not_replace_an_entry(tmp_path):
    whole, part = entry("a", 1, 1.0), entry("a", 1, 2.0)
    part["benchmarks"].pop()
    path = history.keep(whole, tmp_path)
    with pytest.raises(SystemExit, match="3 benchmarks, the report 2"):
        history.keep(part, tmp_path)
    assert history.keep(entry("a", 1, 3.0), tmp_path) == path
    (kept,) = history.entries(tmp_path)
    assert [history.milliseconds(benchmark) for benchmark in kept["benchmarks"]] == [3.0] * 3


def test_a_panel_has_one_machine_and_device_time(tmp_path):
    runs = [entry("a", 1, 4.0), entry("b", 2, 3.0), entry("a", 1, 4.0, gpu=None)]
    panels = render_latency.panels(runs)
    assert panels[GPU, "full", "linears"] == {"linear qkv": {"aaaaaaa": 4.0, "bbbbbbb": 3.0}}
    # Without a GPU it is the caller's time.
    line = {"aaaaaaa": pytest.approx(8.0)}
    assert panels["Some CPU (4 cores)", "full", "linears"] == {"linear qkv": line}


def test_the_picture_is_a_png_with_lines_in_it(tmp_path):
    path = tmp_path / "new" / "latency.png"
    render_latency.draw([entry("a", 1, 4.0), entry("b", 2, 0.03)], path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    colourful = pixels.max(axis=2) - pixels.min(axis=2) > 60  # axes and text are grey
    assert colourful.any(axis=1).sum() > 100
    with pytest.raises(SystemExit, match="make bench"):
        render_latency.draw([], path)


def test_the_table_of_kernels():
    lines = render_readme.kernel_table(entry("a", 1, 0.5))
    assert lines[-2:] == [
        "| activation fused gelu7 | 0.500 | 2.00 TB/s | 80 % |",
        "| linear qkv | 0.500 | 600 TFLOP/s | 80 % |",
    ]
    text = "\n".join(lines)
    assert "aaaaaaa" in text and GPU in text and "2.50 TB/s" in text and "750 TFLOP/s" in text
    assert render_readme.is_full(entry("a", 1, 0.5))
