from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sounds import write_silent_video, write_sine
from typer.testing import CliRunner

from magihuman import runtime
from magihuman.export.cli import cli as exported
from magihuman.runtime.cli import inspect
from magihuman.runtime.cli.main import app
from magihuman.runtime.weights.locate import AUDIO_FOLDER, IMAGE_FOLDER, TEXT_FOLDER, TURBO_FOLDER

SMALL = ("--seconds", "0.2", "--width", "64", "--height", "64", "--steps", "2")
SR = ("--sr", "540p", "--sr-width", "96", "--sr-height", "96", "--sr-steps", "2")
COMMAND = [sys.executable, "-m", "magihuman.runtime.cli"]


def run(*arguments: object):
    """The command in this process. An exception that is not an exit code is a failure."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def one_line(stderr: str) -> str:
    """What an error must look like: a single line, after the lines that say what was loaded."""
    lines = [line for line in stderr.splitlines() if not line.startswith("load ")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture
def inputs(tmp_path) -> Path:
    """A folder of good and bad input files."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "face.png")
    write_sine(tmp_path / "voice.wav", seconds=0.3)
    write_silent_video(tmp_path / "silent.mp4")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("neither a picture nor a sound\n" * 20)
    return tmp_path


# -- generate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sr", [False, True])
@pytest.mark.parametrize("audio", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_generate(tiny_dir, inputs, image, audio, sr):
    options = [*(SR if sr else ()), *(("--image", inputs / "face.png") if image else ())]
    options += ("--audio", inputs / "voice.wav") if audio else ()
    path = inputs / "clip.mp4"
    result = run("generate", "-m", tiny_dir, "-p", "hi", "-o", path, *SMALL, *options)
    assert result.exit_code == 0, result.stderr
    size = 96 if sr else 64
    assert f"{path}: 5 frames of {size}x{size}, 0.20 s, seed 42" in result.stdout
    assert "denoise 2/2" in result.stderr
    assert ("super_resolve 2/2" in result.stderr) == sr
    with av.open(str(path)) as container:
        picture = container.streams.video[0]
        assert (picture.width, picture.height, picture.frames) == (size, size, 5)
        assert len(container.streams.audio) == 1


@pytest.mark.usefixtures("same_bytes")
def test_generate_does_what_the_library_does(tiny_dir, inputs, engine):
    path = inputs / "clip.mp4"
    result = run("generate", "-m", tiny_dir, "-p", "hi", "-o", path, *SMALL, "--seed", 7, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    said = json.loads(result.stdout)
    timings = said.pop("timings_s")
    assert said == {
        "path": str(path),
        "frames": 5,
        "width": 64,
        "height": 64,
        "fps": 25,
        "duration_s": 0.2,
        "sample_rate_hz": 44100,
        "seed": 7,
        "warnings": [],
    }
    stages = ["text", "audio", "image", "denoise", "decode_audio", "decode_video"]
    assert list(timings) == ["load", "prepare", "queue", *stages, "write"]
    video = engine.generate("hi", seconds=0.2, width=64, height=64, steps=2, seed=7)
    assert path.read_bytes() == video.save(inputs / "other.mp4").read_bytes()


def test_the_file_may_be_of_another_kind(tiny_dir, tmp_path):
    command = ("generate", "-m", tiny_dir, "-p", "hi", *SMALL, "-o", f"{tmp_path}/frames/")
    result = run(*command, "--thumbnail", tmp_path / "still.jpg")
    assert result.exit_code == 0, result.stderr
    assert f"{tmp_path}/frames: 5 frames of 64x64" in result.stdout
    names = [*(f"{number:05}.png" for number in range(1, 6)), "sound.wav"]
    assert sorted(os.listdir(tmp_path / "frames")) == names
    with Image.open(tmp_path / "still.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))


@pytest.mark.parametrize("is_tagged", [True, False])
def test_the_file_says_what_it_was_made_from(tiny_dir, tmp_path, is_tagged):
    options = ("--crf", 30, "--preset", "medium", *(() if is_tagged else ("--no-tags",)))
    path = tmp_path / "clip.mp4"
    result = run("generate", "-m", tiny_dir, "-p", "hi", "-o", path, *SMALL, *options)
    assert result.exit_code == 0, result.stderr
    with av.open(str(path)) as container:
        said = {name: container.metadata.get(name) for name in ("prompt", "seed", "model")}
    expected = {"prompt": "hi", "seed": "42", "model": tiny_dir.name}
    assert said == (expected if is_tagged else dict.fromkeys(expected))
    settings = path.read_bytes().partition(b"x264 - core")[2]  # that the encoder notes
    assert b"crf=30.0" in settings and b"subme=7" in settings


def test_every_option_reaches_the_request(tiny_dir, inputs, monkeypatch):
    seen = []
    original = runtime.Request.plan
    monkeypatch.setattr(
        runtime.Request, "plan", lambda self, *a: seen.append((self, *a)) or original(self, *a)
    )
    options = {
        "image": str(inputs / "face.png"), "audio": str(inputs / "voice.wav"), "seconds": 0.24,
        "width": 96, "height": 64, "sr_width": 128, "sr_height": 96, "seed": 3, "steps": 1,
        "negative_prompt": "bad", "sr_steps": 1, "guidance": 2.0, "sr_guidance": 3.0,
    }  # fmt: skip
    flags = [str(x) for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
    model = ("-m", tiny_dir, "--variant", "base", "--sr", "1080p", "--precision", "fp32")
    model += ("--device", "cpu", "--turbo-vae", tiny_dir / TURBO_FOLDER)
    model += ("--text-encoder", tiny_dir / TEXT_FOLDER, "--audio-vae", tiny_dir / AUDIO_FOLDER)
    model += ("--image-vae", tiny_dir / IMAGE_FOLDER)
    result = run("generate", "-p", "hi", "-o", inputs / "clip.mp4", *model, *flags)
    assert result.exit_code == 0, result.stderr
    options |= {"image": inputs / "face.png", "audio": inputs / "voice.wav"}
    for request, variant, sr in seen:
        assert request == runtime.Request("hi", **options)
        assert (variant.name, sr) == ("base", "1080p")


def test_the_model_may_come_from_the_environment(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MAGIHUMAN_MODEL", str(tiny_dir))
    assert run("generate", "-p", "hi", "-o", tmp_path / "clip.mp4", *SMALL).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", " "], "prompt must be text that is not blank"),
        (["--seconds", "0.1"], "seconds must be a number from 0.2 to 60, got 0.1"),
        (["--seconds", "nan"], "seconds must be a number from 0.2 to 60, got nan"),
        (["--width", "31"], "width must be a whole number from 32 to 4096, got 31"),
        (["--height", "9999"], "height must be a whole number from 32 to 4096, got 9999"),
        (["--seed", "-1"], "seed must be a whole number from 0"),
        (["--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (["--guidance", "5"], "guidance must stay unset for the distill variant"),
        (["--sr-steps", "2"], "sr_steps needs an engine loaded with super-resolution"),
        (["--sr", "540p", "--width", "1024"], "super-resolution must not shrink the clip"),
        (["--sr", "720p"], "sr must be one of '540p', '1080p', got '720p'"),
        (["--variant", "turbo"], "variant must be one of 'base', 'distill', got 'turbo'"),
        (["--precision", "fp16"], "precision must be one of 'bf16', 'fp32', 'fp8', 'fp8-attn'"),
        (["--precision", "fp8", "--device", "cpu"], "precision='fp8' needs the compiled transfo"),
        (["--precision", "fp8", "--keep-bf16", "a,b"], "keep_bf16 must name linears of the blo"),
        (
            ["--keep-bf16", "modality"],
            "keep_bf16 must go with precision='fp8', 'fp8-attn' or 'int8', got",
        ),
        (["--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--image", "{}/no.png"], "image must be a readable file, got {}/no.png, which does not"),
        (["--image", "{}/empty"], "image must not be empty, got {}/empty of 0 bytes"),
        (["--image", "{}/text"], "image must be in a format Pillow reads"),
        (["--image", "{}"], "image must be a readable file, got {}, which is not a file"),
        (["--audio", "{}/no.wav"], "audio must be a readable file, got {}/no.wav, which does not"),
        (["--audio", "{}/empty"], "audio must not be empty, got {}/empty of 0 bytes"),
        (["--audio", "{}/text"], "audio must be in a format FFmpeg reads"),
        (["--audio", "{}/silent.mp4"], "audio must have a sound track, got {}/silent.mp4"),
        (["-o", "{}/clip.avi"], "the output's name must end in .mp4, .webm, .gif or .wav, or in"),
        (["-o", "{}/empty/"], "the output's folder must not exist yet, got {}/empty; name another"),
        (["--crf", "52"], "crf must be a whole number from 0 to 51 for .mp4, got 52"),
        (["--preset", "slowest"], "preset must be one of ultrafast, superfast, veryfast, faster"),
        (["-o", "{}/a.gif", "--crf", "3"], "crf must be left out for .gif, got 3"),
        (["--thumbnail", "{}/a.bmp"], "the thumbnail's name must end in one of .webp, .jpg, .jpeg"),
        (["--thumbnail", "{}/no/a.png"], "the thumbnail's folder must exist, got {}/no; create it"),
        (["-o", "{}/no/clip.mp4"], "the output's folder must exist, got {}/no; create it first"),
        (["-o", "{}/empty/clip.mp4"], "the output's folder must exist, got {}/empty"),
        (["-o", "/proc/clip.mp4"], "the output's folder /proc cannot be written to"),
        (["-m", "{}/no/model"], "model must be a directory with the published folders or a hub id"),
        (["-m", "{}"], "{} lacks distill, turbo_vae, t5gemma-9b-9b-ul2, stable-audio-open-1.0"),
        (["--text-encoder", "{}/no"], "t5gemma-9b-9b-ul2 must be at the path given, {}/no"),
        (["--turbo-vae", "{}"], "{} must hold TurboV3-Wan22-TinyShallow_7_7.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_dir, inputs, options, message):
    options = [option.format(inputs) for option in options]
    defaults = ("generate", "-m", tiny_dir, "-p", "hi", "-o", inputs / "clip.mp4")
    before = sorted(inputs.iterdir())
    result = run(*defaults, *options)
    assert result.exit_code == 2
    assert one_line(result.stderr).startswith(message.format(inputs))
    assert result.stdout == ""
    assert sorted(inputs.iterdir()) == before


def test_a_full_disk_is_noticed_before_loading(inputs, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    result = run("generate", "-m", "no/such/model", "-p", "hi", "-o", inputs / "clip.mp4")
    assert result.exit_code == 2
    # 125 frames of 480x256 at 2 bits a pixel are 3.7 MiB, and 1 MiB more.
    assert "must have 5 MiB free for this clip, got 0.0 MiB" in one_line(result.stderr)


def test_a_failure_of_the_machine_is_exit_code_1(tiny_dir, tmp_path):
    command = ("generate", "-m", tiny_dir, "-p", "hi", "-o", tmp_path / "clip.mp4")
    result = run(*command, "--device", "cuda:99")
    assert result.exit_code == 1
    assert one_line(result.stderr).startswith("cuda:99 is not there")


def test_a_damaged_model_is_one_line_and_exit_code_2(tiny_dir, tmp_path):
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    weights = model / "distill" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run("generate", "-m", model, "-p", "hi", "-o", tmp_path / "clip.mp4", *SMALL)
    assert result.exit_code == 2
    assert one_line(result.stderr).startswith(f"{weights} is damaged or cut short")
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-p", "hi"],
        ["generate", "-m", "model", "-p", "hi", "-o", "clip.mp4", "--seconds", "five"],
        ["generate", "-m", "model", "-p", "hi", "-o", "clip.mp4", "--no-such-option"],
        ["no-such-command"],
        [],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, monkeypatch):
    monkeypatch.delenv("MAGIHUMAN_MODEL", raising=False)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stdout + result.stderr


def test_names_are_printed_as_they_are(tmp_path):
    """Whatever in them looks like rich's markup or emoji."""
    folder = tmp_path / "a[red]b[" / "] :sun:" / "c"
    folder.parent.mkdir(parents=True)
    result = run("tiny", folder)
    assert result.exit_code == 0, result.stderr
    path = folder.parent / "clip[bold].mp4"
    result = run("generate", "-m", folder, "-p", "hi", "-o", path, *SMALL)
    assert f"{path}: 5 frames of 64x64" in result.stdout
    assert str(folder / "none") in one_line(run("inspect", folder / "none").stderr)


@pytest.mark.parametrize("command", ["serve", "export"])
def test_help_shows_the_extras(command):
    result = CliRunner().invoke(exported.app, [command, "--help"])
    assert ("'magihuman[serve]'" if command == "serve" else "ONNX") in result.stdout


def test_what_the_encoding_lacks_is_escaped(tiny_dir, tmp_path):
    path = tmp_path / "\N{SNOWMAN}[red].mp4"
    options = ["generate", "-m", str(tiny_dir), "-p", "\N{SNOWMAN}", "-o", str(path), *SMALL]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *options], env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/\\u2603[red].mp4: 5 frames" in done.stdout and path.exists()
    options[-len(SMALL) - 1] = str(tmp_path / "\N{SNOWMAN}" / "a.mp4")
    done = subprocess.run([*COMMAND, *options], env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the output's folder must exist" in one_line(done.stderr) and "\\u2603" in done.stderr


def test_help():
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("generate", "tiny", "inspect", "doctor"))
    assert "--negative-prompt" in run("generate", "--help").stdout
    assert "magihuman[serve]" in run("serve", "--help").stdout  # brackets are markup, too


# -- the real process -------------------------------------------------------------------------


def test_the_process_warns_in_one_line_and_writes_the_clip(tiny_dir, tmp_path):
    options = ["-p", "hi", "-o", "clip.mp4", "--seconds", "0.2", "--width", "64", "--height", "70"]
    result = subprocess.run(
        [*COMMAND, "generate", "-m", str(tiny_dir), *options, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    note = "sizes are made in steps of 32 pixels: asked for 64x70, making 64x64"
    said = json.loads(result.stdout)
    assert said["warnings"] == [note]
    assert Path(said["path"]) == tmp_path / "clip.mp4"
    assert (tmp_path / "clip.mp4").stat().st_size > 1000
    assert result.stderr == f"warning: {note}\n"


def test_the_process_refuses_without_a_traceback(tmp_path):
    result = subprocess.run(
        [*COMMAND, "generate", "-m", str(tmp_path), "-p", b"\xff", "-o", "clip.mp4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == "error: prompt must be valid Unicode, got '\\udcff'\n"


def test_an_interrupted_process_says_so_and_leaves_nothing(tiny_dir, tmp_path):
    options = ["-p", "hi", "-o", str(tmp_path / "clip.mp4"), "--seconds", "0.2", "--steps", "1000"]
    process = subprocess.Popen(
        [*COMMAND, "generate", "-m", str(tiny_dir), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("denoise 1/1000"):
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate()
    assert process.returncode == 1
    assert rest.splitlines()[-1] == "interrupted" and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


# -- tiny, inspect, doctor --------------------------------------------------------------------


def test_tiny_writes_a_model_that_works(tiny_dir, tmp_path):
    result = run("tiny", tmp_path / "new" / "model", "--seed", 0)
    assert result.exit_code == 0
    folders = [line.removeprefix("wrote ") for line in result.stdout.splitlines()]
    assert sorted(folders) == sorted(map(str, (tmp_path / "new" / "model").iterdir()))
    # The same seed gives the same weights.
    name = Path("distill") / "model.safetensors"
    assert (tmp_path / "new" / "model" / name).read_bytes() == (tiny_dir / name).read_bytes()


@pytest.mark.parametrize("place", ["file", "file/model"])
def test_tiny_refuses_a_place_it_cannot_write(tmp_path, place):
    (tmp_path / "file").touch()
    result = run("tiny", tmp_path / place)
    assert result.exit_code == 2
    assert one_line(result.stderr).startswith("the checkpoint cannot be written to")


ALL = [
    "base", "distill", "540p_sr", "1080p_sr", TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER, IMAGE_FOLDER,
]  # fmt: skip


def test_inspect_a_whole_model(tiny_dir):
    result = run("inspect", tiny_dir)
    assert result.exit_code == 0 and result.stderr == ""
    assert all(name in result.stdout for name in ALL)
    components = json.loads(run("inspect", tiny_dir, "--json").stdout)["components"]
    assert [(c["name"], c["state"]) for c in components] == [(name, "ok") for name in ALL]
    facts = {c["name"]: c for c in components}
    assert facts["distill"]["tensors"] == facts["base"]["tensors"] == 51
    assert facts["distill"]["dtypes"] == {"F32": 51}
    assert facts["base"]["dtypes"] == {"F32": 31, "BF16": 20}
    assert facts["distill"]["disk_bytes"] > facts["base"]["disk_bytes"]
    assert facts["distill"]["device_bytes"] == facts["base"]["device_bytes"]


def test_inspect_names_what_is_missing(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir / "distill", tmp_path / "distill")
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 0
    states = {c["name"]: c["state"] for c in json.loads(result.stdout)["components"]}
    assert states == {name: "ok" if name == "distill" else "missing" for name in ALL}


def drop_a_tensor(path: Path) -> None:
    state = load_file(path)
    state.pop(next(key for key in state if "decoder" in key))
    save_file(state, path)


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("base", "model-00002-of-00002.safetensors", Path.unlink, "is missing"),
        ("base", "magihuman.json", lambda path: path.write_text("{"), "cannot be read as JSON"),
        ("distill", "model.safetensors", lambda path: path.write_bytes(b"1"), "damaged or cut"),
        (TURBO_FOLDER, "checkpoint-340000.ckpt", lambda path: path.write_bytes(b"1"), "damaged"),
        (AUDIO_FOLDER, "model.safetensors", drop_a_tensor, "1 missing: decoder"),
        (AUDIO_FOLDER, "model_config.json", Path.unlink, "model_config.json is missing"),
        (TEXT_FOLDER, "model.safetensors", lambda path: path.write_bytes(b"1"), "damaged or cut"),
        (IMAGE_FOLDER, "Wan2.2_VAE.pth", Path.unlink, "Wan2.2_VAE.pth is missing"),
        (IMAGE_FOLDER, "Wan2.2_VAE.pth", lambda path: path.write_bytes(b"1"), "damaged, cut short"),
    ],
)
def test_inspect_names_what_is_damaged(tiny_dir, tmp_path, name, file, damage, message):
    shutil.copytree(tiny_dir / name, tmp_path / name)
    damage(tmp_path / name / file)
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{name}: ") and message in line
    assert result.stdout.count("damaged") == 1
    states = json.loads(run("inspect", tmp_path, "--json").stdout)["components"]
    assert next(c for c in states if c["name"] == name)["state"] == line.removeprefix(f"{name}: ")


def test_inspect_needs_a_directory(tmp_path):
    result = run("inspect", tmp_path / "no")
    assert result.exit_code == 2
    assert one_line(result.stderr) == (
        f"{tmp_path / 'no'} must be a directory with the published folders"
    )


def test_what_fits_a_gpu(tiny_dir, tmp_path):
    components = inspect.inspect_model(tiny_dir)
    size = {c.name: c.device_bytes for c in components}
    alone = sum(size[name] for name in ("distill", *ALL[4:])) + inspect.WORKSPACE_BYTES
    every = ["distill", "base", "distill + 540p", "distill + 1080p"]
    assert inspect.fits(components, 10**12) == dict.fromkeys(every, True)
    assert inspect.fits(components, 0) == dict.fromkeys(every, False)
    exact = inspect.fits(components, alone)
    assert exact == {"distill": True, "base": True, **dict.fromkeys(every[2:], False)}
    assert not inspect.fits(components, alone - 1)["distill"]
    shutil.copytree(tiny_dir / "distill", tmp_path / "distill")
    assert list(inspect.fits(inspect.inspect_model(tmp_path), 10**12)) == ["distill"]


def test_doctor():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["av"] == av.__version__
    assert {"device", "transformer", "attention", "fp8 linears", "free disk"} <= set(facts)
    result = run("doctor")
    assert result.exit_code == 0 and "free disk" in result.stdout


def test_doctor_says_how_gpus_make_engines():
    assert inspect.several_gpus(1, lambda a, b: True) == {}
    said = inspect.several_gpus(4, lambda a, b: {a, b} != {1, 3})
    assert said["engines of serve"] == "4 of 1, 2 of 2, 1 of 4 GPUs (--gpus-per-engine)"
    assert said["GPUs together"] == "no peer access: 1 and 3"
    assert inspect.several_gpus(2, lambda a, b: True)["GPUs together"] == "peer access"


# -- memory plans -----------------------------------------------------------------------------


def test_inspect_plans_for_the_model_asked(tiny_dir):
    options = ("--sr", "540p", "--memory-limit-gb", 12)
    plan = json.loads(run("inspect", tiny_dir, *options, "--json").stdout)["memory_plan"]
    assert plan["limit_bytes"] == 12 * 2**30 >= plan["peak_bytes"]
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert list(stages) == [
        "load", "text", "audio", "image", "denoise", "super_resolve", "decode",
    ]  # fmt: skip
    assert plan["peak_bytes"] == max(stage["total_bytes"] for stage in plan["stages"])
    shown = run("inspect", tiny_dir, *options).stdout
    assert "memory plan within 12.0 GiB" in shown and "super_resolve" in shown
    assert ("all weights stay" in shown) == (not plan["moves"])
    plan = json.loads(run("inspect", tiny_dir, *options[:3], 4, "--json").stdout)["memory_plan"]
    assert list(plan) == ["error"] and "the stage decode takes" in plan["error"]


def test_inspect_plans_only_for_what_is_there(tiny_dir, tmp_path):
    shutil.copytree(tiny_dir / "distill", tmp_path / "distill")
    result = run("inspect", tmp_path, "--memory-limit-gb", 12)
    assert f"no memory plan: {TURBO_FOLDER} is missing" in result.stdout


def test_doctor_plans_for_the_published_sizes():
    options = ("--sr", "1080p", "--precision", "bf16", "--memory-limit-gb", 36)
    plan = json.loads(run("doctor", *options, "--json").stdout)["memory_plan"]
    assert set(plan["moves"]) >= {"transformer", "super-resolution transformer"}
    assert plan["host_bytes"] > 55 * 2**30 and not plan["replays"]
    shown = run("doctor", *options).stdout
    assert "streamed)" in shown and "rest in host memory" in shown


def test_doctor_plans_for_each_of_several_gpus():
    options = ("--sr", "1080p", "--precision", "fp8", "--memory-limit-gb", 76.6)
    facts = json.loads(run("doctor", *options, "--context-parallel", 4, "--json").stdout)
    first, others = facts["memory_plan"], facts["memory_plan_of_others"]
    assert not first["moves"] and not others["moves"] and first["replays"] and others["replays"]
    held = [set(plan["stages"][0]["weights"]) for plan in (first, others)]
    shared = {"video decoder", "transformer", "super-resolution transformer"}
    assert held[1] == shared < held[0]
    shown = run("doctor", *options, "--context-parallel", 4).stdout
    assert shown.index("the first GPU:") < shown.index("each other GPU:")
    assert "memory_plan_of_others" not in json.loads(run("doctor", *options, "--json").stdout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variant", "turbo"), "variant must be one of 'base', 'distill', got 'turbo'"),
        (("--sr", "720p"), "sr must be one of None, '540p', '1080p', got '720p'"),
        (("--memory-limit-gb", -1), "memory_limit_gb must be a number of GiB above 0, got -1.0"),
        (
            ("--memory-limit-gb", 40, "--context-parallel", 3),
            "context_parallel must divide the transformer's key/value heads, 8, got 3; use 1 or 2"
            " or 4 or 8",
        ),
    ],
)
def test_a_plan_of_what_is_not_there_is_refused(options, message):
    result = run("doctor", *options)
    assert result.exit_code == 2 and one_line(result.stderr) == message


def test_a_limit_is_handed_to_load(tiny_dir, tmp_path):
    out = tmp_path / "a.mp4"
    options = ("--memory-limit-gb", 12, "--device", "cpu")
    result = run("generate", "--model", tiny_dir, "-p", "hi", "-o", out, *options)
    assert result.exit_code == 2
    assert one_line(result.stderr) == "memory_limit_gb must go with a GPU, got 12 with cpu"


def test_explain(tmp_path):
    page = tmp_path / "page.html"
    result = run("explain", "--seconds", "1", "--html", page, "--json")
    assert result.exit_code == 0
    explanation = json.loads(result.stdout)
    assert explanation["tokens"] == [7 * 8 * 15, 26, 300]
    after = {row["operation"] for row in explanation["after"]}
    assert {"magihuman.linear_add_", "magihuman.gated_attention", "magihuman.linear"} <= after
    assert (
        explanation["totals"]["after"]["launches"] < explanation["totals"]["before"]["launches"] / 5
    )
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can record")
def test_explain_says_what_recording_needs():
    result = run("explain", "--recorded")
    assert result.exit_code == 1  # no GPU, as docs/cli.md has it
    assert "--recorded needs a GPU" in one_line(result.stderr)


@pytest.mark.parametrize(
    "arguments",
    [["--variant", "1080p_sr"], ["--seconds", "99"], ["--html", "/proc/none/page.html"]],
)
def test_explain_refuses_bad_input(arguments):
    result = run("explain", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


# -- weights that are not finite --------------------------------------------------------------


def spoil(folder: Path, component: str, value: float) -> str:
    """Put one value into a file of a component; the name of the tensor."""
    place = folder / component
    if component in (TURBO_FOLDER, IMAGE_FOLDER):
        (file,) = (file for file in place.iterdir() if file.suffix in (".ckpt", ".pth"))
        content = torch.load(file, weights_only=True)
        state = content.get("ema_state_dict", content)
        key = next(key for key in state if key.endswith("conv_in.conv.weight") or "conv1." in key)
        state[key].view(-1)[0] = value
        torch.save(content, file)
        return key.removeprefix("module.")
    file = sorted(place.glob("*.safetensors"))[-1]
    state = load_file(file)
    key = sorted(key for key in state if "encoder" in key or "layers" in key)[-1]
    if component == TEXT_FOLDER:
        key = sorted(key for key in state if key.startswith(("model.encoder.", "encoder.")))[-1]
    state[key].view(-1)[0] = value
    save_file(state, file, metadata={"format": "pt"})
    return key


COMPONENTS = ("base", "distill", "1080p_sr", TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER, IMAGE_FOLDER)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("component", COMPONENTS)
def test_inspect_finds_what_is_not_finite(tiny_dir, tmp_path, component, value):
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    name = spoil(folder, component, value)
    assert run("inspect", folder).exit_code == 0
    result = run("inspect", folder, "--check", "--json")
    assert result.exit_code == 2
    states = {each["name"]: each["state"] for each in json.loads(result.stdout)["components"]}
    bad = states.pop(component)
    assert "holds NaN or infinity in 1 tensors" in bad and name in bad
    assert set(states.values()) == {"ok"}


def test_inspect_finds_nothing_in_good_weights(tiny_dir):
    assert run("inspect", tiny_dir, "--check").exit_code == 0
    assert run("inspect", "nano", "--check").exit_code == 0


def test_a_wrong_clip_is_one_line_and_no_file(tiny_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    spoil(folder, "distill", float("nan"))
    path = tmp_path / "clip.mp4"
    result = run("generate", "-m", folder, "-p", "hi", "-o", path, *SMALL)
    assert result.exit_code == 1
    assert "NaN or infinity from the transformer" in result.stderr.splitlines()[-1]
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
