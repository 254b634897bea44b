"""Tensors that move are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from magihuman.graphs.cuda_graphs.addresses import MovedError, addresses, check_addresses


def test_a_change_in_place_is_no_move() -> None:
    layer = nn.Linear(3, 3)
    captured = addresses(dict(layer.named_parameters()))
    with torch.no_grad():
        layer.weight.copy_(torch.ones(3, 3))
    layer.load_state_dict(nn.Linear(3, 3).state_dict())
    check_addresses(captured, dict(layer.named_parameters()))


@pytest.mark.parametrize("by", ["data", "parameter"])
def test_a_moved_tensor_is_named(by: str) -> None:
    layer = nn.Linear(3, 3)
    before = layer.bias  # kept, so that its address is not given to the new one
    storage = before.data
    captured = addresses(dict(layer.named_parameters()))
    if by == "data":
        layer.bias.data = storage.clone()
    else:
        layer.bias = nn.Parameter(storage.clone())
    with pytest.raises(MovedError, match=rf"bias must stay at {storage.data_ptr():#x}.* in place"):
        check_addresses(captured, dict(layer.named_parameters()))


def test_a_missing_tensor_is_named() -> None:
    layer = nn.Linear(3, 3)
    captured = addresses(dict(layer.named_parameters()))
    layer.bias = None
    with pytest.raises(MovedError, match=r"bias must stay .* and is gone"):
        check_addresses(captured, dict(layer.named_parameters()))
