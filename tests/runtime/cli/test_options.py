from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from magihuman.runtime.cli.options import PrecisionOptions, takes_options


@dataclass(frozen=True, kw_only=True)
class Shared:
    size: Annotated[int, typer.Option(help="Of it.")] = 3
    name: Annotated[str | None, typer.Option(help="Of both.")] = None


@dataclass(frozen=True, kw_only=True)
class Given(Shared):
    place: Annotated[str, typer.Argument(help="Where.")]
    name: Annotated[str, typer.Option("--name", "-n", help="Its own.")] = "it"


seen: list[Given] = []


@takes_options
def command(given: Given) -> None:
    """Do it."""
    seen.append(given)


def run(*arguments: str):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, arguments)


def test_a_field_is_a_parameter_and_those_of_the_class_itself_come_first():
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["place", "name", "size"]
    defaults = [parameter.default for parameter in parameters.values()]
    assert defaults == [inspect.Parameter.empty, "it", 3]
    assert (command.__name__, command.__doc__) == ("command", "Do it.")


def test_the_command_is_given_an_instance():
    seen.clear()
    assert run("here", "-n", "it", "--size", "4").exit_code == 0
    assert run("there").exit_code == 0
    assert seen == [Given(place="here", name="it", size=4), Given(place="there", name="it", size=3)]
    with pytest.raises(FrozenInstanceError):
        seen[0].size = 5  # type: ignore[misc]


@pytest.mark.parametrize("arguments", [(), ("-n", "it"), ("here", "-n"), ("here", "--size", "a")])
def test_what_is_missing_or_of_another_type_is_refused(arguments):
    seen.clear()
    assert run(*arguments).exit_code == 2
    assert not seen


def test_help_is_that_of_the_field_given_last():
    text = run("--help").stdout
    assert "Its own." in text and "Of it." in text and "Of both." not in text


@pytest.mark.parametrize(
    ("text", "names"),
    [(None, None), ("none", "none"), ("modality", "modality"), ("a,b.*", ["a", "b.*"])],
)
def test_what_stays_bf16_is_a_word_or_names(text, names):
    assert PrecisionOptions(keep_bf16=text).kept_names == names
