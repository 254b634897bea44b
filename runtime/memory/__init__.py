"""What is on the device, and when.

`plan` is arithmetic: which parts stay, which move, for a limit. `estimate` says what a clip needs
beside the weights, `placement` weighs a model for the plan, `offload` moves the weights.
"""

from magihuman.runtime.memory import estimate
from magihuman.runtime.memory.offload import Residency
from magihuman.runtime.memory.placement import (
    Cap,
    Placer,
    check_limit,
    folder_parts,
    held_by_others,
    limit_of,
    plan_memory,
    plan_placement,
    synthetic_parts,
)
from magihuman.runtime.memory.plan import (
    AUDIO,
    BASE,
    GIB,
    IMAGE,
    SR,
    TEXT,
    VIDEO,
    MemoryPlan,
    Part,
    StageMemory,
)

__all__ = [
    "AUDIO",
    "BASE",
    "GIB",
    "IMAGE",
    "SR",
    "TEXT",
    "VIDEO",
    "Cap",
    "MemoryPlan",
    "Part",
    "Placer",
    "Residency",
    "StageMemory",
    "check_limit",
    "estimate",
    "folder_parts",
    "held_by_others",
    "limit_of",
    "plan_memory",
    "plan_placement",
    "synthetic_parts",
]
