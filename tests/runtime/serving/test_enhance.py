"""The field `enhance`: prompts rewritten by the endpoint of the server's operator."""

from __future__ import annotations

import dataclasses

import pytest
from prompt_texts import body, stub
from video_client import SMALL, TOKEN_SHA256, kept

from magihuman.runtime import Line, Prompt
from magihuman.runtime.cli.serve import ServeOptions, _settings
from magihuman.runtime.prompts import Endpoint, Enhancer
from magihuman.runtime.serving.settings import Settings

GOOD = str(Prompt(body("Hello!"), [Line("Woman", "English", "Hello!")]))
ORIGINAL = 'She says "hello!"'
KEY = "sk-secret-0123456789"


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256)


def asked_with(settings, endpoint) -> Settings:
    return dataclasses.replace(settings, enhancer=Enhancer(Endpoint(endpoint.url, key=KEY), 5))


def test_a_server_without_an_endpoint_refuses(local):
    for answer in (
        local.post({**SMALL, "prompt": ORIGINAL, "enhance": "true"}),
        local.http.post("/v1/videos", json={"prompt": ORIGINAL, "enhance": True}),
        local.http.post(
            "/v1/videos", json={"prompt": ORIGINAL, "extra_params": {"enhance": "True"}}
        ),
    ):
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert error["param"] == "enhance" and "--enhance" in error["message"]
    assert local.post({**SMALL, "prompt": ORIGINAL, "enhance": "false"}).status_code == 200
    assert 'id="enhance-row" class="check" hidden' in local.http.get("/").text


@pytest.mark.parametrize("value", ["perhaps", 1, "", []])
def test_what_is_neither_true_nor_false_is_refused(local, value):
    answer = local.http.post("/v1/videos", json={"prompt": ORIGINAL, "enhance": value})
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["param"] == "enhance"
    assert "enhance must be true or false, got" in error["message"]


def test_the_rewritten_prompt_is_made_with_the_image_shown(settings, replica, serve_here, face):
    with stub(GOOD) as endpoint, serve_here(asked_with(settings, endpoint), replica) as local:
        with face.open("rb") as image:
            asked = {**SMALL, "prompt": ORIGINAL, "enhance": "true"}
            answer = local.post(asked, input_reference=image)
        video = answer.json()
        assert answer.status_code == 200 and video["prompt"] == GOOD
        done = local.when(video["id"], "completed")
        assert done["prompt"] == GOOD and "rewritten" not in str(done["warnings"])
        job = kept(settings.folder)[video["id"]]
        assert job.prompt == GOOD and KEY not in str(job)
        assert 'id="enhance-row" class="check" >' in local.http.get("/").text
    (asked,) = endpoint.asked
    words, picture = asked.body["messages"][1]["content"]
    assert ORIGINAL in words["text"] and picture["image_url"]["url"].startswith("data:image/jpeg")
    assert asked.headers["Authorization"] == f"Bearer {KEY}"


def test_where_it_fails_the_original_is_made_with_a_warning(settings, replica, serve_here):
    with (
        stub((500, {}, KEY.encode())) as endpoint,
        serve_here(asked_with(settings, endpoint), replica) as local,
    ):
        video = local.post({**SMALL, "prompt": ORIGINAL, "enhance": "true"}).json()
        assert video["prompt"] == ORIGINAL
        done = local.when(video["id"], "completed")
        assert any("was not rewritten: it answered 500" in text for text in done["warnings"])
        assert KEY not in str(done)


def test_nothing_is_sent_for_who_does_not_ask(settings, replica, serve_here):
    with stub(GOOD) as endpoint, serve_here(asked_with(settings, endpoint), replica) as local:
        video = local.post({**SMALL, "prompt": ORIGINAL}).json()
        assert local.when(video["id"], "completed")["prompt"] == ORIGINAL
    assert endpoint.asked == []


def test_the_key_of_the_command_is_taken_out_of_the_environment(monkeypatch):
    from magihuman.runtime.cli.prompt import enhancer_of

    monkeypatch.setenv("MAGIHUMAN_ENHANCE_KEY", KEY)
    options = ServeOptions(model="nano", enhance="http://127.0.0.1:8080/v1", enhance_model="m")
    made = enhancer_of(options)
    assert made == Enhancer(Endpoint("http://127.0.0.1:8080/v1", "m", KEY))
    settings = _settings(options, None, 2**30, 64, made)
    assert settings.enhancer is made and KEY not in repr(settings)
    assert enhancer_of(options).endpoint.key is None  # it is gone
