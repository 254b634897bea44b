"""The table of docs/performance.md about portable kernels, from results/portable.json."""

from __future__ import annotations

from typing import Any

NAMES = {  # of the results, and what their rows are called
    "hopper bf16": "bf16, kernels for Hopper",
    "bf16": "bf16, portable",
    "bf16, 99 KiB": "bf16, portable, tiles of sm_86",
    "int8": "int8, portable",
    "int8, 99 KiB": "int8, portable, tiles of sm_86",
    "fp8": "fp8, portable",
    "fp8, 99 KiB": "fp8, portable, tiles of sm_89",
    "fp8, attention too": "fp8 with fp8 attention, portable",
}
PLAIN = "torch.compile"


def portable_lines(figures: dict[str, Any]) -> list[str]:
    """Seconds of 8 steps of each precision, against `torch.compile` and portable bf16."""
    machine, base = figures["environment"], figures[PLAIN]
    times = {name: figures[name].get("8_steps_ms") for name in NAMES if name in figures}
    bf16 = times.get("bf16")
    rows = [
        f"| {NAMES[name]} | {ms / 1e3:.3f} | {ms / base['8_steps_ms']:.2f} |"
        f" {'' if bf16 is None else f'{ms / bf16:.2f}'} |"
        for name, ms in times.items()
        if ms is not None
    ]
    return [
        "## Portable kernels",
        "",
        f"One {machine.get('gpu', 'CPU')}, torch {machine['torch']}, {machine['date']},"
        f" {figures['tokens']} tokens. No other architecture was",
        "timed: on this one, tiles of others say what they cost where they are not needed.",
        "",
        "| 8 steps | seconds | times `torch.compile` | times portable bf16 |",
        "|---|---|---|---|",
        f"| `torch.compile` of the plain model, PyTorch's attention ({base['attention']})"
        f" | {base['8_steps_ms'] / 1e3:.3f} | 1.00 | |",
        *rows,
    ]
