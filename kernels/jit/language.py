"""Triton and its language, where they are installed.

A file that imports both from here may declare its kernel's operator too: it can be imported where
Triton is not, to compute the reference. Functions are then left as they are, and nothing calls
them.
"""

from __future__ import annotations

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise  # Triton is there, and what it needs is not
    triton, tl = SimpleNamespace(jit=lambda function: function), None

__all__ = ["tl", "triton"]
