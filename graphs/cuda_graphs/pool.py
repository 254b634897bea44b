"""Captured graphs by size: one memory pool, a budget, and which of them to give up.

Only one graph runs at a time, so all share a pool. Before a new size would pass the budget
(`budget`), the least recently used graphs go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch

from magihuman.graphs.cuda_graphs.budget import Budget

log = logging.getLogger("magihuman")
Key = TypeVar("Key", bound=Hashable)
Graph = TypeVar("Graph")
Output = TypeVar("Output")

FREE_SHARE = 0.25  # of the memory that is free beside the weights, for the graphs of one model
TEXT_BUCKET = 64  # text is padded to a multiple of this
DRIVER_BYTES = 16 * 2**20  # assumed of each graph, since the driver does not say what it keeps


def bucket_of(tokens: int) -> int:
    """Tokens of a prompt of so many, once it is padded to its bucket: a graph is for one length."""
    return -(-tokens // TEXT_BUCKET) * TEXT_BUCKET


class Captures(Generic[Key, Graph]):
    """Captured graphs and what belongs to them, by size.

    Attributes:
        kept: in no order.
        pool: that captures use and set; None where nothing is kept.
        stream: that they are made on, since graphs that share a pool must share one; None on the
            CPU, where nothing can be captured.
    """

    def __init__(
        self,
        device: torch.device,
        budget_bytes: int | None,
        capturing: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Nothing is captured yet.

        Args:
            device: a GPU.
            budget_bytes: of all graphs; by default a quarter of the memory free now. One graph is
                kept even where it passes the budget alone.
            capturing: entered while a size is captured.
        """
        if budget_bytes is None:
            budget_bytes = int(FREE_SHARE * free_bytes(device))
        self.kept: dict[Key, Graph] = {}
        self.pool: Any = None
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device, self._budget = device, Budget[Key](budget_bytes)
        self._capturing = capturing

    def use(self, key: Key) -> Graph:
        """The graph of a size that is kept, which becomes the most recently used."""
        self._budget.use(key)
        return self.kept[key]

    def add(
        self, key: Key, tokens: int, own_bytes: int, capture: Callable[[], Graph], what: str
    ) -> None:
        """Capture a size, giving up others where it has no room beside them.

        Args:
            key: of a size that is not kept.
            tokens: what its memory in the pool grows with.
            own_bytes: that it needs outside the pool, beside what the driver keeps.
            capture: makes it.
            what: it is, for people.

        Raises:
            torch.OutOfMemoryError: it has no room, even with every other graph given up.
        """
        own_bytes += DRIVER_BYTES
        self._give_up(self._budget.make_room(tokens, own_bytes))
        graph = None
        while graph is None:
            try:
                with self._capturing or nullcontext():
                    graph = capture()
            except torch.OutOfMemoryError as error:
                if not self.kept:
                    raise torch.OutOfMemoryError(
                        f"{self._device} has no room to capture {what}, with no other size"
                        f" captured; ask for a smaller clip, or free memory: {error}"
                    ) from error
            if graph is None:  # outside the handler, whose error holds what was allocated
                self._give_up(self._budget.clear())
        self.kept[key] = graph
        self._budget.keep(key, tokens, own_bytes, pool_bytes(self.pool))

    def record(
        self, warm_up: Callable[[], object], run: Callable[[], Output], keep_graph: bool = False
    ) -> tuple[torch.cuda.CUDAGraph, Output]:
        """A graph of what `run` launches, in the pool, and what `run` returned.

        warm_up: goes before, since kernels compile and libraries choose when they are first called.
        keep_graph: as of `torch.cuda.CUDAGraph`.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            warm_up()
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):  # what other threads of a service call must not break it
                output = run()
        self.pool = graph.pool()
        torch.cuda.current_stream(self._device).wait_stream(self.stream)
        return graph, output

    def release(self) -> None:
        """Give every graph up."""
        self._give_up(self._budget.clear())

    def _give_up(self, keys: Iterable[Key]) -> None:
        for key in keys:
            log.info("gave up the graph of %s to save memory", key)
            del self.kept[key]
        if not self.kept:
            self.pool = None  # PyTorch refuses a pool whose last graph is gone
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """What can still be allocated: the device's free memory, as far as this process may have it,
    and PyTorch's unused blocks.
    """
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device.index)) - reserved
    return max(0, min(free, allowed)) + reserved - torch.cuda.memory_allocated(device)


def pool_bytes(pool: Any) -> int:
    """What a memory pool holds of the device, free blocks included."""
    segments = torch.cuda.memory_snapshot()
    return sum(part["total_size"] for part in segments if part["segment_pool_id"] == pool)
