"""`magihuman score`. Exit codes: 0 where all thresholds are met, 1 where not, else as always."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from magihuman import runtime
from magihuman.runtime.cli.options import (
    DeviceOptions,
    JsonOptions,
    KernelsOption,
    PrecisionOption,
    takes_options,
)
from magihuman.runtime.cli.terminal.console import FAILED, Bar, err, print_table, user_errors

if TYPE_CHECKING:
    from magihuman.kernels.target import Kernels
    from magihuman.runtime.config import Precision
    from magihuman.runtime.evaluate import ClipScore, ModelScore, Synchrony


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(DeviceOptions, JsonOptions):
    """A clip and what it was made from, or a model and how many clips to make with it."""

    clip: Annotated[Path | None, typer.Argument(help="An mp4 of the nano model.")] = None
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Score clips of this model: nano, or a copy."),
    ] = None
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Of the clip.")] = ""
    image: Annotated[Path | None, typer.Option(help="Reference image of the clip.")] = None
    audio: Annotated[Path | None, typer.Option(help="Driving voice of the clip.")] = None
    clips: Annotated[int | None, typer.Option(help="With --model, of each kind at most.")] = None
    precision: PrecisionOption = None
    kernels: KernelsOption = "auto"


@takes_options
def score(options: ScoreOptions) -> None:
    """Measure colours, mouth and sound of a clip of the nano model, or of many.

    With --model, clips from held-out prompts, images and voices; exit code 1 where a threshold is
    not met.
    """
    with user_errors():
        if (options.clip is None) == (options.model is None):
            raise runtime.InvalidRequestError("score needs either a clip or --model, not both")
        if options.clip is not None:
            _score_clip(options.clip, options)
            return
        assert options.model is not None
        total = _score_model(options.model, options)
        if options.as_json:
            print(json.dumps(total.to_dict()))
        else:
            _print_total(total)
    if total.broken:
        raise typer.Exit(FAILED)


def _score_clip(clip: Path, options: ScoreOptions) -> None:
    """Measure one clip and print its figures."""
    from magihuman.runtime.evaluate import score_file

    figures = score_file(clip, options.prompt, options.image, options.audio)
    if options.as_json:
        print(json.dumps(asdict(figures)))
    else:
        _print_clip(figures)


def _score_model(model: str, options: ScoreOptions) -> ModelScore:
    """Make clips with a model and measure them."""
    from magihuman.runtime.evaluate import score_model
    from magihuman.runtime.weights import model_folder

    folder = model_folder(model)
    bar = Bar(options.as_json)
    with (
        bar,
        runtime.load(
            folder,
            precision=cast("Precision | None", options.precision),
            kernels=cast("Kernels", options.kernels),
            device=options.device,
            on_load=bar.on_load,
        ) as engine,
    ):
        return score_model(engine, folder, options.clips, bar.on_step)


def _print_total(total: ModelScore) -> None:
    """Print the figures of all clips, and the thresholds that are not met."""
    table = Table("figure", "value")
    for name, value in asdict(total).items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    print_table(table)
    for sentence in total.broken:
        err.print(sentence, style="red")


def _print_clip(figures: ClipScore) -> None:
    """Print the figures of one clip."""
    table = Table("figure", "value")
    for part, colour in figures.found.items():
        named = figures.named.get(part)
        table.add_row(part, f"{colour}" + (f", should be {named}" if named else ""))
    table.add_row("mouth with sound", _synchrony_text(figures.synchrony))
    if figures.voice is not None:
        table.add_row("mouth with voice", _synchrony_text(figures.voice))
    if figures.first_frame_db is not None:
        table.add_row("first frame with image", f"{figures.first_frame_db:.1f} dB")
    print_table(table)


def _synchrony_text(synchrony: Synchrony) -> str:
    return f"{synchrony.correlation:.3f}, {synchrony.lag_frames:+d} frames"
