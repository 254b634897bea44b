"""Clips of the same prompts and seeds in several precisions, measured side by side."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from magihuman.runtime.engine import Engine, OnLoad
from magihuman.runtime.errors import InvalidRequestError, OutputError, one_of
from magihuman.runtime.evaluate.cases import Case, check_case
from magihuman.runtime.evaluate.hearing import Recogniser
from magihuman.runtime.evaluate.landmarks import Landmarks
from magihuman.runtime.evaluate.measures import (
    EvaluatedClip,
    Measure,
    NotMeasured,
    standard_measures,
)
from magihuman.runtime.evaluate.precisions import PathLike, loaded, must_simulate
from magihuman.runtime.files import atomic_folder, check_new_folder, write_json
from magihuman.runtime.prompts import Prompt
from magihuman.runtime.request import Progress, ProgressCallback, Request, Video
from magihuman.runtime.weights import PrecisionPolicy, sized

PRECISIONS = ("bf16", "fp8", "fp8-attn", "int8")
FIGURES = "evaluation.json"  # in the folder that is written


class EvaluateOptions(TypedDict, total=False):
    """What `evaluate` takes as keywords; each may be left out.

    Attributes:
        seconds, width, height: as for `Request`, by default what suits the model.
        steps: as for `Request`.
        seed: of the first case, 42 by default; each further case has the next number.
        variant, transformer, device, on_load: as for `load`.
        asr, landmarks: as of `standard_measures`, where no measures are given.
        out: a new folder for the clips, `PRECISION/NUMBER.mp4`, and `evaluation.json`. It appears
            whole or not at all.
        on_progress: called after every step; the stage names precision and case.
    """

    seconds: float | None
    width: int | None
    height: int | None
    steps: int | None
    seed: int
    variant: str
    transformer: PathLike | None
    device: str | torch.device | None
    on_load: OnLoad | None
    asr: str | Recogniser | None
    landmarks: Landmarks | None
    out: PathLike | None
    on_progress: ProgressCallback | None


@dataclass(frozen=True)
class Figures:
    """What was measured on one clip.

    Attributes:
        case, seed, precision: of the clip.
        figures: by the measures' names; None where a clip has none.
        notes: what measures say beside their figure, such as the words heard.
        warnings: where the clip differs from what was asked for, and why.
    """

    case: Case
    seed: int
    precision: str
    figures: dict[str, float | None]
    notes: dict[str, str]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The same, ready for JSON."""
        return {
            "prompt": self.case.prompt,
            "words": " ".join(line.words for line in self.case.lines) or None,
            "seed": self.seed,
            "precision": self.precision,
            "figures": self.figures,
            "notes": self.notes,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Evaluation:
    """The figures of all clips.

    Attributes:
        settings: what was evaluated, and how.
        precisions: in order, bf16 first where it is among them.
        simulated: those whose kernels cannot run here.
        units: of the measures, by name.
        clips: figures of each, by precision and then by case.
        not_measured: why a measure was not taken, by name.
        failures: a sentence for each figure that a measure could not give.
    """

    settings: dict[str, object]
    precisions: tuple[str, ...]
    simulated: tuple[str, ...]
    units: dict[str, str]
    clips: list[Figures]
    not_measured: dict[str, str]
    failures: list[str]

    def mean(self, name: str, precision: str) -> float | None:
        """The mean of a measure over the clips of a precision that have a figure, if any has."""
        given = [clip.figures[name] for clip in self.clips if clip.precision == precision]
        values = [value for value in given if value is not None]
        return statistics.fmean(values) if values else None

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON. Every number is finite."""
        return {
            **self.settings,
            "precisions": list(self.precisions),
            "simulated": list(self.simulated),
            "measures": {
                name: {"unit": unit, **{p: self.mean(name, p) for p in self.precisions}}
                for name, unit in self.units.items()
            },
            "not_measured": self.not_measured,
            "failures": self.failures,
            "clips": [clip.to_dict() for clip in self.clips],
        }


def evaluate(
    model: PathLike,
    prompts: Sequence[str | Prompt | Case],
    precisions: Sequence[str] = ("bf16", "fp8", "int8"),
    measures: Sequence[Measure] | None = None,
    **options: Unpack[EvaluateOptions],
) -> Evaluation:
    """Make a clip of each prompt in each precision, with the same seeds, and measure it.

    The model is loaded once for each precision. Where the kernels of one cannot run here it is
    simulated in the plain model.

    Args:
        model: what `load` takes, without `synthetic`.
        prompts: one clip of each in each precision; `read_cases` reads them from a file.
        precisions: of "bf16", "fp8", "fp8-attn" and "int8". Differences are to bf16.
        measures: by default `standard_measures(model, asr, landmarks)`.
        options: see `EvaluateOptions`.

    Raises:
        InvalidRequestError: an argument is not one of those above, or an image or a voice cannot be
            read; no weights are read before.
        OutputError: the folder exists, or cannot be written.
        CheckpointError, DeviceError: as `load`.
    """
    for name in options:
        one_of("options", name, tuple(EvaluateOptions.__annotations__))
    out = options.get("out")
    folder = None if out is None else Path(out).absolute()
    if folder is not None:
        check_new_folder(folder, 0)
    run = _Run(model, prompts, precisions, measures, options)
    if folder is None:
        return run.result(None)
    with _told(folder), atomic_folder(folder) as temporary:
        evaluation = run.result(temporary)
        write_json(temporary / FIGURES, evaluation.to_dict())
    return evaluation


class _Run:
    """One evaluation, whose arguments are checked when it is made."""

    def __init__(
        self,
        model: PathLike,
        prompts: Sequence[str | Prompt | Case],
        precisions: Sequence[str],
        measures: Sequence[Measure] | None,
        options: EvaluateOptions,
    ) -> None:
        self._model, self._options = model, options
        self._cases = _cases(prompts)
        self._precisions = _precisions(precisions)
        self._requests = self._asked()
        self._load: dict[str, Any] = {
            name: options[name] for name in ("variant", "transformer", "device") if name in options
        }
        for precision in self._precisions:
            must_simulate(model, PrecisionPolicy(precision), **self._load)
        if measures is None:
            heard, seen = options.get("asr"), options.get("landmarks")
            measures = standard_measures(model, heard, seen)
        self._measures = _measures(measures)
        self._failures: list[str] = []

    def result(self, out: Path | None) -> Evaluation:
        """All clips made and measured. out: a folder for them."""
        clips, simulated, device = [], [], ""
        with tempfile.TemporaryDirectory(prefix="magihuman-") as kept, _told(Path(kept)):
            for name in self._precisions:
                precision = PrecisionPolicy(name)
                on_load = self._options.get("on_load")
                with loaded(self._model, precision, on_load=on_load, **self._load) as (
                    engine,
                    is_simulated,
                ):
                    device = str(engine.device)
                    simulated += [name] if is_simulated else []
                    clips += list(self._of(engine, name, Path(kept), out))
        first = self._requests[0]
        settings = {
            "model": os.fspath(self._model),
            "variant": self._options.get("variant", "distill"),
            "device": device,
            "seconds": first.seconds,
            "width": first.width,
            "height": first.height,
            "steps": first.steps,
            "seed": first.seed,
        }
        return Evaluation(
            settings=settings,
            precisions=self._precisions,
            simulated=tuple(simulated),
            units={m.name: m.unit for m in self._measures if not isinstance(m, NotMeasured)},
            clips=clips,
            not_measured={m.name: m.why for m in self._measures if isinstance(m, NotMeasured)},
            failures=self._failures,
        )

    def _asked(self) -> list[Request]:
        """The request of each case, whose files can be read."""
        given = self._options
        size = {name: given.get(name) for name in ("seconds", "width", "height")}
        values = sized(self._model, **size)  # type: ignore[arg-type]
        first, steps = given.get("seed", 42), given.get("steps")
        requests = []
        for i, case in enumerate(self._cases):
            files: dict[str, Any] = {"image": case.image, "audio": case.audio}
            request = Request(case.prompt, **files, seed=first + i, steps=steps, **values)
            check_case(case, request)
            requests.append(request)
        return requests

    def _of(
        self, engine: Engine, precision: str, kept: Path, out: Path | None
    ) -> Iterator[Figures]:
        """The figures of a precision. kept: where the clips of bf16 are, for the others."""
        for i, (case, request) in enumerate(zip(self._cases, self._requests, strict=True)):
            label = f"{precision} {i + 1} of {len(self._cases)}"
            video = engine.generate(request, on_progress=self._labelled(label))
            if out is not None:
                (out / precision).mkdir(exist_ok=True)
                video.save(out / precision / f"{i + 1:03}.mp4")
            reference = None
            if precision == "bf16":
                np.savez(kept / f"{i}.npz", frames=video.frames, audio=video.audio)
            elif "bf16" in self._precisions:
                reference = _read(kept / f"{i}.npz", video)
            yield self._figures(EvaluatedClip(case, precision, video, reference))

    def _figures(self, clip: EvaluatedClip) -> Figures:
        figures: dict[str, float | None] = {}
        notes: dict[str, str] = {}
        for measure in self._measures:
            if isinstance(measure, NotMeasured):
                continue
            name = measure.name
            try:
                figures[name] = _finite(measure.of(clip))
                note = getattr(measure, "note", None)
                text = None if note is None else note(clip)
            except Exception as error:  # of a measure from elsewhere: the others' figures stay
                figures[name], text = None, None
                self._failures.append(
                    f"{name}, {clip.precision}, {clip.case.prompt[:40]!r}:"
                    f" {type(error).__name__}: {error}"
                )
            if text is not None:
                notes[name] = str(text)
        video = clip.video
        return Figures(clip.case, video.seed, clip.precision, figures, notes, video.warnings)

    def _labelled(self, label: str) -> ProgressCallback | None:
        tell = self._options.get("on_progress")
        if tell is None:
            return None

        def told(progress: Progress) -> None:
            tell(dataclasses.replace(progress, stage=label))

        return told


def _cases(prompts: Sequence[str | Prompt | Case]) -> list[Case]:
    if isinstance(prompts, (str, Prompt, Case)) or not prompts:
        raise InvalidRequestError(f"prompts must be a list of one at least, got {prompts!r}")
    return [each if isinstance(each, Case) else Case(str(each)) for each in prompts]


def _precisions(names: Sequence[str]) -> tuple[str, ...]:
    """The precisions, each once, bf16 first."""
    if isinstance(names, str) or not names:
        raise InvalidRequestError(f"precisions must be a list of one at least, got {names!r}")
    for name in names:
        one_of("a precision", name, PRECISIONS)
    return tuple(sorted(dict.fromkeys(names), key=lambda name: name != "bf16"))


def _measures(given: Sequence[Measure]) -> list[Measure]:
    """The measures, whose names are unlike."""
    names = set()
    for measure in given:
        name = getattr(measure, "name", None)
        if not isinstance(measure, Measure) or not isinstance(name, str) or name in names:
            raise InvalidRequestError(
                "a measure must have a name of its own, a unit, and of(clip), got"
                f" {name or measure!r}"
            )
        names.add(name)
    return list(given)


def _finite(value: float | None) -> float | None:
    """The figure that a measure gave. Raises `ValueError` for what is none."""
    if value is None:
        return None
    figure = float(value)
    if not math.isfinite(figure):
        raise ValueError(f"a figure must be finite, or None, got {figure}")
    return figure


def _read(path: Path, like: Video) -> Video:
    with np.load(path) as kept:
        return Video(kept["frames"], kept["audio"], like.fps, like.sample_rate_hz)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Errors of the disk as `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
