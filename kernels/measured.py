"""Timings kept on disk, so that a choice between kernels is measured once per machine."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton

CACHE = Path.home() / ".cache" / "magihuman" / "measured"


class Measurements:
    """Named timings of one GPU under one set of versions."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.machine = machine_key(device)
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()
        self._path = (folder or CACHE) / f"{digest[:16]}.json"

    def get(self, key: str) -> dict[str, float] | None:
        """Milliseconds by candidate, or None. A damaged file counts as an empty one."""
        entry = self._read().get(key)
        return dict(entry) if isinstance(entry, dict) else None

    def fastest(self, key: str, measure: Callable[[], dict[str, float]]) -> str:
        """The candidate of the least time: as kept, or as measured now and then kept."""
        times = self.get(key)
        if times is None:
            times = measure()
            self.put(key, times)
        return min(times, key=times.__getitem__)

    def put(self, key: str, times: dict[str, float]) -> None:
        """Keep timings. Where the disk does not allow it, they are measured again next time."""
        entries = {**self._read(), key: times}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".json")
            with os.fdopen(handle, "w") as file:
                json.dump({**entries, "machine": self.machine}, file, indent=1)
            os.replace(name, self._path)
        except OSError:
            return

    def _read(self) -> dict[str, object]:
        try:
            entries = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}


@functools.cache
def machine_key(device: torch.device) -> dict[str, str]:
    """What a timing depends on besides shapes: GPU, driver, torch, triton."""
    from torch.cuda import get_device_name

    return {
        "gpu": get_device_name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    return text.splitlines()[0]
