"""Cards by name, as data: what a plan and an estimate of time need to know of one that is not here.

Figures are the makers': dense rates with sums in fp32, at the clock they state. Memory is what a
process can see.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import get_args

from magihuman.kernels.target import (
    E4M3_FROM,
    HOPPER,
    HOPPER_CAPABILITY,
    PORTABLE,
    Capability,
    Kernels,
    KernelSet,
)
from magihuman.runtime.errors import InvalidRequestError, one_of
from magihuman.runtime.memory.plan import GIB

PCIE_4, PCIE_5 = 24e9, 50e9  # bytes a second of pinned copies over 16 lanes
HALF_PCIE_4, HALF_PCIE_5 = PCIE_4 / 2, PCIE_5 / 2  # over 8 lanes
# Share of the dense rate that large products reach. An H100 reaches 0.6, measured; what has not
# been measured here is taken to reach less. Cards for games state half of the rate of others with
# sums in fp32, and run above the clock of their sheet, so that they come nearer to it.
SHARE, GAMES_SHARE = 0.5, 0.8
EIGHT_BIT_SHARE = 0.8  # of that, in 8 bits: the same work beside half of the time
ATTENTION_SHARE = 0.8  # of the rate in bf16 that products reach
HOPPER_ATTENTION = 5.5e14  # measured


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        name: on the command line.
        title: in full.
        sm: compute capability.
        memory_gib: that a process can see.
        bf16, int8, fp8: 10^12 operations a second of dense products; 0 where there are none.
        bus: bytes a second from pinned host memory.
        share: of the dense rate that large products are taken to reach.
        is_unified: whether its memory is the host's.
        asked: which kernels it is to run, as of `load`.
    """

    name: str
    title: str
    sm: Capability
    memory_gib: float
    bf16: float
    int8: float
    fp8: float
    bus: float = PCIE_4
    share: float = SHARE
    is_unified: bool = False
    asked: Kernels = "auto"

    @property
    def memory_bytes(self) -> int:
        """Bytes that a process can see."""
        return int(self.memory_gib * GIB)

    def asked_for(self, kernels: Kernels) -> Card:
        """The card, with the kernels that are asked for.

        Raises:
            InvalidRequestError: there are no such kernels.
        """
        one_of("kernels", kernels, get_args(Kernels))
        return dataclasses.replace(self, asked=kernels)

    @property
    def kernels(self) -> KernelSet:
        """The set of kernels that it runs: those for Hopper, or the portable ones."""
        return HOPPER if self.asked == "auto" and self.sm == HOPPER_CAPABILITY else PORTABLE

    @property
    def is_hopper(self) -> bool:
        """Whether it runs the kernels that were written for Hopper alone."""
        return self.kernels == HOPPER

    @property
    def precisions(self) -> tuple[str, ...]:
        """In which precisions transformers can run, the default first."""
        if self.sm < E4M3_FROM:
            return "int8", "bf16"
        return "fp8", "int8", "fp8-attn", "bf16"

    def linear_flops(self, precision: str) -> float:
        """Operations a second that products are taken to reach."""
        rates = {"bf16": self.bf16, "int8": self.int8}
        share = self.share
        if self.sm == HOPPER_CAPABILITY and (not self.is_hopper or precision == "int8"):
            share = SHARE  # its share is that of its own kernels, and int8 has portable ones alone
        rate = 1e12 * share * rates.get(precision, self.fp8)
        return rate if precision == "bf16" else EIGHT_BIT_SHARE * rate

    @property
    def attention_flops(self) -> float:
        """Operations a second that attention is taken to reach, in bf16."""
        if self.is_hopper:
            return HOPPER_ATTENTION
        return ATTENTION_SHARE * self.linear_flops("bf16")


def _games(
    name: str,
    title: str,
    sm: Capability,
    memory_gib: float,
    bf16: float,
    bus: float,
) -> Card:
    """A card for games: int8 at four times the rate of bf16, fp8 at twice."""
    fp8 = 2 * bf16 if sm >= E4M3_FROM else 0.0
    return Card(name, title, sm, memory_gib, bf16, 4 * bf16, fp8, bus, GAMES_SHARE)


CARDS = {
    card.name: card
    for card in (
        _games("3090", "GeForce RTX 3090", (8, 6), 23.7, 71.0, PCIE_4),
        _games("4060ti-16", "GeForce RTX 4060 Ti 16 GB", (8, 9), 15.6, 44.1, HALF_PCIE_4),
        _games("4080", "GeForce RTX 4080", (8, 9), 15.7, 97.5, PCIE_4),
        _games("4090", "GeForce RTX 4090", (8, 9), 23.6, 165.2, PCIE_4),
        _games("5060ti-16", "GeForce RTX 5060 Ti 16 GB", (12, 0), 15.5, 47.4, HALF_PCIE_5),
        _games("5080", "GeForce RTX 5080", (12, 0), 15.5, 112.6, PCIE_5),
        _games("5090", "GeForce RTX 5090", (12, 0), 31.4, 209.5, PCIE_5),
        Card("a10", "A10", (8, 6), 22.0, 125.0, 250.0, 0.0),
        Card("a6000", "RTX A6000", (8, 6), 47.4, 154.8, 309.7, 0.0),
        Card("6000ada", "RTX 6000 Ada", (8, 9), 47.4, 364.2, 728.5, 728.5),
        Card("a100-40", "A100 40 GB", (8, 0), 39.4, 312.0, 624.0, 0.0),
        Card("a100-80", "A100 80 GB", (8, 0), 79.2, 312.0, 624.0, 0.0),
        Card("l4", "L4", (8, 9), 22.0, 121.0, 242.0, 242.0),
        Card("l40s", "L40S", (8, 9), 44.4, 362.0, 733.0, 733.0),
        Card("h100", "H100 SXM", (9, 0), 79.1, 989.0, 1979.0, 1979.0, PCIE_5, 0.6),
        Card("h200", "H200", (9, 0), 139.8, 989.0, 1979.0, 1979.0, PCIE_5, 0.6),
        Card("b200", "B200", (10, 0), 178.4, 2250.0, 4500.0, 4500.0, PCIE_5),
        Card("pro6000", "RTX PRO 6000", (12, 0), 95.0, 503.8, 1007.6, 1007.6, PCIE_5),
        Card("gb10", "GB10", (12, 1), 119.7, 125.0, 250.0, 250.0, 100e9, is_unified=True),
    )
}
ALIASES = {"a100": "a100-80", "rtxpro6000": "pro6000", "dgxspark": "gb10", "4060ti": "4060ti-16"}
ALIASES |= {"5060ti": "5060ti-16", "rtx6000ada": "6000ada", "rtxa6000": "a6000"}
NOISE = re.compile(r"nvidia|geforce|rtx|[\s_-]|(?<=\d)gb$", re.IGNORECASE)


def card_of(name: str) -> Card:
    """The card of a name, in whatever case, with or without the maker's words.

    Raises:
        InvalidRequestError: there is none of that name; it lists those there are.
    """
    plain = NOISE.sub("", name).lower()
    known = {NOISE.sub("", key).lower(): card for key, card in CARDS.items()}
    known |= {NOISE.sub("", alias).lower(): CARDS[card] for alias, card in ALIASES.items()}
    if plain not in known:
        raise InvalidRequestError(
            f"card must be one of {', '.join(CARDS)}, got {name!r}; take the one nearest in"
            " architecture and memory, with --memory-limit-gb for less"
        )
    return known[plain]
