"""What docs/performance.md says of the cost of looking for NaN.

The section has a heading of its own, and is not there before its results are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PRECISIONS = ("bf16", "fp8-attn")


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """One results file, if it is there."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def check_lines(folder: Path) -> list[str]:
    """What looking for NaN costs a request."""
    figures = read(folder, "check_cost")
    if figures is None:
        return []
    facts, shape = figures["environment"], figures["shape"]
    made = {name: figures[name] for name in PRECISIONS if name in figures}
    rows = [
        ("a request, to frames and sound", [f"{f['request_ms']:.0f} ms" for f in made.values()]),
        (
            "its difference from one without checks, and that figure's standard error",
            [
                f"{f['difference_ms']:.2f} ± {f['difference_error_ms']:.2f} ms"
                for f in made.values()
            ],
        ),
        ("kernels and copies of the checks", [f"{f['kernels_ms']:.2f} ms" for f in made.values()]),
        ("the host, in their calls", [f"{f['host_ms']:.2f} ms" for f in made.values()]),
        (
            "**both together, of the request**",
            [f"**{f['bound_percent']:.3f} %**" for f in made.values()],
        ),
    ]
    return [
        "## Looking for NaN",
        "",
        f"What each stage makes is looked through for NaN and infinity. One"
        f" {facts.get('gpu', 'CPU')}, {facts['date']}, torch",
        f"{facts['torch']}, {shape['width']}x{shape['height']}, {shape['clip_s']:g} s, with the"
        " checks and without them in turns. Most of the work runs beside",
        "other work, so the last row is a bound.",
        "",
        f"| checks | {' | '.join(made)} |",
        "|---|" + "---|" * len(made),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]
