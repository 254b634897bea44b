"""Every option of the server by its environment."""

from __future__ import annotations

import dataclasses

import pytest
from typer.main import get_command

from magihuman.runtime.cli import main, serve

COMMAND = get_command(main.app).commands["serve"]
OPTIONS = {
    parameter.name: parameter
    for parameter in COMMAND.params
    if parameter.param_type_name == "option" and parameter.name != "help"
}
VALUES = {  # of another kind than text
    "port": ("8123", 8123),
    "warmup": ("480x256x5 64x64x1", ["480x256x5", "64x64x1"]),
    "ray_logs": ("1", True),
    "keep_hours": ("2.5", 2.5),
    "queue_limit": ("7", 7),
}


def parsed(arguments: list[str]) -> dict[str, object]:
    return COMMAND.make_context("serve", arguments).params


def test_every_option_has_a_variable():
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(serve.ServeOptions)}
    for option in OPTIONS.values():
        names = [name[2:].replace("-", "_").upper() for name in option.opts if name[:2] == "--"]
        variables = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)
        assert variables == [f"MAGIHUMAN_{name}" for name in names]


@pytest.mark.parametrize("name", VALUES)
def test_a_variable_stands_for_its_option(monkeypatch, name):
    text, value = VALUES[name]
    monkeypatch.setenv("MAGIHUMAN_MODEL", "nano")
    assert parsed([])[name] != value
    monkeypatch.setenv(f"MAGIHUMAN_{name.upper()}", text)
    found = parsed([])[name]
    assert (list(found) if isinstance(found, (list, tuple)) else found) == value


@pytest.mark.parametrize("name", ["GPUS_PER_ENGINE", "CONTEXT_PARALLEL"])
def test_an_option_of_two_names_has_two_variables(monkeypatch, name):
    monkeypatch.setenv(f"MAGIHUMAN_{name}", "2")
    assert parsed(["--model", "nano"])["context_parallel"] == 2


def test_the_command_line_goes_before(monkeypatch):
    monkeypatch.setenv("MAGIHUMAN_PORT", "8123")
    assert parsed(["--model", "nano", "--port", "9000"])["port"] == 9000


def test_an_empty_variable_is_none(monkeypatch):
    """As a compose file has it for what is not set."""
    monkeypatch.setenv("MAGIHUMAN_PORT", "")
    monkeypatch.setenv("MAGIHUMAN_DEVICE", "")
    values = parsed(["--model", "nano"])
    assert values["port"] == 8000 and not values["device"]


def test_other_commands_have_no_variables_of_the_server(monkeypatch):
    monkeypatch.setenv("MAGIHUMAN_DEVICE", "tpu")
    generate = get_command(main.app).commands["generate"]
    assert generate.make_context("generate", ["-p", "hi", "-o", "a.mp4"]).params["device"] is None
