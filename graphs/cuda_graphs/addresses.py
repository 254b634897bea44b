"""A replayed graph reads and writes the addresses it was captured with; this checks them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class MovedError(RuntimeError):
    """A tensor of a captured graph is no longer where it was; the message names it."""


def addresses(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The address at which each tensor begins, by its name."""
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def check_addresses(captured: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
    """Check that every tensor still begins where `captured` says.

    Raises:
        MovedError: one does not, or is gone.
    """
    for name, address in captured.items():
        if name not in tensors:
            state = "gone"
        elif tensors[name].data_ptr() != address:
            state = f"at {tensors[name].data_ptr():#x}"
        else:
            continue
        raise MovedError(
            f"{name} must stay at {address:#x}, where its graph was captured, and is {state};"
            " change values in place (copy_), or make a new CompiledForward"
        )
