"""What may be asked of a compiled transformer, beside its sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magihuman.kernels.target import Capability, Kernels


@dataclass(frozen=True)
class CompileOptions:
    """How a forward is rewritten to fused kernels.

    Attributes:
        attention_backend: one of `kernels.attention.backends.NAMES`; by default what measures
            fastest here.
        linear_route: one of `kernels.linear.routes.TILES` or "library"; by default what measures
            fastest here for each shape.
        cache: folder of rewritten graphs; by default the user's.
        fp8_attention: attention over e4m3 q, k and v, in the layers whose projection to them has
            e4m3 weights.
        kernels: "auto" for the Hopper kernels on Hopper and the portable ones elsewhere, or
            "portable" for the latter everywhere.
        tiles_for: capability of another GPU whose tiles the portable kernels use, such as (8, 6);
            by default that of the device.
    """

    attention_backend: str | None = None
    linear_route: str | None = None
    cache: Path | None = None
    fp8_attention: bool = False
    kernels: Kernels = "auto"
    tiles_for: Capability | None = None


@dataclass(frozen=True)
class ReplayOptions(CompileOptions):
    """How a forward is rewritten, captured and replayed.

    Attributes:
        budget_bytes: of all captured graphs; by default a quarter of the memory free now. One graph
            is kept even where it passes the budget alone.
        capturing: entered while a size is timed and captured, when nothing else may run on the
            device.
        replays: False launches kernels one by one, and nothing is captured.
        before_layer: called, where nothing is captured, with the number of each layer before it is
            launched, and with their number behind the last.
        debug: check before every replay that no tensor has moved, and keep what was captured for
            `CompiledForward.recorded`.
        rank: of this process among `ranks`.
        ranks: processes that share each sequence, the default group of torch.distributed.
    """

    budget_bytes: int | None = None
    capturing: AbstractContextManager[Any] | None = None
    replays: bool = True
    before_layer: Callable[[int], None] | None = None
    debug: bool = False
    rank: int = 0
    ranks: int = 1
