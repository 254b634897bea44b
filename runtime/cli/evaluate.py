"""`magihuman evaluate`. Exit codes: 0, 1 where a measure failed, else as for all commands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from magihuman.runtime.cli.options import (
    DeviceOptions,
    JsonOptions,
    ModelOption,
    TrialOptions,
    takes_options,
)
from magihuman.runtime.cli.terminal.console import FAILED, Bar, err, out, print_table, user_errors
from magihuman.runtime.config import NANO

if TYPE_CHECKING:
    from magihuman.runtime.evaluate import Evaluation

DEFAULT = ("bf16", "fp8", "int8")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TrialOptions, DeviceOptions, JsonOptions):
    """What clips are made of, in which precisions, and what hears them."""

    prompts: Annotated[
        Path,
        typer.Option(help="A prompt on each line or in each block, or JSON lines.", metavar="FILE"),
    ]
    model: ModelOption = NANO
    precisions: Annotated[
        list[str] | None,
        typer.Option(help="bf16, fp8, fp8-attn, int8; by default bf16 fp8 int8."),
    ] = None
    more: Annotated[list[str] | None, typer.Argument(metavar="PRECISION", hidden=True)] = (
        None  # what follows the first after --precisions
    )
    asr: Annotated[
        str | None,
        typer.Option(help="Speech recognition, as Whisper: a folder, a hub id, or a plug-in's."),
    ] = None
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder for clips and figures.")
    ] = None
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next has the next.")] = 42

    @property
    def named(self) -> list[str]:
        """The precisions, which blanks or commas may part."""
        given = [*(self.precisions or ()), *(self.more or ())]
        return [name for text in given for name in text.split(",")] or list(DEFAULT)


@takes_options
def evaluate(options: EvaluateOptions) -> None:
    """Make clips in each precision and measure words, mouth, colours and differences side by side.

    Where a precision's kernels cannot run here it is simulated. Exit code 1 where a measure failed.
    """
    with user_errors():
        found = _evaluate(options)
        if options.as_json:
            print(json.dumps(found.to_dict(), allow_nan=False))
        else:
            _print(found, options.folder)
    if found.failures:
        raise typer.Exit(FAILED)


def _evaluate(options: EvaluateOptions) -> Evaluation:
    """Read the file, and make and measure the clips."""
    from magihuman.runtime import evaluate as room

    cases = room.read_cases(options.prompts)
    bar = Bar(options.as_json)
    with bar:
        return room.evaluate(
            options.model,
            cases,
            options.named,
            asr=options.asr,
            seconds=options.seconds,
            width=options.width,
            height=options.height,
            steps=options.steps,
            seed=options.seed,
            variant=options.variant,
            transformer=options.transformer,
            device=options.device,
            out=options.folder,
            on_load=bar.on_load,
            on_progress=bar.on_progress,
        )


def _print(found: Evaluation, folder: Path | None) -> None:
    """Print a row for each measure, and what has none."""
    headings = [
        f"{name}, simulated" if name in found.simulated else name for name in found.precisions
    ]
    table = Table("mean over clips", "unit", *headings)
    for name, unit in found.units.items():
        means = (found.mean(name, precision) for precision in found.precisions)
        table.add_row(name, unit, *("-" if mean is None else f"{mean:.3f}" for mean in means))
    print_table(table)
    for name, why in found.not_measured.items():
        out.print(f"{name} not measured: {why}")
    for sentence in found.failures:
        err.print(sentence, style="red")
    if folder is not None:
        out.print(f"{folder}: {len(found.clips)} clips and their figures")
