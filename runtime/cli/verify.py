"""`magihuman verify`. Exit codes: 0 for a pass, 1 for a fail, else as for all commands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from magihuman import runtime
from magihuman.runtime.cli.options import (
    DeviceOptions,
    JsonOptions,
    ModelOption,
    PrecisionOptions,
    TrialOptions,
    takes_options,
)
from magihuman.runtime.cli.terminal.console import FAILED, Bar, err, out, print_table, user_errors

if TYPE_CHECKING:
    from magihuman.runtime.config import Precision
    from magihuman.runtime.evaluate import Report, Thresholds

SHOWN_LINEARS = 8


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(TrialOptions, PrecisionOptions, DeviceOptions, JsonOptions):
    """What is compared, at which size, and the thresholds of the verdict."""

    model: ModelOption
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="One clip each; may be repeated.")
    ] = None
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt on each line.")] = None
    precision: Annotated[str, typer.Option(help="fp8, fp8-attn: attention too, or int8.")] = "fp8"
    seed: Annotated[int, typer.Option(help="Of both clips of a prompt.")] = 42
    max_linear_error: Annotated[float, typer.Option(help="Of any linear's product.")] = 0.08
    max_attention_error: Annotated[float, typer.Option(help="Of any layer's attention.")] = 0.12
    max_latents_error: Annotated[float, typer.Option(help="Of video and audio.")] = 0.15
    min_psnr_db: Annotated[float | None, typer.Option(help="Of the frames.")] = None
    min_ssim: Annotated[float | None, typer.Option(help="Of the frames.")] = None
    min_snr_db: Annotated[float | None, typer.Option(help="Of the sound.")] = None
    score: Annotated[
        bool, typer.Option("--score", help="Of the nano model: compare colours and mouth too.")
    ] = False
    html: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None


@takes_options
def verify(options: VerifyOptions) -> None:
    """Compare fp8 or int8, simulated on any device, with bf16, on your weights and prompts.

    Errors of linears, layers and latents, PSNR and SSIM of frames, SNR of the sound; exit code 1
    where a threshold is not met, with the linears to keep in bf16.
    """
    with user_errors():
        prompts = [*(options.prompt or ()), *_read(options.prompts)]
        if not prompts:
            raise runtime.InvalidRequestError("verify needs --prompt or --prompts, got neither")
        html = options.html
        if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
            raise runtime.OutputError(f"--html must be a file in a folder that exists, got {html}")
        report = _compare(prompts, options)
        if html is not None:
            from magihuman.runtime.evaluate import write_page

            write_page(report, html)
        if options.as_json:
            print(json.dumps(report.to_dict(), allow_nan=False))
        else:
            _print(report)
    if report.broken:
        raise typer.Exit(FAILED)


def _compare(prompts: list[str], options: VerifyOptions) -> Report:
    """Make the clips of all prompts and compare them."""
    from magihuman.runtime.weights import sized

    size = {"seconds": options.seconds, "width": options.width, "height": options.height}
    bar = Bar(options.as_json)
    with bar:
        return runtime.verify(
            options.model,
            prompts,
            precision=cast("Precision", options.precision),
            keep_bf16=options.kept_names or "none",
            **sized(options.model, **size),
            steps=options.steps,
            seed=options.seed,
            thresholds=_thresholds(options),
            score=options.score,
            variant=options.variant,
            transformer=options.transformer,
            device=options.device,
            on_load=bar.on_load,
            on_progress=bar.on_progress,
        )


def _thresholds(options: VerifyOptions) -> Thresholds:
    from magihuman.runtime.evaluate import Thresholds

    return Thresholds(
        max_linear_error=options.max_linear_error,
        max_attention_error=options.max_attention_error,
        max_video_error=options.max_latents_error,
        max_audio_error=options.max_latents_error,
        min_psnr_db=options.min_psnr_db,
        min_ssim=options.min_ssim,
        min_snr_db=options.min_snr_db,
    )


def _read(path: Path | None) -> list[str]:
    """Return the lines of a file of prompts, without blank ones."""
    if path is None:
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise runtime.InvalidRequestError(f"--prompts {path} cannot be read: {error}") from error


def _print(report: Report) -> None:
    """Print the worst linears, every clip, and the verdict."""
    ranked = sorted(report.per_linear.items(), key=lambda item: item[1].worst, reverse=True)
    table = Table("linear", "first step", "last step", title="largest relative errors")
    for name, error in ranked[:SHOWN_LINEARS]:
        table.add_row(name, f"{error.first:.4f}", f"{error.last:.4f}")
    print_table(table)
    if report.per_attention:
        worst = max(report.per_attention.items(), key=lambda item: item[1].worst)
        out.print(f"attention: {worst[1].worst:.4f} at most, after {worst[0]}")
    table = Table("prompt", "video latents", "audio latents", "PSNR", "SSIM", "SNR")
    for clip in report.clips:
        errors = (f"{clip.video_error[-1]:.4f}", f"{clip.audio_error[-1]:.4f}")
        quality = (f"{clip.psnr_db:.1f} dB", f"{clip.ssim:.3f}", f"{clip.snr_db:.1f} dB")
        table.add_row(clip.prompt[:40], *errors, *quality)
    print_table(table)
    precision = report.settings["precision"]
    for clip in report.clips:
        if clip.scores is not None:
            figures = " and ".join(
                f"{score.right} of {len(score.named)} colours, mouth and sound"
                f" {score.synchrony.correlation:.3f}"
                for score in clip.scores
            )
            out.print(f"{clip.prompt[:40]}: bf16 and {precision} have {figures}")
    for sentence in report.broken:
        err.print(sentence, style="red")
    if report.suggested_keep_bf16:
        out.print(f"try: --keep-bf16 '{','.join(report.suggested_keep_bf16)}'")
    out.print(report.verdict)
