"""How much memory a graph's tensors take at most, from their shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def peak_bytes(module: fx.GraphModule, *inputs: Tensor) -> int:
    """Bytes of all tensors, inputs included, that a graph keeps at once, each until it is last
    read; without weights and what operators use inside.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        walk = _Walk(module)
        walk.run(*(mode.from_tensor(tensor) for tensor in inputs))
    return walk.peak


class _Walk(fx.Interpreter):
    """Runs a graph on shapes and keeps the most bytes that were alive at once."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.peak = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        live: dict[int, int] = {}
        for value in (*self.env.values(), result):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, FakeTensor):  # a weight is not
                    storage = tensor.untyped_storage()
                    live[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, sum(live.values()))
        return result


def reserve(size_bytes: int, device: torch.device) -> Tensor:
    """One block of this size, for the allocator to cut from once the caller lets go of it.

    Tensors that grow from one operator to the next would each need memory of their own: what
    smaller ones leave is in pieces.
    """
    return torch.empty(size_bytes, dtype=torch.uint8, device=device)
