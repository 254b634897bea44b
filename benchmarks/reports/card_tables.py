"""What docs/models.md says of other cards: what would run there, and the text encoder in 8 bits."""

from __future__ import annotations

from typing import Any

from magihuman.runtime.memory.cards import CARDS, Card
from magihuman.runtime.memory.outlook import SIZES, Outlook, outlook
from magihuman.runtime.memory.plan import GIB

# Ten of those that `doctor --card` knows, one for each architecture and size of memory.
SHOWN = (
    "4080", "3090", "4090", "5090", "a100-40", "l40s", "a100-80", "h100", "pro6000", "gb10",
)  # fmt: skip
TEXT_PRECISIONS = ("bf16", "int8", "fp8")


def text_lines(figures: dict[str, Any]) -> list[str]:
    """Errors of embeddings, and the nano model's score, by the precision of the text encoder."""
    facts, nano = figures["environment"], figures["nano"]
    normal, outliers = (figures["random"][kind] for kind in ("normal", "outliers"))
    made = [name for name in TEXT_PRECISIONS if name in nano]
    score = [nano[name]["score"] for name in made]

    def both(of: dict[str, Any]) -> list[str]:
        return [f"{of[name]['error']:.4f} ({of[name]['worst_token']:.4f})" for name in made]

    rows = [
        (f"{figures['layers']} layers at the published width, normally distributed", both(normal)),
        ("the same with columns 30 times as large", both(outliers)),
        ("the nano model's encoder, over its held-out prompts", both(nano)),
        ("nano: named colours where they belong", [f"{100 * s['colours']:.0f} %" for s in score]),
        ("nano: correlation of mouth and sound", [f"{s['synchrony']:.2f}" for s in score]),
    ]
    return [
        "Relative errors of embeddings against those of the same weights computed in fp32, and in"
        " parentheses",
        f"those of the worst token; clips that were scored: {figures['clips']}. On"
        f" {facts.get('gpu', 'a CPU')} ({facts['date']}, torch {facts['torch']}).",
        "",
        f"| weights of the text encoder | {' | '.join(made)} |",
        f"|---|{'---|' * len(made)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]


def card_lines() -> list[str]:
    """What would run on ten cards, and the seconds to expect."""
    made = {name: [outlook(CARDS[name], size) for size in SIZES] for name in SHOWN}
    return [
        f"| 5 s on | memory | kernels | precision | {' | '.join(SIZES)} | in host memory |",
        f"|---|---|---|---|{'---|' * len(SIZES)}---|",
        *(_card_row(CARDS[name], clips) for name, clips in made.items()),
    ]


def _card_row(card: Card, clips: list[Outlook]) -> str:
    rest = [f"{each.plan.host_bytes / GIB:.0f}" if each.plan else "-" for each in clips]
    cells = [
        f"{card.title} (`{card.name}`)",
        f"{card.memory_gib:.1f} GiB",
        card.kernels,
        clips[0].precision,
        *(_clip_cell(each) for each in clips),
        f"{' / '.join(rest)} GiB",
    ]
    return f"| {' | '.join(cells)} |"


def _clip_cell(made: Outlook) -> str:
    """Seconds and where they are from, and what is streamed or in 8 bits."""
    if made.seconds is None:
        return "no room"
    kind = "measured" if made.is_measured else "estimated"
    digits = 1 if made.seconds < 10 else 0
    said = f"{made.seconds:.{digits}f} s, {kind}"
    if made.text_precision != "bf16":
        said += f", text {made.text_precision}"
    assert made.plan is not None
    said += ", bands" if made.plan.bands > 1 else ""
    return said + (", streams" if made.places["streamed"] else "")
