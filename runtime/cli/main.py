"""The `magihuman` command. Exit codes: 0, 2 for bad input, 1 for anything else."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from magihuman import runtime
from magihuman.runtime.cli.console import (
    BAD_INPUT,
    Bar,
    JsonOption,
    KeepOption,
    LimitOption,
    ModelOption,
    PlanSrOption,
    PlanVariantOption,
    PrecisionOption,
    RevisionOption,
    SrOption,
    SrTransformerOption,
    TransformerOption,
    TurboVaeOption,
    err,
    keep_list,
    out,
    print_plan,
    print_result,
    size_text,
    user_errors,
)
from magihuman.runtime.cli.score import score
from magihuman.runtime.cli.serve import serve
from magihuman.runtime.cli.verify import verify
from magihuman.runtime.config import NANO

if TYPE_CHECKING:
    from magihuman.runtime.memory import MemoryPlan

app = typer.Typer(
    help="Run daVinci-MagiHuman: a prompt in, a video of a person speaking out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(serve)
app.command()(verify)
app.command()(score)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What is seen and said.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The mp4 to write.")],
    model: ModelOption = NANO,
    image: Annotated[
        Path | None, typer.Option(help="Reference image; becomes the first frame.")
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="Driving voice; becomes the sound.")] = None,
    variant: Annotated[
        str, typer.Option(help="distill (8 steps) or base (32, with guidance).")
    ] = "distill",
    sr: SrOption = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length of the clip, 0.2 to 60; by default 5, or as suits.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels, made in steps of 32; by default 480, or as suits.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels, made in steps of 32; by default 272, or as suits.")
    ] = None,
    sr_width: Annotated[int | None, typer.Option(help="Pixels after super-resolution.")] = None,
    sr_height: Annotated[int | None, typer.Option(help="Pixels after super-resolution.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same clip.")] = 42,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance moves away from.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    sr_steps: Annotated[int | None, typer.Option(help="Super-resolution steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Video guidance of the base model.")
    ] = None,
    sr_guidance: Annotated[float | None, typer.Option(help="Guidance of super-resolution.")] = None,
    precision: PrecisionOption = None,
    keep_bf16: KeepOption = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Decoder of frames: fast (needs a Hopper GPU), plain, or tensorrt, with"
            " --turbo-vae, a folder of engines."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    context_parallel: Annotated[
        int, typer.Option(help="GPUs, from --device on, that make the clip together.")
    ] = 1,
    revision: RevisionOption = None,
    transformer: TransformerOption = None,
    sr_transformer: SrTransformerOption = None,
    turbo_vae: TurboVaeOption = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Path or hub id of the text encoder.")
    ] = None,
    audio_vae: Annotated[
        str | None, typer.Option(help="Path or hub id of the audio autoencoder.")
    ] = None,
    image_vae: Annotated[
        str | None, typer.Option(help="Path or hub id of the image encoder.")
    ] = None,
    memory_limit_gb: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make one clip and write it as an mp4 with sound."""
    with user_errors():
        from magihuman.runtime.weights import sized

        options = sized(model, seconds=seconds, width=width, height=height)
        if negative_prompt is not None:
            options["negative_prompt"] = negative_prompt
        request = runtime.Request(
            prompt=prompt,
            image=image,
            audio=audio,
            sr_width=sr_width,
            sr_height=sr_height,
            seed=seed,
            steps=steps,
            sr_steps=sr_steps,
            guidance=guidance,
            sr_guidance=sr_guidance,
            **options,
        )
        _check_before_loading(request, variant, sr, output)
        bar = Bar(as_json)
        start = time.perf_counter()
        with bar:
            engine = runtime.load(
                model,
                variant=variant,
                sr=sr,
                precision=precision,  # type: ignore[arg-type]
                keep_bf16=keep_list(keep_bf16),
                vae=vae,  # type: ignore[arg-type]
                device=device,
                context_parallel=context_parallel,
                revision=revision,
                transformer=transformer,
                sr_transformer=sr_transformer,
                turbo_vae=turbo_vae,
                text_encoder=text_encoder,
                audio_vae=audio_vae,
                image_vae=image_vae,
                memory_limit_gb=memory_limit_gb,
                on_load=bar.on_load,
            )
            load_s = time.perf_counter() - start
            with engine:
                video = engine.generate(request, save=output, on_progress=bar.on_progress)
        print_result(output.absolute(), video, {"load": load_s, **video.timings_s}, as_json)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    model: Annotated[
        str, typer.Option("--model", "-m", envvar="MAGIHUMAN_MODEL", help="Model directory.")
    ],
    variant: Annotated[str, typer.Option(help="distill, base, 540p_sr or 1080p_sr.")] = "distill",
    precision: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
    keep_bf16: KeepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a transformer as it is held on the device, for generate --transformer OUT."""
    with user_errors():
        bar = Bar(as_json)
        start = time.perf_counter()
        with bar:
            made = runtime.convert(
                model,
                folder,
                variant=variant,
                precision=precision,  # type: ignore[arg-type]
                keep_bf16=keep_list(keep_bf16) or "none",
                on_progress=bar.on_convert,
            )
        elapsed_s = time.perf_counter() - start
        disk_bytes = sum(file.stat().st_size for file in made.iterdir())
        if as_json:
            print(json.dumps({"path": str(made), "bytes": disk_bytes, "seconds": elapsed_s}))
        else:
            out.print(f"{made}: {variant} in {precision}, {size_text(disk_bytes)}")


@app.command()
def tiny(
    folder: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a tiny checkpoint of every component, with random weights: its clips are noise."""
    with user_errors():
        for made in runtime.write_tiny(folder, seed):
            out.print(f"wrote {made}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A model directory, or nano.")],
    variant: PlanVariantOption = "distill",
    sr: PlanSrOption = None,
    precision: PrecisionOption = None,
    memory_limit_gb: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is in a model directory, what is missing or damaged, what fits this GPU, and where
    weights would be in each stage.
    """
    with user_errors():
        import torch

        from magihuman.runtime.cli.inspect import PlanAsked, fits, inspect_model
        from magihuman.runtime.weights import model_folder

        folder = model_folder(model)
        asked = PlanAsked(variant, sr, precision, memory_limit_gb)
        components = inspect_model(folder)
        memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
        lineups = {} if memory is None else fits(components, memory)
        damaged = [c for c in components if c.state not in ("ok", "missing")]
        plan, reason = asked.of_folder(folder, components)
        if as_json:
            fields = [
                {"name": c.name, **{k: v for k, v in vars(c).items() if k != "name"}}
                for c in components
            ]
            planned = {"error": reason} if plan is None else plan.as_dict()
            facts = {"components": fields, "gpu_bytes": memory, "fits": lineups}
            print(json.dumps({**facts, "memory_plan": planned}))
        else:
            table = Table(Column("component", no_wrap=True))
            for title in ("state", "tensors", "dtypes on disk", "disk", "on the device"):
                table.add_column(title)
            for c in components:
                dtypes = ", ".join(f"{count} {name}" for name, count in c.dtypes.items())
                row = (
                    c.name,
                    "damaged" if c in damaged else c.state,
                    str(c.tensors),
                    dtypes,
                    size_text(c.disk_bytes),
                    size_text(c.device_bytes),
                )
                table.add_row(*row)
            out.print(table)
            for label, ok in lineups.items():
                out.print(f"{label}: {'fits' if ok else 'does not fit'} this GPU")
            if memory is None:
                out.print("no GPU here: everything would run on the CPU")
            _show_plan(plan, reason)
            for c in damaged:
                err.print(f"{c.name}: {c.state}", style="red", markup=False, highlight=False)
        if damaged:
            raise typer.Exit(BAD_INPUT)


@app.command()
def doctor(
    variant: PlanVariantOption = "distill",
    sr: PlanSrOption = None,
    precision: PrecisionOption = None,
    memory_limit_gb: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, which paths will be used, and why, and where the weights of the
    published sizes would be in each stage.
    """
    with user_errors():
        from magihuman.runtime.cli.inspect import PlanAsked, machine

        asked = PlanAsked(variant, sr, precision, memory_limit_gb)
        facts = machine()
        plan, reason = asked.of_published()
        if as_json:
            planned = {"error": reason} if plan is None else plan.as_dict()
            print(json.dumps({**facts, "memory_plan": planned}))
            return
        table = Table(show_header=False)
        for name, value in facts.items():
            table.add_row(name, value)
        out.print(table)
        _show_plan(plan, reason)


def _show_plan(plan: MemoryPlan | None, reason: str) -> None:
    if plan is not None:
        print_plan(plan)
    else:
        out.print(f"no memory plan: {reason}", markup=False, highlight=False)


@app.command()
def explain(
    variant: Annotated[str, typer.Option(help="distill, base or 540p_sr.")] = "distill",
    seconds: Annotated[float, typer.Option(help="Length of the clip.")] = 5.0,
    width: Annotated[int, typer.Option(help="Pixels.")] = 480,
    height: Annotated[int, typer.Option(help="Pixels.")] = 272,
    text_tokens: Annotated[int, typer.Option(min=1, max=640, help="Of the prompt.")] = 300,
    html: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Also capture it on this GPU and list its kernels.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what compiling makes of one forward pass: operations, launches, bytes, per kind of layer.

    Needs no weights, and no GPU but for --recorded.
    """
    with user_errors():
        import torch

        from magihuman.graphs import explain as explaining
        from magihuman.runtime.cli.inspect import compiled_counts, recorded_forward
        from magihuman.runtime.config import DiTConfig
        from magihuman.runtime.errors import OutputError
        from magihuman.runtime.model import DiT

        request = runtime.Request("-", seconds=seconds, width=width, height=height)
        counts = compiled_counts(variant, request, text_tokens)
        graph = recorded_forward(counts) if recorded else None
        found = explaining.explain(DiT, DiTConfig(), counts, torch.bfloat16)
        if html is not None:
            try:
                html.write_text(explaining.to_html(found), encoding="utf-8")
            except OSError as error:
                raise OutputError(f"{html} cannot be written: {error.strerror}") from error
        if as_json:
            sides = {s: [vars(row) for row in getattr(found, s)] for s in ("before", "after")}
            extra = {} if graph is None else {"recorded": vars(graph)}
            print(json.dumps({"tokens": counts, **sides, "totals": found.totals(), **extra}))
            return
        for side in ("before", "after"):
            total = found.totals()[side]
            title = f"{side}: {total['launches']:.0f} launches, {total['gigabytes']:.1f} GB"
            table = Table("layers", "operation", "calls", "launches", "GB", title=title)
            shown = ""
            for row in getattr(found, side):
                label, shown = ("" if row.layers == shown else row.layers), row.layers
                figures = (str(row.calls), str(row.launches), f"{row.gigabytes:.2f}")
                table.add_row(label, row.operation, *figures)
            out.print(table)
        if graph is not None:
            nodes = ", ".join(f"{count} {kind}" for kind, count in graph.nodes.most_common())
            table = Table("kernel", "nodes", title=f"recorded, one layer of each kind: {nodes}")
            for name, count in graph.by_readable_name().most_common():
                table.add_row(name, str(count))
            out.print(table)


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    app()


def _check_before_loading(
    request: runtime.Request, variant: str, sr: str | None, output: Path
) -> None:
    """What can be refused before weights are read: plan, input files, the output's place."""
    from magihuman.runtime import config
    from magihuman.runtime.errors import one_of
    from magihuman.runtime.media import check_output

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
    check_output(output, config.video_frames(plan.frames), *plan.size_px)
