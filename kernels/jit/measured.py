"""Timings kept on disk, so that a choice between kernels is measured once per machine."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import triton

from magihuman.kernels.jit import cache

KIND = "measured"  # in the cache


class Measurements:
    """Named timings of one GPU under one set of versions."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        """folder: of kept timings; by default the user's."""
        self.machine = machine_key(device)
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()
        self._key, self._folder = digest[:16], folder

    def get(self, key: str) -> dict[str, float] | None:
        """Milliseconds by candidate, or None. A damaged file counts as an empty one, and so does an
        entry that holds anything but times.
        """
        entry = self._read().get(key)
        if not isinstance(entry, dict) or not all(map(_is_time, entry.values())):
            return None
        return entry or None

    def fastest(
        self, key: str, measure: Callable[[], dict[str, float]], names: Collection[str] = ()
    ) -> str:
        """The candidate of the least time: as kept, or as measured now and then kept.

        names: of all candidates, where what is kept may have no others.
        """
        times = self.get(key)
        if times is None or (names and not times.keys() <= set(names)):
            times = measure()
            self.put(key, times)
        return min(times, key=times.__getitem__)

    def put(self, key: str, times: dict[str, float]) -> None:
        """Keep timings. Where the disk does not allow it, they are measured again next time."""
        entries = {**self._read(), key: times, "machine": self.machine}
        cache.write(KIND, self._key, json.dumps(entries, indent=1).encode(), self._folder)

    def _read(self) -> dict[str, object]:
        content = cache.read(KIND, self._key, self._folder)
        try:
            entries = json.loads(content or b"{}")
        except (ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}


def _is_time(value: object) -> bool:
    """Whether this is a number of milliseconds that can have been measured."""
    is_number = type(value) in (int, float)
    return is_number and 0 <= value < math.inf  # type: ignore[operator]  # it is a number


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
    """The first line of what the NVIDIA driver says of itself, or "unknown"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return text.splitlines()[0]
