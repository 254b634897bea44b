"""A loaded model that takes requests from any thread.

`loading` checks what is asked for, finds and reads the model and assembles an `Engine`. `queue`
says whose turn it is, `stream` hands clips over while they are made, `failures` says what an error
leaves.
"""

from magihuman.runtime.engine import build, loading
from magihuman.runtime.engine.engine import Engine
from magihuman.runtime.engine.loading import load

__all__ = [
    "Engine",
    "build",
    "load",
    "loading",
]
