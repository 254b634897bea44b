"""What docs/performance.md says of a process: the cost of looking for NaN, and its memory.

Each section has a heading of its own, and is not there before its results are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PRECISIONS = ("bf16", "fp8-attn")
MIB, KIB = 2**20, 2**10
DEVICES = {"cpu": "CPU", "gpu": "GPU"}
HELD = {  # what a process keeps, and what it is called
    "resident_bytes": "resident memory",
    "device_bytes": "memory of the device in use",
    "allocated_bytes": "of that allocated by PyTorch",
    "threads": "threads",
    "files": "open files",
}


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


def memory_lines(folder: Path) -> list[str]:
    """What a process keeps over many clips."""
    found = {name: read(folder, f"memory_flat_{key}") for key, name in DEVICES.items()}
    made = {name: figures for name, figures in found.items() if figures is not None}
    if not made:
        return []
    lines = ["## Memory over many clips", ""]
    for name, figures in made.items():
        facts = figures["environment"]
        lines += [
            f"{figures['clips']} clips of three sizes in turn by the {figures['model']} model, with"
            " and without image and voice, on",
            f"{facts.get('gpu', 'a CPU')} ({facts['date']}, torch {facts['torch']}); slopes over"
            " the last two thirds of them.",
            "",
            f"| {name} | at the end | for each clip, and its standard error |",
            "|---|---|---|",
            *(row(key, figures["slopes"][key]) for key in HELD if key in figures["slopes"]),
            "",
        ]
    return lines[:-1]


def row(key: str, slope: dict[str, Any]) -> str:
    """Of what is held: bytes in MiB and KiB, else numbers."""
    if key.endswith("_bytes"):
        end = f"{slope['to'] / MIB:.0f} MiB"
        growth = f"{slope['per_clip'] / KIB:.1f} ± {slope['error'] / KIB:.1f} KiB"
    else:
        end, growth = f"{slope['to']:.1f}", f"{slope['per_clip']:.4f} ± {slope['error']:.4f}"
    return f"| {HELD[key]} | {end} | {growth} |"
