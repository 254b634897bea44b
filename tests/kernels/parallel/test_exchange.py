"""What is copied before and after an exchange, and the exchange itself between two processes."""

from __future__ import annotations

import pytest
import torch

from magihuman.kernels import reference as ref
from magihuman.kernels.parallel import exchange

HEADS, KV_HEADS, DIM, ROWS = 12, 4, 8, 5
COLUMNS = (HEADS + 2 * KV_HEADS) * DIM + HEADS


def projection() -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_packed_columns_are_the_projection_of_fewer_heads(ranks: int) -> None:
    """Each process's part splits as the whole does, into its run of each kind of head."""
    qkv, ones = projection(), torch.zeros(DIM)
    rope = torch.cat((torch.zeros(ROWS, 2), torch.ones(ROWS, 2)), dim=1)  # turns nothing
    whole = ref.split_qkv(qkv, ones, ones, rope, None, HEADS, KV_HEADS)
    packed = ref.pack_heads(qkv, HEADS, KV_HEADS, ranks)
    assert packed.shape[2] % ref.PACKED_COLUMNS == 0
    assert packed.shape[2] - COLUMNS // ranks < ref.PACKED_COLUMNS
    assert not packed[:, :, COLUMNS // ranks :].any()
    for rank in range(ranks):
        columns = packed[rank, :, : COLUMNS // ranks]
        parts = ref.split_qkv(columns, ones, ones, rope, None, HEADS // ranks, KV_HEADS // ranks)
        for part, all_heads in zip(parts, whole, strict=True):
            assert torch.equal(part, all_heads.chunk(ranks, dim=1)[rank])


def test_unpacking_puts_columns_side_by_side() -> None:
    x = torch.randn(ROWS, 6 * 4)
    assert torch.equal(ref.unpack_heads(torch.stack(x.chunk(3, dim=1))), x)


@pytest.mark.parametrize(
    ("counts", "ranks", "each"),
    [
        ((10, 4, 3), 2, [(9, 0, 0), (1, 4, 4)]),
        ((2, 3, 6), 4, [(2, 1, 0), (0, 2, 1), (0, 0, 3), (0, 0, 3)]),
        ((7, 0, 0), 1, [(7, 0, 0)]),
    ],
)
def test_rows_are_shared_in_runs(counts: ref.Counts, ranks: int, each: list[ref.Counts]) -> None:
    """Equal ones, together all of the sequence in its order, with the text padded."""
    sharding = ref.Sharding.of(counts, ranks)
    assert sharding.counts[:2] == counts[:2]
    assert 0 <= sharding.counts[2] - counts[2] < ranks
    assert [sharding.own_counts(rank) for rank in range(ranks)] == each
    assert {sum(rows) for rows in each} == {sharding.rows}
    streams = [[(i, row) for row in range(count)] for i, count in enumerate(sharding.counts)]
    shares = [
        row
        for rank in range(ranks)
        for stream, rows in zip(streams, sharding.own(rank), strict=True)
        for row in stream[rows]
    ]
    assert shares == [row for stream in streams for row in stream]


def test_apart_nothing_is_exchanged() -> None:
    """And so no other process, nor a group, is needed; shapes are those of an exchange."""
    qkv = projection()
    with exchange.apart():
        heads = exchange.rows_to_heads(qkv, HEADS, KV_HEADS, 2)
        back = exchange.heads_to_rows(heads[:, : HEADS // 2 * DIM], 2)
    assert heads.shape == (2 * ROWS, COLUMNS // 2)
    assert torch.equal(back, qkv[:, : HEADS * DIM])
    with pytest.raises(ValueError, match="process group"):
        exchange.rows_to_heads(qkv, HEADS, KV_HEADS, 2)


@pytest.mark.parametrize("counts", [None, (6, 3, 1)])
def test_narrowed_heads_are_those_of_the_exchanged_projection(counts: ref.Counts | None) -> None:
    """And what is attended with them comes back as it would from the heads of several."""
    torch.manual_seed(0)
    dim, heads, kv_heads, ranks = 16, 4, 2, 2
    qkv = torch.randn(ROWS, (heads + 2 * kv_heads) * dim + heads).bfloat16()
    weights = [torch.randn(dim * (3 if counts else 1)) for _ in "qk"]
    rope, length = torch.randn(ranks * ROWS, 12), torch.tensor(2 * ROWS - 1, dtype=torch.int32)
    rows = list(counts or ())
    with exchange.apart():
        whole = exchange.rows_to_heads(qkv, heads, kv_heads, ranks)
        own = heads // ranks, kv_heads // ranks
        right = ref.qkv_fp8(whole, *weights, rope, length, counts, *own)
        *made, gate = exchange.rows_to_heads_fp8(
            qkv, *weights, rope, length, rows, heads, kv_heads, ranks
        )
        out = exchange.gated_attention_fp8_to_rows(*made, gate, length, [], ranks)
        back = exchange.heads_to_rows(ref.attention_fp8(*right, gate, length).flatten(1), ranks)
    for mine, theirs in zip(made, right, strict=True):
        assert torch.equal(mine.float(), theirs.float())
    assert torch.equal(gate, whole[:, -own[0] :])
    assert torch.equal(out, back) and out.shape == (ROWS, heads * dim)


def test_fake_results_have_the_strides_of_real_ones() -> None:
    qkv = projection()
    with exchange.apart():
        for op, args in (
            (exchange.rows_to_heads, (HEADS, KV_HEADS, 2)),
            (exchange.heads_to_rows, (1,)),
        ):
            real, fake = op(qkv, *args), op(qkv.to("meta"), *args)
            assert (real.shape, real.stride()) == (fake.shape, fake.stride())
