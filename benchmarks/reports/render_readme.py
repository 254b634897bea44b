"""Write the tables of figures in the README, in docs/ and in the cards of the nano model, from
benchmarks/results/*.json and the newest full-size run of the suites in benchmarks/results/history.

    python benchmarks/reports/render_readme.py [--check] [--folder RESULTS] [--out ROOT]

Each table stands between `<!-- NAME:start -->` and `<!-- NAME:end -->`; nothing else is touched.
With --check nothing is written, and a file that is out of date is an error. --folder has other
results; --out is another folder to write the files to.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import live_tables
import portable_tables
import team_tables

import card_tables
import history
import power_tables
import process_tables
from magihuman.runtime import config
from magihuman.runtime.evaluate.model_score import LEAST

ROOT = Path(__file__).parents[2]
PRECISIONS = ("bf16", "fp8", "fp8-attn")
FILES = {  # which tables each has
    "README.md": ("headline", "headline-gpus"),
    "docs/performance.md": (
        "denoising",
        "fp8",
        "portable",
        "power",
        "fp8-errors",
        "int8-errors",
        "decoding",
        "super-resolution",
        "memory",
        "request",
        "several-gpus",
        "live",
        "long",
        "loading",
        "kernels",
        "checks",
        "flat",
    ),
    "docs/models.md": ("cards", "text-precision", "nano"),
    "examples/nano/MODEL_CARD.md": ("nano",),
    "runtime/weights/nano/README.md": ("nano",),
}


def read(folder: Path, name: str) -> dict[str, Any]:
    """One results file."""
    value: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return value


def tables(folder: Path) -> dict[str, str]:
    """The Markdown between each pair of markers, of the results in a folder."""
    result = functools.partial(read, folder)
    decoding = result("vae_decode")
    parts = {
        "headline": headline_table(folder),
        "headline-gpus": team_tables.headline_lines(folder),
        "several-gpus": team_tables.lines(folder),
        "live": live_table(folder),
        "long": long_table(folder),
        "denoising": denoising_table(result("compiled_forward")),
        "fp8": fp8_table(result("fp8")),
        "fp8-errors": error_table(result("fp8_errors")),
        "int8-errors": int8_errors(folder),
        "decoding": vae_table(decoding),
        "super-resolution": sr_table(result("super_resolution")),
        "memory": memory_table(result("memory_limit")["cases"]),
        "request": request_table(result("prompt_to_mp4"), decoding),
        "loading": [*reading_lines(result("full_size")), "", *load_lines(result("load_artifact"))],
        "kernels": newest_kernel_table(folder),
        "checks": process_tables.check_lines(folder),
        "portable": portable_table(folder),
        "power": power_table(folder),
        "flat": process_tables.memory_lines(folder),
        "nano": nano_lines(result("nano_score")),
        "cards": card_tables.card_lines(),
        "text-precision": card_tables.text_lines(result("text_precision")),
    }
    return {name: "\n".join(lines) for name, lines in parts.items()}


def headline_table(folder: Path) -> list[str]:
    """The README's table: a whole request, its denoising, and super-resolution."""
    result = functools.partial(read, folder)
    request, sizes = result("prompt_to_mp4"), result("super_resolution")
    forward, machine = result("compiled_forward"), request["environment"]
    compiled_s = forward["baseline"]["torch_compile_fa3_8_steps_ms"] / 1e3
    rows = [
        (
            "prompt to mp4, 480x256",
            [
                f"**{request[name]['prompt_to_mp4_s']:.2f} s**" if name in request else ""
                for name in PRECISIONS
            ],
            "",
        ),
        (
            "its 8 denoising steps",
            [
                f"{request[name]['stages_s']['denoise']:.2f} s" if name in request else ""
                for name in PRECISIONS
            ],
            f"`torch.compile`, bf16: {compiled_s:.2f} s",
        ),
    ]
    for size in ("540p", "1080p"):
        width, height = config.SR_SIZES[size]
        sums = [
            f"{super_resolved_s(sizes, size, name):.1f} s" if name in sizes[size] else ""
            for name in PRECISIONS
        ]
        published = f"published: {sizes[size]['published_s']:.1f} s"
        rows.append((f"noise to frames of {width}x{height}", sums, published))
    return [
        f"| a clip of 5 s on one {machine.get('gpu', 'CPU')} | {' | '.join(PRECISIONS)}"
        " | for comparison |",
        "|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(cells)} | {other} |" for name, cells, other in rows),
        "",
        "`torch.compile` had the plain model with FlashAttention-3, in a run of its own in which"
        " this runtime took",
        f"{forward['compiled_8_steps_ms'] / 1e3:.2f} s. The published seconds are the authors' own."
        f" {machine['date']}, torch {machine['torch']}.",
    ]


def denoising_table(forward: dict[str, Any]) -> list[str]:
    """8 steps in bf16 against `torch.compile`, and the layers of one forward."""
    machine = forward["environment"]
    base = forward["baseline"]["torch_compile_fa3_8_steps_ms"]
    ours = forward["compiled_8_steps_ms"]
    rows = [
        ("8 steps, this runtime, compiled (default on Hopper)", ours / 1e3, base / ours),
        ("8 steps, `torch.compile` of the plain model with FlashAttention-3", base / 1e3, 1.0),
        ("8 steps, plain model, eager", forward["plain_8_steps_ms"] / 1e3,
         base / forward["plain_8_steps_ms"]),
        ("its matrix products (PyTorch's) and attention alone: the bound of bf16",
         forward["bare_8_steps_ms"] / 1e3, base / forward["bare_8_steps_ms"]),
    ]  # fmt: skip
    error = forward["error_after_8_steps"]
    return [
        f"One {machine.get('gpu', 'CPU')}, driver {machine.get('driver')},"
        f" torch {machine['torch']},"
        f" {machine['date']}. Random weights at full",
        f"size, 480x256, 5 s, 300 text tokens ({forward['tokens']} in all), bf16. Figures are"
        " medians after warm-up;",
        "the rows of one table come from one run.",
        "",
        "| denoising | seconds | against `torch.compile` |",
        "|---|---|---|",
        *(f"| {name} | {seconds:.3f} | {ratio:.2f}x |" for name, seconds, ratio in rows),
        "",
        *layer_table(forward),
        "",
        f"After 8 steps the compiled model is {error['compiled against fp32'][0]:.4f} from the"
        " model with fp32 linears (relative",
        f"error of the video latents), the plain one {error['plain against fp32'][0]:.4f}.",
    ]


def layer_table(forward: dict[str, Any]) -> list[str]:
    """Share of each kind of layer in one compiled forward."""
    total = sum(forward["layers_ms"].values())
    return [
        f"| one compiled forward, {total:.0f} ms of kernels | ms | share |",
        "|---|---|---|",
        *(
            f"| {kind} | {ms:.1f} | {100 * ms / total:.0f} % |"
            for kind, ms in sorted(forward["layers_ms"].items(), key=lambda item: -item[1])
        ),
    ]


def fp8_table(figures: dict[str, Any]) -> list[str]:
    """Linears in fp8 against the same in bf16."""
    base = figures["bf16"]["8_steps_ms"]
    rows = [
        f"| {name} | {own['8_steps_ms'] / 1e3:.3f} | {base / own['8_steps_ms']:.2f}x |"
        f" {own['weights_gib']:.1f} GiB | {own['error after 8 steps'][0]:.3f} |"
        for name, own in figures.items()
        if isinstance(own, dict) and "8_steps_ms" in own
    ]
    return [
        "| linears, in one run | seconds of 8 steps | against bf16 | weights |"
        " error against bf16 |",
        "|---|---|---|---|---|",
        *rows,
        *(
            f"| {name}: its matrix products (PyTorch's) and attention alone |"
            f" {own['bare_8_steps_ms'] / 1e3:.3f} | {base / own['bare_8_steps_ms']:.2f}x | | |"
            for name, own in figures.items()
            if isinstance(own, dict) and "bare_8_steps_ms" in own
        ),
    ]


def int8_errors(folder: Path) -> list[str]:
    """As `error_table`; nothing where int8 was not measured."""
    if not (folder / "int8_errors.json").exists():
        return []
    return error_table(read(folder, "int8_errors"), "int8")


def error_table(figures: dict[str, Any], precision: str = "fp8") -> list[str]:
    """8 bits against bf16 on three kinds of weights, and where single linears break."""
    kinds = {
        "normal": "normally distributed",
        "outliers": "heavy tails, massive activations",
        "broken": "three linears made to break",
    }
    summaries = [figures[kind]["summary"] for kind in kinds]
    linears = ("linear_qkv", "linear_proj", "up_gate_proj", "down_proj")
    after = [figures[kind]["after 8 steps"] for kind in kinds]
    said = [figures[kind]["verify"] for kind in kinds]
    rows = [
        (f"`{name}`", [spread(summary[name][precision]) for summary in summaries])
        for name in linears
    ]
    ratios = [max(s[name]["ratio"]["max"] for name in linears) for s in summaries]
    rows += [
        ("largest ratio to the careful reference", [f"{ratio:.3f}" for ratio in ratios]),
        ("what a layer adds to the stream", [spread(s["layer"]) for s in summaries]),
        ("video latents after 8 steps", [f"{a['kernels against bf16'][0]:.3f}" for a in after]),
        ("the same, simulated", [f"{a['simulated against bf16'][0]:.3f}" for a in after]),
        ("largest of the stream over its median", [f"{s['peak']['max']:.2g}" for s in summaries]),
        ("`magihuman verify`", [verdict(own) for own in said]),
    ]
    huge, quiet = (
        next((k for k, own in sweep.items() if own[precision] > 2 * sweep["0"][precision]), None)
        for sweep in figures["sweeps"].values()
    )
    format_name = {"fp8": "e4m3"}.get(precision, precision)
    return [
        f"The table has the relative error of {precision}: the median over all layers and, in"
        " parentheses, the largest.",
        "A linear is compared with the product of its bf16 operands. The careful reference rounds"
        " operands to",
        f"{format_name} with the same scales and computes all else in fp32.",
        "",
        f"| weights | {' | '.join(kinds.values())} |",
        "|---|---|---|---|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
        "",
        *where_it_doubles(huge, quiet),
    ]


def where_it_doubles(huge: str | None, quiet: str | None) -> list[str]:
    """A sentence on sweeps by powers of two; a power is None where the sweep's end is no worse."""
    first = f"A linear's error doubles once one input channel is 2^{huge} times the others"
    if quiet is None:
        return [
            f"{first}. How small",
            "activations on their way to a down projection are does not matter.",
        ]
    return [
        f"{first}, or once activations",
        f"on their way to a down projection are 2^{quiet} times smaller than those of random"
        " weights.",
    ]


def spread(figures: dict[str, float]) -> str:
    """Median and, in parentheses, the largest."""
    return f"{figures['median']:.3f} ({figures['max']:.3f})"


def verdict(said: dict[str, Any]) -> str:
    """Of `verify`, and of the linears that it names."""
    if said["verdict"] == "pass":
        return "pass"
    again = said["with what is suggested"]["verdict"]
    named = len(said["over the threshold of a linear"])
    reason = f"naming {named}" if named else "by the latents alone"
    return f"fail, {reason}; {again} with what it suggests"


def reading_lines(figures: dict[str, Any]) -> list[str]:
    """A sentence on reading a transformer in the published layout."""
    layout = figures["published_layout"]
    read = layout["read"]
    return [
        f"Reading {layout['written']['bytes'] / 2**30:.1f} GiB of weights in the published layout"
        f" takes {read['seconds']:.1f} s from the page",
        f"cache and {read['host_peak_growth_bytes'] / 2**30:.1f} GiB of host memory at its peak.",
    ]


def load_lines(figures: dict[str, Any]) -> list[str]:
    """A sentence on reading a converted transformer."""
    read = figures["from the page cache"]
    grown = read["host_growth_bytes"]
    return [
        f"Loading a transformer converted to fp8, {figures['written']['bytes'] / 2**30:.1f} GiB,"
        f" takes {read['seconds']:.1f} s in a new process, from the page",
        f"cache. At its peak the process holds {grown['RssAnon'] / 2**30:.1f} GiB of host memory of"
        f" its own and {grown['RssFile'] / 2**30:.1f} GiB of pages of the",
        "mapped file.",
    ]


def vae_table(figures: dict[str, Any]) -> list[str]:
    """Frames of a clip by the fast decoder and by the plain one."""
    lines = [
        "| 5 s of frames, on the host | fused | `torch.compile` | | plain, eager | | its memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size in (("256p", "480x256"), ("540p", "896x512"), ("1080p", "1920x1088")):
        own = figures[name]["default"]
        cells = []
        for other in ("torch.compile", "plain"):
            seconds = figures[name].get(other, {}).get("ms", 0) / 1e3
            cells += (
                [f"{seconds:.3f} s", f"{seconds / own['frames_s']:.1f}x"] if seconds else ["", ""]
            )
        cells.append(f"{own['device_gib']:.1f} GiB")
        lines.append(f"| {size} | {own['frames_s']:.3f} s | {' | '.join(cells)} |")
    away = figures["1080p"]["grey levels from the plain decoder's"]["mean"]
    errors = figures["error"]
    soft_s, noise_s = after_last_frame_s(figures)
    return [
        *lines,
        "",
        f"The fused decoder is {errors['default']:.4f} from the decoder in fp32 (relative error of"
        " the values), the plain",
        f"bf16 one {errors['plain bf16']:.4f}; at 1920x1088 their frames are {away:.1f} of 256"
        " levels apart on average. With",
        f"`save=` the mp4 of soft content is complete {soft_s:.3f} s after the"
        f" last frame, one of noise {noise_s:.3f} s.",
    ]


def after_last_frame_s(figures: dict[str, Any]) -> tuple[float, float]:
    """Until an mp4 of 480x256 is complete: of soft content, and of noise."""
    alone = figures["256p"]["mp4"]["mp4 alone"]
    soft, noise = (alone[content]["paced, from planes"] for content in ("soft", "noise"))
    return soft["after_last_frame_s"], noise["after_last_frame_s"]


def super_resolved_s(figures: dict[str, Any], size: str, precision: str) -> float:
    """Base steps, super-resolution and decoding, each timed alone."""
    base_s, loop_s = (figures[name][precision]["loop_s"] for name in ("256p", size))
    return float(base_s + loop_s + figures[size]["decode"]["s"])


def sr_table(figures: dict[str, Any]) -> list[str]:
    """Stages of super-resolved clips, each timed alone, from base latents to frames on the host."""
    lines = [
        "| 5 s super-resolved, from noise to frames | 8 steps at 480x256 | 5 steps | decode | sum |"
        " published | | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in ("540p", "1080p"):
        width, height = config.SR_SIZES[size]
        decode_s, published_s = figures[size]["decode"]["s"], figures[size]["published_s"]
        for precision in PRECISIONS:
            if precision not in figures[size]:
                continue
            base_s, loop_s = (figures[name][precision]["loop_s"] for name in ("256p", size))
            total_s = super_resolved_s(figures, size, precision)
            lines.append(
                f"| {width}x{height}, {precision} | {base_s:.2f} s | {loop_s:.2f} s |"
                f" {decode_s:.2f} s | {total_s:.2f} s | {published_s:.1f} s |"
                f" {published_s / total_s:.1f}x |"
                f" {figures[size][precision]['device_gib']:.1f} GiB |"
            )
    steps = []
    for size in ("540p", "1080p"):
        plain_s, own_s = (figures[size]["bf16"][key] for key in ("plain_step_s", "compiled_step_s"))
        width, height = config.SR_SIZES[size]
        steps.append(
            f"at {width}x{height} {own_s:.2f} s against {plain_s:.2f} s, {plain_s / own_s:.1f}x"
        )
    return [
        *lines,
        "",
        "The stages were timed one after another, in runs of one day, over the weights of one"
        " transformer. The",
        "memory includes these weights and leaves out the decoder's memory. The published figures"
        " come from the",
        "authors' own runs.",
        f"Full attention in bf16 was that of `{figures['1080p']['bf16']['attention']}`, which"
        " measured fastest. One step in bf16",
        "against one of the plain model with FlashAttention-3, each pair in one run:",
        f"{'; '.join(steps)}.",
    ]


def memory_table(cases: dict[str, Any]) -> list[str]:
    """Whole clips in little memory; what is held was read every 20 ms."""
    stages = ("text", "denoise", "super_resolve", "decode_video", "total")
    lines = [
        "| 5 s with `memory_limit_gb` | held, at most | in host memory | text | base steps |"
        " super-resolution | frames | in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    limited = [name for name in cases if " in " in name and "request_s" in cases[name]]
    for name in sorted(limited, key=lambda name: (-int(name.partition("p ")[0]), name)):
        case, (clip, _, limit) = cases[name], name.rpartition(" in ")
        seconds = [
            f"{case['request_s'][stage]:.2f} s" if stage in case["request_s"] else "-"
            for stage in stages
        ]
        rests = f"{(case['plan'] or {}).get('host_bytes', 0) / 2**30:.1f} GiB"
        held = f"{case['device_gib']:.2f} GiB"
        lines.append(f"| {clip}, {limit} GiB | {held} | {rests} | {' | '.join(seconds)} |")
    return [
        *lines,
        "",
        "The memory held, the driver's included, was read every 20 ms, during the first request"
        " too. At 1080p",
        "that request timed an attention of cuDNN's with a mask of 8 GiB, which is no longer tried"
        " there.",
    ]


def request_table(figures: dict[str, Any], decoding: dict[str, Any]) -> list[str]:
    """Whole requests by precision, from the prompt to the file."""
    names = [name for name in PRECISIONS if name in figures]
    own = [figures[name] for name in names]
    machine = figures["environment"]
    soft_s, noise_s = after_last_frame_s(decoding)
    rows = [
        ("text", [f"{f['stages_s']['text']:.3f} s" for f in own]),
        ("denoise", [f"{f['stages_s']['denoise']:.3f} s" for f in own]),
        ("frames and sound", [f"{f['stages_s']['decode_video']:.3f} s" for f in own]),
        ("mp4, after the last frame", [f"{f['stages_s']['write']:.3f} s" for f in own]),
        ("**prompt to mp4**", [f"**{f['prompt_to_mp4_s']:.2f} s**" for f in own]),
        (
            "prompt to the first second of frames, streamed",
            [f"{f['first_frames_s']:.2f} s" for f in own],
        ),
        ("peak GPU memory", [f"{f['peak_gib']:.1f} GiB" for f in own]),
    ]
    return [
        f"| whole request at 480x256, everything resident and warm | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
        "",
        f"Medians of one run, {machine.get('gpu', 'CPU')}, {machine['date']}. Random weights make"
        " frames of noise, which is the most work there is for the mp4",
        f"encoder; in the run of the decoders a file of soft content ended {noise_s - soft_s:.2f} s"
        " sooner.",
    ]


def is_full(entry: history.Entry) -> bool:
    """Whether a GPU ran the full size."""
    return any(history.size(benchmark) == "full" for benchmark in entry["benchmarks"])


def newest_kernel_table(folder: Path) -> list[str]:
    """Of the newest full-size run, under a heading of its own; nothing where there is none."""
    newest = [entry for entry in history.entries(folder / "history") if is_full(entry)][-1:]
    return [line for entry in newest for line in ("## Single kernels", "", *kernel_table(entry))]


def power_table(folder: Path) -> list[str]:
    """What a forward and its parts take of the card's power; nothing where it was not measured."""
    if not (folder / "power.json").exists():
        return []
    return power_tables.power_lines(read(folder, "power"))


def long_table(folder: Path) -> list[str]:
    """Long clips of nano; nothing where they were not measured."""
    if not (folder / "long_clip.json").exists():
        return []
    return live_tables.long_lines(read(folder, "long_clip"))


def live_table(folder: Path) -> list[str]:
    """Of a face that answers, once it has been measured."""
    if not (folder / "live.json").exists():
        return []
    return live_tables.live_lines(read(folder, "live"))


def portable_table(folder: Path) -> list[str]:
    """8 steps on portable kernels; nothing where they were not measured."""
    if not (folder / "portable.json").exists():
        return []
    return portable_tables.portable_lines(read(folder, "portable"))


def kernel_table(entry: history.Entry) -> list[str]:
    """Device time of every kernel and how near it comes to the ceiling, a line a benchmark."""
    rows, ceilings = [], {}
    for benchmark in entry["benchmarks"]:
        info = benchmark["extra_info"]
        if benchmark["group"] == "model" or "of_ceiling" not in info:
            continue
        ceiling = info["ceiling_per_s"] / 1e12
        if "bytes" in info:
            rate = f"{info['bytes_per_s'] / 1e12:.2f} TB/s"
            ceilings["bytes"] = f"a copy within its memory, {ceiling:.2f} TB/s"
        else:
            rate = f"{info['flops_per_s'] / 1e12:.0f} TFLOP/s"
            ceilings["flops"] = f"a large bf16 product, {ceiling:.0f} TFLOP/s"
        rows.append(
            f"| {history.label(benchmark)} | {info['device_ms']:.3f} | {rate} |"
            f" {100 * info['of_ceiling']:.0f} % |"
        )
    return [
        f"Single kernels at commit {history.short_commit(entry)}, {entry['datetime'][:10]}, torch"
        f" {entry['machine_info']['torch']}, on one",
        f"{history.machine(entry)}. The ceiling is what the same run measured:",
        f"{'; '.join(ceilings.values())}.",
        "",
        "| kernel | ms | rate | of the ceiling |",
        "|---|---|---|---|",
        *rows,
    ]


def nano_lines(figures: dict[str, Any]) -> list[str]:
    """How well the nano model does what prompts, images and voices ask of it."""
    facts = figures["environment"]
    made = {name: figures[name] for name in ("bf16", "fp8") if name in figures}
    first = made["bf16"]
    plain, decibels = "{:.2f}".format, "{:.1f} dB".format
    rows: dict[str, tuple[str, Callable[[float], str]]] = {
        "colours": ("named colours where they belong", lambda share: f"{100 * share:.0f} %"),
        "synchrony": ("correlation of mouth and sound", plain),
        "voice": ("correlation of mouth and a given voice", plain),
        "first_frame_db": ("first frame against its image", decibels),
        "image_db": ("images through both halves", decibels),
        "sound_db": ("spectra of sounds through both halves", decibels),
    }
    return [
        f"Over {first['prompts']} held-out prompts, and {first['references']} images and voices,"
        f" on {facts.get('gpu', 'a CPU')} ({facts['date']}, torch",
        f"{facts['torch']}):",
        "",
        f"| figure | aim | {' | '.join(made)} |",
        "|---|---|" + "---|" * len(made),
        *(
            f"| {name} | {show(LEAST[key])} | {' | '.join(show(f[key]) for f in made.values())} |"
            for key, (name, show) in rows.items()
        ),
    ]


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder", type=Path, default=history.RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT)
    arguments = parser.parse_args()
    rendered = tables(arguments.folder)
    for name, parts in FILES.items():
        text = fresh = (ROOT / name).read_text()
        for part in parts:
            start, end = f"<!-- {part}:start -->", f"<!-- {part}:end -->"
            head, rest = fresh.split(start)
            _, tail = rest.split(end)
            fresh = f"{head}{start}\n{rendered[part]}\n{end}{tail}"
        if arguments.check and fresh != text:
            sys.exit(f"{name} is out of date; run python benchmarks/reports/render_readme.py")
        if not arguments.check:
            path = arguments.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fresh)


if __name__ == "__main__":
    main()
