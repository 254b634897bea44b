"""`magihuman doctor --card`: what would run on a card that is not here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast, get_args

from rich.table import Table

from magihuman.runtime.cli.options import PlanOptions
from magihuman.runtime.cli.terminal.console import out, print_plan, print_table, size_text
from magihuman.runtime.config import BASE_VARIANTS, SR_SIZES, TextPrecision
from magihuman.runtime.errors import InvalidRequestError, one_of

if TYPE_CHECKING:
    from magihuman.kernels.target import Kernels
    from magihuman.runtime.memory import Card, Outlook


def describe_card(name: str, options: PlanOptions) -> None:
    """Print what would run on a card: all sizes, or with --sr that one with its memory plan.

    Raises:
        InvalidRequestError: there is no such card, or it has no such precision.
    """
    from magihuman.runtime.memory import CARD_SIZES, card_of, check_limit, outlook_of

    one_of("variant", options.variant, BASE_VARIANTS)
    one_of("sr", options.sr, (None, *SR_SIZES))
    one_of("text_precision", options.text_precision, (None, *get_args(TextPrecision)))
    check_limit(options.memory_limit_gb)
    if options.context_parallel != 1:
        raise InvalidRequestError(
            f"context_parallel must be 1 with --card, got {options.context_parallel}: a card is"
            " told of by itself; leave one of the two out"
        )
    asked = cast("Kernels", options.kernels)
    card = card_of(name).asked_for(asked)
    made = [
        outlook_of(
            card,
            size,
            options.precision,
            variant=options.variant,
            text_precision=cast(TextPrecision | None, options.text_precision),
            limit_gb=options.memory_limit_gb,
            kernels=asked,
        )
        for size in CARD_SIZES
        if options.sr is None or size == options.sr
    ]
    if options.as_json:
        print(json.dumps({"card": facts(card), "clips": [each.as_dict() for each in made]}))
        return
    _print_facts(card, made[0].precision)
    _print_clips(made)
    if options.sr is not None and made[0].plan is not None:
        print_plan(made[0].plan)


def facts(card: Card) -> dict[str, Any]:
    """What is known of a card, for JSON."""
    return {
        "name": card.name,
        "title": card.title,
        "sm": f"sm_{card.sm[0]}{card.sm[1]}",
        "memory_bytes": card.memory_bytes,
        "kernels": card.kernels,
        "precisions": list(card.precisions),
        "copy_bytes_per_s": card.bus,
    }


def _print_facts(card: Card, precision: str) -> None:
    table = Table(show_header=False)
    memory = "shared with the host" if card.is_unified else f"{card.bus / 1e9:.0f} GB/s to it"
    for name, value in (
        ("card", f"{card.title}, sm_{card.sm[0]}{card.sm[1]}"),
        ("memory", f"{size_text(card.memory_bytes)}, {memory}"),
        ("kernels", card.kernels),
        ("precisions", f"{', '.join(card.precisions)}; here {precision}"),
    ):
        table.add_row(name, value)
    print_table(table)


def _print_clips(made: list[Outlook]) -> None:
    table = Table("5 s at", "seconds", "text encoder", "stays", "moves", "host memory")
    for each in made:
        if each.plan is None:
            table.add_row(each.size, "no way", "", each.reason, "", "")
            continue
        places = each.places
        moving = [*places["moved"], *(f"{name}, streamed" for name in places["streamed"])]
        bands = f", frames in {each.plan.bands} bands" if each.plan.bands > 1 else ""
        table.add_row(
            f"{each.size}{bands}",
            seconds_text(each),
            each.text_precision,
            ", ".join(places["resident"]),
            ", ".join(moving) or "nothing",
            size_text(each.plan.host_bytes) if each.plan.host_bytes else "",
        )
    print_table(table)
    out.print("seconds from noise to frames, with what moving adds; in parentheses layers")


def seconds_text(made: Outlook) -> str:
    """Seconds, marked as measured or estimated."""
    if made.seconds is None:
        return ""
    kind = "measured" if made.is_measured else "estimated"
    return f"{made.seconds:.1f} s, {kind}" if made.seconds < 10 else f"{made.seconds:.0f} s, {kind}"
