"""What a server refuses at once, by the model, the memory plan and its options."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner
from video_client import TOKEN_SHA256

from magihuman.export.cli import cli
from magihuman.runtime import CheckpointError
from magihuman.runtime.cli.generate import GenerateOptions
from magihuman.runtime.cli.serve import ServeOptions, _check_model, _settings
from magihuman.runtime.engine import LoadOptions
from magihuman.runtime.memory import MemoryPlan
from magihuman.runtime.memory.plan import StageMemory
from magihuman.runtime.request import MAX_SECONDS, MAX_SIDE_PX
from magihuman.runtime.serving.settings import Capacity
from magihuman.runtime.weights import largest, learnt

LEARNT = {"seconds": 1, "width": 96, "height": 64}


@pytest.fixture
def model(tiny_dir, tmp_path):
    """Write what the tiny model says of itself."""
    folder = shutil.copytree(tiny_dir, tmp_path / "model")

    def write(**values) -> Path:
        (folder / "request.json").write_text(json.dumps({**LEARNT, **values}))
        return folder

    return write


def settings_of(model: Path, tmp_path: Path, **options):
    serve = ServeOptions(model=str(model), folder=tmp_path / "videos", **options)
    return _settings(serve, TOKEN_SHA256, 2**40, rows=27648)


def test_a_model_tells_the_most_that_is_made(model, tiny_dir):
    folder = model(max_seconds=2, max_width=128, max_height=96)
    assert largest(folder) == {"seconds": 2, "width": 128, "height": 96}
    assert learnt(folder) == LEARNT
    assert largest(model(max_seconds=1)) == {
        "seconds": 1, "width": MAX_SIDE_PX, "height": MAX_SIDE_PX,
    }  # fmt: skip
    everything = {"seconds": MAX_SECONDS, "width": MAX_SIDE_PX, "height": MAX_SIDE_PX}
    assert largest(model()) == largest(tiny_dir) == everything


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_seconds": 0.5}, "max_seconds must be no less than seconds, 1, got 0.5"),
        ({"max_width": 64}, "max_width must be no less than width"),
        ({"max_height": "tall"}, "may for max_seconds, max_width, max_height"),
        ({"max_seconds": 100}, "0.2 to 60"),
        ({"max_pixels": 5}, "must hold a number for each of"),
    ],
)
def test_what_a_model_cannot_tell(model, values, says):
    with pytest.raises(CheckpointError, match=says):
        largest(model(**values))


def test_limits_are_the_models_unless_an_option_says_else(model, tmp_path):
    folder = model(max_seconds=2, max_width=128, max_height=96)
    limits = settings_of(folder, tmp_path).limits
    assert (limits.seconds, limits.pixels) == (2, 128 * 96)
    limits = settings_of(folder, tmp_path, max_seconds=3, max_pixels=5000).limits
    assert (limits.seconds, limits.pixels) == (3, 5000)
    limits = settings_of(model(), tmp_path).limits
    assert (limits.seconds, limits.pixels) == (MAX_SECONDS, MAX_SIDE_PX**2)


def refusal(local, **fields) -> str:
    answer = local.http.post("/v1/videos", json={"prompt": "hi", **fields})
    assert answer.status_code == 422, answer.text
    return answer.json()["error"]["message"]


def is_taken(local, **fields) -> bool:
    answer: httpx.Response = local.http.post("/v1/videos", json={"prompt": "hi", **fields})
    if answer.status_code == 200:
        local.delete(answer.json()["id"])
    return answer.status_code == 200


def test_beyond_the_models_most_is_refused_with_what_fits(model, tmp_path, replica, serve_here):
    settings = settings_of(model(max_seconds=2, max_width=128, max_height=96), tmp_path)
    with serve_here(settings, replica) as local:
        assert "from 0.2 to 2 s on this server" in refusal(local, seconds=3)
        assert "ask for 96x96, or for less" in refusal(local, size="128x128", seconds=1)
        assert is_taken(local, seconds=2, size="128x96")
        fields = local.http.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]
        schema = fields["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert schema["seconds"]["anyOf"][0]["maximum"] == 2


def test_a_memory_plan_leaves_each_stage_its_room():
    stages = [
        StageMemory("denoise", {"base": 6 * 2**30}, {}, 2**30, 0, 0.0),
        StageMemory("decode", {"video": 2**30}, {}, 2**29, 0, 0.0),
    ]
    plan = MemoryPlan(10 * 2**30, {}, False, tuple(stages), 0)
    for stage in stages:
        used = stage.total_bytes - stage.working_bytes
        assert plan.room_bytes[stage.name] == plan.limit_bytes - used
    assert plan.room_bytes["decode"] - plan.room_bytes["denoise"] == 5 * 2**30


def test_beyond_what_was_planned_for_is_refused_with_what_fits(
    tiny_dir, tmp_path, replica, serve_here
):
    """Each stage by its own room; before an engine has told its plan, by all the memory."""
    settings = settings_of(tiny_dir, tmp_path, memory_limit_gb=2)
    assert settings.capacity.memory_bytes == 2 * 2**30
    with serve_here(settings, replica) as local:
        assert is_taken(local, seconds=5, size="480x256")
        settings.capacity.plan({"denoise": 2**28, "decode": 2**31})
        message = refusal(local, seconds=5, size="480x256")
        assert "0.2 GiB each" in message and "5 s of 480x256 take about 1.8 GiB" in message
        shorter, smaller = message.partition("; ")[2].removesuffix(" would fit").split(" or ")
        for text in (shorter, smaller):
            seconds, size = text.split(" s of ")
            assert is_taken(local, seconds=seconds, size=size), text
        settings.capacity.plan({"decode": 2**28})
        assert "would fit" in refusal(local, seconds=5, size="480x256")


def test_what_super_resolution_takes_counts():
    from magihuman.runtime import Request, config

    plan = Request("-").plan(config.VARIANTS["distill"], "1080p")
    capacity = Capacity(2**40, token_bytes=1000.0, pixel_bytes=1.0)
    assert capacity.lacks(plan) is None
    capacity.plan({"denoise": 2**40, "super_resolve": 1000})
    needed, room = capacity.lacks(plan)
    assert room == 1000 and needed == plan.video_tokens * 1000


# -- options --------------------------------------------------------------------------------------


def test_serve_takes_all_that_generate_loads_an_engine_with():
    """By construction: a new field of the one is an option of the other."""
    loaded = {field.name for field in dataclasses.fields(LoadOptions)}
    of_generate = {field.name for field in dataclasses.fields(GenerateOptions)} & loaded
    of_serve = {field.name for field in dataclasses.fields(ServeOptions)} & loaded
    assert of_serve - {"queue_limit"} == of_generate
    given = {"memory_limit_gb": 7.0, "context_parallel": 2, "image_vae": "a", "audio_vae": "b"}
    given |= {"text_encoder": "c", "precision": "fp8", "turbo_vae": "d", "revision": "e"}
    arguments = ServeOptions(model="m", **given).load_arguments()
    assert {name: arguments[name] for name in given} == given
    clip = GenerateOptions(model="m", prompt="p", path="o", **given)
    assert arguments == clip.load_arguments()
    LoadOptions(**arguments)


def test_kept_linears_are_a_list_of_names():
    options = ServeOptions(model="m", precision="fp8", keep_bf16="a.*,b")
    assert options.load_arguments()["keep_bf16"] == ["a.*", "b"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--memory-limit-gb", "8", "--device", "cpu"], "memory_limit_gb must go with a GPU"),
        (["--memory-limit-gb", "-1"], "above 0"),
        (["--keep-bf16", "modality"], "keep_bf16 must go with precision"),
        (["--precision", "int4"], "precision must be"),
        (["--context-parallel", "2", "--memory-limit-gb", "8"], "context_parallel=1"),
        (["--sr-transformer", "x"], "sr_transformer must go with sr"),
        (["--max-seconds", "99"], "--max-seconds must be"),
    ],
)
def test_serve_refuses_before_anything_starts(tiny_dir, tmp_path, options, says):
    if "cpu" not in options and torch.cuda.is_available():
        options = [*options, "--device", "cuda"]
    place = ["--folder", str(tmp_path / "videos"), "--port", "1"]
    done = CliRunner().invoke(cli.app, ["serve", "-m", str(tiny_dir), *place, *options])
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output
    assert not (tmp_path / "videos").exists()


def test_components_that_lie_elsewhere_are_looked_for_there(tiny_dir, tmp_path):
    arguments = ServeOptions(model=str(tiny_dir), device="cpu").load_arguments()
    assert _check_model({**arguments, "audio_vae": str(tiny_dir / "stable-audio-open-1.0")}, ())
    with pytest.raises(CheckpointError, match="nowhere"):
        _check_model({**arguments, "audio_vae": str(tmp_path / "nowhere")}, ())
