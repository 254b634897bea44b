"""The text encoder, replayed as CUDA graphs.

It is not rewritten: it runs once a prompt, and what a graph saves are its launches. One graph
serves all prompts up to a multiple of 64 tokens.
"""

from magihuman.graphs.text.replay import ReplayedEncoder

__all__ = [
    "ReplayedEncoder",
]
