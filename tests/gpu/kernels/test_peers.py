"""What kernels write to the memory of other processes, where all of it is one GPU's own."""

from __future__ import annotations

import pytest
import torch

from magihuman.kernels import reference as ref

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman.kernels.attention import backends, qkv_fp8
from magihuman.kernels.attention import fp8 as attention_fp8
from magihuman.kernels.attention.shared_rows import SharedRows
from magihuman.kernels.parallel import exchange, peers, rooms

DEVICE = torch.device("cuda", 0)
RANKS = 4


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def alone(rank: int, monkeypatch: pytest.MonkeyPatch) -> peers.Peers:
    """A process's end of exchanges of which all others' memory is its own."""
    made = peers.Peers(rank, RANKS, DEVICE)
    made.allocate(2**24, 2**24)
    monkeypatch.setattr(rooms, "_map", lambda handle, device: made._rooms[0]._address)
    made.meet(lambda handle: [handle] * RANKS)
    return made


@pytest.mark.parametrize("rows", [1, 37, 268])
@pytest.mark.parametrize(("heads", "kv_heads", "angles"), [(40, 8, 48), (8, 4, 64), (24, 8, 16)])
def test_heads_are_narrowed_on_their_way(
    rows: int, heads: int, kv_heads: int, angles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of each process, for the heads of all: the bits that one GPU has of all rows."""
    torch.manual_seed(rows)
    total, dim = RANKS * rows, peers.NARROW_DIM
    columns = (heads + 2 * kv_heads) * dim + heads
    qkv = randn(total, columns + 8)[:, :columns]  # rows further apart than they are long
    qkv[: total // 3] *= 1e-4  # where eps counts
    angle = randn(total, angles, dtype=torch.float32)
    rope = torch.cat((angle.sin(), angle.cos()), dim=1)
    length = torch.tensor(total, device=DEVICE, dtype=torch.int32)
    for counts in (None, (total - total // 2 - total // 4, total // 4, total // 2)):
        weights = [0.3 * randn(dim * (3 if counts else 1), dtype=torch.float32) for _ in "qk"]
        arguments = (*weights, rope, length, counts, heads, kv_heads)
        q, k, _, scale, _ = qkv_fp8.qkv_fp8(qkv, *arguments)
        _, _, values, gate = ref.split_qkv(qkv, *weights, rope, counts, heads, kv_heads)
        for rank in range(RANKS):
            end = alone(rank, monkeypatch)
            mine = slice(rank * rows, (rank + 1) * rows)
            assert end.narrows(qkv[mine], (*weights, rope), heads, kv_heads)
            end._rooms[0].own_heads.fill_(0xFF)  # NaN in e4m3 and in bf16
            *narrow, rest, made_scale = end.rows_to_heads_fp8(
                qkv[mine], *weights, rope, counts, heads, kv_heads, is_alone=True
            )
            assert torch.equal(made_scale, scale)
            for made, whole in zip(narrow, (q, k), strict=True):
                # Alone, what is for the heads of each process lies in its run of rows.
                right = torch.cat(whole[mine].chunk(RANKS, dim=1))
                assert torch.equal(made.view(torch.uint8), right.view(torch.uint8))
            given = [torch.cat(x[mine].flatten(1).chunk(RANKS, dim=1)) for x in (values, gate)]
            right = torch.cat(given, dim=1)
            assert torch.equal(rest[:, : right.shape[1]], right)
            assert not rest[:, right.shape[1] :].any()
            end.close()


def test_other_projections_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor heads of another width, what is not aligned or not bf16, and what has no room."""
    end = alone(0, monkeypatch)
    tables = tuple(torch.zeros(n, 128, device=DEVICE) for n in (1, 1, 4096))
    qkv = randn(64, 56 * 128 + 40)
    assert end.narrows(qkv, tables, 40, 8)
    assert not end.narrows(qkv.float(), tables, 40, 8)
    assert not end.narrows(randn(64, 57 * 128)[:, 1:][:, : 56 * 128 + 40], tables, 40, 8)
    assert not end.narrows(randn(64, 56 * 16 + 40), tables, 40, 8)
    assert not end.narrows(randn(4096, 56 * 128 + 40), tables, 40, 8)
    end.close()


@pytest.mark.parametrize("rows", [1, 5, 131, 1072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_alone_are_those_of_all(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    kv_heads, dim = 2, 128
    x = randn(rows, kv_heads * dim + 16, dtype=dtype)
    length = torch.tensor(max(1, rows - 3), device=DEVICE, dtype=torch.int32)
    x[int(length) :] = 1e30
    v, scale = qkv_fp8.values_fp8(x, length, kv_heads, dim)
    none = torch.zeros(dim, device=DEVICE)
    rope = torch.zeros(rows, 96, device=DEVICE)
    qkv = torch.cat((x[:, : kv_heads * dim].repeat(1, 3), x[:, -2:]), dim=1)
    right = ref.qkv_fp8(qkv, none, none, rope, length, None, kv_heads, kv_heads)
    assert torch.equal(v.float(), right[2].float())
    torch.testing.assert_close(scale, right[4], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "ranks"), [(268, 4), (77, 2), (1072, 4), (1, 2)])
@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(10, 2, 128), (4, 2, 64), (3, 1, 32)])
def test_attention_writes_rows_where_they_are_wanted(
    rows: int, ranks: int, consumers: int, heads: int, kv_heads: int, dim: int
) -> None:
    """The bits of attention in this process's memory, tiles that end amid a process's rows too."""
    reason = backends.why_not("gluon", dim, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(rows)
    total = rows * ranks
    qkv = randn(total, (heads + 2 * kv_heads) * dim + heads)
    angle = randn(total, 3 * dim // 8, dtype=torch.float32)
    rope = torch.cat((angle.sin(), angle.cos()), dim=1)
    none = torch.zeros(dim, device=DEVICE)
    length = torch.tensor(max(1, total - 5), device=DEVICE, dtype=torch.int32)
    parts = qkv_fp8.qkv_fp8(qkv, none, none, rope, length, None, heads, kv_heads)
    gate = qkv[:, -heads:]
    right = attention_fp8.attention(*parts, gate, length, consumers=consumers).flatten(1)
    # The memories of all processes one after another, the first of them in the middle.
    wide = 3 * heads * dim
    memory = torch.full((ranks, rows, wide), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    first = ranks // 2
    away = [(rank - first) * rows * wide * 2 // 16 for rank in range(ranks)]
    shared = SharedRows(memory[first], heads * dim, torch.tensor(away, device=DEVICE))
    out = attention_fp8.attention(*parts, gate, length, consumers=consumers, shared=shared)
    assert out.data_ptr() == memory[first].data_ptr()
    columns = slice(heads * dim, 2 * heads * dim)
    assert torch.equal(memory[:, :, columns].flatten(0, 1), right)
    memory[:, :, columns] = float("nan")
    assert memory.isnan().all()


def test_operators_without_peers_are_those_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both operators over stores, of a team of one process, against what they stand for."""
    heads, kv_heads, dim, rows = 40, 8, 128, 300
    team = peers.Peers(0, 1, DEVICE)
    columns = (heads + 2 * kv_heads) * dim + heads
    team.allocate(*exchange.room_bytes(rows, columns, heads * dim, 1, 2))
    team.meet(lambda handle: [handle])
    qkv = randn(rows, columns)
    weights = [0.3 * randn(dim, dtype=torch.float32) for _ in "qk"]
    angle = randn(rows, 48, dtype=torch.float32)
    rope = torch.cat((angle.sin(), angle.cos()), dim=1)
    length = torch.tensor(rows - 7, device=DEVICE, dtype=torch.int32)
    made = []
    for end in (team, None):
        monkeypatch.setattr(exchange, "_peers", end)
        monkeypatch.setattr(exchange, "_all_to_all", lambda x: x)
        parts = exchange.rows_to_heads_fp8(qkv, *weights, rope, length, [], heads, kv_heads, 1)
        out = exchange.gated_attention_fp8_to_rows(*parts, length, [], 1, backends.LOCAL)
        made.append((parts[5].clone(), parts[4], out.clone()))
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)
    team.close()
