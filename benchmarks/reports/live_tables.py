"""The tables of docs/performance.md about a face that answers, from results/live.json, and about
long clips of nano, from results/long_clip.json.
"""

from __future__ import annotations

from typing import Any

WAYS = {"long": "`generate_long`", "continued": "pieces, `continue_from`", "live": "`live`"}
BESIDE = ("environment", "text_tokens", "block_s", "nano")  # of the results: no precision


def live_lines(figures: dict[str, Any]) -> list[str]:
    """Of each number of GPUs in each precision, and of nano on the CPU."""
    machine = figures["environment"]
    rows = [
        _row(_name(precision, ranks, found), found)
        for precision, of_ranks in figures.items()
        if precision not in BESIDE
        for ranks, found in of_ranks.items()
    ]
    if "nano" in figures:
        nano = figures["nano"]
        rows.append(_row(f"nano, {nano['threads']} threads of the CPU", nano))
    return [
        "## A face that answers",
        "",
        f"{machine.get('gpu', 'CPU')}, torch {machine['torch']}, {machine['date']}. A voice was fed"
        " as it would be spoken. The factor is",
        "seconds of picture by seconds of making it. The delay is from when a sound came until its"
        " frame was handed over:",
        "a player that begins the most of it late never stops.",
        "",
        "| | size | window | factor | delay: median | 99 % | most | jitter | frames repeated |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def _name(precision: str, ranks: str, found: dict[str, Any]) -> str:
    """What a row is called, with its GPU where it is not that of the others."""
    gpu = found.get("environment", {}).get("gpu")
    return f"{precision}, {ranks} GPU{'' if ranks == '1' else 's'}" + (f", {gpu}" if gpu else "")


def _row(name: str, found: dict[str, Any]) -> str:
    delays = (found[f"delay_{each}_s"] for each in ("median", "p99", "max"))
    return (
        f"| {name} | {found['width']}x{found['height']} | {found['window_s']:.2f} s |"
        f" {found['factor']:.2f} | {' | '.join(f'{delay:.2f} s' for delay in delays)} |"
        f" {1e3 * found['jitter_s']:.0f} ms | {found['repeated_frames']} |"
    )


def long_lines(figures: dict[str, Any]) -> list[str]:
    """Of each way to make a long clip of nano: the worst of several clips."""
    machine = figures["environment"]
    made = {name: figures[name] for name in WAYS if name in figures}
    clips = max(len(one["clips"]) for one in made.values())
    rows = [
        f"| {WAYS[name]} | {one['least synchrony']:.2f} | {one['median synchrony']:.2f} |"
        f" {one['largest lag, frames']} | {one['largest join']:.1f} | {one['background']:.1f} |"
        for name, one in made.items()
    ]
    return [
        "## Long clips of nano",
        "",
        f"{figures['voice_s']:.0f} s of a voice with pauses, {clips} seeds,"
        f" {machine.get('gpu', 'a CPU')}, {machine['date']}: how mouth and sound correlate in every"
        " 5 s, frames",
        "that one lags behind the other, the largest step at a join over the median step of its"
        " clip, and how far",
        "the background moves away, of 255. All but the median are the worst of all clips.",
        "",
        "| made by | worst 5 s | median 5 s | lag | step at a join | background |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
