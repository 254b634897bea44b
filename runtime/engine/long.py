"""Clips without an end: windows one after another, each from the last frame of the one before."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from magihuman.runtime import config
from magihuman.runtime.errors import DeadlineExceeded, InvalidRequestError, OutputError, shown
from magihuman.runtime.media import FragmentWriter, check_output, mark, read_audio
from magihuman.runtime.pipeline import LATENT_SAMPLES, Waveform, joined, whole_frames
from magihuman.runtime.prompts import MAX_SCENE_S, Prompt, Scene
from magihuman.runtime.request import (
    MAX_SECONDS,
    MIN_SECONDS,
    STANDARD_SIZE,
    Chunk,
    ClipSize,
    ProgressCallback,
    Request,
    RequestOptions,
    Video,
)

STRIDE = config.VIDEO_STRIDE[0]  # frames of a latent, the least step of a window
SHORTEST = 2 * STRIDE  # frames that a window goes on for; the model has learnt none as short
QUIET = 0.1  # of the loudest moment: below it is a pause
FRAME_SAMPLES = config.SAMPLE_RATE_HZ // config.FPS
MAX_VOICE_S = 3600.0
MIN_WINDOW_S = SHORTEST / config.FPS
Generate = Callable[..., Video]


@dataclass(frozen=True)
class Window:
    """A stretch of a long clip.

    Attributes:
        begin, end: its first and its last frame; the last is the next one's first.
        scene: the number of the scene that it belongs to.
    """

    begin: int
    end: int
    scene: int

    @property
    def seconds(self) -> float:
        """Of the request that makes it."""
        return (self.end - self.begin) / config.FPS


@dataclass(frozen=True)
class LongOptions:
    """How a long clip is made.

    Attributes:
        window_s: of a window at most.
        save: the mp4 to write as windows are made.
        on_progress, cancel: as of `Engine.generate`.
        deadline_s: for all of it.
        request: the other fields of `Request`, of all windows.
    """

    window_s: float
    save: Path | None = None
    on_progress: ProgressCallback | None = None
    cancel: threading.Event | None = None
    deadline_s: float | None = None
    request: dict[str, object] = field(default_factory=dict)


def long_request(
    prompt: str | Prompt | Sequence[Scene], options: RequestOptions, suited: ClipSize | None
) -> tuple[list[Scene], Waveform | None, dict[str, object]]:
    """Scenes, voice, and the fields of `Request` that all windows have.

    suited: of the model, where it tells. Raises `InvalidRequestError` for what is wrong with any.
    """
    values: dict[str, object] = {"seed": 42, **(suited or {}), **options}
    before = options.get("continue_from")
    if isinstance(before, Video) and not {"width", "height"} & options.keys():
        values |= before.made_at
    voice = read_voice(values.pop("audio", None))
    seconds = options.get("seconds")
    if isinstance(prompt, (str, Prompt)):
        length = (suited or STANDARD_SIZE)["seconds"] if seconds is None else seconds
        scenes = [Scene(prompt, MAX_SCENE_S if voice is not None and seconds is None else length)]
    else:
        scenes = list(prompt)
        if not scenes or not all(isinstance(scene, Scene) for scene in scenes):
            raise InvalidRequestError(f"prompt must be text or Scenes, got {shown(prompt)}")
        if seconds is not None:
            raise InvalidRequestError("seconds must be those of the scenes: leave it out")
    if voice is not None and seconds is not None:
        voice = whole_frames(voice[: int(seconds * config.LATENT_AUDIO_RATE_HZ)])
    values.pop("seconds", None)
    Request(prompt="-", **values)  # type: ignore[arg-type]
    return scenes, voice, values


def checked_window_s(seconds: float | None, suited: ClipSize) -> float:
    """The longest that a window may be, by default what suits. Raises `InvalidRequestError`."""
    if seconds is None:
        return suited["seconds"]
    check_window_s(seconds, MIN_WINDOW_S, MAX_SECONDS)
    return seconds


def check_window_s(seconds: object, low: float, high: float) -> None:
    """Raise `InvalidRequestError` where a window may not be as long as was asked for."""
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not low <= seconds <= high:  # type: ignore[operator]  # so NaN is none
        raise InvalidRequestError(
            f"window_seconds must be {low:g} to {high:g}, got {shown(seconds)}"
        )


def read_voice(audio: object) -> Waveform | None:
    """A driving voice of any length up to an hour, padded to whole frames, where there is one.

    Raises `InvalidRequestError`.
    """
    if audio is None:
        return None
    if isinstance(audio, np.ndarray):
        return whole_frames(audio)
    rate = config.LATENT_AUDIO_RATE_HZ
    samples = read_audio(audio, rate, MAX_VOICE_S + 1)  # type: ignore[arg-type]
    if len(samples) > MAX_VOICE_S * rate:
        raise InvalidRequestError(f"a driving voice may last {MAX_VOICE_S:g} s, got a longer one")
    if len(samples) < MIN_SECONDS * rate:
        raise InvalidRequestError(
            f"a driving voice must last {MIN_SECONDS:g} s at least, got {len(samples) / rate:.3f} s"
        )
    return whole_frames(samples)


def plan(scenes: Sequence[Scene], voice: Waveform | None, window_s: float) -> list[Window]:
    """The windows of a clip, cut at the pauses of its voice, each as long as `window_s` at most.

    With a voice the clip is as long as that: what scenes last beyond it is left out, and the last
    one goes on to its end.
    """
    longest = max(SHORTEST, int(round(window_s * config.FPS, 6)) // STRIDE * STRIDE)
    lengths = (round(scene.seconds * config.FPS / STRIDE) * STRIDE for scene in scenes)
    ends = list(itertools.accumulate(max(SHORTEST, length) for length in lengths))
    loud = None
    if voice is not None:
        total = len(voice) // LATENT_SAMPLES - 1
        ends = [*(end for end in ends[:-1] if end <= total - SHORTEST), total]
        loud = _loudness(voice)
    windows = []
    for number, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        points = cuts(begin, end, longest, loud)
        windows += [Window(first, last, number) for first, last in itertools.pairwise(points)]
    return windows


def cuts(
    begin: int, end: int, longest: int, loud: npt.NDArray[np.float64] | None = None
) -> list[int]:
    """Frames from `begin` to `end`, both included, with none further from the next than `longest`.

    loud: the loudness of each frame, by which they lie in pauses, or where it is least; else they
    are about as far from each other. All differences are multiples of the least step.
    """
    if loud is None:
        count = math.ceil((end - begin) / longest)
        steps = (end - begin) // STRIDE
        return [begin + steps * index // count * STRIDE for index in range(count + 1)]
    points = [begin]
    while end - points[-1] > longest:
        last = min(points[-1] + longest, end - max(SHORTEST, longest // 4 // STRIDE * STRIDE))
        options = range(last, points[-1] + max(SHORTEST, longest // 2) - 1, -STRIDE)
        levels = [float(loud[option]) for option in options] or [0.0]
        bound = max(min(levels), QUIET * float(loud.max()))
        points.append(next((o for o in options if loud[o] <= bound), last))
    return [*points, end]


def _loudness(voice: Waveform) -> npt.NDArray[np.float64]:
    """The RMS around each frame: [latents]."""
    frames = voice[: len(voice) // LATENT_SAMPLES * LATENT_SAMPLES].reshape(-1, LATENT_SAMPLES)
    power = np.square(frames.astype(np.float64)).mean(1)
    padded = np.pad(power, 1, mode="edge")
    rms: npt.NDArray[np.float64] = np.sqrt((padded[:-2] + padded[1:-1] + padded[2:]) / 3)
    return rms


def chunks(
    generate: Generate, scenes: Sequence[Scene], voice: Waveform | None, options: LongOptions
) -> Iterator[Chunk]:
    """Make a long clip window by window, and yield each as soon as it is made.

    generate: `Engine.generate`. Memory is that of a window. What ends it early, and an iterator
    that nobody holds any more, leave the file with all windows before.
    """
    windows = plan(scenes, voice, options.window_s)
    with ExitStack() as stack:
        file: FragmentWriter | None = None
        if options.save is not None:
            file = _opened(options.save)
            stack.callback(_settle, options.save)
            stack.enter_context(file)
        for chunk in _made(generate, scenes, windows, voice, options):
            if file is not None:
                _write(file, chunk, options.save)
            yield chunk


def _made(
    generate: Generate,
    scenes: Sequence[Scene],
    windows: Sequence[Window],
    voice: Waveform | None,
    options: LongOptions,
) -> Iterator[Chunk]:
    end_s = None if options.deadline_s is None else time.monotonic() + options.deadline_s
    seam = Seam()
    before = options.request.get("continue_from")
    seam.is_first = before is None
    for number, window in enumerate(windows):
        request = _request(scenes, window, number, before, voice, options)
        left_s = None if end_s is None else end_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded(f"the clip was not done within {options.deadline_s:g} s")
        video = generate(
            request, on_progress=options.on_progress, cancel=options.cancel, deadline_s=left_s
        )
        yield seam.add(video, is_last=number == len(windows) - 1)
        # What the next one needs of it, and not its frames.
        frames = video.frames[-1:].copy()
        before = dataclasses.replace(video, frames=frames, audio=video.audio[:0].copy())
        del video


def _request(
    scenes: Sequence[Scene],
    window: Window,
    number: int,
    before: object,
    voice: Waveform | None,
    options: LongOptions,
) -> Request:
    values = {**options.request, "continue_from": before, "seconds": window.seconds}
    values["seed"] = (int(options.request["seed"]) + number) % (2**63)  # type: ignore[call-overload]
    if before is not None:
        values["image"] = None
    if voice is not None:
        part = slice(window.begin * LATENT_SAMPLES, (window.end + 1) * LATENT_SAMPLES)
        values["audio"] = voice[part].copy()
    return Request(prompt=str(scenes[window.scene].prompt), **values)  # type: ignore[arg-type]


class Seam:
    """Puts windows together: the frame that two of them share is that between both, and their sound
    is faded over it.

    Attributes:
        is_first: whether what comes next is the beginning, and not a clip that goes on from one.
    """

    def __init__(self) -> None:
        self.is_first = True
        self._frame: npt.NDArray[np.uint8] | None = None  # kept back, with its sound
        self._sound: Waveform | None = None
        self._done = 0
        self._warnings: dict[str, None] = {}
        self._timings_s: dict[str, float] = {}

    def add(self, video: Video, is_last: bool) -> Chunk:
        """The next chunk, from the next window."""
        frames, sound = video.frames.copy(), video.audio[: len(video.frames) * FRAME_SAMPLES].copy()
        sound = np.pad(sound, ((0, len(frames) * FRAME_SAMPLES - len(sound)), (0, 0)))
        if self._frame is not None and self._sound is not None:
            both = self._frame.astype(np.uint16) + frames[0] + 1
            frames[0] = (both // 2).astype(np.uint8)
            sound[:FRAME_SAMPLES] = joined(self._sound, sound[:FRAME_SAMPLES])
        elif not self.is_first:  # the frame is that of the clip before
            frames, sound = frames[1:], sound[FRAME_SAMPLES:]
        self.is_first = False
        self._warnings.update(dict.fromkeys(video.warnings))
        for stage, seconds in video.timings_s.items():
            self._timings_s[stage] = self._timings_s.get(stage, 0.0) + seconds
        if not is_last:
            self._frame, self._sound = frames[-1].copy(), sound[-FRAME_SAMPLES:].copy()
            frames, sound = frames[:-1], sound[:-FRAME_SAMPLES]
        first, self._done = self._done, self._done + len(frames)
        return Chunk(
            frames=frames,
            first_frame=first,
            audio=sound,
            fps=video.fps,
            sample_rate_hz=video.sample_rate_hz,
            is_last=is_last,
            seed=video.seed,
            timings_s=dict(self._timings_s) if is_last else {},
            warnings=tuple(self._warnings) if is_last else (),
        )


def _opened(path: Path) -> FragmentWriter:
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"the name of a long clip must end in .mp4, got {path.name}")
    check_output(path)
    try:
        return FragmentWriter(path, config.FPS, config.SAMPLE_RATE_HZ)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from error


def _settle(path: Path) -> None:
    """Mark a file as made by a model, which it says of itself; one of nothing is removed."""
    with suppress(OSError):  # what ended the clip is raised, and not this
        if path.stat().st_size:
            mark(path)
        else:
            path.unlink()


def _write(file: FragmentWriter, chunk: Chunk, path: Path | None) -> None:
    import av

    try:
        file.add(chunk.frames, chunk.audio, chunk.is_last)
    except (OSError, av.FFmpegError) as error:
        raise OutputError(
            f"{path} could not be written: {error}; it has what was made before"
        ) from error
