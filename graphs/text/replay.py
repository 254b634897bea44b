"""CUDA graphs of the text encoder, one for each length that prompts are padded to, replayed.

A prompt of some hundred tokens leaves the GPU waiting for the CPU: a forward of T5Gemma 9B launches
more than a thousand kernels, most of which take less time than a launch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from magihuman.graphs.cuda_graphs import Captures, bucket_of

log = logging.getLogger("magihuman")
Encode = Callable[[Tensor, Tensor], Tensor]  # ids [1, L] and a mask [1, 1, L, L] to [1, L, C]

BUDGET_BYTES = 2**30  # of all graphs; one of 640 tokens needs some 200 MiB


@dataclass
class _Captured:
    """A graph with its fixed inputs and output."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    length: Tensor
    hidden: Tensor


class ReplayedEncoder:
    """An encoder whose tokens all see each other, captured for each padded length when first seen.

    Not safe to call from several threads at once, nor from streams that do not wait for each other.
    Its graphs stay where others are given up for memory: a neighbour may be replaying one.
    """

    def __init__(self, encode: Encode, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing is captured yet.

        Args:
            encode: takes ids and a mask, which it adds to the scores of every layer's attention.
            dtype: of that mask.
            device: that the encoder is on.
        """
        self._encode, self._dtype, self._device = encode, dtype, device
        self._captures = Captures[int, _Captured](device, BUDGET_BYTES)

    def __call__(self, ids: Tensor) -> Tensor:
        """Hidden states [L, C] of token ids [1, L], which the next call may overwrite.

        Raises:
            torch.OutOfMemoryError: a new length has no room.
        """
        length = ids.shape[1]
        bucket = bucket_of(length)
        if bucket not in self._captures.kept:
            what = f"{bucket} tokens of text"
            self._captures.add(bucket, bucket, 0, lambda: self._capture(bucket), what)
        captured = self._captures.use(bucket)
        captured.ids[:, :length].copy_(ids)  # what follows counts for nothing
        captured.length.fill_(length)
        captured.graph.replay()
        return captured.hidden[0, :length]

    def _capture(self, bucket: int) -> _Captured:
        start = time.perf_counter()
        ids = torch.zeros(1, bucket, dtype=torch.long, device=self._device)
        length = torch.full((), bucket, device=self._device)

        def padded() -> Tensor:
            return self._encode(ids, key_mask(bucket, length, self._dtype))

        graph, hidden = self._captures.record(padded, padded)
        log.info("captured %d tokens of text in %.1f s", bucket, time.perf_counter() - start)
        return _Captured(graph, ids, length, hidden)


def key_mask(tokens: int, length: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores so that no token sees those from `length` on.

    length: a scalar. Returns [1, 1, tokens, tokens] on its device. Tokens beyond see the others,
    too: a row without anything to see would be NaN, and its values count for zero, not for nothing.
    """
    hidden = torch.arange(tokens, device=length.device) >= length
    mask = torch.zeros(tokens, dtype=dtype, device=length.device)
    mask.masked_fill_(hidden, torch.finfo(dtype).min)
    return mask.expand(1, 1, tokens, tokens)
