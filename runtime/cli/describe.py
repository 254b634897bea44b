"""`magihuman inspect`, `doctor` and `explain`: what `inspect.py` gathers, as tables or JSON.

Exit codes as for all commands; `inspect` has that of bad input where a component is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Column, Table

from magihuman import runtime
from magihuman.runtime.cli.options import JsonOptions, PlanOptions, takes_options
from magihuman.runtime.cli.plans.card import describe_card
from magihuman.runtime.cli.terminal.console import (
    BAD_INPUT,
    err,
    out,
    print_plan,
    print_table,
    size_text,
    user_errors,
)

if TYPE_CHECKING:
    from magihuman.graphs.cuda_graphs import Recorded
    from magihuman.graphs.explain import Explanation
    from magihuman.kernels.target import Kernels
    from magihuman.runtime.cli.inspect import Component
    from magihuman.runtime.cli.plans.asked import Answer, PlanAsked
    from magihuman.runtime.config import TextPrecision

SIDES = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(PlanOptions):
    """A model directory, and the memory plan to make for it."""

    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A model directory, or nano.")]
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Also read every weight, and name those with NaN or infinity."
        ),
    ] = False


@takes_options
def inspect(options: InspectOptions) -> None:
    """Say what is in a model directory, what is missing or damaged, what fits this GPU, and where
    weights would be in each stage.
    """
    with user_errors():
        import torch

        from magihuman.runtime.cli.inspect import fits, inspect_model
        from magihuman.runtime.weights import model_folder

        folder = model_folder(options.model)
        question = _plan_question(options)
        components = inspect_model(folder, options.check)
        memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
        lineups = {} if memory is None else fits(components, memory)
        damaged = [c for c in components if c.state not in ("ok", "missing")]
        plans = question.of_ranks(lambda asked: asked.of_folder(folder, components))
        if options.as_json:
            fields = [
                {"name": c.name, **{k: v for k, v in vars(c).items() if k != "name"}}
                for c in components
            ]
            facts = {"components": fields, "gpu_bytes": memory, "fits": lineups}
            print(json.dumps({**facts, **_plans_as_dict(plans)}))
        else:
            _print_components(components)
            for label, ok in lineups.items():
                out.print(f"{label}: {'fits' if ok else 'does not fit'} this GPU")
            if memory is None:
                out.print("no GPU here: everything would run on the CPU")
            _print_plans(plans)
            for c in damaged:
                err.print(f"{c.name}: {c.state}", style="red")
        if damaged:
            raise typer.Exit(BAD_INPUT)


def _print_components(components: Sequence[Component]) -> None:
    """Print a row for each component: its state, tensors, and bytes on disk and on the device."""
    table = Table(Column("component", no_wrap=True))
    for title in ("state", "tensors", "dtypes on disk", "disk", "on the device"):
        table.add_column(title)
    for c in components:
        table.add_row(
            c.name,
            c.state if c.state in ("ok", "missing") else "damaged",
            str(c.tensors),
            ", ".join(f"{count} {name}" for name, count in c.dtypes.items()),
            size_text(c.disk_bytes),
            size_text(c.device_bytes),
        )
    print_table(table)
    for c in components:
        if c.layout:
            out.print(f"{c.name} is in the layout: {c.layout}")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(PlanOptions):
    """This machine, or a card that need not be here."""

    card: Annotated[
        str | None,
        typer.Option(help="Tell of this card instead, such as 4090, 3090, a100-40 or l40s."),
    ] = None


@takes_options
def doctor(options: DoctorOptions) -> None:
    """Say what this machine has, which paths will be used, and why, and where the weights of the
    published sizes would be in each stage.

    With --card, what would run on a card that need not be here, and the seconds to expect.
    """
    with user_errors():
        if options.card is not None:
            describe_card(options.card, options)
            return
        from magihuman.runtime.cli.inspect import machine
        from magihuman.runtime.cli.plans.asked import PlanAsked

        question = _plan_question(options)
        facts = machine(question.kernels)
        plans = question.of_ranks(PlanAsked.of_published)
        if options.as_json:
            print(json.dumps({**facts, **_plans_as_dict(plans)}))
            return
        table = Table(show_header=False)
        for name, value in facts.items():
            table.add_row(name, value)
        print_table(table)
        _print_plans(plans)


def _plan_question(options: PlanOptions) -> PlanAsked:
    """Return what the plan is asked for. Raises `InvalidRequestError` for what there is not."""
    from magihuman.runtime.cli.plans.asked import PlanAsked

    return PlanAsked(
        options.variant,
        options.sr,
        options.precision,
        options.memory_limit_gb,
        cast("Kernels", options.kernels),
        options.context_parallel,
        text_precision=cast("TextPrecision", options.text_precision or "bf16"),
    )


def _plans_as_dict(plans: Sequence[Answer]) -> dict[str, Any]:
    """Return the plans for JSON, of the first GPU and of each other one, or why there is none."""
    names = ("memory_plan", "memory_plan_of_others")
    return {
        name: {"error": reason} if plan is None else plan.as_dict()
        for name, (plan, reason) in zip(names, plans, strict=False)
    }


def _print_plans(plans: Sequence[Answer]) -> None:
    """Print the plans as tables, of the first GPU and of each other one, or why there is none."""
    for name, (plan, reason) in zip(("the first GPU", "each other GPU"), plans, strict=False):
        if len(plans) > 1:
            out.print(f"{name}:")
        if plan is not None:
            print_plan(plan)
        else:
            out.print(f"no memory plan: {reason}")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(JsonOptions):
    """The forward pass to explain, and how it is shown."""

    variant: Annotated[str, typer.Option(help="distill, base or 540p_sr.")] = "distill"
    seconds: Annotated[float, typer.Option(help="Length of the clip.")] = 5.0
    width: Annotated[int, typer.Option(help="Pixels.")] = 480
    height: Annotated[int, typer.Option(help="Pixels.")] = 256
    text_tokens: Annotated[int, typer.Option(min=1, max=640, help="Of the prompt.")] = 300
    html: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Also capture it on this GPU and list its kernels.")
    ] = False


@takes_options
def explain(options: ExplainOptions) -> None:
    """Say what compiling makes of one forward pass: operations, launches, bytes, per kind of layer.

    Needs no weights, and no GPU but for --recorded.
    """
    with user_errors():
        import torch

        from magihuman.graphs import explain as explaining
        from magihuman.runtime.cli.inspect import compiled_counts, recorded_forward
        from magihuman.runtime.config import DiTConfig
        from magihuman.runtime.files import write_text
        from magihuman.runtime.model import DiT

        request = runtime.Request(
            "-", seconds=options.seconds, width=options.width, height=options.height
        )
        counts = compiled_counts(options.variant, request, options.text_tokens)
        graph = recorded_forward(counts) if options.recorded else None
        explanation = explaining.explain(DiT, DiTConfig(), counts, torch.bfloat16)
        if options.html is not None:
            write_text(options.html, explaining.to_html(explanation))
        if options.as_json:
            sides = {s: [vars(row) for row in getattr(explanation, s)] for s in SIDES}
            facts = {"tokens": counts, **sides, "totals": explanation.totals()}
            print(json.dumps(facts if graph is None else {**facts, "recorded": vars(graph)}))
            return
        _print_explanation(explanation)
        if graph is not None:
            _print_recorded(graph)


def _print_explanation(explanation: Explanation) -> None:
    """Print a table of the forward pass before compiling, and one after."""
    for side in SIDES:
        total = explanation.totals()[side]
        title = f"{side}: {total['launches']:.0f} launches, {total['gigabytes']:.1f} GB"
        table = Table("layers", "operation", "calls", "launches", "GB", title=title)
        shown = ""
        for row in getattr(explanation, side):
            label, shown = ("" if row.layers == shown else row.layers), row.layers
            figures = (str(row.calls), str(row.launches), f"{row.gigabytes:.2f}")
            table.add_row(label, row.operation, *figures)
        print_table(table)


def _print_recorded(graph: Recorded) -> None:
    """Print the kernels of a captured graph, and how often each is launched."""
    nodes = ", ".join(f"{count} {kind}" for kind, count in graph.nodes.most_common())
    table = Table("kernel", "nodes", title=f"recorded, one layer of each kind: {nodes}")
    for name, count in graph.by_readable_name().most_common():
        table.add_row(name, str(count))
    print_table(table)
