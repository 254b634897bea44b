"""Keep a report of `pytest benchmarks/suites --benchmark-json=REPORT` as an entry of the history.

    python benchmarks/reports/history.py REPORT [--folder FOLDER] [--commit REVISION]

An entry is a report without the time of every single round, so `--benchmark-compare=ENTRY` reads
it. --commit names what was measured where the report cannot: where the suites ran on a copy of the
tree without git's folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
FOLDER = RESULTS / "history"
NOT_KEPT = ("options", "param", "params")  # of a benchmark; its name says which
COMMIT = ("id", "time", "dirty")

Entry = dict[str, Any]


def trimmed(report: Entry) -> Entry:
    """The report without raw times, and of the commit only what tells it from others."""
    benchmarks = []
    for benchmark in report["benchmarks"]:
        kept = {key: value for key, value in benchmark.items() if key not in NOT_KEPT}
        kept["stats"] = {key: value for key, value in kept["stats"].items() if key != "data"}
        benchmarks.append(kept)
    commit = {key: report["commit_info"][key] for key in COMMIT}
    return {**report, "commit_info": commit, "benchmarks": benchmarks}


def machine(entry: Entry) -> str:
    """The GPU, or where there is none the processor."""
    facts = entry["machine_info"]
    return str(facts["gpu"] or f"{facts['cpu']} ({facts['cores']} cores)")


def short_commit(entry: Entry) -> str:
    """Seven digits, and a mark where the tree had changes on top."""
    commit = entry["commit_info"]
    return commit["id"][:7] + ("-dirty" if commit["dirty"] else "")


def file_name(entry: Entry) -> str:
    """`<date>-<commit>-<machine>.json`."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine(entry).lower()).strip("-")
    return f"{entry['datetime'][:10]}-{short_commit(entry)}-{slug}.json"


def named_commit(revision: str) -> dict[str, Any]:
    """What a report says of a commit, from this repository."""
    command = ["git", "show", "--no-patch", "--format=%H %cI", revision]
    shown = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    commit, time = shown.stdout.split()
    return {"id": commit, "time": time, "dirty": False}


def keep(report: Entry, folder: Path = FOLDER) -> Path:
    """Write the entry of a report. A later run of the same day, commit and machine replaces it."""
    if report["commit_info"]["time"] is None:
        sys.exit(
            "an entry must say which commit was measured, and the report does not: the suites ran"
            " outside git; name the commit with --commit"
        )
    entry = trimmed(report)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(entry)
    new, old = len(entry["benchmarks"]), 0
    if path.is_file():
        old = len(json.loads(path.read_text())["benchmarks"])
    if new < old:
        sys.exit(
            f"an entry is replaced by whole runs only: {path} has {old} benchmarks, the report"
            f" {new}; remove the entry first, or run all of them"
        )
    path.write_text(json.dumps(entry, indent=1) + "\n")
    return path


def entries(folder: Path = FOLDER) -> list[Entry]:
    """All entries, in the order of their commits, and of one commit in that of the runs."""
    found: list[Entry] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    moment = datetime.datetime.fromisoformat
    return sorted(found, key=lambda e: (moment(e["commit_info"]["time"]), moment(e["datetime"])))


def size(benchmark: Entry) -> str:
    """The name of the size."""
    return str(benchmark["extra_info"]["size"])


def label(benchmark: Entry) -> str:
    """`test_activation[full-fused-gelu7]` as `activation fused gelu7`.

    Of `test_kernel`, whose kernels a table names, the parameters alone.
    """
    name, _, parameters = benchmark["name"].removeprefix("test_").rstrip("]").partition("[")
    words = [p for p in parameters.split("-") if p != size(benchmark)]
    return " ".join(words if name == "kernel" else [name, *words])


def milliseconds(benchmark: Entry) -> float:
    """Of the device where it was timed, else of the caller; the median."""
    device_ms = benchmark["extra_info"].get("device_ms")
    return float(benchmark["stats"]["median"] * 1e3 if device_ms is None else device_ms)


def main() -> None:
    """Keep one report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    if arguments.commit is not None:
        report["commit_info"] = named_commit(arguments.commit)
    print(keep(report, arguments.folder))


if __name__ == "__main__":
    main()
