"""Rows for heads and back, between the processes that share a sequence: `torch.ops.magihuman.*`.

Between GPUs that can write to each other's memory, each operator is one kernel of `peers`.
Elsewhere it is one copy and one all-to-all of torch.distributed's default group: NCCL or, on the
CPU, where the copy is the reference, gloo. All are launched on the current stream and can be
captured.

Attention over e4m3 has operators of its own, which take an exchange and what is beside it: q and k
are narrowed before they are sent, and heads are written where their rows are wanted as soon as they
are attended with.

Bytes of a process, for S rows in bf16 and the published 40 and 8 heads of 128 over P processes:
7208 S 2 to the projection's way out, of which (P - 1) / P leave the device, and 5120 S 2 on the way
back. At P = 2 and S = 7381 (896x512, 5 s) that is 53 MB and 38 MB over the link for each layer.
Where a copy and an all-to-all do it, the two copies also read and write 364 MB of the device's
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from magihuman.kernels import ops
from magihuman.kernels import reference as ref
from magihuman.kernels.jit import UNSET
from magihuman.kernels.linear.scaled import runs_of

if TYPE_CHECKING:
    from magihuman.kernels.parallel.peers import Peers

_is_apart: ContextVar[bool] = ContextVar("apart", default=False)
_peers: Peers | None = None  # of this process's team


def connect(peers: Peers | None) -> None:
    """Exchange by stores between GPUs from now on; None: by torch.distributed."""
    global _peers
    _peers = peers


@contextmanager
def apart() -> Iterator[None]:
    """Within, what would be exchanged stays here, and nobody is waited for: a run before a capture
    may fail on one GPU alone.
    """
    token = _is_apart.set(True)
    try:
        yield
    finally:
        _is_apart.reset(token)


def room_bytes(rows: int, columns: int, width: int, ranks: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a process is sent in one exchange of rows for heads, and in one back.

    rows: of each process; columns: of the projection; width: of attention's result over all heads;
    itemsize: bytes of a value.
    """
    heads = rows * ranks * ref.packed_width(columns, ranks)
    return heads * itemsize, rows * width * itemsize


def _all_to_all(x: Tensor) -> Tensor:
    """Entry r of [ranks, S, W] goes to process r; entry r of the result comes from it."""
    received = torch.empty_like(x)
    if _is_apart.get():
        return received.copy_(x)
    # As bytes, whose exchange every backend has.
    dist.all_to_all_single(received.view(torch.uint8), x.view(torch.uint8))
    return received


@torch.library.custom_op("magihuman::rows_to_heads", mutates_args=())
def rows_to_heads(qkv: Tensor, heads: int, kv_heads: int, ranks: int) -> Tensor:
    """Give this process's rows of a whole projection for all rows of its heads' part of one.

    qkv: [S, C], rows [Q | K | V | gate] of so many heads. Returns [ranks S, C / ranks], rows
    [Q | K | V | gate] of the heads of this process.
    """
    if qkv.is_cuda and _peers is not None:
        return _peers.rows_to_heads(qkv, heads, kv_heads, ranks, _is_apart.get())
    if qkv.is_cuda:
        from magihuman.kernels.parallel import head_pack

        packed = head_pack.pack_heads(qkv, heads, kv_heads, ranks)
    else:
        packed = ref.pack_heads(qkv, heads, kv_heads, ranks)
    return _all_to_all(packed).flatten(0, 1)[:, : qkv.shape[1] // ranks]


@rows_to_heads.register_fake
def _(qkv: Tensor, heads: int, kv_heads: int, ranks: int) -> Tensor:
    rows, columns = qkv.shape
    out = qkv.new_empty(rows * ranks, ref.packed_width(columns, ranks))
    return out[:, : columns // ranks]


@torch.library.custom_op("magihuman::heads_to_rows", mutates_args=())
def heads_to_rows(x: Tensor, ranks: int) -> Tensor:
    """Give all rows of this process's heads, [ranks S, C / ranks], for its rows of all heads,
    [S, C].
    """
    if x.is_cuda and _peers is not None:
        return _peers.heads_to_rows(x.contiguous(), ranks, _is_apart.get())
    received = _all_to_all(x.contiguous().unflatten(0, (ranks, -1)))
    if x.is_cuda:
        from magihuman.kernels.parallel import head_pack

        return head_pack.unpack_heads(received)
    return ref.unpack_heads(received)


@heads_to_rows.register_fake
def _(x: Tensor, ranks: int) -> Tensor:
    return x.new_empty(x.shape[0] // ranks, x.shape[1] * ranks)


@torch.library.custom_op("magihuman::rows_to_heads_fp8", mutates_args=())
def rows_to_heads_fp8(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    length: Tensor,
    attended_rows: list[int],
    heads: int,
    kv_heads: int,
    ranks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `reference.qkv_fp8` of `rows_to_heads`, and with it the gate.

    qkv, heads, kv_heads: as of `rows_to_heads`; the others as of `qkv_fp8`, for the rows of all
    processes. Returns what `qkv_fp8` does for the heads of this process, and [ranks S, heads /
    ranks] in qkv's dtype.
    """
    own, own_kv = heads // ranks, kv_heads // ranks
    tables = q_weight, k_weight, rope
    if qkv.is_cuda and _peers is not None and _peers.narrows(qkv, tables, heads, kv_heads):
        from magihuman.kernels.attention import qkv_fp8 as kernel

        counts = runs_of(attended_rows)
        q, k, rest, qk_scale = _peers.rows_to_heads_fp8(
            qkv, *tables, counts, heads, kv_heads, _is_apart.get()
        )
        v, v_scale = kernel.values_fp8(rest, length, own_kv, q.shape[2])
        first = own_kv * q.shape[2]
        return q, k, v, qk_scale, v_scale, rest[:, first : first + own]
    whole = rows_to_heads(qkv, heads, kv_heads, ranks)
    narrow = ops.qkv_fp8(whole, *tables, length, attended_rows, own, own_kv)
    gate = _gates_behind(whole, own_kv * narrow[0].shape[2], own)
    return *narrow, gate.copy_(whole[:, whole.shape[1] - own :])


def _gates_behind(x: Tensor, values: int, heads: int) -> Tensor:
    """Room for gates [rows of x, heads] as they come beside so many values of a row."""
    return x.new_empty(x.shape[0], ref.packed_width(values + heads, 1))[:, values : values + heads]


@rows_to_heads_fp8.register_fake
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    length: Tensor,
    attended_rows: list[int],
    heads: int,
    kv_heads: int,
    ranks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    own, own_kv = heads // ranks, kv_heads // ranks
    whole = qkv.new_empty(qkv.shape[0] * ranks, qkv.shape[1] // ranks)
    narrow = ops.qkv_fp8(whole, q_weight, k_weight, rope, length, attended_rows, own, own_kv)
    return *narrow, _gates_behind(whole, own_kv * narrow[0].shape[2], own)


@torch.library.custom_op("magihuman::gated_attention_fp8_to_rows", mutates_args=())
def gated_attention_fp8_to_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: Tensor,
    v_scale: Tensor,
    gate: Tensor,
    length: Tensor,
    local: list[int],
    ranks: int,
    backend: str = UNSET,
) -> Tensor:
    """Compute `heads_to_rows` of `gated_attention_fp8`: [rows / ranks, heads ranks D] in gate's
    dtype, for q of [rows, heads, D].
    """
    scales = qk_scale, v_scale
    if q.is_cuda and _peers is not None and not local and gate.dtype == torch.bfloat16:
        from magihuman.kernels.attention import backends

        if backend == backends.LOCAL:
            from magihuman.kernels.attention import fp8

            (rows, own, dim), is_alone = q.shape, _is_apart.get()
            shared = _peers.shared_rows(rows // ranks, own * dim, gate.dtype, is_alone)
            out = fp8.attention(q, k, v, *scales, gate, length, shared=shared)
            _peers.meet_again(is_alone)
            return out
    out = ops.gated_attention_fp8(q, k, v, *scales, gate, length, local, backend)
    return heads_to_rows(out.flatten(1), ranks)


@gated_attention_fp8_to_rows.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: Tensor,
    v_scale: Tensor,
    gate: Tensor,
    length: Tensor,
    local: list[int],
    ranks: int,
    backend: str = UNSET,
) -> Tensor:
    rows, heads, dim = q.shape
    return gate.new_empty(rows // ranks, ranks * heads * dim)
