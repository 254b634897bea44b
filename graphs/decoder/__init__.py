"""The window decoder of the Turbo VAE, captured once, rewritten, replayed.

`compile` runs the passes, `replay` keeps a CUDA graph for each kind and size of window, `peak` says
how much memory one takes.
"""

from magihuman.graphs.decoder.replay import CompiledDecoder

__all__ = [
    "CompiledDecoder",
]
