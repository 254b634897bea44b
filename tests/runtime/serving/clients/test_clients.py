from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from video_client import PATIENCE_S, TOKEN, until

from magihuman.runtime.weights import TEXT_FOLDER, model_folder

PROMPT = "A woman with long black hair in a yellow shirt on a pink background says: ho ba hu"
FAST = {"size": "64x64", "seconds": "0.6", "num_inference_steps": 2}
# Of files that are here: its own would come from the network.
TOKENIZER = str(model_folder("nano") / TEXT_FOLDER)
KEY = "sk-" + TOKEN.encode().hex()  # of the proxy's own
HEADERS = ["-H", f"Authorization: Bearer {TOKEN}"]


def run(command: list[str], **options) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=4 * PATIENCE_S, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def curl(program, *arguments: str) -> bytes:
    command = [program("curl"), "-sS", "--fail-with-body", *HEADERS, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- curl, as vLLM-Omni's and SGLang's pages have it, but for smaller clips -----------------------


def test_curls_of_vllm_omni(nano, program, picture, sound, tmp_path):
    fields = {"prompt": PROMPT, "width": 64, "height": 64, "num_frames": 15, "fps": 16}
    fields |= {"num_inference_steps": 2, "guidance_scale": 1.0, "flow_shift": 5.0, "seed": 42}
    fields |= {"user": "me", "extra_params": '{"boundary_ratio": 0.875}'}
    form = [part for name, value in fields.items() for part in ("-F", f"{name}={value}")]
    form += ["-F", f"input_reference=@{picture}", "-F", f"audio_reference=@{sound}"]
    video = json.loads(curl(program, f"{nano.url}/v1/videos", *form))
    assert video["object"] == "video" and video["size"] == "64x64"
    done = nano.when(video["id"], "completed")
    assert any("flow_shift" in note and "boundary_ratio" in note for note in done["warnings"])
    output = tmp_path / "output.mp4"
    curl(program, "-L", f"{nano.url}/v1/videos/{video['id']}/content", "-o", str(output))
    assert output.read_bytes()[4:8] == b"ftyp"
    assert video["id"] in curl(program, f"{nano.url}/v1/videos").decode()
    headers = tmp_path / "headers"
    synchronous = curl(program, "-D", str(headers), f"{nano.url}/v1/videos/sync", *form)
    assert synchronous[4:8] == b"ftyp"
    told = headers.read_text().lower()
    for name in ("x-request-id", "x-model", "x-inference-time-s", "x-stage-durations"):
        assert f"{name}: " in told
    curl(program, "-X", "DELETE", f"{nano.url}/v1/videos/{video['id']}")


def test_curls_of_vllm_omni_are_taken_as_they_are(nano, program):
    """At a size that the model has not learnt, and a length that takes minutes here."""
    fields = {"prompt": "A cinematic tracking shot of a mountain lake at sunrise"}
    fields |= {"width": 1280, "height": 720, "num_frames": 80, "fps": 16}
    fields |= {"num_inference_steps": 40}
    form = [part for name, value in fields.items() for part in ("-F", f"{name}={value}")]
    video = json.loads(curl(program, f"{nano.url}/v1/videos", *form))
    assert (video["size"], video["seconds"]) == ("1280x720", "3.2")
    nano.delete(video["id"])


def test_curls_of_sglang(nano, program):
    body = {"prompt": PROMPT, "size": "64x64", "seconds": 1, "num_inference_steps": 2}
    kind = ["-H", "Content-Type: application/json"]
    answer = curl(program, "-X", "POST", f"{nano.url}/v1/videos", *kind, "-d", json.dumps(body))
    name = json.loads(answer)["id"]

    def is_completed() -> bool:  # as their page does
        page = json.loads(curl(program, "-X", "GET", f"{nano.url}/v1/videos"))
        item = next(video for video in page["data"] if video["id"] == name)
        return item["status"] == "completed"

    until(is_completed)
    assert curl(program, "-L", f"{nano.url}/v1/videos/{name}/content")[4:8] == b"ftyp"
    assert json.loads(curl(program, f"{nano.url}/models"))["model_path"] == "nano"
    nano.delete(name)


# -- SDKs -----------------------------------------------------------------------------------------


def test_openai_for_python(nano, picture, tmp_path):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{nano.url}/v1", api_key=TOKEN, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["nano"]
        video = client.videos.create_and_poll(
            prompt=PROMPT,
            model="sora-2",
            size="64x64",
            seconds="4",
            input_reference=picture,
            extra_body={"num_inference_steps": 1},
            poll_interval_ms=100,
        )
        assert video.status == "completed" and video.seconds == "4"
        for variant, start in (("video", None), ("thumbnail", b"RIFF"), ("spritesheet", b"RIFF")):
            path = tmp_path / variant
            client.videos.download_content(video.id, variant=variant).write_to_file(path)
            assert start is None or path.read_bytes()[:4] == start
        assert next(iter(client.videos.list(limit=1, order="desc"))).id == video.id
        assert client.videos.retrieve(video.id).id == video.id
        assert client.videos.delete(video.id).deleted


NODE = """
const OpenAI = require("openai");
const fs = require("fs");
(async () => {
  const [url, key, picture] = process.argv.slice(2);
  const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
  let video = await client.videos.create(
    { prompt: "hi", model: "nano", size: "64x64", seconds: "0.6", num_inference_steps: 2,
      input_reference: fs.createReadStream(picture) });
  while (video.status === "queued" || video.status === "in_progress") {
    await new Promise((done) => setTimeout(done, 100));
    video = await client.videos.retrieve(video.id);
  }
  const found = [];
  for await (const each of client.videos.list({ limit: 1 })) found.push(each.id);
  const sizes = [];
  for (const variant of ["video", "thumbnail"]) {
    const answer = await client.videos.downloadContent(video.id, { variant });
    sizes.push((await answer.arrayBuffer()).byteLength);
  }
  const again = await client.videos.retrieve(video.id);
  const gone = await client.videos.delete(video.id);
  console.log(JSON.stringify({ status: again.status, found, id: video.id, sizes, gone }));
})().catch((error) => { console.error(error); process.exit(1); });
"""


def test_openai_for_node(nano, clients, program, picture, tmp_path):
    if not (clients / "node_modules" / "openai").is_dir():
        pytest.skip("openai is not installed for node")
    script = tmp_path / "script.js"
    script.write_text(NODE)
    variables = {**os.environ, "NODE_PATH": str(clients / "node_modules")}
    command = [program("node"), str(script), f"{nano.url}/v1", TOKEN, str(picture)]
    told = json.loads(run(command, env=variables))
    assert told["status"] == "completed" and told["id"] in told["found"]
    assert min(told["sizes"]) > 100 and told["gone"]["deleted"] is True


# -- a proxy in front, and a program that loads the server ----------------------------------------


@contextmanager
def litellm(program, nano, folder: Path, port: int):
    """LiteLLM's proxy, ready, with the server as a model of OpenAI's."""
    config = folder / "config.yaml"
    model = {"model": "openai/nano", "api_base": f"{nano.url}/v1", "api_key": TOKEN}
    models = [{"model_name": "nano", "litellm_params": model}]
    config.write_text(json.dumps({"model_list": models}))  # which is YAML, too
    variables = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    variables["LITELLM_MASTER_KEY"] = KEY
    command = [program("litellm"), "--config", str(config), "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1"], stdout=log, stderr=log, env=variables
        )
    try:
        bearer = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=bearer, timeout=300) as http:

            def is_ready() -> bool:
                assert process.poll() is None, (folder / "log").read_text()
                try:
                    return http.get("/health/liveliness").status_code == 200
                except httpx.TransportError:
                    return False

            until(is_ready)
            yield http
    finally:
        process.kill()
        process.wait(300)


def test_litellm_in_front(nano, program, tmp_path):
    port = int(nano.another(tmp_path).url.rpartition(":")[2])
    with litellm(program, nano, tmp_path, port) as http:
        asked = {"model": "nano", "prompt": PROMPT, "seconds": "0.6", "size": "64x64"}
        answer = http.post("/v1/videos", json=asked)
        assert answer.status_code == 200, answer.text
        name = answer.json()["id"]

        def is_completed() -> bool:
            video = http.get(f"/v1/videos/{name}")
            assert video.status_code == 200, video.text
            assert video.json()["status"] != "failed", video.text
            return video.json()["status"] == "completed"

        until(is_completed)
        content = http.get(f"/v1/videos/{name}/content")
        assert content.status_code == 200 and content.content[4:8] == b"ftyp"


def test_aiperf_with_20_requests(nano, program, tmp_path):
    inputs = tmp_path / "prompts.jsonl"
    inputs.write_text("".join(json.dumps({"text": f"{PROMPT} {i}"}) + "\n" for i in range(20)))
    command = [program("aiperf"), "profile", "--model", "nano", "--url", nano.url]
    command += ["--endpoint-type", "video_generation", "--tokenizer", TOKENIZER]
    command += ["--input-file", str(inputs), "--custom-dataset-type", "single_turn"]
    command += ["--request-count", "20", "--concurrency", "4", "--api-key", TOKEN]
    command += ["--download-video-content", "--ui", "none"]
    command += ["--output-artifact-dir", str(tmp_path / "out")]
    for name, value in FAST.items():
        command += ["--extra-inputs", f"{name}:{value}"]
    run(command, cwd=tmp_path)
    (summary,) = (tmp_path / "out").rglob("profile_export_aiperf.json")
    told = json.loads(summary.read_text())
    assert told["request_count"]["avg"] == 20 and not told.get("error_summary")
    states = [video["status"] for video in nano.http.get("/v1/videos?limit=100").json()["data"]]
    assert states.count("completed") >= 20 and set(states) == {"completed"}
