"""What a figure was measured on, and how results are written."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with what every script takes: --folder, and --tiny.

    A tiny run tells nothing about speed, and must be given a folder of its own for its results.
    """
    parser.add_argument("--folder", type=Path, help=f"of the results; by default {RESULTS}")
    parser.add_argument(
        "--tiny", action="store_true", help="at a size for any machine: to see that it runs"
    )
    given = parser.parse_args()
    if given.tiny and (given.folder is None or given.folder.resolve() == RESULTS.resolve()):
        parser.error(
            f"results of --tiny must not lie among those that count, got {given.folder or RESULTS};"
            " give another --folder"
        )
    if given.folder is None:
        given.folder = RESULTS
    return given


def environment() -> dict[str, Any]:
    """GPU, driver and versions."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": driver.splitlines()[0],
            "cuda": torch.version.cuda,
        }
    return facts


def write(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `figures` with the environment beside them to `folder`/`name`.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **figures}, indent=1) + "\n")
    return path
