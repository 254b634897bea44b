"""What a figure was measured on, and how results are written."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


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
