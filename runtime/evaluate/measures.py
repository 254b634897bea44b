"""What is measured on each clip of an evaluation. Any object of the form of `Measure` will do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from magihuman.runtime.evaluate import clip_score, hearing
from magihuman.runtime.evaluate import landmarks as faces
from magihuman.runtime.evaluate.cases import Case
from magihuman.runtime.evaluate.clip_score import Array, Synchrony
from magihuman.runtime.evaluate.hearing import Recogniser, open_recogniser
from magihuman.runtime.evaluate.landmarks import Landmarks
from magihuman.runtime.evaluate.model_score import PROMPTS, SCORE_FOLDER
from magihuman.runtime.evaluate.plugged import plugged
from magihuman.runtime.media import quality
from magihuman.runtime.request import Video
from magihuman.runtime.weights import exists, model_folder

GROUP = "magihuman.measures"
MOST_DB = 100.0  # of clips that are equal
Key = TypeVar("Key")
Value = TypeVar("Value")
SynchronyOf = Callable[[Video], Synchrony | None]
Boxes = dict[str, tuple[tuple[float, float, float, float], ...]]
WHOLE: Boxes = {"frame": ((0.0, 1.0, 0.0, 1.0),)}


@dataclass(frozen=True)
class EvaluatedClip:
    """A clip to be measured.

    Attributes:
        case: what it was made of.
        precision: of the transformer.
        video: the clip.
        reference: that of the same case and seed in bf16; None where this is it, or none was made.
    """

    case: Case
    precision: str
    video: Video
    reference: Video | None = None


@runtime_checkable
class Measure(Protocol):
    """A figure of a clip.

    Attributes:
        name: in tables and JSON, unlike those of other measures.
        unit: of the figure, such as "dB" or "share".
    """

    name: str
    unit: str

    def of(self, clip: EvaluatedClip) -> float | None:
        """The figure, which is finite; None where this clip has none."""
        ...


@dataclass
class NotMeasured:
    """Stands for a measure that cannot be taken here, and says why."""

    name: str
    unit: str
    why: str

    def of(self, clip: EvaluatedClip) -> None:
        """No figure."""


def last_kept(of: Callable[[Key], Value]) -> Callable[[Key], Value]:
    """The same function, which keeps the value of the last argument: several measures ask for what
    is found in a clip.
    """
    last: tuple[Key, Value] | None = None

    def kept(key: Key) -> Value:
        nonlocal last
        if last is None or last[0] is not key:
            last = key, of(key)
        return last[1]

    return kept


def hearing_of(recogniser: Recogniser) -> Callable[[EvaluatedClip], str]:
    """What a recogniser hears in a clip."""

    def heard(clip: EvaluatedClip) -> str:
        video = clip.video
        languages = {line.language for line in clip.case.lines}
        language = languages.pop() if len(languages) == 1 else None
        mono = video.audio.reshape(len(video.audio), -1).mean(1)
        return recogniser(mono, video.sample_rate_hz, language)

    return last_kept(heard)


class ErrorRate:
    """Share of the words that are heard wrongly, see `hearing`; or of characters, where the
    dialogue has Chinese, Japanese or Korean ones.
    """

    unit = "share"

    def __init__(self, heard: Callable[[EvaluatedClip], str], by_characters: bool) -> None:
        self.name = "character error rate" if by_characters else "word error rate"
        self._heard, self._by_characters = heard, by_characters

    def of(self, clip: EvaluatedClip) -> float | None:
        """None of a case without words, or with words for the other of the two rates."""
        words = " ".join(line.words for line in clip.case.lines)
        if not words or hearing.is_by_characters(words) != self._by_characters:
            return None
        if self._by_characters:
            return hearing.character_error_rate(self._heard(clip), words)
        return hearing.word_error_rate(self._heard(clip), words)

    def note(self, clip: EvaluatedClip) -> str | None:
        """What was heard."""
        return None if self.of(clip) is None else self._heard(clip)


def synchrony_of(opening: Callable[[Video], Array | None]) -> SynchronyOf:
    """How the mouth, by its opening, goes with the sound; None where it is not seen."""

    def found(video: Video) -> Synchrony | None:
        mouth = opening(video)
        if mouth is None:
            return None
        frames, rate_hz = len(video.frames), video.sample_rate_hz
        sound = clip_score.loudness(video.audio, rate_hz, video.fps, frames)
        return clip_score.synchrony(mouth, sound)

    return last_kept(found)


@dataclass
class MouthWithSound:
    """Correlation of the mouth's opening and the sound's loudness, at their best lag."""

    synchrony: SynchronyOf
    name: str = "mouth with sound"
    unit: str = "correlation"

    def of(self, clip: EvaluatedClip) -> float | None:
        """-1 to 1."""
        found = self.synchrony(clip.video)
        return None if found is None else found.correlation


@dataclass
class MouthLag:
    """By how much the mouth comes after the sound."""

    synchrony: SynchronyOf
    name: str = "mouth after sound"
    unit: str = "frames"

    def of(self, clip: EvaluatedClip) -> float | None:
        """Below 0 where the mouth is early."""
        found = self.synchrony(clip.video)
        return None if found is None else float(found.lag_frames)


class NamedColours:
    """Of the nano world: colours of the prompt that are where they belong."""

    name, unit = "named colours", "share"

    def of(self, clip: EvaluatedClip) -> float | None:
        """None where the prompt names none."""
        named = clip_score.named_colours(clip.case.prompt)
        found = clip_score.found_colours(clip.video.frames) if named else {}
        right = sum(found[part] == colour for part, colour in named.items())
        return right / len(named) if named else None


class ColourDrift:
    """How far colours move from those of the first second: the largest change of a channel in a
    later one.
    """

    name, unit = "colour drift", "of 255"

    def __init__(self, boxes: Boxes = WHOLE) -> None:
        """boxes: parts of the picture, whose mean colours are looked at; by default all of it."""
        self._boxes = boxes

    def of(self, clip: EvaluatedClip) -> float:
        """0 of a clip that lasts no two seconds."""
        fps, frames = clip.video.fps, clip.video.frames
        seconds = [frames[at : at + fps] for at in range(0, max(len(frames) - fps, 0) + 1, fps)]
        colours = np.stack([self._colours(second) for second in seconds])
        return float(np.abs(colours - colours[0]).max())

    def _colours(self, frames: npt.NDArray[np.uint8]) -> Array:
        """[parts, 3]."""
        means = (
            np.mean([clip_score.box(frames, each).mean((0, 1, 2)) for each in boxes], axis=0)
            for boxes in self._boxes.values()
        )
        return np.stack(list(means))


@dataclass
class FaceDrift:
    """How far the shape of the face moves from the first quarter's, see `geometry_drift`."""

    points: Callable[[Video], faces.Points]
    name: str = "face drift"
    unit: str = "of the eyes' distance"

    def of(self, clip: EvaluatedClip) -> float | None:
        """None where too few frames have a face."""
        return faces.geometry_drift(self.points(clip.video))


class FrameDifference:
    """PSNR of the frames with those of bf16."""

    name, unit = "frames against bf16", "dB"

    def of(self, clip: EvaluatedClip) -> float | None:
        """100 dB of equal ones; None of bf16 itself."""
        if clip.reference is None:
            return None
        return min(quality.psnr_db(clip.video.frames, clip.reference.frames), MOST_DB)


class SoundDifference:
    """Signal-to-noise ratio of the sound with that of bf16."""

    name, unit = "sound against bf16", "dB"

    def of(self, clip: EvaluatedClip) -> float | None:
        """As `FrameDifference`; None where that of bf16 is silent, or of another length."""
        if clip.reference is None or not clip.reference.audio.any():
            return None
        ours, theirs = clip.video.audio, clip.reference.audio
        return None if ours.shape != theirs.shape else min(quality.snr_db(ours, theirs), MOST_DB)


def standard_measures(
    model: str | os.PathLike[str],
    asr: str | Recogniser | None = None,
    landmarks: Landmarks | None = None,
) -> list[Measure]:
    """The measures of `magihuman evaluate`, and those that other packages register.

    Args:
        model: of the clips. Those of a model whose folder has what the nano model's has for its
            score are measured as the nano world's.
        asr: a recogniser, or the name of one, see `open_recogniser`.
        landmarks: of faces; by default MediaPipe's where it is installed.

    Raises:
        CheckpointError: the ASR model cannot be loaded.
        InvalidRequestError: an entry point cannot be used.
    """
    is_nano = exists(model_folder(model) / SCORE_FOLDER / PROMPTS)
    seen = _of_nano() if is_nano else _of_faces(landmarks or faces.installed_landmarks())
    return [*_heard(asr), *seen, FrameDifference(), SoundDifference(), *plugged(GROUP)]


def _heard(asr: str | Recogniser | None) -> Sequence[Measure]:
    if asr is None:
        return [NotMeasured("word error rate", "share", "name an ASR model, by --asr or asr=")]
    heard = hearing_of(open_recogniser(asr) if isinstance(asr, str) else asr)
    return [ErrorRate(heard, False), ErrorRate(heard, True)]


def _of_nano() -> Sequence[Measure]:
    synchrony = synchrony_of(lambda video: clip_score.mouth_opening(video.frames))
    mouth = MouthWithSound(synchrony), MouthLag(synchrony)
    return [*mouth, NamedColours(), ColourDrift(clip_score.REGIONS)]


def _of_faces(landmarks: Landmarks | None) -> Sequence[Measure]:
    if landmarks is None:
        return [
            NotMeasured(MouthWithSound.name, MouthWithSound.unit, faces.INSTALL),
            NotMeasured(FaceDrift.name, FaceDrift.unit, faces.INSTALL),
            ColourDrift(),
        ]

    def looked_for(video: Video) -> faces.Points:
        return landmarks(video.frames)

    points = last_kept(looked_for)
    synchrony = synchrony_of(lambda video: faces.opening(points(video)))
    mouth = MouthWithSound(synchrony), MouthLag(synchrony)
    return [*mouth, FaceDrift(points), ColourDrift()]
