"""Draw joules of a forward by kernel, from benchmarks/results/power.json.

    python benchmarks/reports/render_power.py [--folder RESULTS] [--out PNG]

A bar for each precision. Where no energy could be measured, milliseconds. No display is needed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import history
from power_tables import PICTURE

OUT = Path(__file__).parents[2] / "docs" / PICTURE
LEAST = 0.04  # of the longest bar, in which there is room for a number


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write the PNG."""
    bars = figures["joules by kernel"]
    is_energy = all(part["joules"] is not None for bar in bars.values() for part in bar.values())
    key, unit = ("joules", "J") if is_energy else ("ms", "ms")
    values = {
        name: {part: own[key] for part, own in bar.items()} for name, bar in reversed(bars.items())
    }
    figure = Figure(figsize=(11, 1.2 + 0.7 * len(values)), layout="constrained")
    axes = figure.subplots()
    _draw_bars(axes, values)
    machine = figures["environment"].get("gpu", "CPU")
    axes.set_title(
        f"{unit} of one forward of {figures['tokens']} tokens, by kernel, {machine}",
        loc="left",
        fontsize=10,
    )
    axes.set_xlabel(unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_bars(axes: Axes, values: dict[str, dict[str, float]]) -> None:
    """The largest part of all bars first, each part in one colour."""
    sums: dict[str, float] = {}
    for bar in values.values():
        for part, value in bar.items():
            sums[part] = sums.get(part, 0.0) + value
    longest = max(sum(bar.values()) for bar in values.values())
    ends = dict.fromkeys(values, 0.0)
    for i, part in enumerate(sorted(sums, key=sums.__getitem__, reverse=True)):
        widths = [bar.get(part, 0.0) for bar in values.values()]
        drawn = axes.barh(
            list(values), widths, left=list(ends.values()), color=f"C{i % 10}", label=part
        )
        labels = [f"{width:.1f}" if width > LEAST * longest else "" for width in widths]
        axes.bar_label(drawn, labels, label_type="center", fontsize=8, color="white")
        ends = {name: end + width for (name, end), width in zip(ends.items(), widths, strict=True)}
    for name, end in ends.items():
        axes.text(end, name, f" {end:.1f}", va="center", fontsize=9)
    axes.set_xlim(0, 1.08 * longest)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def main() -> None:
    """Read the figures, write the PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=history.RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    draw(json.loads((arguments.folder / "power.json").read_text()), arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
