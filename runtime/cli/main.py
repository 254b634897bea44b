"""The `magihuman` command. Exit codes: 0, 2 for bad input, 128 and its number after SIGTERM or
SIGHUP, 1 for anything else.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from magihuman.runtime.cli.convert import convert, tiny
from magihuman.runtime.cli.describe import doctor, explain, inspect
from magihuman.runtime.cli.evaluate import evaluate
from magihuman.runtime.cli.generate import generate
from magihuman.runtime.cli.prompt import prompt
from magihuman.runtime.cli.score import score
from magihuman.runtime.cli.serve import serve
from magihuman.runtime.cli.terminal.completion import completion
from magihuman.runtime.cli.terminal.ending import orderly
from magihuman.runtime.cli.verify import verify
from magihuman.runtime.files import version

app = typer.Typer(
    help="Run daVinci-MagiHuman: a prompt in, a video of a person speaking out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # brackets are no markup: 'magihuman[serve]'
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    serve, verify, evaluate, score, generate, prompt, convert, tiny, inspect, doctor, explain,
    completion,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"magihuman {version()}")
        raise typer.Exit


@app.callback()
def root(
    is_asked: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run the command of this process's arguments; warnings go to stderr, a line each.

    What the terminal's encoding lacks, as in names of files, is written as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    with orderly():
        app()
