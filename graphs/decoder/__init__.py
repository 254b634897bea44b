"""The window decoder of the Turbo VAE, captured once, rewritten, replayed.

`compile` runs the `passes`, once for each kind of window. `replay` keeps a CUDA graph for each kind
and size of window, and `peak` says how much memory one takes.
"""

from magihuman.graphs.decoder.replay import CompiledDecoder, batch_of

__all__ = [
    "CompiledDecoder",
    "batch_of",
]
