"""What the commands share: consoles, errors as exit codes, progress, a clip's summary, a plan."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from magihuman import runtime

if TYPE_CHECKING:
    from magihuman.runtime.memory import MemoryPlan, StageMemory

# Names of files are printed as they are, and may look like markup ([red]) or emoji (:sun:).
out = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)

BAD_INPUT, FAILED = 2, 1
WIDEST = 10_000  # letters of a line, where a terminal sets no bound
BAD_INPUT_ERRORS = (
    runtime.InvalidRequestError,
    runtime.CheckpointError,
    runtime.OutputError,
    runtime.MissingExtraError,
)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the package's own errors into one line and an exit code."""
    try:
        yield
    except BAD_INPUT_ERRORS as error:
        err.print(f"error: {error}", style="red")
        raise typer.Exit(BAD_INPUT) from None
    except runtime.MagiHumanError as error:
        err.print(f"error: {error}", style="red")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(FAILED) from None


def need(what: str, extra: str, *modules: str) -> None:
    """Raise `MissingExtraError` where a module of an extra is not installed."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise runtime.MissingExtraError(
                what, extra, (error.name or name).partition(".")[0]
            ) from error


def print_table(table: Table) -> None:
    """Print a table, or a block of lines for each row where the terminal is too narrow for it."""
    for column in table.columns:
        column.overflow = "fold"  # nothing is cut
    narrowest = Measurement.get(out, out.options.update(max_width=WIDEST), table).minimum
    if narrowest <= out.width:
        out.print(table)
        return
    if table.title:
        out.print(table.title)
    titles = [str(column.header) for column in table.columns]
    for first, *rest in zip(*(column.cells for column in table.columns), strict=True):
        out.print(first)
        for title, cell in zip(titles[1:], rest, strict=True):
            if cell:
                out.print(f"  {title}: {cell}".replace("\n", "\n    ") if title else f"  {cell}")


class Bar:
    """Shows progress: a live bar on a terminal, plain lines elsewhere, nothing with --json."""

    def __init__(self, silent: bool) -> None:
        self._live = None
        self._silent = silent
        self._tasks: dict[str, object] = {}
        if not silent and err.is_terminal:
            columns = (
                TextColumn("{task.description:>16}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._live = Progress(*columns, TimeElapsedColumn(), console=err, transient=True)

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_load(self, component: str, done: int, of: int) -> None:
        """Show how many bytes of a component's weights have been read."""
        finished = of > 0 and done == of
        note = size_text(done) if of > 1 else ""
        self._show(f"load {component}", done, of, note, line=finished and of == 1)

    def on_convert(self, stage: str, done: int, of: int) -> None:
        """Show how many bytes of weights have been hashed or converted."""
        self._show(stage, done, of, size_text(done), line=done == of)

    def on_step(self, stage: str, done: int, of: int) -> None:
        """Show how many graphs have been exported, or how many steps of a build are done."""
        self._show(stage, done, of, f"{done}/{of}", line=done == of)

    def on_progress(self, progress: runtime.Progress) -> None:
        """Show how many steps of a stage have finished."""
        note = f"{progress.step}/{progress.of}"
        self._show(progress.stage, progress.step, progress.of, note, line=progress.step > 0)

    def _show(self, name: str, done: int, of: int, note: str, line: bool) -> None:
        if self._live is not None:
            task = self._tasks.get(name)
            if task is None:
                task = self._tasks[name] = self._live.add_task(name, total=None, note="")
            self._live.update(task, completed=done, total=of or None, note=note)  # type: ignore[arg-type]
        elif line and not self._silent:
            err.print(f"{name} {note}".rstrip())


@dataclass(frozen=True)
class Made:
    """What is said of a clip.

    Attributes:
        frames, height, width: of the clip.
        last: the clip, or the last chunk of it.
    """

    frames: int
    height: int
    width: int
    last: runtime.Video | runtime.Chunk

    @classmethod
    def of(cls, video: runtime.Video) -> Made:
        """Return what is said of a clip that is there whole."""
        frames, height, width = video.frames.shape[:3]
        return cls(frames, height, width, video)


def print_result(path: Path, made: Made, timings: dict[str, float], as_json: bool) -> None:
    """Say what was written and how long each stage took."""
    frames, height, width, video = made.frames, made.height, made.width, made.last
    duration_s = frames / video.fps
    if as_json:
        print(
            json.dumps(
                {
                    "path": os.fspath(path),
                    "frames": frames,
                    "width": width,
                    "height": height,
                    "fps": video.fps,
                    "duration_s": duration_s,
                    "sample_rate_hz": video.sample_rate_hz,
                    "seed": video.seed,
                    "warnings": list(video.warnings),
                    "timings_s": timings,
                }
            )
        )
        return
    table = Table("stage", "seconds")
    for name, seconds in timings.items():
        table.add_row(name, f"{seconds:.3f}")
    table.add_row("total", f"{sum(timings.values()):.3f}")
    print_table(table)
    out.print(f"{path}: {frames} frames of {width}x{height}, {duration_s:.2f} s, seed {video.seed}")


def print_plan(plan: MemoryPlan) -> None:
    """Print what comes to the device and leaves it from stage to stage, and what that costs."""
    title = f"memory plan within {size_text(plan.limit_bytes)}, estimated"
    table = Table(Column("stage", no_wrap=True), title=title, title_justify="left")
    table.add_column("what changes on the device")
    for name in ("activations", "sum"):
        table.add_column(name, justify="right", no_wrap=True)
    before: StageMemory | None = None
    for stage in plan.stages:
        table.add_row(
            stage.name,
            "\n".join(_changes(before, stage)),
            size_text(stage.working_bytes),
            size_text(stage.total_bytes),
        )
        before = stage
    print_table(table)
    if plan.bands > 1:
        out.print(f"windows of frames are decoded in {plan.bands} bands, one after another")
    if not plan.streamed:
        out.print("all weights stay on the device")
        return
    out.print(
        f"{', '.join(plan.streamed)}: {size_text(plan.host_bytes)} rest in host memory;"
        f" {plan.extra_s:.1f} s more for a clip are expected"
    )


def _changes(before: StageMemory | None, stage: StageMemory) -> Iterator[str]:
    """Say what a stage has on the device that the one before had not, and the other way round."""
    held = {} if before is None else before.weights
    for name in held:
        if name not in stage.weights:
            yield f"- {name}"
    for name, size in stage.weights.items():
        if held.get(name) != size:
            count = stage.streamed.get(name)
            yield f"+ {name} {size_text(size)}" + (f" ({count} layers streamed)" if count else "")
    if stage.copied_bytes:
        cost = f", {stage.extra_s:.2f} s more" if stage.extra_s >= 0.005 else ""
        yield f"{size_text(stage.copied_bytes)} brought over{cost}"


def size_text(count: int) -> str:
    """Return a number of bytes as text, in the unit that reads best."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} GiB"
