"""A loaded model that takes requests from any thread.

`loading` takes `options`, has a `blueprint` drawn of the model, has `build` read or make its
components, and `assemble` an `Engine` of them. `queue` says whose turn it is, `stream` hands clips
over while they are made, `live` has what follows a voice that is still coming, `warmup` runs every
model before the first request does, and `failures` says what an error leaves.
"""

from magihuman.runtime.engine import loading
from magihuman.runtime.engine.engine import Engine
from magihuman.runtime.engine.live import LiveChunk, LiveVoice
from magihuman.runtime.engine.loading import load
from magihuman.runtime.engine.options import LoadOptions, OnLoad

__all__ = [
    "Engine",
    "LiveChunk",
    "LiveVoice",
    "LoadOptions",
    "OnLoad",
    "load",
    "loading",
]
