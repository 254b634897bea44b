"""What compiling any model's graph says: a report, or the error of a pass."""

from __future__ import annotations

from dataclasses import dataclass, field


class CompileError(RuntimeError):
    """A pass did not find what the architecture implies."""


@dataclass
class CompileReport:
    """What compiling did.

    Attributes:
        nodes_before: of the graph as captured.
        nodes_after: of the rewritten graph.
        kernels: the set that a transformer's come from, on a GPU.
        attention: the backend, of a transformer.
        linears: the route of each kind of linear, of a transformer.
        from_cache: whether the rewritten graph had been kept.
        matches: places that each pass found, by its name.
        seconds: that each step took, by its name.
    """

    nodes_before: int = 0
    nodes_after: int = 0
    kernels: str = ""
    attention: str = ""
    linears: dict[str, str] = field(default_factory=dict)
    from_cache: bool = False
    matches: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
