"""The tables of several GPUs on one request, from benchmarks/results/context_parallel.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from magihuman.runtime import config

SIZES = {"256p": (480, 256), **config.SR_SIZES}
PRECISIONS = ("fp8-attn", "fp8", "bf16")


def read(folder: Path) -> dict[str, Any] | None:
    """The figures; None where they were not measured."""
    path = folder / "context_parallel.json"
    if not path.exists():
        return None
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def headline_lines(folder: Path) -> list[str]:
    """The README's table, of the first precision; nothing where there are no figures."""
    figures = read(folder)
    if figures is None:
        return []
    rows = forward_rows(figures, PRECISIONS[:1]) or forward_rows(figures, PRECISIONS)[:1]
    return [
        *table(f"a clip of 5 s on {machine(figures)}", figures, [*rows, *request_rows(figures)]),
        "",
        "[Several GPUs](docs/embedding.md#several-gpus) of one host work on one request together.",
    ]


def lines(folder: Path) -> list[str]:
    """All that was measured; nothing where it was not."""
    figures = read(folder)
    if figures is None:
        return []
    rows = [*forward_rows(figures, PRECISIONS), *request_rows(figures)]
    return [
        "## Several GPUs",
        "",
        f"One request on GPUs of one host, {machine(figures)}, {figures['environment']['date']},"
        f" torch {figures['environment']['torch']},",
        "in one run: a forward of the compiled transformer, and whole requests.",
        "",
        *table("5 s", figures, rows),
        "",
        *exchange_lines(figures),
    ]


def machine(figures: dict[str, Any]) -> str:
    """How many of which GPU there are."""
    gpus = figures["gpus"]
    return f"{len(gpus)} x {gpus[0]}" if gpus else "a CPU"


def counts(figures: dict[str, Any]) -> list[str]:
    """The numbers of GPUs that anything was measured on, as the figures name them."""
    forwards = [own for size in figures.get("forwards", {}).values() for own in size.values()]
    found = {count for own in (*forwards, *figures.get("requests", {}).values()) for count in own}
    return sorted(found, key=int)


def table(title: str, figures: dict[str, Any], rows: list[tuple[str, dict[str, str]]]) -> list[str]:
    """A column for each number of GPUs; a row has a cell by that number, or none."""
    columns = counts(figures)
    heads = [f"{count} GPU{'s' if count != '1' else ''}" for count in columns]
    return [
        f"| {title} | {' | '.join(heads)} |",
        "|---|" + "---|" * len(columns),
        *(f"| {name} | {' | '.join(cells.get(c, '') for c in columns)} |" for name, cells in rows),
    ]


def forward_rows(
    figures: dict[str, Any], precisions: tuple[str, ...]
) -> list[tuple[str, dict[str, str]]]:
    """Milliseconds of a forward, and how many times faster that is than on one GPU."""
    rows = []
    for size, (width, height) in SIZES.items():
        for precision in precisions:
            own = figures.get("forwards", {}).get(size, {}).get(precision)
            if own:
                seconds = {count: each["ms"] / 1e3 for count, each in own.items() if "ms" in each}
                name = f"a forward, {width}x{height}, {precision}"
                rows.append((name, cells(seconds, 1e3, "ms")))
    return rows


def request_rows(figures: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Seconds from prompt to frames, and of `load` in a new process."""
    rows = []
    for size, (width, height) in SIZES.items():
        own = figures.get("requests", {}).get(size)
        if own:
            precision = next(iter(own.values()))["precision"]
            seconds = {count: each["prompt_to_frames_s"] for count, each in own.items()}
            loads = {
                count: f"{each['fresh_load_s']:.0f} s"
                for count, each in own.items()
                if "fresh_load_s" in each
            }
            rows.append(
                (f"prompt to frames, {width}x{height}, {precision}", cells(seconds, 1, "s"))
            )
            if loads:
                rows.append((f"`load` in a new process, for {width}x{height}", loads))
    return rows


def cells(seconds: dict[str, float], scale: float, unit: str) -> dict[str, str]:
    """Each figure and its ratio to that of one GPU."""
    made = {}
    for count, value in seconds.items():
        text = f"{scale * value:.{2 if unit == 's' else 1}f} {unit}"
        is_compared = count != "1" and "1" in seconds
        made[count] = f"{text} ({seconds['1'] / value:.2f}x)" if is_compared else text
    return made


def exchange_lines(figures: dict[str, Any]) -> list[str]:
    """The share of a forward's kernels that exchanges take."""
    rows = []
    for size, (width, height) in SIZES.items():
        for precision in PRECISIONS:
            own = figures.get("forwards", {}).get(size, {}).get(precision, {})
            shares = {
                count: f"{100 * each['exchange_share']:.1f} %"
                for count, each in own.items()
                if "exchange_share" in each
            }
            if shares:
                rows.append((f"{width}x{height}, {precision}", shares))
    columns = [count for count in counts(figures) if count != "1"]
    heads = [f"{count} GPUs" for count in columns]
    return [
        "| share of exchanges, with the norms of q and k and waiting for the others"
        f" | {' | '.join(heads)} |",
        "|---|" + "---|" * len(columns),
        *(f"| {name} | {' | '.join(own.get(c, '') for c in columns)} |" for name, own in rows),
    ]
