"""The `magihuman` command: what `runtime` has, and `export` on top of it.

The script is bound here, and not to `magihuman.runtime.cli`, because `runtime` imports nothing from
`export`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from magihuman.runtime.cli import main as cli
from magihuman.runtime.cli.options import JsonOptions, takes_options
from magihuman.runtime.cli.terminal.console import (
    FAILED,
    Bar,
    err,
    need,
    out,
    print_table,
    size_text,
    user_errors,
)
from magihuman.runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from magihuman.export.exporting import OnGraph
    from magihuman.export.verify import Verdict


@dataclass(frozen=True, kw_only=True)
class ExportOptions(JsonOptions):
    """Which decoder is written, where, and as what."""

    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")]
    model: Annotated[
        str,
        typer.Option("--model", "-m", envvar="MAGIHUMAN_MODEL", help="Model directory, or nano."),
    ]
    vae: Annotated[bool, typer.Option("--vae", help="The Turbo VAE decoder.")] = False
    audio: Annotated[
        bool, typer.Option("--audio", help="The audio decoder instead, as ONNX in fp32.")
    ] = False
    target: Annotated[str, typer.Option(help="onnx or tensorrt.")] = "onnx"
    sm: Annotated[
        int | None,
        typer.Option(help="Compute capability of the engines, as 89; by default this GPU's."),
    ] = None
    size: Annotated[
        list[str] | None,
        typer.Option(help="As 480x256, or fewest:best:most; may be given several times."),
    ] = None
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16"
    workspace_gib: Annotated[
        float, typer.Option(min=0.01, help="GPU memory a layer of an engine may use.")
    ] = 8.0
    verify: Annotated[
        bool, typer.Option(help="Compare with the plain decoder; figures go into the manifest.")
    ] = True
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Make nothing: compare what DIR holds.")
    ] = False


@cli.app.command()
@takes_options
def export(options: ExportOptions) -> None:
    """Write the video or the audio decoder as ONNX, or as TensorRT engines."""
    with user_errors():
        _check(options)
        _check_libraries()
        start = time.perf_counter()
        verdict = _write(options)
        _show(options.folder, verdict, time.perf_counter() - start, options.as_json)
        if verdict is not None and not verdict.is_ok:
            raise typer.Exit(FAILED)


def _check(options: ExportOptions) -> None:
    """Refuse options that do not go together."""
    if options.vae == options.audio and not options.verify_only:
        raise InvalidRequestError("one of --vae and --audio must be given, got both or none")
    if options.audio and (options.target != "onnx" or options.size or options.sm):
        raise InvalidRequestError(
            "--audio must go without --target tensorrt, --size and --sm: the audio decoder is"
            " one ONNX graph for clips of all lengths"
        )


def _check_libraries() -> None:
    """Refuse where a library of the export is not installed."""
    need("export", "onnx", "magihuman.export.exporting", "magihuman.export.verify")


def _write(options: ExportOptions) -> Verdict | None:
    """Make the folder and compare it with the plain decoder, each unless told otherwise."""
    from magihuman.export import exporting
    from magihuman.export import verify as verifying

    bar = Bar(options.as_json)
    callbacks: dict[str, OnGraph] = {"on_step": bar.on_step, "on_hash": bar.on_convert}
    with bar:
        if options.audio and not options.verify_only:
            exporting.export_audio(options.model, options.folder, **callbacks)
        elif not options.verify_only:
            decoder = exporting.VaeExport(
                target=options.target,
                sizes=tuple(options.size or exporting.SIZES),
                sm=options.sm,
                dtype=options.dtype,
                workspace_bytes=int(options.workspace_gib * 2**30),
            )
            exporting.export_vae(options.model, options.folder, decoder, **callbacks)
        if options.verify or options.verify_only:
            return verifying.verify(options.folder, options.model, bar.on_step)
    return None


def _show(folder: Path, verdict: Verdict | None, seconds: float, as_json: bool) -> None:
    """Print what was written and how far it is from the plain decoder."""
    files = sorted(folder.iterdir())
    figures = () if verdict is None else verdict.figures
    skipped = None if verdict is None else verdict.engines_not_run
    if as_json:
        facts = {
            "path": str(folder),
            "bytes": {file.name: file.stat().st_size for file in files},
            "seconds": seconds,
            "verified": [{**dataclasses.asdict(f), "ok": f.is_ok} for f in figures],
            "engines_not_run": skipped,
        }
        print(json.dumps(facts))
        return
    table = Table(
        Column("file", no_wrap=True), "size", "latents", "arithmetic", "error", "limit", ""
    )
    for file in files:
        of_file = [figure for figure in figures if figure.file == file.name]
        if not of_file:
            table.add_row(file.name, size_text(file.stat().st_size), "", "", "", "", "")
        for figure in of_file:
            table.add_row(
                file.name,
                size_text(file.stat().st_size),
                "x".join(map(str, figure.shape[2:])),
                figure.arithmetic,
                f"{figure.error:.1e}",
                f"{figure.limit:.1e}",
                "ok" if figure.is_ok else "FAIL",
            )
    print_table(table)
    if skipped is not None:
        err.print(f"engines not run: {skipped}")
    out.print(f"{folder}: {len(files)} files in {seconds:.0f} s")


def main() -> None:
    """Run the command of this process's arguments."""
    cli.main()


if __name__ == "__main__":
    main()
