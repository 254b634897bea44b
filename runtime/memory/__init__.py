"""What is on the device, and when.

`plan` is arithmetic: which parts stay, which move, for a limit. `parts` weighs a model for it,
`estimate` says what a clip needs beside the weights, `speeds` how fast they come, `placement` makes
the plan of a model and keeps to it, `offload` moves the weights.
"""

from magihuman.runtime.memory import estimate
from magihuman.runtime.memory.cards import Card, card_of
from magihuman.runtime.memory.offload import Residency
from magihuman.runtime.memory.outlook import SIZES as CARD_SIZES
from magihuman.runtime.memory.outlook import Outlook
from magihuman.runtime.memory.outlook import outlook as outlook_of
from magihuman.runtime.memory.parts import folder_parts, synthetic_parts
from magihuman.runtime.memory.placement import (
    Cap,
    Clips,
    Placer,
    check_limit,
    held_by_others,
    limit_of,
    plan_memory,
    plan_placement,
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
from magihuman.runtime.memory.speeds import speeds_of

__all__ = [
    "AUDIO",
    "BASE",
    "CARD_SIZES",
    "GIB",
    "IMAGE",
    "SR",
    "TEXT",
    "VIDEO",
    "Cap",
    "Card",
    "Clips",
    "MemoryPlan",
    "Outlook",
    "Part",
    "Placer",
    "Residency",
    "StageMemory",
    "card_of",
    "check_limit",
    "estimate",
    "folder_parts",
    "held_by_others",
    "limit_of",
    "outlook_of",
    "plan_memory",
    "plan_placement",
    "speeds_of",
    "synthetic_parts",
]
