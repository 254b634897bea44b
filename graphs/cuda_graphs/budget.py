"""Which captured graphs to keep: the least recently used go when their memory passes a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Budget(Generic[Key]):
    """Bytes of the graphs kept, in order of use. It only counts: the caller frees what must go.

    All graphs share one pool, where the work of one overlaps the work of the others. A graph given
    up leaves its blocks there for later captures, and the device gets the pool back with the last
    graph. So the pool counts once, in full, for as long as anything is kept.

    A size no larger than the largest in the pool finds its blocks there. A larger one is taken to
    need all of its own, by the bytes a token that the first capture into an empty pool took.
    """

    def __init__(self, limit_bytes: int) -> None:
        """Nothing is kept yet. limit_bytes is for all graphs together; a single one may pass it."""
        self.limit_bytes = limit_bytes
        self._own_bytes: OrderedDict[Key, int] = OrderedDict()
        self._pool_bytes = 0
        self._largest_tokens = 0
        self._bytes_per_token = 0.0

    @property
    def total_bytes(self) -> int:
        """The bytes of everything kept: the pool, and what graphs need outside of it."""
        return self._pool_bytes + sum(self._own_bytes.values())

    def make_room(self, tokens: int, own_bytes: int) -> list[Key]:
        """What to give up before a graph of `tokens` is captured, the least recently used first.

        own_bytes: what the graph needs outside the pool.
        """
        grows = tokens > self._largest_tokens
        need = own_bytes + (int(tokens * self._bytes_per_token) if grows else 0)
        # Guidance runs two sizes in turn: were each given up for the other, every step would
        # capture. A growing pool is let go all the same, or it would keep each smaller one in it.
        spared = 0 if grows else 1
        gone = []
        while len(self._own_bytes) > spared and self.total_bytes + need > self.limit_bytes:
            gone.append(self._give_up_oldest())
        return gone

    def clear(self) -> list[Key]:
        """Give everything up, the least recently used first."""
        return [self._give_up_oldest() for _ in range(len(self._own_bytes))]

    def keep(self, key: Key, tokens: int, own_bytes: int, pool_bytes: int) -> None:
        """A graph was captured and is now the most recently used.

        pool_bytes: of the whole pool, measured after the capture.
        """
        if not self._own_bytes:
            self._bytes_per_token = pool_bytes / tokens
        self._own_bytes[key] = own_bytes
        self._pool_bytes = pool_bytes
        self._largest_tokens = max(self._largest_tokens, tokens)

    def use(self, key: Key) -> None:
        """Make a kept graph the most recently used."""
        self._own_bytes.move_to_end(key)

    def _give_up_oldest(self) -> Key:
        key, _ = self._own_bytes.popitem(last=False)
        if not self._own_bytes:
            self._pool_bytes = self._largest_tokens = 0
        return key
