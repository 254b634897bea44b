"""Prompts rewritten by an endpoint on loopback, which fails in every way."""

from __future__ import annotations

import base64
import io
import json
import socket
import time

import pytest
from PIL import Image
from prompt_texts import answer, body, stub, within

from magihuman.runtime import InvalidRequestError, Line, Prompt, enhance
from magihuman.runtime.prompts import Endpoint, Enhancer
from magihuman.runtime.prompts.chat import ANSWER_BYTES

ORIGINAL = 'A woman says "good morning"'
GOOD = str(Prompt(body("Good morning!"), [Line("Woman", "English", "Good morning!")]))
PLAIN = "A woman smiles and says good morning."
SHORT = str(Prompt('She says "good morning"', [Line("Woman", "English", "good morning")]))
LOST = str(Prompt(body("good evening"), [Line("Woman", "English", "good evening")]))
LONG = str(Prompt("word " * 900, [Line("Woman", "English", "good morning")]))
KEY = "sk-secret-0123456789"


def kept(made, reason: str) -> None:
    """That the original is, and why; the key is told nobody."""
    assert made.text == ORIGINAL and not made.is_rewritten
    (warning,) = made.warnings
    assert warning.code == "enhance-failed" and reason in warning.sentence, warning
    assert KEY not in repr(made)


def test_a_prompt_is_rewritten():
    with stub(GOOD) as endpoint:
        made = enhance(ORIGINAL, endpoint.url, model="m", key=KEY, seconds=4)
    assert made.text == GOOD and made.is_rewritten and made.warnings == ()
    (asked,) = endpoint.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["Authorization"] == f"Bearer {KEY}" and asked.body["model"] == "m"
    system, user = asked.body["messages"]
    assert system["role"] == "system" and "Background Sound:" in system["content"]
    assert ORIGINAL in user["content"] and "4 seconds" in user["content"]


def test_the_whole_address_may_be_given_and_no_key():
    with stub(GOOD) as endpoint:
        enhance(ORIGINAL, f"{endpoint.url}/chat/completions?v=1")
    assert endpoint.asked[0].path == "/v1/chat/completions?v=1"
    assert "Authorization" not in endpoint.asked[0].headers


def test_an_image_is_shown_small():
    with stub(GOOD) as endpoint:
        enhance(ORIGINAL, endpoint.url, image=Image.new("RGB", (3000, 1000), "red"))
    words, picture = endpoint.asked[0].body["messages"][1]["content"]
    assert ORIGINAL in words["text"]
    head, content = picture["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (768, 256)


def test_spacing_is_put_right_and_quotation_marks_too():
    loose = GOOD.replace("Good morning!", "早上好").replace('"早', "“早").replace('好"', "好”")
    with stub(loose.replace("English", "Mandarin")) as endpoint:
        made = enhance("Someone says “早上好”", endpoint.url)
    assert made.is_rewritten and '<Woman, Mandarin>: "早 上 好"' in made.text


@pytest.mark.parametrize("wrong", [PLAIN, LOST, LONG], ids=["no form", "lost words", "too long"])
def test_what_is_not_in_the_form_is_asked_for_once_more(wrong):
    with stub(wrong, GOOD) as endpoint:
        made = enhance(ORIGINAL, endpoint.url)
    assert made.text == GOOD and made.is_rewritten
    assert len(endpoint.asked) == 2
    roles = [message["role"] for message in endpoint.asked[1].body["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    with stub(wrong) as endpoint:
        kept(enhance(ORIGINAL, endpoint.url, key=KEY), "not in the form")
    assert len(endpoint.asked) == 2


def test_what_is_in_the_form_and_short_is_taken_where_the_second_is_no_better():
    with stub(SHORT, PLAIN) as endpoint:
        made = enhance(ORIGINAL, endpoint.url)
    assert made.text == SHORT and made.is_rewritten and len(endpoint.asked) == 2
    assert "body-short" in [warning.code for warning in made.warnings]


HUGE = answer("x" * (2 * ANSWER_BYTES))
FAILURES = {
    "500": ((500, {}, b"broken"), "answered 500", 2),
    "429": ((429, {}, b"slow down"), "answered 429", 2),
    "401": ((401, {}, KEY.encode()), "answered 401", 1),
    "404": ((404, {}, b""), "answered 404", 1),
    "no JSON": ((200, {}, b"<html>"), "not JSON", 2),
    "deep JSON": ((200, {}, b"[" * 100_000), "not JSON", 2),
    "other JSON": ((200, {}, b'{"choices": []}'), "not JSON", 2),
    "no UTF-8": ((200, {}, b"\xff\xfe\x00"), "not JSON", 2),
    "no text": ((200, {}, json.dumps({"choices": [{"message": {"content": None}}]}).encode()),
                "no text", 2),
    "blank": ((200, {}, answer(" \n")), "no text", 2),
    "empty": ((200, {}, b""), "not JSON", 2),
    "huge": ((200, {}, HUGE), "more than", 1),
    "long": ((200, {}, answer("x" * 30_000)), "more than", 2),
    "the key": ((200, {}, answer(f"{KEY} {GOOD}")), "repeats the key", 1),
    "cut": ((200, {"Content-Length": "1000"}, b"{"), "not JSON", 2),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_keeps_the_original(failure):
    reply, reason, times = FAILURES[failure]
    with stub(reply) as endpoint:
        kept(enhance(ORIGINAL, endpoint.url, key=KEY), reason)
    assert len(endpoint.asked) == times


def test_a_redirect_is_not_followed():
    with stub(GOOD) as other, stub((307, {"Location": f"{other.url}/x"}, b"")) as endpoint:
        kept(enhance(ORIGINAL, endpoint.url, key=KEY), "redirects are not followed")
    assert other.asked == []


def test_no_proxy_is_asked(monkeypatch):
    with stub(GOOD) as proxy, stub(GOOD) as endpoint:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert enhance(ORIGINAL, endpoint.url).is_rewritten
    assert proxy.asked == []


def test_who_says_nothing_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start_s = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        kept(enhance(ORIGINAL, url, key=KEY, timeout_s=0.3), "in time")
    assert within(20, start_s)


def test_who_says_a_byte_at_a_time_is_not_waited_for():
    with stub(GOOD, drip=True) as endpoint:
        start_s = time.monotonic()
        kept(enhance(ORIGINAL, endpoint.url, timeout_s=0.5), "in time")
        assert within(20, start_s)
    assert len(endpoint.asked) == 1


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    made = enhance(ORIGINAL, f"http://127.0.0.1:{port}", key=KEY)
    assert made.text == ORIGINAL and made.warnings[0].code == "enhance-failed"


def test_no_tls_where_there_is_none():
    with stub(GOOD) as endpoint:
        made = enhance(ORIGINAL, endpoint.url.replace("http:", "https:"), key=KEY, timeout_s=20)
    assert made.text == ORIGINAL and endpoint.asked == []


def test_a_prompt_of_any_length_is_not_sent():
    with stub(GOOD) as endpoint:
        made = enhance("a" * 20_001, endpoint.url)
    assert not made.is_rewritten and endpoint.asked == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "ftp://127.0.0.1"}, "address such as"),
        ({"url": "127.0.0.1:80"}, "address such as"),
        ({"url": "http://"}, "address such as"),
        ({"url": "http://127.0.0.1:99999"}, "address such as"),
        ({"url": "http://[::1"}, "address such as"),
        ({"url": "http://127.0.0.1/a b"}, "address such as"),
        ({"url": None}, "address such as"),
        ({"url": f"http://me:{KEY}@127.0.0.1"}, "without a user"),
        ({"key": f"{KEY}\r\nHost: x"}, "printable ASCII"),
        ({"key": ""}, "printable ASCII"),
        ({"model": ""}, "model's name"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"timeout_s": float("nan")}, "timeout_s must be"),
        ({"timeout_s": 601}, "timeout_s must be"),
        ({"prompt": " "}, "not blank"),
        ({"image": "/nowhere.png"}, "nowhere"),
    ],
)
def test_wrong_arguments_are_refused_without_the_key(wrong, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        enhance(**{"prompt": ORIGINAL, "url": "http://127.0.0.1:1", **wrong})
    assert KEY not in str(caught.value)


def test_the_key_is_in_no_repr():
    assert KEY not in repr(Enhancer(Endpoint("http://127.0.0.1", key=KEY)))
