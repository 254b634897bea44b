"""`magihuman convert` and `magihuman tiny`, which write weights. Exit codes as for all commands."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from magihuman import runtime
from magihuman.runtime.cli.options import JsonOptions, PrecisionOptions, takes_options
from magihuman.runtime.cli.terminal.console import Bar, out, size_text, user_errors

if TYPE_CHECKING:
    from magihuman.runtime.config import Precision


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(PrecisionOptions, JsonOptions):
    """A published transformer, the folder for the converted one, and its precision."""

    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")]
    model: Annotated[
        str, typer.Option("--model", "-m", envvar="MAGIHUMAN_MODEL", help="Model directory.")
    ]
    variant: Annotated[str, typer.Option(help="distill, base, 540p_sr or 1080p_sr.")] = "distill"
    precision: Annotated[str, typer.Option(help="fp8, int8 or bf16.")] = "fp8"


@takes_options
def convert(options: ConvertOptions) -> None:
    """Write a transformer as it is held on the device, for generate --transformer OUT."""
    with user_errors():
        bar = Bar(options.as_json)
        start = time.perf_counter()
        with bar:
            folder = runtime.convert(
                options.model,
                options.folder,
                variant=options.variant,
                precision=cast("Precision", options.precision),
                keep_bf16=options.kept_names or "none",
                on_progress=bar.on_convert,
            )
        elapsed_s = time.perf_counter() - start
        disk_bytes = sum(file.stat().st_size for file in folder.iterdir())
        if options.as_json:
            print(json.dumps({"path": str(folder), "bytes": disk_bytes, "seconds": elapsed_s}))
        else:
            size = size_text(disk_bytes)
            out.print(f"{folder}: {options.variant} in {options.precision}, {size}")


def tiny(
    folder: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a tiny checkpoint of every component, with random weights: its clips are noise."""
    with user_errors():
        for component in runtime.write_tiny(folder, seed):
            out.print(f"wrote {component}")
