"""Attention by its definition in fp32, which kernels on a GPU are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from magihuman.kernels import reference as ref


def exact_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """fp32, a head at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, dtype=torch.float32)
    for head in range(q.shape[1]):
        keys, values = (x[:, head // group].float() for x in (k, v))
        scores = q[:, head].float() @ keys.T * q.shape[2] ** -0.5
        out[:, head] = scores.softmax(-1) @ values
    return out * gate.float().sigmoid()[..., None]


def gated_blockwise(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, local: ref.LocalAttention, length: Tensor
) -> Tensor:
    """Frame-local, with the keys from `length` on unseen."""
    valid = torch.arange(len(k), device=k.device) < length
    parts = (x.transpose(0, 1) for x in (q, k, v))
    return ref.head_gate(ref._ranges(*parts, local, valid, ref._blockwise_attention), gate)
