"""Results of attention that go to the memory of several processes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SharedRows:
    """Where a kernel of every process writes the columns of its heads, in the rows' owners' memory.

    Attributes:
        out: [S, columns] of this process, of all heads; `first` is the first column to write.
        distances: int64 [ranks], from `out` to that of each process, in units of 16 bytes.
    """

    out: Tensor
    first: int
    distances: Tensor
