"""Every script of benchmarks/ runs, at a tiny size on the CPU, so that none rots."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fp8
import fp8_errors
import load_artifact
import memory_flat
import process_tables
import render_readme
from harness import measure, sizes, weight_kinds
from magihuman.graphs import quantization
from magihuman.runtime.weights import random_weights, tiny

pytestmark = pytest.mark.timeout(1800)  # one fixture runs all scripts

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ROWS = 4 * 4 * 4 + 13 + 64  # video, audio, and text with the padding of its bucket

# Arguments of each script beside --tiny and --folder, in the order in which they are run: what is
# rewritten for one is in the cache for the next. A folder's name stands for a path of the test's.
TINY: dict[str, list[str]] = {
    "compiled_forward": ["--baseline"],
    "fp8": [],
    "super_resolution": ["--plain"],
    "context_parallel": [
        *("--ranks", "2", "--precision", "bf16", "--sizes", "256p", "1080p"),
        *("--requests", "256p", "--loads"),
    ],
    "exchanges": [],
    "full_size": ["--scratch", "{scratch}"],
    "live": ["--precision", "bf16", "--seconds", "1.5", "--window", "0.64"],
    "host/load_artifact": ["{artifacts}"],
    "memory/memory_limit": ["--case", "540p fp8 in 24", "--sr-steps", "1"],
    "host/mp4": [],
    "accuracy/nano_score": [],
    "accuracy/long_clip": ["--device", "cpu"],
    "prompt_to_mp4": ["--precisions", "bf16", "--repeats", "1"],
    "check_cost": ["--precisions", "bf16"],
    "memory/memory_flat": [],
    "vae_decode": ["--baseline", "--variants", "default"],
    "power": ["--rows", "40"],
    "accuracy/fp8_errors": [],
    "portable": ["--only", "torch.compile;bf16;int8;fp8"],
    "host/many_videos": [],
    "accuracy/text_precision": [],
}
WRITES = {"memory/memory_flat": "memory_flat_cpu"}  # not named as its script
# Those that read what the others wrote, and take no --tiny.
READERS: dict[str, list[str]] = {
    "reports/history": ["{report}", "--folder", "{folder}/history"],
    "reports/render_latency": ["--folder", "{folder}/history", "--out", "{out}/latency.png"],
    "reports/render_readme": ["--folder", "{folder}", "--out", "{out}"],
    "reports/render_power": ["--folder", "{folder}", "--out", "{out}/power.png"],
}
# One process runs them all: importing torch takes longer than most of them.
DRIVER = """
import gc, json, os, runpy, sys, time, traceback
root, ends = sys.argv[1], {}
sys.path.insert(0, "")
for name, arguments in json.load(sys.stdin):
    sys.argv = [f"{root}/{name}.py", *arguments]
    sys.path[0] = os.path.dirname(sys.argv[0])
    start, end = time.process_time(), "ok"
    gc.collect()
    gc.freeze()  # or each collection would look at all that was imported before
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        end = "ok" if exit.code in (None, 0) else f"exit: {exit.code}"
    except BaseException:
        end = traceback.format_exc()
    ends[" ".join([name, *arguments])] = end
    print(f"-- {name}: {time.process_time() - start:.1f} s", file=sys.stderr, flush=True)
with open("ends.json", "w") as file:
    json.dump(ends, file)
"""


def run_scripts(calls: list[tuple[str, list[str]]], folder: Path) -> dict[str, str]:
    """How each ended, by its name and arguments. All keep what they cache below `folder`."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    # -P: the repository's root stays off sys.path.
    done = subprocess.run(
        [sys.executable, "-P", "-c", DRIVER, str(BENCHMARKS)],
        input=json.dumps(calls),
        cwd=folder,
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
    )
    print(done.stderr[-5000:])
    assert done.returncode == 0, done.stderr
    ends: dict[str, str] = json.loads((folder / "ends.json").read_text())
    return ends


def report() -> dict[str, Any]:
    """Of the suites, as far as an entry of the history needs it."""
    info = {"size": "tiny", "device": "cpu"}
    benchmark = {"name": "test_linear[tiny-qkv]", "group": "linears", "extra_info": info}
    return {
        "machine_info": {"cpu": "Some CPU", "cores": 4, "gpu": None, "torch": torch.__version__},
        "commit_info": {"id": "0" * 40, "time": "2026-11-01T12:00:00+00:00", "dirty": False},
        "datetime": "2026-11-02T12:00:00+00:00",
        "benchmarks": [benchmark | {"stats": {"median": 1e-3}}],
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder of results, `out` beside it, and how each script ended."""
    root = tmp_path_factory.mktemp("scripts")
    paths = {name: root / name for name in ("folder", "scratch", "artifacts", "out")}
    for path in paths.values():
        path.mkdir()
    paths["report"] = root / "report.json"
    paths["report"].write_text(json.dumps(report()))
    tiny = ["--tiny", "--folder", "{folder}"]
    calls = [(name, [*own, *tiny]) for name, own in TINY.items()] + list(READERS.items())
    filled = [(name, [part.format(**paths) for part in own]) for name, own in calls]
    ends = run_scripts(filled, root)
    return paths["folder"], {name.split()[0]: end for name, end in ends.items()}


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON, with its keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def test_limits_are_told_with_and_without_super_resolution():
    """As far as cases were run to their end, large clips first."""
    seconds = {"text": 0.5, "denoise": 1.0, "decode_video": 0.25, "total": 2.0}
    plan = {"host_bytes": 3 * 2**30}
    case = {"device_gib": 15.5, "plan": plan, "request_s": seconds}
    cases = {
        "256p int8, text int8 in 16": case,
        "256p fp8 in 16": {"failed": True},
        "540p fp8": case,
        "540p fp8 in 24": {**case, "request_s": seconds | {"super_resolve": 3.0}},
    }
    rows = [line for line in render_readme.memory_table(cases) if " GiB | " in line]
    assert rows == [
        "| 540p fp8, 24 GiB | 15.50 GiB | 3.0 GiB | 0.50 s | 1.00 s | 3.00 s | 0.25 s | 2.00 s |",
        "| 256p int8, text int8, 16 GiB | 15.50 GiB | 3.0 GiB | 0.50 s | 1.00 s | - | 0.25 s"
        " | 2.00 s |",
    ]


def test_every_script_is_run():
    with_main = {
        path.relative_to(BENCHMARKS).with_suffix("").as_posix()
        for path in BENCHMARKS.rglob("*.py")
        if re.search(r"^if __name__ == |^def main\(", path.read_text(), re.MULTILINE)
    }
    assert with_main == TINY.keys() | READERS.keys()


@pytest.mark.parametrize("name", [*TINY, *READERS])
def test_it_runs(results, name):
    assert results[1][name] == "ok"


# Differences of memory and times, which a small model may not change, and of results, which may be
# equal.
MAY_BE_ZERO = (
    r"difference|slopes|gib|bytes|error|kernels|latents|levels|exchange|matches|nodes|colours"
    r"|synchrony|voice|late|repeated|jitter|lag|background"
)


@pytest.mark.parametrize("name", TINY)
def test_its_figures_are_numbers(results, name):
    figures = json.loads((results[0] / f"{WRITES.get(name, Path(name).name)}.json").read_text())
    assert "gpu" not in figures.pop("environment")
    assert '"failed"' not in json.dumps(figures)  # a part that failed while others went on
    found = list(numbers(figures))
    assert found
    for path, value in found:
        assert math.isfinite(value), path
        assert value > 0 or re.search(MAY_BE_ZERO, path), (path, value)


def test_the_readme_is_rendered_from_these_results(results):
    folder, _ = results
    text = (folder.parent / "out" / "docs" / "performance.md").read_text()
    section = text.split("<!-- fp8:start -->")[1].split("<!-- fp8:end -->")[0]
    assert section.strip() == render_readme.tables(folder)["fp8"].strip()
    steps_s = json.loads((folder / "fp8.json").read_text())["fp8"]["8_steps_ms"] / 1e3
    assert f"| fp8 | {steps_s:.3f} |" in section
    assert "nan" not in re.findall(r"[a-z]+", section)
    figures = json.loads((folder / "context_parallel.json").read_text())
    own = figures["forwards"]["256p"]["bf16"]
    ratio = own["1"]["ms"] / own["2"]["ms"]
    for page in ("README.md", "docs/performance.md"):
        text = (folder.parent / "out" / page).read_text()
        cells = f"{own['1']['ms']:.1f} ms | {own['2']['ms']:.1f} ms ({ratio:.2f}x)"
        assert f"| a forward, 480x256, bf16 | {cells} |" in text
        assert "| prompt to frames, 480x256, bf16 |" in text
        assert "| `load` in a new process, for 480x256 |" in text
    text = (folder.parent / "out" / "docs" / "performance.md").read_text()
    section = text.split("<!-- power:start -->")[1].split("<!-- power:end -->")[0]
    assert section.strip() == render_readme.tables(folder)["power"].strip()
    live = json.loads((folder / "live.json").read_text())
    assert f"| bf16, 1 GPU | 64x64 | {live['bf16']['1']['window_s']:.2f} s |" in text
    assert f"| nano, {live['nano']['threads']} threads of the CPU | 32x32 |" in text
    for picture in ("latency.png", "power.png"):
        assert (folder.parent / "out" / picture).stat().st_size > 0


def test_help_of_every_script(tmp_path):
    ends = run_scripts([(name, ["--help"]) for name in (*TINY, *READERS)], tmp_path)
    assert set(ends.values()) == {"ok"} and len(ends) == len(TINY) + len(READERS)


@pytest.mark.parametrize("folder", [[], ["--folder", str(BENCHMARKS / "results")]])
def test_tiny_results_do_not_lie_among_those_that_count(tmp_path, folder):
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").glob("*.json")}
    ends = run_scripts([("compiled_forward", ["--tiny", *folder])], tmp_path)
    assert list(ends.values()) == ["exit: 2"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


# -- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8_attention", [False, True])
def test_the_bound_of_fp8_has_every_product_and_attention(fp8_attention):
    size = sizes.TINY
    model = random_weights.dit(size.arch, 0, torch.device("cpu"), torch.bfloat16, "distill")
    quantization.quantize_model(model, quantization.quantized_linears(size.arch))
    calls = fp8.bare(model, size.layout, fp8_attention)
    assert len(calls) == 5 * size.arch.num_layers  # four linears and attention
    for call in calls:
        result = call()
        assert result.shape[0] == ROWS and result.isfinite().all()


def test_the_bound_s_rows_are_those_of_the_compiled_forward():
    assert measure.padded_rows(measure.LAYOUT) == 32 * 8 * 15 + 126 + 320


# -- fp8 on weights of several kinds ----------------------------------------------------------


@pytest.fixture(scope="module")
def int8_figures(results) -> dict[str, Any]:
    """Of `fp8_errors.py` at the size for the CPU."""
    return json.loads((results[0] / "int8_errors.json").read_text())


@pytest.fixture(scope="module")
def fp8_figures(results) -> dict[str, Any]:
    return json.loads((results[0] / "fp8_errors.json").read_text())


def test_the_kernels_are_as_exact_as_a_careful_reference(fp8_figures):
    """Here the operators' references: what they have more is the rounding of a sum to bf16."""
    for kind in fp8_errors.KINDS:
        found = fp8_figures[kind]["layers"]
        assert {len(values) for values in found.values()} == {tiny.DIT.num_layers}
        for name in ("linear_qkv", "linear_proj", "up_gate_proj", "down_proj"):
            for errors in found[name]:
                assert 0.99 < errors["fp8"] / errors["careful"] < 1.01
            ratio = fp8_figures[kind]["summary"][name]["ratio"]
            assert ratio["min"] <= ratio["median"] <= ratio["max"] < 1.01


def test_only_weights_made_to_break_break(fp8_figures):
    """Rounding two normally distributed operands costs 0.037, and outliers no more than that."""
    for kind in ("normal", "outliers"):
        summary = fp8_figures[kind]["summary"]
        for name in ("linear_qkv", "linear_proj", "up_gate_proj", "down_proj"):
            assert summary[name]["fp8"]["max"] < 0.05
        assert fp8_figures[kind]["verify"]["verdict"] == "pass"
    assert fp8_figures["outliers"]["summary"]["peak"]["max"] > 3e3
    assert fp8_figures["normal"]["summary"]["peak"]["max"] < 10
    broken = fp8_figures["broken"]
    said = broken["verify"]
    assert said["verdict"] == "fail" and len(broken["made_to_break"]) == 3
    assert said["over the threshold of a linear"] == broken["made_to_break"]
    assert said["with what is suggested"]["verdict"] == "pass"
    for name in broken["made_to_break"]:
        _, _, layer, _, part = name.split(".")
        assert broken["layers"][part][int(layer)]["fp8"] > 0.5


def test_int8_is_nearer_where_values_are_alike_and_further_where_not(int8_figures, fp8_figures):
    for name in ("linear_qkv", "linear_proj", "up_gate_proj", "down_proj"):
        normal, outliers = (int8_figures[k]["summary"][name] for k in ("normal", "outliers"))
        assert normal["int8"]["max"] < 0.02 < fp8_figures["normal"]["summary"][name]["fp8"]["min"]
        # The rounding of a sum to bf16, beside errors that are a third of e4m3's.
        assert max(normal["ratio"]["max"], outliers["ratio"]["max"]) < 1.02
        if name in ("linear_qkv", "up_gate_proj"):  # behind a norm whose gains differ
            assert outliers["int8"]["median"] > 3 * normal["int8"]["median"]
    assert int8_figures["normal"]["verify"]["verdict"] == "pass"


def test_int8_has_no_activations_that_are_too_small(int8_figures):
    """The third of the linears made to break has them; scales by row hold it."""
    broken = int8_figures["broken"]
    said = broken["verify"]
    assert said["verdict"] == "fail" and said["with what is suggested"]["verdict"] == "pass"
    assert said["over the threshold of a linear"] == broken["made_to_break"][:2]
    lines = render_readme.error_table(int8_figures, "int8")
    assert lines[0].startswith("The table has the relative error of int8")
    assert "one input channel is 2^4 times" in lines[-2] and "does not matter" in lines[-1]


def test_the_table_of_errors(fp8_figures):
    lines = render_readme.error_table(fp8_figures)
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if " | " in line}
    found = fp8_figures["outliers"]["summary"]["down_proj"]["fp8"]
    assert rows["| `down_proj`"][1] == f"{found['median']:.3f} ({found['max']:.3f})"
    said = ["pass", "pass", "fail, naming 3; pass with what it suggests |"]
    assert rows["| `magihuman verify`"] == said
    assert all(len(cells) == 3 for cells in rows.values())
    # Between the last error below twice the first and the next.
    assert "2^16 times" in lines[-2] and "2^10 times" in lines[-1]


def test_loops_of_the_graph_are_those_simulated(fp8_figures):
    for kind in fp8_errors.KINDS:
        after = fp8_figures[kind]["after 8 steps"]
        # The references of one and the other sum alike; in between, errors of 1e-6 may spread.
        assert max(after["kernels against simulated"]) < 0.1 * min(after["kernels against bf16"])


def test_where_e4m3_ends(fp8_figures):
    """2^17 between its smallest and its largest number, 2^13 from 1/8 down to half the smallest."""
    sweeps = fp8_figures["sweeps"]
    huge, quiet = sweeps["channel times 2^k"], sweeps["activations over 2^k"]
    assert max(huge[str(k)]["fp8"] for k in range(0, 13, 2)) < 0.05 < 0.5 < huge["20"]["fp8"]
    assert max(quiet[str(k)]["fp8"] for k in range(0, 7, 2)) < 0.05 < 0.5 < quiet["14"]["fp8"]


def test_outliers_are_heavy_tailed():
    size = fp8_errors.sizes.TINY
    model = random_weights.dit(size.arch, 0, size.device, torch.bfloat16, "distill")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weight_kinds.outliers(model.state_dict(), model.config)
    gains = model.state_dict()["block.layers.2.attention.pre_norm.weight"] + 1
    assert gains.abs().max() > 5 * gains.abs().median() > 0
    rows = model.state_dict()["block.layers.2.mlp.up_gate_proj.weight"].float().norm(dim=1)
    assert rows.max() > 5 * rows.median()
    assert torch.equal(
        model.state_dict()["final_linear_video.weight"], before["final_linear_video.weight"]
    )


# -- what every request costs, and what none may keep -----------------------------------------


def test_what_the_checks_cost_is_what_runs_with_them_alone(results):
    folder, _ = results
    figures = json.loads((folder / "check_cost.json").read_text())["bf16"]
    calls, _ = figures["kernels"]["aten::linalg_vector_norm"]
    # Of the text, of both streams in each of 2 steps and after them, of the sound, and of a window
    # of frames before its last sum and of what is added there.
    assert calls == 1 + 2 * 2 + 2 + 1 + 2
    # Nothing that both run: no product, no attention.
    assert not {"aten::mm", "aten::matmul", "aten::convolution"} & figures["kernels"].keys()
    assert 0 < figures["kernels_ms"] < figures["request_ms"]
    said = process_tables.check_lines(folder)
    assert f"| **both together, of the request** | **{figures['bound_percent']:.3f} %** |" in said


def test_memory_that_grows_is_not_flat():
    turns, page = 25, 4096
    noise = np.random.default_rng(0).normal(0, 2**20, turns * memory_flat.TURN)
    steady = [2**30 + int(value) for value in noise]
    found = memory_flat.slope(steady, page)
    assert found["is_flat"] and 0 < abs(found["per_clip"]) < 3 * found["error"]
    leaky = [value + 100 * page * clip for clip, value in enumerate(steady)]
    found = memory_flat.slope(leaky, page)
    assert not found["is_flat"] and found["per_clip"] == pytest.approx(100 * page, rel=0.1)
    filling = [2**20 * min(clip, 90) for clip in range(turns * memory_flat.TURN)]
    assert memory_flat.slope(filling, page)["is_flat"]  # a third of the clips, that caches may take
    assert memory_flat.slope([7] * 300, page)["is_flat"]


def test_memory_is_read_after_each_clip(results):
    folder, _ = results
    figures = json.loads((folder / "memory_flat_cpu.json").read_text())
    assert figures["clips"] == 24
    for held in ("resident_bytes", "anonymous_bytes", "threads", "files"):
        assert len(figures["after_each"][held]) == 24
    assert figures["slopes"]["files"]["to"] < 100
    said = "\n".join(process_tables.memory_lines(folder))
    assert (
        f"| resident memory | {figures['slopes']['resident_bytes']['to'] / 2**20:.0f} MiB" in said
    )


# -- loading an artifact ----------------------------------------------------------------------


def test_an_artifact_is_loaded_and_compared(results):
    folder, _ = results
    figures = json.loads((folder / "load_artifact.json").read_text())
    assert figures["written"]["files"] == 1 and figures["written"]["bytes"] > 10**6
    for name in ("first read", "from the page cache"):
        assert figures[name]["tensors"] > 40
        assert 0 < figures[name]["plan_s"] < figures[name]["seconds"]
        assert set(figures[name]["host_growth_bytes"]) == {"RssAnon", "RssFile", "RssShmem"}
    assert not any((folder.parent / "artifacts").iterdir())
    said = " ".join(render_readme.load_lines(figures))
    assert f"takes {figures['from the page cache']['seconds']:.1f} s" in said


def test_another_value_is_found():
    loaded, source = (load_artifact.made(fp8_errors.sizes.TINY) for _ in range(2))
    quantization.quantize_model(loaded, quantization.quantized_linears(tiny.DIT))
    scale = loaded.state_dict()["block.layers.3.mlp.down_proj.weight_scale"]
    scale[5] *= 1 + 1e-6
    with pytest.raises(ValueError, match=r"down_proj\.weight_scale must be what was written"):
        load_artifact.check(loaded, source, rounded=False)
