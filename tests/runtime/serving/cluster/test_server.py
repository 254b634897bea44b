"""`magihuman serve` from outside: Ray, processes that are killed, restarts."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from contextlib import suppress

import httpx
import pytest
from typer.testing import CliRunner
from video_client import LONG, PATIENCE_S, SMALL, TOKEN, kept, until
from websockets.sync.client import connect

from magihuman.runtime.cli import serve
from magihuman.runtime.cli.main import app
from magihuman.runtime.errors import InvalidRequestError

pytest.importorskip("ray", reason="the extra [serve] is not installed")

# Decoding alone takes an engine seconds: long enough to be killed in the midst of it.
SLOW = {"prompt": "hi", "seconds": "2", "size": "128x128", "num_inference_steps": "100"}


def made(server) -> int:
    """Videos that the engine has made to their end."""
    text = server.http.get("/metrics").text
    found = re.search(r'^magihuman_requests_total\{outcome="done"\} (\S+)$', text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def test_all_verbs(server, face, voice):
    assert server.http.get("/health").json() == {"status": "ok"}
    with face.open("rb") as image, voice.open("rb") as sound:
        name = server.create(SMALL, input_reference=image, audio=sound)
    done = server.when(name, "completed")
    assert done["progress"] == 100 and done["timings_s"]["denoise"] > 0
    whole = server.content(name)
    assert whole.headers["content-type"] == "video/mp4" and whole.content[4:8] == b"ftyp"
    part = server.content(name, Range="bytes=0-99")
    assert (part.status_code, part.content) == (206, whole.content[:100])
    server.delete(name)
    assert server.http.get(f"/v1/videos/{name}").status_code == 404


def test_a_face_is_talked_to(server, face):
    """The voice and the picture pass between the processes."""
    picture = base64.b64encode(face.read_bytes()).decode()
    asked = {"image": f"data:image/png;base64,{picture}", "token": TOKEN, "sample_rate": 16_000}
    asked |= {"size": "64x64", "num_inference_steps": 1, "window_seconds": 0.64}
    address = server.url.replace("http:", "ws:") + "/v1/live"
    with connect(address, proxy=None, open_timeout=300) as client:
        client.send(json.dumps(asked))
        assert json.loads(client.recv(timeout=120)) == {"type": "ready"}
        client.send(bytes(16_000))
        client.send('{"type": "end"}')
        messages = list(client)
        assert client.close_code == 1000
    assert json.loads(messages[-1]) == {"type": "end"}
    assert b"moof" in b"".join(each for each in messages if isinstance(each, bytes))


def test_openais_client(server, face, tmp_path):
    """As it is installed; other clients are tried by `make test-clients`."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as client:
        video = client.videos.create(
            prompt="hi", model="sora-2", size="64x32", seconds="1", input_reference=face,
            extra_body={"num_inference_steps": 1, "quality": "high"},
        )  # fmt: skip
        done = client.videos.poll(video.id, poll_interval_ms=100)
        assert (done.status, done.size, done.seconds) == ("completed", "64x32", "1")
        assert [each.id for each in client.videos.list(limit=1)][:1] == [video.id]
        assert client.videos.retrieve(video.id).id == video.id
        (model,) = client.models.list()
        assert client.models.retrieve(model.id) == model
        starts = {"video": b"ftyp", "thumbnail": b"WEBP", "spritesheet": b"WEBP"}
        for variant, start in starts.items():
            content = client.videos.download_content(video.id, variant=variant).read()
            assert start in content[4:12]
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError, match="there is no such video"):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.UnprocessableEntityError, match="size must be WIDTHxHEIGHT"):
            client.videos.create(prompt="hi", size="huge")


def test_a_video_is_seen_while_it_is_made(server):
    name = server.create({**SMALL, "seconds": "2"})
    with server.http.stream("GET", f"/v1/videos/{name}/stream", timeout=180) as answer:
        content = answer.read()
    assert answer.status_code == 200 and content[4:8] == b"ftyp"
    server.when(name, "completed")
    assert content.count(b"moof") == 2 and content == server.http.get(answer.url).content
    assert server.http.get(f"/v1/videos/{name}/events").text.count("event: completed") == 1


def test_the_log_has_a_line_for_each_video_and_nothing_of_ray(server):
    before = len(server.log.read_text())
    names = [server.create({**SMALL, "size": size}) for size in ("64x64", "64x70")]
    for name in names:
        server.when(name, "completed")
    until(lambda: server.log.read_text()[before:].count("\n") >= 2)
    lines = server.log.read_text()[before:].splitlines()
    lines.sort(key=lambda line: names[0] not in line)
    for line, name in zip(lines, names, strict=True):
        assert re.match(rf"\S+Z INFO {name} completed: [\d.]+ s of 64x", line), line
    assert "sizes are made in steps of 32 pixels" in lines[1]
    assert "pid=" not in server.log.read_text()  # as Ray begins what its processes say


def test_removing_a_running_one_frees_its_engine(server):
    server.when(server.create(), "completed")
    before = made(server)
    names = [server.create(LONG) for _ in range(3)]
    server.when(names[0], "in_progress")
    for name in names:
        server.delete(name)
    server.when(server.create(), "completed")
    assert made(server) == before + 1


def test_strangers_are_told_nothing(server):
    name = server.create()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {TOKEN}x"}):
        with httpx.Client(base_url=server.url, headers=headers) as stranger:
            assert stranger.get("/ready").status_code == 200
            assert stranger.get("/metrics").status_code == 401
            assert stranger.post("/v1/videos", json={"prompt": "hi"}).status_code == 401
            assert stranger.get(f"/v1/videos/{name}/content").status_code == 401
            assert stranger.delete(f"/v1/videos/{name}").status_code == 401
    server.when(name, "completed")


def test_ray_answers_nothing_itself(server):
    """Its proxy told its routes to everybody, and asked no token."""
    for path in ("/-/routes", "/-/healthz"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_an_api_killed_is_started_again(server):
    """Nothing is lost, and what an engine has begun is made once more."""
    finished = server.create()
    server.when(finished, "completed")
    content = server.content(finished).content
    running = server.create(SLOW)
    server.when(running, "in_progress")
    server.kill("ray::ServeReplica:magihuman:api")

    def is_back() -> bool:
        with suppress(httpx.TransportError):
            return server.get(running)["status"] == "completed"
        return False

    until(is_back)
    assert server.content(finished).content == content
    assert server.process.poll() is None


def test_uploads_that_are_too_large_or_damaged(server):
    start = b'{"prompt": "'

    def without_a_length():
        yield start
        for _ in range(100):
            yield b"x" * 50_000

    headers = {"Content-Type": "application/json"}
    for content in (start + b"x" * 5_000_000, without_a_length()):
        answer = server.http.post("/v1/videos", content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
    assert server.post(SMALL, input_reference=b"no image").status_code == 422
    assert server.post(SMALL, audio=b"no sound").status_code == 422


def test_metrics_of_engines_and_of_the_server(server):
    server.when(server.create(), "completed")
    text = server.http.get("/metrics").text
    assert 'magihuman_requests_total{outcome="done"}' in text
    assert 'magihuman_stage_seconds_count{stage="denoise"}' in text
    assert 'magihuman_videos{status="completed"}' in text


def test_an_engine_killed_while_it_makes_a_video(server):
    """The video is put back in line once; a second time it fails and says why."""
    finished = server.create()
    server.when(finished, "completed")
    content = server.content(finished).content
    twice = server.create(SLOW)
    for _ in range(2):
        server.when(twice, "in_progress")
        until(lambda: server.get(twice)["stage"] == "denoise")
        server.kill("ray::ServeReplica:magihuman:engine")
        until(lambda: server.get(twice)["status"] in ("queued", "failed"))
        assert server.content(finished).content == content  # answered while no engine runs
    failed = server.get(twice)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "engine_lost")
    assert "ended unexpectedly, 2 times in a row" in failed["error"]["message"]
    server.when(server.create(), "completed")
    assert "magihuman_videos_requeued_total 2.0" in server.http.get("/metrics").text


def test_everything_killed_and_started_again(server):
    finished = server.create()
    server.when(finished, "completed")
    content = server.content(finished).content
    running = server.create({**SMALL, "num_inference_steps": "600"})
    server.when(running, "in_progress")
    waiting = [server.create({**SMALL, "seed": str(seed)}) for seed in range(3)]
    own = server.private_folder()
    server.process.kill()  # the processes of its Ray follow
    server.process.wait(300)
    assert own.exists()
    server.start()
    assert not own.exists()
    assert server.content(finished).content == content
    for name in (running, *waiting):
        server.when(name, "completed")


@pytest.mark.parametrize(
    "part", ["raylet/raylet ", pytest.param("gcs/gcs_server ", marks=pytest.mark.thorough)]
)
def test_a_server_whose_ray_has_ended_ends(server, part):
    """It would go on accepting, and answer nobody."""
    own = server.private_folder()
    finished = server.create()
    server.when(finished, "completed")
    server.kill(part)
    assert server.process.wait(300) == 1  # a service is started again; 10 s where nothing else runs
    said = part.partition("/")[0]
    assert re.search(f"error: Ray's {said}.* ended unexpectedly", server.log.read_text())
    until(lambda: not server.processes())
    assert not own.exists()
    server.start()
    assert server.get(finished)["status"] == "completed"


@pytest.mark.parametrize(
    "begun",
    [
        "",
        pytest.param("raylet/raylet ", marks=pytest.mark.thorough),
        "ray::ServeReplica:magihuman:engine",
    ],
)
def test_told_to_stop_while_it_loads(server, tmp_path, begun):
    """At any moment: before Ray, while Ray starts, while the engine does."""
    other = server.another(tmp_path)
    other.launch()
    until(lambda: "loading" in other.log.read_text())
    until(lambda: not begun or other.processes(begun))
    other.process.terminate()
    assert other.process.wait(PATIENCE_S) == 0, other.log.read_text()
    until(lambda: not other.processes())
    assert "Traceback" not in other.log.read_text() and "error" not in other.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nowhere"], "model must be a directory"),
        (["--model", "{damaged}"], "is damaged or cut short"),
        (["--folder", "{broken}"], "broken/records.sqlite is not: file is not a database"),
        (["--database", "mysql://me:secret@host/x"], "or sqlite:///FILE, got mysql://"),
        (["--database", "sqlite:///{broken}/records.sqlite"], "is not: file is not a database"),
        (["--storage", "ftpx://host/x"], "the storage must be a folder or a URL that fsspec knows"),
        (["--storage", "/proc/none"], "the storage must take files, and /proc/none does not"),
        (["--api-replicas", "2"], "--api-replicas must go with --ray-address, got 2"),
        (["--ray-address", "auto"], "must name what all of its machines reach, and --database is"),
        (
            [
                "--ray-address",
                "ray://x:1",
                "--database",
                "sqlite:///{broken}/x",
                "--storage",
                "{new}",
            ],
            "the address of a Ray cluster must be auto, or HOST:PORT of its head, got ray://x:1",
        ),
        (["--port", "{port}"], "must be able to listen on 127.0.0.1 port {port}"),
        (["--folder", "{folder}"], "must be of one server alone, and another has {folder}"),
        (["--min-replicas", "2", "--max-replicas", "1"], "--max-replicas must be from"),
        (["--gpus-per-engine", "3"], "--gpus-per-engine must divide the transformer's key/value"),
        (
            ["--gpus-per-engine", "2", "--vae", "tensorrt", "--turbo-vae", "x"],
            "--vae tensorrt must go with --gpus-per-engine 1, got 2",
        ),
        (["--device", "tpu"], "--device must be cpu, or cuda"),
        (["--warmup", "480x272"], "--warmup must be WIDTHxHEIGHTxSECONDS"),
        (["--warmup", "1x1x1"], "width must be a whole number from 32"),
        (["--variant", "540p_sr"], "variant must be one of"),
        (["--keep-hours", "-1"], "--keep-hours must be 0 to 1000000"),
        (["--max-seconds", "61"], "--max-seconds must be 0.2 to 60"),
        (["--crf", "52"], "crf must be a whole number from 0 to 51 for .mp4, got 52"),
        (["--timeout-seconds", "0"], "--timeout-seconds must be above 0"),
        (["--token-file", "nowhere"], "--token-file must be a text file"),
        (["--token-file", "{empty}"], "must be printable ASCII without spaces, and not empty"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments(server, tiny_dir, tmp_path, monkeypatch, arguments, says):
    monkeypatch.setattr(serve, "WAIT_S", 0.1)
    (tmp_path / "empty").write_text("\n")
    known = {
        "port": server.url.rpartition(":")[2],
        "folder": server.folder(),
        "broken": tmp_path / "broken",
        "new": tmp_path / "new",
        "empty": tmp_path / "empty",
        "damaged": shutil.copytree(tiny_dir, tmp_path / "damaged"),
    }
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "records.sqlite").write_text("no database at all " * 100)
    os.truncate(tmp_path / "damaged" / "distill" / "model.safetensors", 1000)
    command = ["serve", "--model", tiny_dir, "--device", "cpu", "--folder", tmp_path / "videos"]
    command += [argument.format(**known) for argument in arguments]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and says.format(**known) in result.stderr


@pytest.mark.parametrize(
    ("gpus", "each", "most", "expected"),
    [(4, 2, None, 2), (8, 4, None, 2), (5, 2, None, 2), (4, 4, 1, 1), (4, 1, None, 4)],
)
def test_engines_share_out_the_gpus(tmp_path, gpus, each, most, expected):
    from magihuman.runtime.serving.app import Engines, application
    from magihuman.runtime.serving.settings import Settings

    options = serve.ServeOptions(model="nano", context_parallel=each, max_replicas=most)
    assert serve._max_replicas(options, gpus) == expected
    engines = Engines({}, (), each, 1, expected)
    deployed = application(Settings(tmp_path, "tiny"), engines, ("127.0.0.1", 1))
    engine = deployed._bound_deployment.init_args[0]._bound_deployment
    assert engine.ray_actor_options["num_gpus"] == each


@pytest.mark.parametrize(
    ("gpus", "each", "most", "says"),
    [
        (4, 2, 3, "engines that the GPUs have room for by --gpus-per-engine, 2, 2, got 3"),
        (2, 4, None, "--gpus-per-engine must be at most the number of GPUs, 2, got 4"),
        (2, 1, 3, "engines that the GPUs have room for, 2, got 3"),
    ],
)
def test_engines_for_which_there_are_too_few_gpus(gpus, each, most, says):
    options = serve.ServeOptions(model="nano", context_parallel=each, max_replicas=most)
    with pytest.raises(InvalidRequestError, match=says):
        serve._max_replicas(options, gpus)


def test_engines_that_are_too_many_may_end_what_they_make(tmp_path):
    """Serve stops the newest, busy or not, once few have been enough for ten minutes."""
    from magihuman.runtime.serving.app import Engines, application
    from magihuman.runtime.serving.settings import Settings

    engines = Engines({}, (), False, 1, 2)
    deployed = application(Settings(tmp_path, "tiny"), engines, ("127.0.0.1", 1))
    engine = deployed._bound_deployment.init_args[0]._bound_deployment
    assert engine._deployment_config.graceful_shutdown_timeout_s >= 3600


def test_told_to_stop_it_lets_what_runs_end_and_keeps_the_rest(server):
    running = server.create({**SMALL, "num_inference_steps": "600"})
    beside = server.create(LONG)
    server.when(running, "in_progress")
    server.when(beside, "in_progress")
    waiting = server.create()
    server.delete(beside)
    server.when(waiting, "in_progress")
    last = [server.create({**SMALL, "seed": str(seed)}) for seed in range(2)]
    own = server.private_folder()
    server.process.terminate()
    refused = until(lambda: (answer := server.post()).status_code == 503 and answer)
    assert refused.json()["error"]["code"] == "draining" and "retry-after" in refused.headers
    assert server.process.wait(PATIENCE_S) == 0
    assert not own.exists()
    jobs = kept(server.folder())
    assert jobs[running].status == jobs[waiting].status == "completed"
    assert [(jobs[name].status, jobs[name].attempts) for name in last] == [("queued", 0)] * 2
