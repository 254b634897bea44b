"""Draw latency over commits from the history.

    python benchmarks/reports/render_latency.py [--folder HISTORY] [--out PNG]

A panel for each machine, size and group of benchmarks; a line for each benchmark. Device time where
there is a GPU, else the caller's. No display is needed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import history

OUT = history.RESULTS / "latency.png"
WIDTH, PANEL_HEIGHT, LINE_HEIGHT = 11.0, 2.6, 0.19  # inches
COLOURS = 10  # of matplotlib's cycle
MARGIN = 1.5  # factor above and below the lines, so that a flat line looks flat

Panel = tuple[str, str, str]  # machine, size, group
Line = dict[str, float]  # milliseconds by commit, in order


def panels(entries: list[history.Entry]) -> dict[Panel, dict[str, Line]]:
    """Lines of every panel. Of several runs of one commit on one machine, the last counts."""
    found: dict[Panel, dict[str, Line]] = {}
    for entry in entries:
        for benchmark in entry["benchmarks"]:
            panel = history.machine(entry), history.size(benchmark), benchmark["group"]
            line = found.setdefault(panel, {}).setdefault(history.label(benchmark), {})
            line[history.short_commit(entry)] = history.milliseconds(benchmark)
    return dict(sorted(found.items()))


def draw(entries: list[history.Entry], path: Path) -> None:
    """Write the PNG."""
    if not entries:
        raise SystemExit("the history is empty; `make bench` writes an entry")
    found = panels(entries)
    heights = [max(PANEL_HEIGHT, 0.9 + LINE_HEIGHT * len(lines)) for lines in found.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)
    for axes, (panel, lines) in zip(grid[:, 0], found.items(), strict=True):
        axes.set_title(", ".join(panel), loc="left", fontsize=10)
        own = [entry for entry in entries if history.machine(entry) == panel[0]]
        _draw_lines(axes, lines, list(dict.fromkeys(map(history.short_commit, own))))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_lines(axes: Axes, lines: dict[str, Line], commits: list[str]) -> None:
    """Slowest first in the legend, as on the axis."""
    latest = {label: list(line.values())[-1] for label, line in lines.items()}
    for i, label in enumerate(sorted(lines, key=latest.__getitem__, reverse=True)):
        places = [commits.index(commit) for commit in lines[label]]
        axes.plot(
            places,
            list(lines[label].values()),
            ("-", "--", ":")[i // COLOURS % 3],
            marker="o",
            markersize=4,
            color=f"C{i % COLOURS}",
            label=f"{label}: {_digits(latest[label])} ms",
        )
    values = [value for line in lines.values() for value in line.values()]
    axes.set_yscale("log")
    axes.set_ylim(min(values) / MARGIN, max(values) * MARGIN)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylabel("ms")
    axes.set_xlim(-0.5, len(commits) - 0.5)
    axes.set_xticks(range(len(commits)), commits, rotation=30, ha="right", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _digits(value: float) -> str:
    """Three significant ones."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def main() -> None:
    """Read the history, write the PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=history.FOLDER)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    draw(history.entries(arguments.folder), arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
