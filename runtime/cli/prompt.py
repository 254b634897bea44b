"""`magihuman prompt`, which looks at a prompt before a clip is made.

Exit codes as for all commands: what a prompt lacks is told, and is no failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from magihuman import runtime
from magihuman.runtime.cli.options import JsonOptions, takes_options
from magihuman.runtime.cli.terminal.console import err, out, user_errors
from magihuman.runtime.prompts import TIMEOUT_S, Endpoint, Enhancer, PromptReport, picture
from magihuman.runtime.request import MAX_SECONDS, MIN_SECONDS, STANDARD_SIZE

KEY_VARIABLE = "MAGIHUMAN_ENHANCE_KEY"


@dataclass(frozen=True, kw_only=True)
class EnhanceOptions:
    """Who rewrites prompts, where somebody does."""

    enhance: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="OpenAI-compatible chat endpoint that rewrites the prompt into the model's form,"
            f" as in http://127.0.0.1:8080/v1; its key is read from {KEY_VARIABLE}. Nothing is sent"
            " anywhere without this.",
        ),
    ] = None
    enhance_model: Annotated[
        str, typer.Option(help="The name by which that endpoint knows its language model.")
    ] = "default"
    enhance_seconds: Annotated[
        float, typer.Option(help="Longest wait for the rewritten prompt.")
    ] = TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class PromptOptions(EnhanceOptions, JsonOptions):
    """A prompt, and what it is for."""

    text: Annotated[str, typer.Argument(metavar="PROMPT", help="Any text.")]
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="MAGIHUMAN_MODEL",
            help="Model directory, or nano, whose tokenizer counts the tokens; else they are"
            " estimated.",
        ),
    ] = None
    seconds: Annotated[
        float | None,
        typer.Option(help="Length of the clip, 0.2 to 60; by default 5, or as suits the model."),
    ] = None
    image: Annotated[
        Path | None, typer.Option(help="Reference image, shown to the endpoint of --enhance.")
    ] = None


@takes_options
def prompt(options: PromptOptions) -> None:
    """Say what a prompt lacks: its form, length, languages, tokens, and whether the words fit.

    With --enhance, have it rewritten, and print the new one.
    """
    with user_errors():
        _check(options)
        count, seconds = _counter(options.model), _seconds(options)
        report = runtime.check_prompt(options.text, seconds=seconds, count=count)
        made = _enhanced(options, seconds)
        if made is not None:
            report = runtime.check_prompt(made.text, seconds=seconds, count=count)
        failures = () if made is None or made.is_rewritten else made.warnings
        warnings = (*failures, *report.warnings)
        if options.as_json:
            said = {**asdict(report), "warnings": [asdict(warning) for warning in warnings]}
            text = options.text if made is None else made.text
            is_rewritten = made is not None and made.is_rewritten
            about = {"text": text, "is_rewritten": is_rewritten, "seconds": seconds}
            print(json.dumps({**about, **said}))
            return
        if made is not None:
            print(made.text.rstrip("\n"))
        _print(report, seconds, out if made is None else err)
        for warning in warnings:
            err.print(f"warning: {warning}")


def enhancer_of(options: EnhanceOptions) -> Enhancer | None:
    """Who rewrites prompts, or None; the key is taken out of what other processes inherit."""
    key = os.environ.pop(KEY_VARIABLE, None)
    if options.enhance is None:
        return None
    return Enhancer(Endpoint(options.enhance, options.enhance_model, key), options.enhance_seconds)


def _check(options: PromptOptions) -> None:
    if options.seconds is not None and not MIN_SECONDS <= options.seconds <= MAX_SECONDS:
        raise runtime.InvalidRequestError(
            f"--seconds must be {MIN_SECONDS:g} to {MAX_SECONDS:g}, got {options.seconds:g}"
        )
    if options.image is not None and options.enhance is None:
        raise runtime.InvalidRequestError(
            "--image is shown to the endpoint of --enhance; give both or neither"
        )


def _counter(model: str | None) -> Callable[[str], int] | None:
    if model is None:
        return None
    from magihuman.runtime.weights import token_counter

    return token_counter(model)


def _seconds(options: PromptOptions) -> float:
    if options.seconds is not None:
        return options.seconds
    if options.model is None:
        return STANDARD_SIZE["seconds"]
    from magihuman.runtime.weights import suited

    return suited(options.model)["seconds"]


def _enhanced(options: PromptOptions, seconds: float) -> runtime.Enhancement | None:
    enhancer = enhancer_of(options)
    if enhancer is None:
        return None
    image = None if options.image is None else picture(options.image)
    return enhancer.enhance(options.text, seconds=seconds, image=image)


def _print(report: PromptReport, seconds: float, console: Console) -> None:
    tokens = report.tokens
    about = "about " if tokens.is_estimate else ""
    said = "not known" if report.said_s is None else f"{report.said_s:.1f} s of {seconds:g} s"
    table = Table("what", "found")
    for name, value in (
        ("form", "the model's" if report.is_in_form else "not the model's"),
        ("words of the body" if report.is_in_form else "words", str(report.words)),
        ("languages", ", ".join(report.languages) or "none"),
        ("tokens", f"{about}{tokens.used}, {about}{tokens.left} left"),
        ("to say the words", said),
    ):
        table.add_row(name, value)
    console.print(table)
