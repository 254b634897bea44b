"""`magihuman verify`: passes on healthy weights, and names the linears that fp8 cannot hold."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import golden
from harness import weight_kinds
from magihuman import runtime
from magihuman.graphs import quantization
from magihuman.graphs.transformer import compile as compiling
from magihuman.graphs.transformer.options import CompileOptions
from magihuman.graphs.transformer.passes.context import Context
from magihuman.runtime.cli.main import app
from magihuman.runtime.evaluate import clip_score, verify_page, verify_report, verify_runs
from magihuman.runtime.evaluate.simulated import Mode, Simulated
from magihuman.runtime.evaluate.verify_report import Thresholds
from magihuman.runtime.evaluate.verify_runs import Report, VerifyOptions
from magihuman.runtime.media import quality
from magihuman.runtime.model import tokens
from magihuman.runtime.weights.checkpoint import SINGLE_NAME

CPU = torch.device("cpu")
CLIP = {"seconds": 0.2, "width": 32, "height": 32, "steps": 2}
FLAGS = [text for name, value in CLIP.items() for text in (f"--{name}", str(value))]
QKV, UP = "block.layers.1.attention.linear_qkv", "block.layers.2.mlp.up_gate_proj"
BROKEN = (QKV, UP)


def run(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def healthy(engine) -> Report:
    return runtime.verify(engine, ["a <woman>", "hi"], **CLIP)


@pytest.fixture(scope="module")
def broken_dir(tiny_dir, tmp_path_factory) -> Path:
    """The tiny model with two norms that make a channel huge, and linears that undo it."""
    folder = shutil.copytree(tiny_dir, tmp_path_factory.mktemp("broken") / "model")
    file = folder / "distill" / SINGLE_NAME
    state = load_file(file)
    for linear in BROKEN:
        weight_kinds.hide(state, linear)
    save_file(state, file)
    return folder


@pytest.fixture(scope="module")
def broken(broken_dir) -> Report:
    return runtime.verify(broken_dir, ["hi"], device="cpu", **CLIP)


# -- the simulation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "attention", "dtype"),
    [
        ("none", False, torch.float8_e4m3fn),
        pytest.param(["*.down_proj"], False, torch.float8_e4m3fn, marks=pytest.mark.thorough),
        (["*.up_gate_proj"], False, torch.float8_e4m3fn),
        pytest.param("none", True, torch.float8_e4m3fn, marks=pytest.mark.thorough),
        (["block.layers.2.attention.*"], True, torch.float8_e4m3fn),
        ("none", False, torch.int8),
        pytest.param(["*.up_gate_proj"], False, torch.int8, marks=pytest.mark.thorough),
    ],
)
def test_the_simulation_is_the_rewritten_graph(keep, attention, dtype, tmp_path):
    """Both compute the reference on the CPU, with the norm's fp32 rounded once."""
    layout = tokens.Layout(frames=3, rows=4, columns=6, audio=9, text=7)
    model, quantized = golden.dit(local=False), golden.dit(local=False)
    names = quantization.quantized_linears(model.config, keep)
    quantization.quantize_model(quantized, names, dtype)
    compiling.pad_weights(quantized, quantized.config)
    torch.manual_seed(0)
    inputs = golden.inputs_of(model, layout)
    length = torch.tensor(layout.tokens, dtype=torch.int32)
    context = Context(quantized.config, layout.counts, torch.bfloat16, CPU)
    options = CompileOptions(cache=tmp_path, fp8_attention=attention)
    module, _ = compiling.compile_forward(quantized, context, options)
    graph = module(*inputs.values(), length)
    bf16 = model(**inputs)
    with Simulated(model, names, attention, dtype) as simulation:
        for mode in (Mode.BF16, Mode.MEASURE):
            with simulation.running(mode):
                assert all(map(torch.equal, model(**inputs), bf16))
        with simulation.running(Mode.NARROW):
            simulated = model(**inputs)
    assert list(simulation.linear_errors) == names
    layers = [i for i in range(5) if f"block.layers.{i}.attention.linear_qkv" in names]
    assert list(simulation.attention_errors) == (layers if attention else [])
    assert len(simulation.layer_errors) == model.config.num_layers
    for ours, theirs, plain in zip(simulated, graph, bf16, strict=True):
        assert golden.error(ours, theirs) < 1e-5 < 4e-3 < golden.error(theirs, plain)
    assert all(map(torch.equal, model(**inputs), bf16))  # nothing is left of it


# -- the verdict ------------------------------------------------------------------------------


def test_healthy_weights_pass(healthy, engine):
    assert healthy.verdict == "pass"
    assert healthy.broken == healthy.suggested_keep_bf16 == []
    assert list(healthy.per_linear) == quantization.linears(engine._parts.dit.config)
    # Rounding two normally distributed operands to e4m3.
    assert all(
        0.03 < e.first < 0.045 and 0.03 < e.last < 0.045 for e in healthy.per_linear.values()
    )
    assert len(healthy.per_layer) == 5
    assert all(0.005 < e.worst < 0.06 for e in healthy.per_layer)
    for clip in healthy.clips:
        assert len(clip.video_error) == len(clip.audio_error) == 2
        assert 0 < clip.video_error[0] < clip.video_error[1] < 0.1
        assert 20 < clip.psnr_db < 60 and 0.9 < clip.ssim < 1 and 10 < clip.snr_db < 60


def test_fp8_attention_is_judged_too(engine):
    report = runtime.verify(engine, ["hi"], precision="fp8-attn", **CLIP)
    assert report.verdict == "pass"
    assert report.settings["precision"] == "fp8-attn"
    assert list(report.per_attention) == [
        f"block.layers.{i}.attention.linear_qkv" for i in range(5)
    ]
    assert all(0.02 < error.worst < 0.08 for error in report.per_attention.values())
    assert "Attention over fp8 q, k and v" in verify_page.to_html(report)
    assert len(report.to_dict()["per_attention"]) == 5
    strict = Thresholds(max_attention_error=report.per_attention[QKV].worst * 0.999)
    again = runtime.verify(engine, ["hi"], precision="fp8-attn", thresholds=strict, **CLIP)
    assert again.verdict == "fail"
    assert QKV in again.suggested_keep_bf16
    assert any(line.startswith(f"{QKV}, attention after it: error") for line in again.broken)
    with pytest.raises(
        runtime.InvalidRequestError, match=r"must be 'fp8', 'fp8-attn' or 'int8' .*got 'fp32'"
    ):
        runtime.verify(engine, ["hi"], precision="fp32", **CLIP)


def test_healthy_weights_pass_in_int8(engine):
    report = runtime.verify(engine, ["hi"], precision="int8", **CLIP)
    assert report.verdict == "pass" and report.settings["precision"] == "int8"
    assert report.per_attention == {}
    # Rounding two rows of normally distributed numbers to 127 steps each way: a third of e4m3's.
    assert all(0.008 < error.worst < 0.025 for error in report.per_linear.values())
    assert all(0.001 < error.worst < 0.03 for error in report.per_layer)
    assert "int8 against bf16: pass" in verify_page.to_html(report)


def test_broken_weights_fail_in_int8_and_exactly_they_are_named(broken_dir):
    report = runtime.verify(broken_dir, ["hi"], precision="int8", device="cpu", **CLIP)
    assert report.verdict == "fail" and report.suggested_keep_bf16 == [QKV, UP]
    assert all(report.per_linear[name].worst > 0.5 for name in BROKEN)
    options = {"precision": "int8", "keep_bf16": report.suggested_keep_bf16, "device": "cpu"}
    assert runtime.verify(broken_dir, ["hi"], **options, **CLIP).verdict == "pass"


def test_the_bf16_side_is_what_generate_makes(healthy, engine):
    """Also afterwards: verifying leaves the engine as it was."""
    for clip in healthy.clips:
        video = engine.generate(clip.prompt, **CLIP)
        assert np.array_equal(clip.shown[0], video.frames[[0, 2, 4]])
        assert not np.array_equal(*clip.shown)


def test_broken_weights_fail_and_exactly_they_are_named(broken):
    assert broken.verdict == "fail"
    assert broken.suggested_keep_bf16 == [QKV, UP]
    assert all(broken.per_linear[name].worst > 0.5 for name in BROKEN)
    rest = [error.worst for name, error in broken.per_linear.items() if name not in BROKEN]
    assert max(rest) < 0.05
    assert any(sentence.startswith(QKV) for sentence in broken.broken)


def test_what_is_suggested_passes(broken, broken_dir):
    again = runtime.verify(
        broken_dir, ["hi"], keep_bf16=broken.suggested_keep_bf16, device="cpu", **CLIP
    )
    assert again.verdict == "pass"
    assert not set(BROKEN) & set(again.per_linear)


def test_with_no_linear_to_blame_the_worst_tenth_is_suggested(engine):
    limits = Thresholds(max_video_error=1e-6, min_ssim=1.0)
    report = runtime.verify(engine, ["hi"], keep_bf16="modality", thresholds=limits, **CLIP)
    assert [sentence.split(" ")[1] for sentence in report.broken] == ["video", "SSIM"]
    kept, worst = report.suggested_keep_bf16[:2], report.suggested_keep_bf16[2:]
    assert kept == ["block.layers.0.*", "block.layers.4.*"]
    ranked = sorted(report.per_linear, key=lambda n: report.per_linear[n].worst)
    assert len(ranked) == 12 and worst == ranked[:-3:-1]


# -- the measures -----------------------------------------------------------------------------


def test_measures_of_known_differences():
    black = np.zeros((2, 16, 16, 3), np.uint8)
    grey = np.full_like(black, 51)
    assert quality.psnr_db(grey, black) == pytest.approx(20 * math.log10(5))
    assert quality.psnr_db(grey, grey) == math.inf
    # Flat frames have no variance: equation 13 is C1 / (51^2 + C1).
    assert quality.ssim(grey, black) == pytest.approx(6.5025 / (51**2 + 6.5025))
    assert quality.ssim(grey, grey) == pytest.approx(1.0)
    wave = np.sin(np.arange(1000, dtype=np.float32))[:, None].repeat(2, axis=1)
    assert quality.snr_db(wave * 1.1, wave) == pytest.approx(20, abs=1e-3)
    assert quality.snr_db(wave, wave) == math.inf
    assert quality.snr_db(wave, wave * 0) == -math.inf


# -- the command ------------------------------------------------------------------------------


def test_a_pass_on_the_command_line(tiny_dir, tmp_path, healthy):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\nhi\n")
    page = tmp_path / "page.html"
    result = run(
        "verify", "-m", tiny_dir, "-p", "a <woman>", "--prompts", prompts, *FLAGS, "--json",
        "--html", page, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads(json.dumps(healthy.to_dict()))
    assert list(found) == [
        "verdict", "settings", "thresholds", "per_linear", "per_attention", "per_layer", "clips",
        "broken", "suggested_keep_bf16",
    ]  # fmt: skip
    assert found["settings"]["steps"] == 2 and found["thresholds"]["max_linear_error"] == 0.08
    assert set(found["per_linear"][QKV]) == {"first", "last"}
    assert set(found["clips"][0]) == {
        "prompt", "video_error", "audio_error", "psnr_db", "ssim", "snr_db", "scores",
    }  # fmt: skip
    text = page.read_text()
    assert "fp8 against bf16: pass" in text and "a &lt;woman&gt;" in text
    assert text.count("<rect ") == 20 and text.count("<polyline ") == 6
    assert "http" not in text and "src='data:" in text
    pictures = re.findall("base64,([^']*)'", text)
    assert len(pictures) == 2 * 2 * 3
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    assert np.array_equal(np.asarray(picture), healthy.clips[0].shown[0][0])


def test_a_fail_on_the_command_line(broken_dir, tmp_path, broken):
    page = tmp_path / "page.html"
    result = run("verify", "-m", broken_dir, "-p", "hi", *FLAGS, "--html", page, "--device", "cpu")
    assert result.exit_code == 1
    assert f"try: --keep-bf16 '{QKV},{UP}'" in result.stdout
    assert result.stdout.endswith("fail\n")
    assert "fp8 2/2" not in result.stderr and "fp8 1 of 1 2/2" in result.stderr
    text = page.read_text()
    assert "fp8 against bf16: fail" in text and f"<li>{QKV}<li>{UP}" in text


def test_clips_are_scored_where_that_is_asked_for(tiny_dir, healthy):
    assert healthy.clips[0].scores is None
    prompt = "A man in a red shirt on a green background says: ma"
    result = run("verify", "-m", tiny_dir, "-p", prompt, *FLAGS, "--score", "--json")
    bf16, fp8 = json.loads(result.stdout)["clips"][0]["scores"]
    assert bf16["named"] == fp8["named"] == {"shirt": "red", "background": "green"}
    assert set(bf16["synchrony"]) == {"correlation", "lag_frames"}
    said = run("verify", "-m", tiny_dir, "-p", prompt, *FLAGS, "--score").stdout
    assert "of 2 colours" in said


@pytest.mark.parametrize(
    ("found", "correlation", "said"),
    [
        ("red", 0.85, []),
        ("blue", 0.9, ["colours"]),
        ("red", 0.7, ["correlation"]),
        ("red", math.nan, ["correlation"]),
    ],
)
def test_a_score_that_fp8_loses_fails(healthy, found, correlation, said):
    def score(colour: str, correlation: float) -> clip_score.ClipScore:
        return clip_score.ClipScore(
            {"shirt": "red"}, {"shirt": colour}, clip_score.Synchrony(correlation, 0)
        )

    pair = score("red", 0.9), score(found, correlation)
    clip = dataclasses.replace(healthy.clips[0], scores=pair)
    sentences = verify_report.broken(Thresholds(), {}, {}, [clip])
    assert [sentence.split(": ")[1].split()[0] for sentence in sentences] == said


def test_the_page_is_written_whole_or_not_at_all(healthy, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("before")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(runtime.OutputError, match="disk full"):
        verify_page.write_page(healthy, page)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_figures_that_are_not_finite_reach_json_and_page(healthy):
    clip = vars(healthy.clips[0]) | {"video_error": [0.1, math.nan], "psnr_db": math.inf}
    report = Report(**(vars(healthy) | {"clips": [type(healthy.clips[0])(**clip)]}))
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))["clips"][0]
    assert found["video_error"] == [0.1, "nan"] and found["psnr_db"] == "inf"
    assert "nan" not in re.sub("base64,[^']*", "", verify_page.to_html(report))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs --prompt or --prompts"),
        (("--prompts", "/none"), "--prompts /none cannot be read"),
        (("-p", " "), "prompt must be text"),
        (("-p", "hi", "--keep-bf16", "*.nothing"), "keep_bf16 must name linears"),
        (("-p", "hi", "--variant", "540p_sr"), "variant must be one of"),
        (("-p", "hi", "--seconds", "99"), "seconds must be"),
        (("-p", "hi", "--html", "/none/page.html"), "--html must be a file in a folder"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(tiny_dir, monkeypatch, arguments, said):
    monkeypatch.setattr(
        "magihuman.runtime.engine.loading.load", lambda *a, **k: pytest.fail("loaded")
    )
    result = run("verify", "-m", tiny_dir, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and said in result.stderr


def test_only_a_bf16_engine_can_be_verified(tiny_dir):
    with (
        runtime.load(tiny_dir, device="cpu", precision="fp32") as engine,
        pytest.raises(runtime.InvalidRequestError, match="precision='bf16'"),
    ):
        runtime.verify(engine, ["hi"], **CLIP)
    with pytest.raises(runtime.InvalidRequestError, match="must be a list"):
        runtime.verify(tiny_dir, "hi")


def test_options_are_those_of_the_settings(tiny_dir):
    fields = {field.name: field.type for field in dataclasses.fields(verify_runs._Settings)}
    hints = {name: hint.__forward_arg__ for name, hint in VerifyOptions.__annotations__.items()}
    assert hints == fields
    with pytest.raises(TypeError, match="'second'"):
        runtime.verify(tiny_dir, ["hi"], second=1)
