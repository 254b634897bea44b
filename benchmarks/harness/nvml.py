"""Energy, clock and throttle reasons of a GPU, from NVML, NVIDIA's management library.

Functions and constants are those of the NVML API reference, "Device Queries". The library comes
with the driver and is called by ctypes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"
SM_CLOCK = 1  # of nvmlClockType_t
REASONS = {  # bits of nvmlClocksEventReasons, all but those of other cards' features
    0x1: "idle",
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, by the driver",
    0x40: "thermal, by the hardware",
    0x80: "power brake",
    0x100: "display clock",
}


class Gpu:
    """A GPU as NVML knows it.

    `why_not` says why NVML cannot be asked about it, else it is None. Where it cannot, or where
    this GPU has no such reading, a reading is None.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        """device: a CUDA device, found by its UUID, whatever devices this process sees.

        library: has NVML's functions; by default the driver's.
        """
        self.why_not: str | None = None
        self._handle = ctypes.c_void_p()
        if device.type != "cuda":
            self.why_not = f"NVML is about NVIDIA's GPUs, not about {device.type}"
            return
        try:
            self._library = ctypes.CDLL(LIBRARY) if library is None else library
        except OSError as error:
            self.why_not = f"{LIBRARY} cannot be loaded: {error}"
            return
        self.why_not = self._found(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; the counter moves every few tens of milliseconds."""
        found = self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
        return None if found is None else found / 1e3

    def sm_mhz(self) -> int | None:
        """Clock of the streaming multiprocessors now."""
        return self._ask("nvmlDeviceGetClockInfo", ctypes.c_uint(), SM_CLOCK)

    def throttle_reasons(self) -> list[str] | None:
        """Names of what keeps the clock from being higher now; none where nothing does."""
        found = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong())
        return None if found is None else [name for bit, name in REASONS.items() if found & bit]

    def _found(self, uuid: str) -> str | None:
        """Find the GPU; why it was not found."""
        code = self._library.nvmlInit_v2()
        if code == 0:
            code = self._library.nvmlDeviceGetHandleByUUID(
                uuid.encode(), ctypes.byref(self._handle)
            )
        return None if code == 0 else f"NVML answers {code} when asked for {uuid}"

    def _ask(self, function: str, result: Any, *arguments: int) -> int | None:
        """What a function leaves in `result`, its last argument."""
        if self.why_not is not None:
            return None
        ask = getattr(self._library, function, None)
        if ask is None or ask(self._handle, *arguments, ctypes.byref(result)) != 0:
            return None
        return int(result.value)
