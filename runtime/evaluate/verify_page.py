"""What `verify` found on one page: verdict, plots, frames side by side. One file, no links."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from magihuman.graphs.quantization import PARTS
from magihuman.runtime.evaluate.verify_report import Clip, Report
from magihuman.runtime.files import write_text

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377")
PLOT_WIDTH, PLOT_HEIGHT, MARGIN = 900, 220, 60  # SVG units
STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:1000px}h1.pass{color:#228833}"
    "h1.fail{color:#cc3311}svg{width:100%;font:11px sans-serif}"
    "td,th{padding:2px 12px 2px 0;text-align:left}img{max-width:32%;margin:2px}"
)


def write_page(report: Report, path: Path) -> None:
    """Write the page, whole or not at all. Raises `OutputError`."""
    write_text(path, to_html(report))


def to_html(report: Report) -> str:
    """The page."""
    precision = html.escape(str(report.settings["precision"]))
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{precision} against bf16</title>",
        f"<style>{STYLE}</style>",
        f"<h1 class={report.verdict}>{precision} against bf16: {report.verdict}</h1>",
        _list("Thresholds not met", report.broken),
        _list("Keep in bf16, to try next", report.suggested_keep_bf16),
        "<p>" + html.escape(", ".join(f"{k} {v}" for k, v in report.settings.items())),
        f"<p>Errors are relative, ||{precision} - bf16|| / ||bf16||, from the same seed and noise.",
        "<h2>Linears, each by itself, at the worse of the first and the last step</h2>",
        _linears(report),
        _attentions(report),
        f"<h2>Residual stream after each layer, all before it in {precision}</h2>",
        _lines({s: [getattr(e, s) for e in report.per_layer] for s in ("first", "last")}, 0),
        "<h2>Latents after each step</h2>",
        _lines(_latents(report.clips), 1),
    ]
    return "".join(parts + [_clip(clip, precision) for clip in report.clips])


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"<h3>{title}</h3><ul>" + "".join(f"<li>{html.escape(s)}" for s in lines) + "</ul>"


def _linears(report: Report) -> str:
    """Bars: the four linears of each layer side by side, and the threshold as a line."""
    limit = report.thresholds.max_linear_error
    worst = {name: error.worst for name, error in report.per_linear.items()}
    top = _top([*worst.values(), limit])
    slot = PLOT_WIDTH / len(report.per_layer)
    shapes = [_axes(top, [str(layer) for layer in range(len(report.per_layer))], slot, slot / 2)]
    for name, error in worst.items():
        layer, part = name.removeprefix("block.layers.").split(".", 1)
        at = MARGIN + slot * (int(layer) + 0.1 + 0.2 * PARTS.index(part))
        y = _y(error, top)
        shapes.append(
            f"<rect x={at:.1f} y={y:.1f} width={slot * 0.18:.1f} height={PLOT_HEIGHT - y:.1f}"
            f" fill='{COLOURS[PARTS.index(part)]}'><title>{html.escape(name)} {error:.3g}</title>"
            "</rect>"
        )
    y = _y(limit, top)
    shapes.append(
        f"<line x1={MARGIN} x2={MARGIN + PLOT_WIDTH} y1={y:.1f} y2={y:.1f} stroke='#000'"
        " stroke-dasharray='4'/>"
    )
    return _svg(shapes, PARTS)


def _attentions(report: Report) -> str:
    if not report.per_attention:
        return ""
    lines = [f"{name}: {error.worst:.3g}" for name, error in report.per_attention.items()]
    return _list("Attention over fp8 q, k and v, by the projection before it", lines)


def _latents(clips: Sequence[Clip]) -> dict[str, list[float]]:
    """The relative errors of each stream of latents after each step, by what to call the line."""
    lines = {}
    for i, clip in enumerate(clips, 1):
        lines[f"video, prompt {i}"] = clip.video_error
        lines[f"audio, prompt {i}"] = clip.audio_error
    return lines


def _lines(series: dict[str, list[float]], first: int) -> str:
    """A line for each series; `first`: the number of the first point."""
    top = _top([value for values in series.values() for value in values])
    count = max(len(values) for values in series.values())
    slot = PLOT_WIDTH / max(count - 1, 1)
    shapes = [_axes(top, [str(first + i) for i in range(count)], slot, 0)]
    for i, values in enumerate(series.values()):
        points = [(MARGIN + slot * at, _y(value, top)) for at, value in enumerate(values)]
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(f"<polyline points='{path}' fill='none' stroke='{colour}'/>")
        shapes += [f"<circle cx={x:.1f} cy={y:.1f} r=3 fill='{colour}' />" for x, y in points]
    return _svg(shapes, list(series))


def _top(values: Sequence[float]) -> float:
    """The end of the axis: a little above the largest finite value."""
    return 1.1 * max((v for v in values if math.isfinite(v)), default=0.0) or 1.0


def _y(value: float, top: float) -> float:
    """What is not finite reaches the top."""
    return PLOT_HEIGHT * (1 - (value / top if math.isfinite(value) else 1.0))


def _axes(top: float, labels: Sequence[str], slot: float, shift: float) -> str:
    shapes = [
        f"<text x=0 y={_y(value, top) + 4:.1f}>{value:.3g}</text>"
        f"<line x1={MARGIN} x2={MARGIN + PLOT_WIDTH} y1={_y(value, top):.1f}"
        f" y2={_y(value, top):.1f} stroke='#ddd'/>"
        for value in (0.0, top / 2, top)
    ]
    for i, label in enumerate(labels):
        at = MARGIN + slot * i + shift
        shapes.append(f"<text x={at:.1f} y={PLOT_HEIGHT + 16} text-anchor='middle'>{label}</text>")
    return "".join(shapes)


def _svg(shapes: Sequence[str], legend: Sequence[str]) -> str:
    """The shapes, framed, with the names of the colours above."""
    names = " ".join(
        f"<span style='color:{COLOURS[i % len(COLOURS)]}'>&#9632; {html.escape(name)}</span>"
        for i, name in enumerate(legend)
    )
    box = f"0 -12 {MARGIN + PLOT_WIDTH + 20} {PLOT_HEIGHT + 36}"
    return f"<p>{names}</p><svg viewBox='{box}'>{''.join(shapes)}</svg>"


def _clip(clip: Clip, precision: str) -> str:
    rows = "".join(
        f"<tr><th>{label}<td>{''.join(map(_image, frames))}</tr>"
        for label, frames in zip(("bf16", precision), clip.shown, strict=True)
    )
    return (
        f"<h2>{html.escape(clip.prompt)}</h2><p>frames: PSNR {clip.psnr_db:.1f} dB, SSIM"
        f" {clip.ssim:.3f}; sound: SNR {clip.snr_db:.1f} dB</p><table>{rows}</table>"
    )


def _image(frame: Any) -> str:
    """A frame uint8 [H, W, 3] as a picture inside the page."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG")
    return f"<img src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"
