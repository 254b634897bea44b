"""Which set of kernels a graph is made for: the ones written for Hopper, or the portable ones.

Operators, passes and graphs are the same for both. A graph names the kernel behind an operator in
the arguments `route` and `backend`, and these names are chosen for a `Target`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Kernels = Literal["auto", "portable"]  # what may be asked for
KernelSet = Literal["hopper", "portable"]  # what is used
Capability = tuple[int, int]  # of a GPU, such as (8, 6)

HOPPER: KernelSet = "hopper"
PORTABLE: KernelSet = "portable"
HOPPER_CAPABILITY: Capability = (9, 0)
PORTABLE_FROM: Capability = (8, 0)  # tensor cores that take bf16 and int8
E4M3_FROM: Capability = (8, 9)  # tensor cores that take e4m3

# KiB of shared memory that one block of threads may have, from the CUDA C++ Programming Guide,
# table "Technical Specifications per Compute Capability".
SHARED_KIB: dict[Capability, int] = {
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (11, 0): 227,
    (12, 0): 99,
    (12, 1): 99,
}
LEAST_SHARED_KIB = 99  # of all that have bf16, and what is taken of one that is not listed


@dataclass(frozen=True)
class Target:
    """What kernels are chosen for.

    Attributes:
        kernels: the set that they come from.
        capability: of the GPU whose tiles the portable kernels use.
    """

    kernels: KernelSet
    capability: Capability

    @property
    def is_portable(self) -> bool:
        """Whether kernels come from the portable set."""
        return self.kernels == PORTABLE

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that one block of threads may have."""
        return 1024 * SHARED_KIB.get(self.capability, LEAST_SHARED_KIB)

    @property
    def architecture(self) -> str:
        """The capability as compilers write it, such as "sm_86"."""
        return name_of(self.capability)


def target_of(
    kernels: Kernels, device: torch.device, tiles_for: Capability | None = None
) -> Target:
    """The set of kernels that is used on this GPU, and the tiles of the portable ones.

    Args:
        kernels: "auto" for the Hopper kernels on Hopper and the portable ones elsewhere, or
            "portable" for the latter everywhere.
        device: a GPU.
        tiles_for: capability of another GPU whose tiles are to be used, such as (8, 6); by default
            that of the device.

    Raises `ValueError` where `kernels` is neither.
    """
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels must be one of {', '.join(get_args(Kernels))}, got {kernels!r}")
    capability = torch.cuda.get_device_capability(device)
    is_hopper = kernels == "auto" and capability == HOPPER_CAPABILITY
    return Target(HOPPER if is_hopper else PORTABLE, tiles_for or capability)


def nearest(capability: Capability, listed: Collection[Capability]) -> Capability:
    """The last of the listed capabilities up to this one that has no more shared memory.

    So what is made for one of them fits: sm_87 takes what is made for sm_80, and an unlisted
    capability what is made for one with the least.

    Raises `ValueError` where there is none.
    """

    def shared(one: Capability) -> int:
        return Target(PORTABLE, one).shared_bytes

    fitting = [one for one in listed if one <= capability and shared(one) <= shared(capability)]
    if not fitting:
        names = ", ".join(map(name_of, sorted(listed)))
        raise ValueError(
            f"there are tiles for {names} and later, and none that fit {name_of(capability)}"
        )
    return max(fitting)


def name_of(capability: Capability) -> str:
    """A capability as compilers write it, such as "sm_86"."""
    return f"sm_{capability[0]}{capability[1]}"
