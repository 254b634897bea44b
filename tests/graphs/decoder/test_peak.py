"""The memory of a graph's tensors, from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magihuman.graphs.decoder.peak import peak_bytes
from magihuman.graphs.trace import capture


class Chain(nn.Module):
    """Grows by a row at a time; the first of its tensors is read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))

    def forward(self, x: Tensor) -> Tensor:
        first = x + self.weight  # 1000
        second = torch.cat((first, first))  # 2000
        third = torch.cat((second, first))  # 3000
        fourth = third[500:].exp()  # 2500; a view is no memory of its own
        return fourth[:1000] * first


def test_tensors_count_while_somebody_reads_them() -> None:
    x = torch.zeros(1000)
    module = capture(Chain(), {"x": x})
    # Most at once: first, second and third; then first, third and fourth. Weights do not count.
    assert peak_bytes(module, x) == 4 * (1000 + 3000 + 2500)
