"""`magihuman score`. Exit codes: 0 where all thresholds are met, 1 where not, else as always."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from magihuman import runtime
from magihuman.runtime.cli.console import (
    FAILED,
    Bar,
    JsonOption,
    PrecisionOption,
    err,
    out,
    user_errors,
)

if TYPE_CHECKING:
    from magihuman.runtime.config import Precision
    from magihuman.runtime.evaluate import ClipScore, Synchrony


def score(
    clip: Annotated[Path | None, typer.Argument(help="An mp4 of the nano model.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Score clips of this model: nano, or a copy."),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Of the clip.")] = "",
    image: Annotated[Path | None, typer.Option(help="Reference image of the clip.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Driving voice of the clip.")] = None,
    clips: Annotated[int | None, typer.Option(help="With --model, of each kind at most.")] = None,
    precision: PrecisionOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure colours, mouth and sound of a clip of the nano model, or of many.

    With --model, clips from held-out prompts, images and voices; exit code 1 where a threshold is
    not met.
    """
    with user_errors():
        if (clip is None) == (model is None):
            raise runtime.InvalidRequestError("score needs either a clip or --model, not both")
        if clip is not None:
            from magihuman.runtime.evaluate import score_file

            found = score_file(clip, prompt, image, audio)
            if as_json:
                print(json.dumps(asdict(found)))
            else:
                _print(found)
            return
        assert model is not None
        from magihuman.runtime.evaluate import score_model
        from magihuman.runtime.weights import model_folder

        folder = model_folder(model)
        bar = Bar(as_json)
        with (
            bar,
            runtime.load(
                folder,
                precision=cast("Precision | None", precision),
                device=device,
                on_load=bar.on_load,
            ) as engine,
        ):
            total = score_model(engine, folder, clips, bar.on_step)
        if as_json:
            print(json.dumps(total.to_dict()))
        else:
            table = Table("figure", "value")
            for name, value in asdict(total).items():
                table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
            out.print(table)
            for sentence in total.broken:
                err.print(sentence, style="red", markup=False, highlight=False)
    if total.broken:
        raise typer.Exit(FAILED)


def _print(found: ClipScore) -> None:
    table = Table("figure", "value")
    for part, colour in found.found.items():
        named = found.named.get(part)
        table.add_row(part, f"{colour}" + (f", should be {named}" if named else ""))
    table.add_row("mouth with sound", _text(found.synchrony))
    if found.voice is not None:
        table.add_row("mouth with voice", _text(found.voice))
    if found.first_frame_db is not None:
        table.add_row("first frame with image", f"{found.first_frame_db:.1f} dB")
    out.print(table)


def _text(found: Synchrony) -> str:
    return f"{found.correlation:.3f}, {found.lag_frames:+d} frames"
