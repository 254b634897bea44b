"""The `magihuman` command. Exit codes: 0, 2 for bad input, 1 for anything else."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Column, Table

from magihuman import runtime
from magihuman.runtime.cli.console import (
    BAD_INPUT,
    Bar,
    err,
    out,
    print_plan,
    print_result,
    size_text,
    user_errors,
)
from magihuman.runtime.cli.options import (
    DeviceOption,
    EngineOptions,
    JsonOptions,
    LimitOptions,
    ModelOption,
    PlanOptions,
    PrecisionOptions,
    SrOption,
    takes_options,
)
from magihuman.runtime.cli.score import score
from magihuman.runtime.cli.serve import serve
from magihuman.runtime.cli.verify import verify
from magihuman.runtime.config import NANO

if TYPE_CHECKING:
    from magihuman.graphs.cuda_graphs import Recorded
    from magihuman.graphs.explain import Explanation
    from magihuman.runtime.cli.inspect import Component, PlanAsked
    from magihuman.runtime.config import Precision
    from magihuman.runtime.memory import MemoryPlan

SIDES = ("before", "after")

app = typer.Typer(
    help="Run daVinci-MagiHuman: a prompt in, a video of a person speaking out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@dataclass(frozen=True, kw_only=True)
class ComponentOptions:
    """Where the small components are, if elsewhere than the model."""

    text_encoder: Annotated[
        str | None, typer.Option(help="Path or hub id of the text encoder.")
    ] = None
    audio_vae: Annotated[
        str | None, typer.Option(help="Path or hub id of the audio autoencoder.")
    ] = None
    image_vae: Annotated[str | None, typer.Option(help="Path or hub id of the image encoder.")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(EngineOptions, ComponentOptions, LimitOptions, JsonOptions):
    """A clip and the engine that makes it."""

    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What is seen and said.")]
    output: Annotated[Path, typer.Option("--out", "-o", help="The mp4 to write.")]
    model: ModelOption = NANO
    image: Annotated[
        Path | None, typer.Option(help="Reference image; becomes the first frame.")
    ] = None
    audio: Annotated[Path | None, typer.Option(help="Driving voice; becomes the sound.")] = None
    variant: Annotated[str, typer.Option(help="distill (8 steps) or base (32, with guidance).")] = (
        "distill"
    )
    sr: SrOption = None
    seconds: Annotated[
        float | None, typer.Option(help="Length of the clip, 0.2 to 60; by default 5, or as suits.")
    ] = None
    width: Annotated[
        int | None, typer.Option(help="Pixels, made in steps of 32; by default 480, or as suits.")
    ] = None
    height: Annotated[
        int | None, typer.Option(help="Pixels, made in steps of 32; by default 272, or as suits.")
    ] = None
    sr_width: Annotated[int | None, typer.Option(help="Pixels after super-resolution.")] = None
    sr_height: Annotated[int | None, typer.Option(help="Pixels after super-resolution.")] = None
    seed: Annotated[int, typer.Option(help="Same seed, same clip.")] = 42
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = (
        None
    )
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    sr_steps: Annotated[int | None, typer.Option(help="Super-resolution steps.")] = None
    guidance: Annotated[float | None, typer.Option(help="Video guidance of the base model.")] = None
    sr_guidance: Annotated[float | None, typer.Option(help="Guidance of super-resolution.")] = None
    vae: Annotated[
        str | None,
        typer.Option(
            help="Decoder of frames: fast (needs a Hopper GPU), plain, or tensorrt, with"
            " --turbo-vae, a folder of engines."
        ),
    ] = None
    device: DeviceOption = None
    context_parallel: Annotated[
        int, typer.Option(help="GPUs, from --device on, that make the clip together.")
    ] = 1

    def request(self) -> runtime.Request:
        """The clip that is asked for, at the length and size that suit the model by default."""
        from magihuman.runtime.weights import sized

        size = {"seconds": self.seconds, "width": self.width, "height": self.height}
        values = sized(self.model, **size)
        if self.negative_prompt is not None:
            values["negative_prompt"] = self.negative_prompt
        return runtime.Request(
            prompt=self.prompt,
            image=self.image,
            audio=self.audio,
            sr_width=self.sr_width,
            sr_height=self.sr_height,
            seed=self.seed,
            steps=self.steps,
            sr_steps=self.sr_steps,
            guidance=self.guidance,
            sr_guidance=self.sr_guidance,
            **values,
        )

    def load_arguments(self) -> dict[str, Any]:
        """The arguments of `runtime.load` that these options are."""
        return {
            **super().load_arguments(),
            "device": self.device,
            "context_parallel": self.context_parallel,
            "text_encoder": self.text_encoder,
            "audio_vae": self.audio_vae,
            "image_vae": self.image_vae,
            "memory_limit_gb": self.memory_limit_gb,
        }


@takes_options
def generate(options: GenerateOptions) -> None:
    """Make one clip and write it as an mp4 with sound."""
    with user_errors():
        request = options.request()
        _check_before_loading(request, options)
        bar = Bar(options.as_json)
        start = time.perf_counter()
        with bar:
            engine = runtime.load(**options.load_arguments(), on_load=bar.on_load)
            load_s = time.perf_counter() - start
            with engine:
                video = engine.generate(request, save=options.output, on_progress=bar.on_progress)
        timings_s = {"load": load_s, **video.timings_s}
        print_result(options.output.absolute(), video, timings_s, options.as_json)


def _check_before_loading(request: runtime.Request, options: GenerateOptions) -> None:
    """Refuse before weights are read what can be: plan, input files, the output's place."""
    from magihuman.runtime import config
    from magihuman.runtime.errors import one_of
    from magihuman.runtime.media import check_output

    variant, sr = options.variant, options.sr
    one_of("variant", variant, config.BASE_VARIANTS)
    if sr is not None:
        one_of("sr", sr, tuple(config.SR_SIZES))
    plan = request.plan(config.VARIANTS[variant], sr)
    if request.image is not None:
        from magihuman.runtime.media import open_image

        open_image(request.image)
    if request.audio is not None:
        from magihuman.runtime.pipeline import open_driving_audio

        open_driving_audio(request.audio, request.seconds)
    check_output(options.output, config.video_frames(plan.frames), *plan.size_px)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(PrecisionOptions, JsonOptions):
    """A published transformer, the folder for the converted one, and its precision."""

    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")]
    model: Annotated[
        str, typer.Option("--model", "-m", envvar="MAGIHUMAN_MODEL", help="Model directory.")
    ]
    variant: Annotated[str, typer.Option(help="distill, base, 540p_sr or 1080p_sr.")] = "distill"
    precision: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8"


@takes_options
def convert(options: ConvertOptions) -> None:
    """Write a transformer as it is held on the device, for generate --transformer OUT."""
    with user_errors():
        bar = Bar(options.as_json)
        start = time.perf_counter()
        with bar:
            folder = runtime.convert(
                options.model,
                options.folder,
                variant=options.variant,
                precision=cast("Precision", options.precision),
                keep_bf16=options.kept_names or "none",
                on_progress=bar.on_convert,
            )
        elapsed_s = time.perf_counter() - start
        disk_bytes = sum(file.stat().st_size for file in folder.iterdir())
        if options.as_json:
            print(json.dumps({"path": str(folder), "bytes": disk_bytes, "seconds": elapsed_s}))
        else:
            size = size_text(disk_bytes)
            out.print(f"{folder}: {options.variant} in {options.precision}, {size}")


def tiny(
    folder: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a tiny checkpoint of every component, with random weights: its clips are noise."""
    with user_errors():
        for component in runtime.write_tiny(folder, seed):
            out.print(f"wrote {component}")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(PlanOptions):
    """A model directory, and the memory plan to make for it."""

    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A model directory, or nano.")]


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
        components = inspect_model(folder)
        memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
        lineups = {} if memory is None else fits(components, memory)
        damaged = [c for c in components if c.state not in ("ok", "missing")]
        plan, reason = question.of_folder(folder, components)
        if options.as_json:
            fields = [
                {"name": c.name, **{k: v for k, v in vars(c).items() if k != "name"}}
                for c in components
            ]
            facts = {"components": fields, "gpu_bytes": memory, "fits": lineups}
            print(json.dumps({**facts, "memory_plan": _plan_as_dict(plan, reason)}))
        else:
            _print_components(components)
            for label, ok in lineups.items():
                out.print(f"{label}: {'fits' if ok else 'does not fit'} this GPU")
            if memory is None:
                out.print("no GPU here: everything would run on the CPU")
            _print_plan(plan, reason)
            for c in damaged:
                err.print(f"{c.name}: {c.state}", style="red", markup=False, highlight=False)
        if damaged:
            raise typer.Exit(BAD_INPUT)


def _print_components(components: Sequence[Component]) -> None:
    """A row for each component: its state, tensors, and bytes on disk and on the device."""
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
    out.print(table)


@takes_options
def doctor(options: PlanOptions) -> None:
    """Say what this machine has, which paths will be used, and why, and where the weights of the
    published sizes would be in each stage.
    """
    with user_errors():
        from magihuman.runtime.cli.inspect import machine

        question = _plan_question(options)
        facts = machine()
        plan, reason = question.of_published()
        if options.as_json:
            print(json.dumps({**facts, "memory_plan": _plan_as_dict(plan, reason)}))
            return
        table = Table(show_header=False)
        for name, value in facts.items():
            table.add_row(name, value)
        out.print(table)
        _print_plan(plan, reason)


def _plan_question(options: PlanOptions) -> PlanAsked:
    """What the memory plan is asked for. Raises `InvalidRequestError` for what there is not."""
    from magihuman.runtime.cli.inspect import PlanAsked

    return PlanAsked(options.variant, options.sr, options.precision, options.memory_limit_gb)


def _plan_as_dict(plan: MemoryPlan | None, reason: str) -> dict[str, Any]:
    """The plan for JSON, or why there is none."""
    return {"error": reason} if plan is None else plan.as_dict()


def _print_plan(plan: MemoryPlan | None, reason: str) -> None:
    """The plan as a table, or why there is none."""
    if plan is not None:
        print_plan(plan)
    else:
        out.print(f"no memory plan: {reason}", markup=False, highlight=False)


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(JsonOptions):
    """The forward pass to explain, and where to."""

    variant: Annotated[str, typer.Option(help="distill, base or 540p_sr.")] = "distill"
    seconds: Annotated[float, typer.Option(help="Length of the clip.")] = 5.0
    width: Annotated[int, typer.Option(help="Pixels.")] = 480
    height: Annotated[int, typer.Option(help="Pixels.")] = 272
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
        from magihuman.runtime.model import DiT

        request = runtime.Request(
            "-", seconds=options.seconds, width=options.width, height=options.height
        )
        counts = compiled_counts(options.variant, request, options.text_tokens)
        graph = recorded_forward(counts) if options.recorded else None
        explanation = explaining.explain(DiT, DiTConfig(), counts, torch.bfloat16)
        if options.html is not None:
            _write(options.html, explaining.to_html(explanation))
        if options.as_json:
            sides = {s: [vars(row) for row in getattr(explanation, s)] for s in SIDES}
            facts = {"tokens": counts, **sides, "totals": explanation.totals()}
            print(json.dumps(facts if graph is None else {**facts, "recorded": vars(graph)}))
            return
        _print_explanation(explanation)
        if graph is not None:
            _print_recorded(graph)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise runtime.OutputError(f"{path} cannot be written: {error.strerror}") from error


def _print_explanation(explanation: Explanation) -> None:
    """A table of the forward pass before compiling, and one after."""
    for side in SIDES:
        total = explanation.totals()[side]
        title = f"{side}: {total['launches']:.0f} launches, {total['gigabytes']:.1f} GB"
        table = Table("layers", "operation", "calls", "launches", "GB", title=title)
        shown = ""
        for row in getattr(explanation, side):
            label, shown = ("" if row.layers == shown else row.layers), row.layers
            figures = (str(row.calls), str(row.launches), f"{row.gigabytes:.2f}")
            table.add_row(label, row.operation, *figures)
        out.print(table)


def _print_recorded(graph: Recorded) -> None:
    """The kernels of a captured graph, and how often each is launched."""
    nodes = ", ".join(f"{count} {kind}" for kind, count in graph.nodes.most_common())
    table = Table("kernel", "nodes", title=f"recorded, one layer of each kind: {nodes}")
    for name, count in graph.by_readable_name().most_common():
        table.add_row(name, str(count))
    out.print(table)


for command in (serve, verify, score, generate, convert, tiny, inspect, doctor, explain):
    app.command()(command)


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    app()
