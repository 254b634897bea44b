"""Which graphs go, in which order, counted without a GPU."""

from __future__ import annotations

from magihuman.graphs.cuda_graphs.budget import Budget


def test_nothing_goes_while_all_fits() -> None:
    budget = Budget[str](limit_bytes=1000)
    assert budget.make_room(100, 10) == []
    budget.keep("a", 100, 10, pool_bytes=400)  # 4 bytes a token
    assert budget.make_room(140, 10) == []  # 410 and 570 more
    budget.keep("b", 140, 10, pool_bytes=900)
    assert budget.total_bytes == 920
    assert budget.make_room(100, 80) == []  # no larger than b, so it needs no more of the pool
    budget.keep("c", 100, 80, pool_bytes=900)
    assert budget.total_bytes == 1000


def test_the_least_recently_used_goes_first() -> None:
    budget = Budget[str](limit_bytes=100)
    for key in "abcd":
        assert budget.make_room(10, 20) == []
        budget.keep(key, 10, 20, pool_bytes=20)
    budget.use("a")
    assert budget.make_room(10, 40) == ["b", "c"]
    assert budget.total_bytes == 60


def test_the_pool_counts_until_the_last_graph_goes() -> None:
    budget = Budget[str](limit_bytes=1000)
    budget.keep("small", 100, 10, pool_bytes=400)
    budget.keep("large", 200, 10, pool_bytes=900)
    # 1000 would do once the pool is given back, and not one graph earlier.
    assert budget.make_room(225, 10) == ["small", "large"]
    assert budget.total_bytes == 0
    budget.keep("larger", 225, 10, pool_bytes=900)
    assert budget.total_bytes == 910


def test_two_sizes_in_turn_keep_both_however_small_the_budget() -> None:
    """A graph is never given up for one that fits its pool, unless a third goes first."""
    budget = Budget[str](limit_bytes=0)
    budget.keep("prompt", 100, 10, pool_bytes=400)
    assert budget.make_room(90, 10) == []
    budget.keep("negative", 90, 10, pool_bytes=400)
    budget.use("prompt")
    budget.use("negative")
    assert budget.make_room(80, 10) == ["prompt"]


def test_a_growing_pool_is_given_back() -> None:
    """Else each larger size would add all of its own to what the smaller ones hold."""
    budget = Budget[str](limit_bytes=700)
    budget.keep("a", 100, 10, pool_bytes=400)
    assert budget.make_room(110, 10) == ["a"]
    budget.keep("b", 110, 10, pool_bytes=440)
    assert budget.make_room(100, 10) == []


def test_all_can_be_given_up() -> None:
    budget = Budget[str](limit_bytes=1000)
    budget.keep("a", 100, 10, pool_bytes=400)
    budget.keep("b", 100, 10, pool_bytes=400)
    budget.use("a")
    assert budget.clear() == ["b", "a"]
    assert budget.total_bytes == 0
    assert budget.clear() == []
