"""The tables of docs/performance.md about power, from benchmarks/results/power.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PICTURE = "images/joules_by_kernel.png"  # of `render_power`, beside the page
LIBRARY = {  # products of the library and what they are called, by the type of linears
    "fp8": {"row-wise": "library, a scale a row", "tensor-wise": "library, one scale"},
    "bf16": {"product alone": "library, product alone"},
}


def power_lines(figures: dict[str, Any]) -> list[str]:
    """All of them, under a heading of their own."""
    machine = figures["environment"]
    return [
        "## Power",
        "",
        f"One {machine.get('gpu', 'CPU')}, driver {machine.get('driver')}, torch"
        f" {machine['torch']}, {machine['date']}. Random weights,",
        f"{figures['tokens']} tokens in {figures['rows']} rows. Sustained figures are those of a"
        " GPU that does nothing else for a while;",
        "joules are the whole card's, by its energy counter.",
        "",
        *forward_table(figures),
        "",
        f"![Joules of a forward by kernel]({PICTURE})",
        "",
        "The bound is made of the same run: the library's products (in fp8 with one scale for all"
        " rows and",
        "columns), the fastest attention, and the bytes of the layers' other operators at the rate"
        " of a copy.",
        "",
        *bound_table(figures["bound"]),
        "",
        "Linears have what follows them in their time, the library's products have not.",
        "",
        *linear_tables(figures["products"]),
        *part_table(figures),
        *other_rows(figures["other rows"]),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def shown(value: float | None, form: str) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else form.format(value)


def forward_table(figures: dict[str, Any]) -> list[str]:
    """A forward in each precision, on a hot card, and 8 steps on one that has rested."""
    rows = []
    for precision, own in figures["forward"].items():
        hot, rested = own["sustained"], own["after_rest"]
        rows.append(
            [
                precision,
                f"{hot['ms']:.1f} ms",
                shown(hot["joules"], "{:.1f} J"),
                shown(hot["watts"], "{:.0f} W"),
                shown(hot["mhz"], "{:.0f} MHz"),
                held_back(hot["throttle"]),
                f"{rested['8_steps_ms'] / 1e3:.3f} s",
                shown(rested["joules"], "{:.0f} J"),
            ]
        )
    head = ["one forward", "sustained", "energy", "power", "SM clock", "held back by"]
    return table([*head, "8 steps after 2 s of rest", "energy"], rows)


def held_back(throttle: dict[str, float] | None) -> str:
    """What kept the clock from being higher, and for how much of the time."""
    return ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in (throttle or {}).items())


def bound_table(bounds: dict[str, Any]) -> list[str]:
    """The parts of each bound, and how near the forward comes."""
    rows = [
        [
            precision,
            *(f"{own[part]:.1f} ms" for part in ("products_ms", "attention_ms", "rest_ms")),
            f"{own['forward_ms']:.1f} ms",
            f"{own['8_steps_ms'] / 1e3:.3f} s",
            f"{own['ratio']:.2f}",
        ]
        for precision, own in bounds.items()
    ]
    head = ["bound of a forward", "products", "attention", "the rest", "sum", "8 steps"]
    return table([*head, "forward, sustained, over it"], rows)


def linear_tables(products: dict[str, Any]) -> list[str]:
    """Every linear in fp8 and bf16."""
    lines: list[str] = []
    for name in LIBRARY:
        head = [f"{name}, columns x depth", "route", "with what follows", *LIBRARY[name].values()]
        lines += [*table(head, linear_rows(products[name], LIBRARY[name])), ""]
    return lines


def linear_rows(linears: dict[str, Any], library: Sequence[str]) -> list[list[str]]:
    """By the route that serves each linear, and by the library."""
    return [
        [
            f"{name}, {own['columns']} x {own['depth']}",
            own["serves"],
            *(product_cell(own["by"].get(by)) for by in (own["serves"], *library)),
        ]
        for name, own in linears.items()
    ]


def product_cell(own: dict[str, Any] | None) -> str:
    """Time, rate and energy of a product, where it was measured."""
    if own is None:
        return ""
    energy = shown(own["picojoules_per_flop"], ", {:.2f} pJ/FLOP")
    return f"{own['ms']:.3f} ms, {own['tflops']:.0f} TFLOP/s{energy}"


def part_table(figures: dict[str, Any]) -> list[str]:
    """Attention in each way, and the operators that only move bytes."""
    attention, norms = figures["attention"], figures["norms"]
    rates = {
        f"attention, {name}": f"{own['tflops']:.0f} TFLOP/s" for name, own in attention.items()
    }
    rates |= {f"`{name}`": f"{own['tb_per_s']:.2f} TB/s" for name, own in norms.items()}
    rows = [
        [
            name,
            f"{own['ms']:.3f} ms",
            rate,
            shown(own["joules"], "{:.3f} J"),
            shown(own["mhz"], "{:.0f} MHz"),
        ]
        for (name, rate), own in zip(
            rates.items(), [*attention.values(), *norms.values()], strict=True
        )
    ]
    return table(["one call", "time", "rate", "energy", "SM clock"], rows)


def other_rows(heights: dict[str, Any]) -> list[str]:
    """Linears and attention in fp8 at other heights; nothing where none was asked for."""
    if not heights:
        return []
    rows = []
    for height, own in heights.items():
        rows += [[height, *row] for row in linear_rows(own["products"], LIBRARY["fp8"])]
        rows += [
            [height, f"attention, {name}", "", product_cell(one), "", ""]
            for name, one in own["attention"].items()
        ]
    head = ["rows", "fp8, columns x depth", "route", "with what follows"]
    return ["", *table([*head, *LIBRARY["fp8"].values()], rows)]
