from __future__ import annotations

import json
import os

import pytest
from PIL import Image
from prompt_texts import body, stub
from typer.testing import CliRunner

from magihuman import runtime
from magihuman.runtime.cli.main import app

GOOD = str(runtime.Prompt(body("Hello!"), [runtime.Line("Woman", "English", "Hello!")]))
KEY = "sk-secret-0123456789"


def run(*arguments: object):
    result = CliRunner().invoke(app, ["prompt", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_good_prompt_and_its_tokens(tiny_dir):
    result = run(GOOD, "-m", tiny_dir, "--seconds", 3, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    said = json.loads(result.stdout)
    assert (said["text"], said["is_in_form"], said["is_rewritten"]) == (GOOD, True, False)
    assert said["languages"] == ["English"] and said["seconds"] == 3
    tokens = said["tokens"]  # the tiny tokenizer has one for each byte
    assert not tokens["is_estimate"] and tokens["used"] >= len(GOOD)
    assert tokens["left"] == 640 - tokens["used"] < 0
    assert [warning["code"] for warning in said["warnings"]] == ["tokens-over"]


def test_tokens_are_estimated_without_a_model():
    result = run("A woman smiles.")
    assert result.exit_code == 0
    assert "about 6, about 634 left" in result.stdout and "not the model's" in result.stdout
    assert result.stderr.startswith("warning: the text has neither")


def test_the_length_that_suits_the_model():
    words = "hello " * 12
    assert "words-too-many" in run(f'She says "{words}"', "-m", "nano", "--json").stdout
    assert "words-too-many" not in run(f'She says "{words}"', "--json").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "not blank"),
        (["a", "--seconds", "0.1"], "--seconds must be"),
        (["a", "--seconds", "nan"], "--seconds must be"),
        (["a", "-m", "/nowhere"], "lacks config.json"),
        (["a", "--image", "x.png"], "both or neither"),
        (["a", "--enhance", "x"], "address such as"),
        (["a", "--enhance", "http://127.0.0.1", "--enhance-seconds", "0"], "timeout_s must be"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_enhance_prints_the_new_prompt_alone_on_stdout(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGIHUMAN_ENHANCE_KEY", KEY)
    Image.new("RGB", (8, 8)).save(tmp_path / "face.png")
    with stub(GOOD) as endpoint:
        options = ("--enhance", endpoint.url, "--enhance-model", "m")
        result = run('She says "hello!"', *options, "--image", tmp_path / "face.png")
    assert result.exit_code == 0 and result.stdout == GOOD
    assert "the model's" in result.stderr
    (asked,) = endpoint.asked
    assert asked.body["model"] == "m" and asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.body["messages"][1]["content"][1]["type"] == "image_url"
    assert KEY not in result.output and "MAGIHUMAN_ENHANCE_KEY" not in os.environ


def test_where_enhancing_fails_the_original_is_printed_with_a_warning(monkeypatch):
    monkeypatch.setenv("MAGIHUMAN_ENHANCE_KEY", KEY)
    with stub((500, {}, KEY.encode())) as endpoint:
        result = run("She nods.", "--enhance", endpoint.url)
        as_json = run("She nods.", "--enhance", endpoint.url, "--json")
    assert result.exit_code == 0 and result.stdout == "She nods.\n"
    assert "warning: the prompt was not rewritten: it answered 500" in result.stderr
    said = json.loads(as_json.stdout)
    assert (said["text"], said["is_rewritten"]) == ("She nods.", False)
    assert said["warnings"][0]["code"] == "enhance-failed"
    assert KEY not in result.output + as_json.output


def test_nothing_is_sent_unless_asked(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.create_connection", refuse)
    assert run("She nods.").exit_code == 0
