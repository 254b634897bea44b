"""How the route of a linear is chosen, as far as that needs no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from magihuman.kernels.linear.routes import with_room


def test_a_route_without_memory_is_no_choice():
    """A limit may leave room for tiles, and none for what the library has to write before."""
    ran = []

    def run(name: str) -> None:
        ran.append(name)
        if name in full:
            raise torch.OutOfMemoryError(f"{name} has no room")

    full = {"library"}
    assert with_room(run, ["library", "narrow", "wide"]) == ["narrow", "wide"]
    assert ran == ["library", "narrow", "wide"]
    full |= {"narrow", "wide"}
    with pytest.raises(torch.OutOfMemoryError, match="wide has no room"):
        with_room(run, ["library", "narrow", "wide"])


def test_another_error_is_told():
    def run(name: str) -> None:
        raise ValueError(name)

    with pytest.raises(ValueError, match="library"):
        with_room(run, ["library", "narrow"])
