"""The runtime a service embeds: `load` a model, `generate` clips, `save` them.

    from magihuman import runtime

    with runtime.load("/models/daVinci-MagiHuman") as engine:
        engine.generate("A woman smiles and says: hello!").save("hello.mp4")

Importing this package imports neither torch nor any model; `load` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from magihuman.runtime.errors import (
    Cancelled,
    CheckpointError,
    DeadlineExceeded,
    DeviceError,
    EngineUnusable,
    InvalidRequestError,
    MagiHumanError,
    MissingExtraError,
    NonFiniteError,
    OutputError,
    QueueFull,
)
from magihuman.runtime.hooks import Hooks, NvtxHooks, OpenTelemetryHooks, PrometheusHooks
from magihuman.runtime.prompts import (
    Enhancement,
    Line,
    Prompt,
    PromptReport,
    PromptWarning,
    Scene,
    enhance,
    read_script,
)
from magihuman.runtime.prompts import check as check_prompt
from magihuman.runtime.request import Chunk, Plan, Progress, Request, Video

if TYPE_CHECKING:
    from magihuman.runtime.engine import Engine, LiveChunk, LiveVoice, load
    from magihuman.runtime.evaluate import verify
    from magihuman.runtime.media import Output
    from magihuman.runtime.weights import Synthetic as synthetic
    from magihuman.runtime.weights import convert, write_tiny

__all__ = [
    "Cancelled",
    "CheckpointError",
    "Chunk",
    "DeadlineExceeded",
    "DeviceError",
    "Engine",
    "EngineUnusable",
    "Enhancement",
    "Hooks",
    "InvalidRequestError",
    "Line",
    "LiveChunk",
    "LiveVoice",
    "MagiHumanError",
    "MissingExtraError",
    "NonFiniteError",
    "NvtxHooks",
    "OpenTelemetryHooks",
    "Output",
    "OutputError",
    "Plan",
    "Progress",
    "PrometheusHooks",
    "Prompt",
    "PromptReport",
    "PromptWarning",
    "QueueFull",
    "Request",
    "Scene",
    "Video",
    "check_prompt",
    "convert",
    "enhance",
    "load",
    "read_script",
    "synthetic",
    "verify",
    "write_tiny",
]

_LAZY = {
    "Engine": ("engine", "Engine"),
    "LiveChunk": ("engine", "LiveChunk"),
    "LiveVoice": ("engine", "LiveVoice"),
    "Output": ("media", "Output"),
    "convert": ("weights", "convert"),
    "load": ("engine", "load"),
    "synthetic": ("weights", "Synthetic"),
    "verify": ("evaluate", "verify"),
    "write_tiny": ("weights", "write_tiny"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
