from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from magihuman import runtime
from magihuman.runtime import CheckpointError, DeviceError, InvalidRequestError
from magihuman.runtime.engine import LoadOptions, loading
from magihuman.runtime.memory import GIB, MemoryPlan
from magihuman.runtime.weights import locate, random_weights
from magihuman.runtime.weights.locate import AUDIO_FOLDER, IMAGE_FOLDER, TEXT_FOLDER, TURBO_FOLDER
from magihuman.runtime.weights.tiny import DIT

SMALL = {"seconds": 0.2, "width": 64, "height": 64, "steps": 1}


def copy_without(tiny_dir: Path, target: Path, *names: str) -> Path:
    return Path(shutil.copytree(tiny_dir, target / "model", ignore=lambda *_: names))


# -- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "turbo"}, "variant must be one of 'base', 'distill', got 'turbo'"),
        ({"variant": "540p_sr"}, "variant must be one of 'base', 'distill', got '540p_sr'"),
        ({"variant": ""}, "variant must be one of 'base', 'distill', got ''"),
        ({"sr": "720p"}, "sr must be one of None, '540p', '1080p', got '720p'"),
        (
            {"precision": "fp16"},
            "precision must be one of 'bf16', 'fp32', 'fp8', 'fp8-attn', 'int8', got 'fp16'",
        ),
        ({"kernels": "hopper"}, "kernels must be one of 'auto', 'portable', got 'hopper'"),
        ({"device": "tpu"}, "device must be cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N, got 'meta'"),
        ({"device": 5}, "device must be cpu, cuda or cuda:N, got 5"),
    ],
)
def test_a_wrong_argument_is_refused(tiny_dir, options, message):
    with pytest.raises(InvalidRequestError) as caught:
        runtime.load(tiny_dir, **options)
    assert str(caught.value) == message


def test_a_gpu_that_is_not_there_is_refused(tiny_dir):
    count = torch.cuda.device_count()
    message = rf"^cuda:99 is not there: this PyTorch sees {count} GPU\(s\); use device='cpu'$"
    with pytest.raises(DeviceError, match=message):
        runtime.load(tiny_dir, device="cuda:99")


def test_without_a_device_the_first_gpu_is_taken_or_the_cpu():
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert loading.pick_device(None) == torch.device(expected)
    assert loading.pick_device(torch.device("cpu")) == loading.pick_device("cpu")


def test_options_are_the_arguments_of_load_with_their_defaults():
    fields = {field.name: field.default for field in dataclasses.fields(LoadOptions)}
    arguments = inspect.signature(runtime.load).parameters
    given = {name: parameter.default for name, parameter in arguments.items()}
    assert given.pop("model") is inspect.Parameter.empty
    assert fields.pop("model") is dataclasses.MISSING
    assert given == fields and "team" not in given


def test_options_for_other_processes_leave_device_and_callbacks_behind(tiny_dir):
    """Which may be what pickle refuses, as functions made here are."""
    given = LoadOptions(
        tiny_dir,
        sr="540p",
        device="cpu",
        on_load=lambda name, done, of: None,
        hooks=[type("Local", (), {})()],
        keep_bf16=["a", "b"],
        context_parallel=2,
    )
    sent = pickle.loads(pickle.dumps(given.for_others()))
    expected = LoadOptions(tiny_dir, sr="540p", keep_bf16=["a", "b"], context_parallel=2)
    assert sent == expected
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(given)


def test_either_all_processes_capture_graphs_or_none_does(monkeypatch):
    """One that launches its kernels one by one would have the others wait for it."""
    asked = []

    class Drawn:
        def __init__(self, options, device, limit, follows, captures):
            asked.append(captures)
            self.placer = self
            self.plan = MemoryPlan(GIB, {}, captures and not follows, (), 0)

    class OneOf:
        rank, device = 0, torch.device("cpu")

        def agree(self, work):
            return work()

        def gather(self, plan):
            return [plan, Drawn(None, None, None, True, asked[-1]).plan]

    monkeypatch.setattr(MemoryPlan, "held", "")
    drawn = loading.draw_in(OneOf(), lambda captures: Drawn(None, None, None, False, captures))
    assert not drawn.blueprint.plan.replays
    assert [plan.replays for plan in drawn.plans] == [False, False]
    assert asked == [True, True, False, False]


def test_components_stay_as_they_were_built(tiny_dir):
    with runtime.load(tiny_dir, device="cpu") as engine:
        with pytest.raises(dataclasses.FrozenInstanceError):
            engine._parts.forward = None
        assert engine._parts.captured == ()


def test_a_synthetic_model_has_one_variant():
    with pytest.raises(InvalidRequestError, match="must be 'base', as the synthetic model's"):
        runtime.load(runtime.synthetic("base"), variant="distill", device="cpu")
    with pytest.raises(
        InvalidRequestError, match="must be one of 'base', 'distill', got '540p_sr'"
    ):
        runtime.synthetic("540p_sr")


# -- a directory ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["no/such/folder", "file"])
def test_the_model_must_be_a_directory_or_a_hub_id(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as caught:
        runtime.load(tmp_path / path, device="cpu")
    assert str(caught.value) == (
        "model must be a directory with the published folders or a hub id (owner/name), got"
        f" {tmp_path / path}"
    )


def test_all_missing_folders_are_named(tiny_dir, tmp_path):
    folder = copy_without(tiny_dir, tmp_path, "distill", TEXT_FOLDER, "1080p_sr")
    with pytest.raises(CheckpointError) as caught:
        runtime.load(folder, sr="1080p", device="cpu")
    assert str(caught.value) == (
        f"{folder} lacks distill, 1080p_sr, {TEXT_FOLDER};"
        " download what is missing or give its path"
    )


def test_an_empty_directory_lacks_everything_but_the_image_encoder(tmp_path):
    names = f"distill, {TURBO_FOLDER}, {TEXT_FOLDER}, {AUDIO_FOLDER}"
    with pytest.raises(CheckpointError, match=f"lacks {names}; download"):
        runtime.load(tmp_path, device="cpu")


def test_what_is_not_asked_for_need_not_be_there(tiny_dir, tmp_path):
    folder = copy_without(tiny_dir, tmp_path, "base", "540p_sr", "1080p_sr")
    with runtime.load(folder, device="cpu") as engine:
        assert (engine.variant, engine.sr) == ("distill", None)


def test_the_engine_says_what_it_is(tiny_dir):
    with runtime.load(
        str(tiny_dir), variant="base", sr="1080p", precision="fp32", device="cpu"
    ) as engine:
        assert (engine.variant, engine.sr, engine.precision) == ("base", "1080p", "fp32")
        assert engine.device == torch.device("cpu")
        assert not engine.is_compiled and engine.kernels is None
        parts = engine._parts
        for dit in (parts.dit, parts.sr_dit):
            assert {p.dtype for p in dit.parameters()} == {torch.float32}
        assert not parts.dit.config.local_attention_layers
        assert parts.sr_dit.config.local_attention_layers == (0, 1, 2, 4)


def test_loading_is_reported(tiny_dir):
    reports: list[tuple[str, int, int]] = []
    runtime.load(tiny_dir, sr="540p", device="cpu", on_load=lambda *r: reports.append(r)).close()
    names = list(dict.fromkeys(name for name, _, _ in reports))
    # Cheap components come first.
    cheap = [TURBO_FOLDER, AUDIO_FOLDER, IMAGE_FOLDER, TEXT_FOLDER]
    assert names == [*cheap, "distill", "540p_sr"]
    for name in names:
        own = [(done, of) for reported, done, of in reports if reported == name]
        assert own[0] == (0, 0) and own[-1] == (1, 1)
    read = [(done, of) for name, done, of in reports if name == "distill" and of > 1]
    assert [done for done, _ in read] == sorted({done for done, _ in read})
    assert read[-1][0] == read[-1][1] > 10**6


def test_components_may_lie_elsewhere(tiny_dir, tmp_path):
    moved = {
        "turbo_vae": TURBO_FOLDER,
        "text_encoder": TEXT_FOLDER,
        "audio_vae": AUDIO_FOLDER,
        "image_vae": IMAGE_FOLDER,
    }
    folder = copy_without(tiny_dir, tmp_path, *moved.values())
    places = {name: shutil.copytree(tiny_dir / old, tmp_path / name) for name, old in moved.items()}
    with (
        runtime.load(folder, device="cpu", **places) as engine,
        runtime.load(tiny_dir, device="cpu") as plain,
    ):
        face = Image.new("RGB", (64, 64), "red")
        here = engine.generate("hi", image=face, **SMALL)
        assert (here.frames == plain.generate("hi", image=face, **SMALL).frames).all()


def test_the_image_encoder_may_be_given_as_a_file(tiny_dir, tmp_path):
    folder = copy_without(tiny_dir, tmp_path, IMAGE_FOLDER)
    file = tiny_dir / IMAGE_FOLDER / locate.WEIGHTS_NAME
    with runtime.load(folder, image_vae=file, device="cpu") as engine:
        engine.generate("hi", image=Image.new("RGB", (64, 64)), **SMALL)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("turbo_vae", TURBO_FOLDER),
        ("text_encoder", TEXT_FOLDER),
        ("audio_vae", AUDIO_FOLDER),
        ("image_vae", IMAGE_FOLDER),
    ],
)
def test_a_path_given_must_exist(tiny_dir, option, name):
    with pytest.raises(CheckpointError) as caught:
        runtime.load(tiny_dir, device="cpu", **{option: "/no/such/place"})
    assert str(caught.value) == (
        f"{name} must be at the path given, /no/such/place, which does not exist"
    )


def test_without_an_image_encoder_only_images_are_refused(tiny_dir, tmp_path):
    folder = copy_without(tiny_dir, tmp_path, IMAGE_FOLDER)
    with runtime.load(folder, device="cpu") as engine:
        with pytest.raises(InvalidRequestError, match=r"put Wan2.2-TI2V-5B .* or give load\("):
            engine.generate("hi", image=Image.new("RGB", (64, 64)), **SMALL)
        assert engine.generate("hi", **SMALL).frames.shape == (5, 64, 64, 3)


def test_a_text_encoder_of_another_width_is_refused(tiny_dir, tmp_path):
    folder = copy_without(tiny_dir, tmp_path, "distill")
    narrow = dataclasses.replace(DIT, text_channels=32)
    model = random_weights.dit(narrow, 0, torch.device("cpu"), torch.float32, "distill")
    (folder / "distill").mkdir()
    save_file(model.state_dict(), folder / "distill" / "model.safetensors")
    (folder / "distill" / "magihuman.json").write_text(json.dumps(dataclasses.asdict(narrow)))
    message = "width must be the transformer's text_channels, 32, got 64; they belong to different"
    with pytest.raises(CheckpointError, match=message):
        runtime.load(folder, device="cpu")


# -- the hub, offline -------------------------------------------------------------------------


def cache(root: Path, repo: str, commit: str, branch: str, source: Path, *names: str) -> None:
    """What huggingface_hub leaves on disk when a repository has been downloaded."""
    place = root / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for item in [source / name for name in names] or source.iterdir():
        (snapshot / item.name).symlink_to(item)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / branch).write_text(commit)


USE_HUB = """
import json
from magihuman import runtime

def attempt(model, **options):
    try:
        with runtime.load(model, device="cpu", **options) as engine:
            video = engine.generate("hi", seconds=0.2, width=64, height=64, steps=1)
            return [engine.variant, video.frames.astype(int).tolist()]
    except runtime.CheckpointError as error:
        return str(error)

print(json.dumps({
    "main": attempt("someone/model"),
    "revision": attempt("someone/model", revision="v2", variant="base"),
    "text_encoder": attempt("someone/model", text_encoder="someone/encoder"),
    "lacking": attempt("someone/model", sr="540p"),
    "no_revision": attempt("someone/model", revision="v3"),
    "unknown": attempt("someone/else"),
    "no_override": attempt("someone/model", audio_vae="someone/else"),
    "impossible": attempt("some--one/model"),
}))
"""


@pytest.fixture(scope="module")
def from_hub(tiny_dir, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("hub")
    first, second = "1" * 40, "2" * 40
    cache(root, "someone/model", first, "main", tiny_dir, "distill", TURBO_FOLDER)
    cache(root, "someone/model", second, "v2", tiny_dir, "base", TURBO_FOLDER)
    for name, repo in locate.HUB_IDS.items():
        cache(root, repo, first, "main", tiny_dir / name)
    cache(root, "someone/encoder", first, "main", tiny_dir / TEXT_FOLDER)
    environment = {**os.environ, "HF_HUB_CACHE": str(root), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", USE_HUB],
        env=environment,
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(result.stdout)


def test_a_hub_id_loads_from_the_local_cache(from_hub, engine):
    expected = engine.generate("hi", **SMALL).frames.tolist()
    assert from_hub["main"] == ["distill", expected]
    assert from_hub["text_encoder"] == ["distill", expected]


def test_a_revision_is_another_snapshot(from_hub):
    assert from_hub["revision"][0] == "base"
    assert from_hub["no_revision"].startswith("someone/model is not in the local Hugging")


@pytest.mark.parametrize("case", ["unknown", "no_override"])
def test_an_id_that_is_not_in_the_cache_is_named(from_hub, case):
    assert from_hub[case] == (
        "someone/else is not in the local Hugging Face cache and cannot be downloaded (offline"
        " mode, or no network); go online once, or give a directory"
    )


def test_a_snapshot_may_lack_a_folder(from_hub):
    assert "lacks 540p_sr; download what is missing or give its path" in from_hub["lacking"]


def test_an_impossible_id_is_refused(from_hub):
    assert from_hub["impossible"].startswith("some--one/model cannot be downloaded: ")


def test_of_the_hub_models_only_the_image_encoder_may_be_absent(monkeypatch, tmp_path, caplog):
    """The network's refusal is made here; the rest is real."""

    def refuse(repo, patterns, revision):
        raise CheckpointError(f"{repo} is not there")

    monkeypatch.setattr(locate, "_download", refuse)
    absent = tmp_path / "absent"
    assert locate._third_party(IMAGE_FOLDER, absent) == absent
    assert "requests with an image will be refused" in caplog.text
    with pytest.raises(CheckpointError, match="stable-audio-open"):
        locate._third_party(AUDIO_FOLDER, absent)


def test_the_fast_decoder_is_refused_where_it_cannot_run(tiny_dir):
    with pytest.raises(InvalidRequestError, match=r"vae='fast' needs .* there is no GPU; use"):
        runtime.load(tiny_dir, device="cpu", vae="fast")
    with pytest.raises(InvalidRequestError, match="vae must be one of 'fast', 'plain', 'tensorrt'"):
        runtime.load(tiny_dir, device="cpu", vae="quick")
    with runtime.load(tiny_dir, device="cpu") as engine:
        assert engine.vae == "plain"


# -- exported decoders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "raised", "message"),
    [
        ({"vae": "onnx"}, InvalidRequestError, "vae must be one of 'fast', 'plain', 'tensorrt'"),
        ({"vae": "tensorrt"}, InvalidRequestError, "must go with .* turbo_vae, a folder of eng"),
        (
            {"vae": "tensorrt", "turbo_vae": "{tiny}/turbo_vae"},
            CheckpointError,
            "must hold engines for vae='tensorrt'",
        ),
        ({"turbo_vae": "{engines}"}, CheckpointError, "exported one; load it with vae='tensorrt'"),
        ({"vae": "tensorrt", "turbo_vae": "{engines}"}, DeviceError, "need a CUDA device, got cpu"),
    ],
)
def test_engines_and_the_published_decoder_are_told_apart(
    tiny_dir, engines_dir, options, raised, message
):
    places = {"tiny": tiny_dir, "engines": engines_dir}
    given = {name: value.format(**places) for name, value in options.items()}
    with pytest.raises(raised, match=message):
        runtime.load(tiny_dir, device="cpu", **given)


def test_engines_of_other_weights_are_refused(tiny_dir, engines_dir, tmp_path):
    folder = copy_without(tiny_dir, tmp_path, TURBO_FOLDER)
    shutil.copytree(tiny_dir / TURBO_FOLDER, folder / TURBO_FOLDER)
    with next((folder / TURBO_FOLDER).glob("*.ckpt")).open("ab") as weights:
        weights.write(b"0")
    with pytest.raises(CheckpointError, match="must have been exported from checkpoint-340000"):
        runtime.load(folder, device="cpu", vae="tensorrt", turbo_vae=engines_dir)


def test_engines_are_not_for_random_weights(engines_dir):
    with pytest.raises(InvalidRequestError, match="must go with a model directory"):
        runtime.load(runtime.synthetic(), device="cpu", vae="tensorrt", turbo_vae=engines_dir)
