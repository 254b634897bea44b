"""What the passes know of the model and of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magihuman.kernels.reference import Counts, LocalAttention, Sharding


@dataclass(frozen=True)
class Context:
    """A model's architecture, and the sizes of the sequences that a graph of it is for.

    Attributes:
        config: the architecture, anything with the fields of `magihuman.runtime`'s `DiTConfig`.
        modality_rows: rows of video, audio and text; where several processes share a sequence,
            of those that one of them has.
        dtype: of the linears inside the blocks.
        device: that the model is on.
        local: shape of frame-local attention, where the architecture has such layers.
        sharding: how several processes share a sequence, where they do.
    """

    config: Any
    modality_rows: Counts
    dtype: torch.dtype
    device: torch.device
    local: LocalAttention | None = None
    sharding: Sharding | None = None

    @property
    def tokens(self) -> int:
        """Rows of the graph's linears: the sequence's length, padding included, or one's share."""
        return sum(self.modality_rows)

    @property
    def attended_rows(self) -> Counts:
        """Rows of video, audio and text that attention is over: those of the whole sequence."""
        return self.modality_rows if self.sharding is None else self.sharding.counts

    @property
    def ranks(self) -> int:
        """Processes that share a sequence, and its heads."""
        return 1 if self.sharding is None else self.sharding.ranks

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key/value heads that attention is over."""
        return self.config.heads // self.ranks, self.config.kv_heads // self.ranks

    @property
    def hidden(self) -> int:
        """Channels of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def groupings(self) -> tuple[Counts | None, ...]:
        """The ways in which layers group rows: by modality, and not at all."""
        layers, modality = self.config.num_layers, len(self.config.modality_layers)
        return ((self.modality_rows,) if modality else ()) + ((None,) if modality < layers else ())

    def example(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor to trace with."""
        return torch.empty(shape, dtype=dtype, device=self.device)
