"""What goes into a generation and what comes out, with validation. Imports numpy, never torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError, shown
from magihuman.runtime.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from magihuman.runtime.media import Origin


MIN_SECONDS, MAX_SECONDS = 0.2, 60.0
MIN_SIDE_PX, MAX_SIDE_PX = 32, 4096
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1

# The published pipeline's negative prompt (daVinci-MagiHuman repository,
# inference/pipeline/video_generate.py).
DEFAULT_NEGATIVE_PROMPT = " ".join(
    """
    Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings,
    images, static, overall gray, worst quality, low quality, JPEG compression residue, ugly,
    incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured,
    misshapen limbs, fused fingers, still picture, messy background, three legs, many people
    in the background, walking backwards, low quality, worst quality, poor quality, noise,
    background noise, hiss, hum, buzz, crackle, static, compression artifacts, MP3 artifacts,
    digital clipping, distortion, muffled, muddy, unclear, echo, reverb, room echo,
    over-reverberated, hollow sound, distant, washed out, harsh, shrill, piercing, grating,
    tinny, thin sound, boomy, bass-heavy, flat EQ, over-compressed, abrupt cut, jarring
    transition, sudden silence, looping artifact, music, instrumental, sirens, alarms, crowd
    noise, unrelated sound effects, chaotic, disorganized, messy, cheap sound, emotionless,
    flat delivery, deadpan, lifeless, apathetic, robotic, mechanical, monotone, flat
    intonation, undynamic, boring, reading from a script, AI voice, synthetic, text-to-speech,
    TTS, insincere, fake emotion, exaggerated, overly dramatic, melodramatic, cheesy, cringey,
    hesitant, unconfident, tired, weak voice, stuttering, stammering, mumbling, slurred
    speech, mispronounced, bad articulation, lisp, vocal fry, creaky voice, mouth clicks, lip
    smacks, wet mouth sounds, heavy breathing, audible inhales, plosives, p-pops, coughing,
    clearing throat, sneezing, speaking too fast, rushed, speaking too slow, dragged out,
    unnatural pauses, awkward silence, choppy, disjointed, multiple speakers, two voices,
    background talking, out of tune, off-key, autotune artifacts
    """.split()  # noqa: SIM905
)


class ClipSize(TypedDict):
    """Length and size of a clip, by the names of `Request`."""

    seconds: float
    width: int
    height: int


class FrameSize(TypedDict):
    """Size of a clip, by the names of `Request`."""

    width: int
    height: int


# Of the published model: sizes that are made as they are asked for.
STANDARD_SIZE = ClipSize(seconds=5.0, width=480, height=256)


@dataclass(frozen=True)
class Request:
    """One clip to make. Checked on construction: a bad value raises `InvalidRequestError`.

    A `Request` has the standard length and size where they are left out, whatever the model. Given
    to an engine as keywords, what is left out is the model's, see `Engine.defaults`.

    Attributes:
        prompt: what is seen and said; not empty. Beyond 640 tokens it is cut, with a warning.
        image: reference face (path or PIL image); becomes the first frame.
        audio: driving voice, a path or mono float32 samples at 51.2 kHz, which are taken whole;
            becomes the sound, and the clip ends with it, or up to 0.16 s
            later, in silence.
        seconds: length asked for, 0.2 to 60; what is made is a whole number of latent frames (4 n
            + 1 frames at 25/s).
        width, height: size asked for in pixels; made in steps of 32, rounded down.
        sr_width, sr_height: size after super-resolution; by default that of the engine's mode,
            turned for portraits.
        seed: 0 to 2^63 - 1. Same seed, device and request give the same latents, bit for bit.
        negative_prompt: what guidance moves away from; used only where guidance is on.
        steps, sr_steps: denoising steps; by default what the variant was made for.
        guidance: video guidance of the base model (5.0 by default; 1.0 turns it off). Not for
            distilled models.
        sr_guidance: guidance of super-resolution; off by default, 3.5 as published.
        continue_from: a clip, or the path of one, whose last frame becomes the first frame of this.
    """

    prompt: str
    image: str | os.PathLike[str] | Image | None = None
    audio: str | os.PathLike[str] | npt.NDArray[np.float32] | None = None
    seconds: float = STANDARD_SIZE["seconds"]
    width: int = STANDARD_SIZE["width"]
    height: int = STANDARD_SIZE["height"]
    sr_width: int | None = None
    sr_height: int | None = None
    seed: int = 42
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    steps: int | None = None
    sr_steps: int | None = None
    guidance: float | None = None
    sr_guidance: float | None = None
    continue_from: Video | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise InvalidRequestError(f"prompt must be text that is not blank, got {self.prompt!r}")
        if not isinstance(self.negative_prompt, str):
            raise InvalidRequestError(f"negative_prompt must be text, got {self.negative_prompt!r}")
        for name in ("prompt", "negative_prompt"):
            if not _is_unicode(getattr(self, name)):  # as of a command line that is not UTF-8
                raise InvalidRequestError(
                    f"{name} must be valid Unicode, got {getattr(self, name)!r}"
                )
        if self.continue_from is not None:
            _check_continued(self.continue_from, self.image)
        if isinstance(self.audio, np.ndarray):
            _check_samples(self.audio)
        _number("seconds", self.seconds, MIN_SECONDS, MAX_SECONDS)
        _whole("seed", self.seed, 0, MAX_SEED)
        for name in ("width", "height"):
            _whole(name, getattr(self, name), MIN_SIDE_PX, MAX_SIDE_PX)
        if (self.sr_width is None) != (self.sr_height is None):
            raise InvalidRequestError("sr_width and sr_height go together: give both or neither")
        for name in ("sr_width", "sr_height"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), MIN_SIDE_PX, MAX_SIDE_PX)
        for name in ("steps", "sr_steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, MAX_STEPS)
        for name in ("guidance", "sr_guidance"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 1.0, 100.0)

    def plan(self, variant: config.Variant, sr: str | None) -> Plan:
        """What an engine of this variant and super-resolution mode ("540p", "1080p", None) makes.

        Raises `InvalidRequestError` where the request and the engine do not fit.
        """
        notes: list[str] = []
        if self.guidance is not None and variant.guidance is None and self.guidance != 1.0:
            raise InvalidRequestError(
                f"guidance must stay unset for the {variant.name} variant, which was distilled to"
                f" run without, got {self.guidance:g}; load variant='base' to use guidance"
            )
        if sr is None:
            for name in ("sr_width", "sr_steps", "sr_guidance"):
                if getattr(self, name) is not None:
                    raise InvalidRequestError(
                        f"{name} needs an engine loaded with super-resolution: load(...,"
                        " sr='540p' or '1080p')"
                    )
        rows, columns = config.latent_side(self.height), config.latent_side(self.width)
        stride = config.VIDEO_STRIDE[1]
        if (columns * stride, rows * stride) != (self.width, self.height):
            notes.append(
                f"sizes are made in steps of 32 pixels: asked for {self.width}x{self.height},"
                f" making {columns * stride}x{rows * stride}"
            )
        sr_rows = sr_columns = None
        if sr is not None:
            width, height = config.SR_SIZES[sr]
            if self.height > self.width:
                width, height = height, width
            width, height = self.sr_width or width, self.sr_height or height
            sr_rows, sr_columns = config.latent_side(height), config.latent_side(width)
            if (sr_columns * stride, sr_rows * stride) != (width, height):
                notes.append(
                    f"sizes are made in steps of 32 pixels: super-resolution to {width}x{height}"
                    f" makes {sr_columns * stride}x{sr_rows * stride}"
                )
            if sr_rows < rows or sr_columns < columns:
                raise InvalidRequestError(
                    f"super-resolution must not shrink the clip:"
                    f" {columns * stride}x{rows * stride} does not fit"
                    f" {sr_columns * stride}x{sr_rows * stride}; ask for a smaller width and height"
                )
        guidance = variant.guidance if self.guidance is None else self.guidance
        return Plan(
            audio=config.audio_latents(self.seconds),
            rows=rows,
            columns=columns,
            sr_rows=sr_rows,
            sr_columns=sr_columns,
            steps=self.steps or variant.steps,
            sr_steps=self.sr_steps or (config.upscaler(sr).steps if sr else 0),
            guidance=None if guidance in (None, 1.0) else guidance,
            sr_guidance=None if self.sr_guidance in (None, 1.0) else self.sr_guidance,
            warnings=tuple(notes),
        )


class LookOptions(TypedDict, total=False):
    """Those fields of `Request` that have no file in them, and no length, as keywords."""

    width: int
    height: int
    sr_width: int | None
    sr_height: int | None
    seed: int
    negative_prompt: str
    steps: int | None
    sr_steps: int | None
    guidance: float | None
    sr_guidance: float | None


class RequestOptions(LookOptions, total=False):
    """The fields of `Request` beside the prompt, as keywords."""

    image: str | os.PathLike[str] | Image | None
    audio: str | os.PathLike[str] | npt.NDArray[np.float32] | None
    seconds: float
    continue_from: Video | str | os.PathLike[str] | None


def request_of(
    prompt: str | Prompt | Request, options: RequestOptions, suited: ClipSize | None = None
) -> Request:
    """The request that a prompt and keywords make; a `Request` stands for all.

    suited: of a model, for keywords that are left out; by default what `Request` has.

    Raises `InvalidRequestError` for keywords beside a `Request`, or values that are none.
    """
    if not isinstance(prompt, Request):
        filled: RequestOptions = options if suited is None else {**suited, **options}
        before = options.get("continue_from")
        if isinstance(before, Video) and not {"width", "height"} & options.keys():
            filled = {**filled, **before.made_at}
        text = str(prompt) if isinstance(prompt, Prompt) else prompt
        return Request(prompt=text, **filled)
    if options:
        raise InvalidRequestError(
            f"a Request must stand alone, got {', '.join(options)} beside it; set it in the Request"
        )
    return prompt


@dataclass(frozen=True)
class Plan:
    """A request resolved against an engine, and what differs from what was asked.

    Attributes:
        audio: latents of the sound, 25 a second and one more.
        rows, columns: of the video latents, 16 pixels each.
        sr_rows, sr_columns: those after super-resolution; None without.
        steps, sr_steps: denoising steps; sr_steps is 0 without super-resolution.
        guidance, sr_guidance: scales; None where there is no guidance.
        warnings: a sentence for each difference from what was asked.
    """

    audio: int
    rows: int
    columns: int
    sr_rows: int | None
    sr_columns: int | None
    steps: int
    sr_steps: int
    guidance: float | None
    sr_guidance: float | None
    warnings: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        """Latent video frames."""
        return config.latent_frames(self.audio)

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of the finished frames."""
        stride = config.VIDEO_STRIDE[1]
        return (self.sr_columns or self.columns) * stride, (self.sr_rows or self.rows) * stride

    @property
    def duration_s(self) -> float:
        """Seconds that the finished clip lasts."""
        return config.video_frames(self.frames) / config.FPS

    @property
    def video_tokens(self) -> int:
        """Tokens of the picture in the transformer that has most of them."""
        sides = self.rows * self.columns, (self.sr_rows or 0) * (self.sr_columns or 0)
        return self.frames * max(sides)

    def beyond(self, learnt: ClipSize | None, seconds: float) -> str | None:
        """What to say of a clip longer or larger than a model has learnt, None of any other.

        learnt: None where the model does not tell. seconds: of the clip, before super-resolution.
        """
        if learnt is None:
            return None
        asked: list[str] = []
        if config.audio_latents(seconds) > config.audio_latents(learnt["seconds"]):
            asked.append(f"{seconds:g} s")
        rows, columns = (config.latent_side(learnt[side]) for side in ("height", "width"))
        if self.rows * self.columns > rows * columns:
            stride = config.VIDEO_STRIDE[1]
            asked.append(f"{self.columns * stride}x{self.rows * stride} pixels")
        if not asked:
            return None
        return (
            f"the model has learnt clips of up to {learnt['seconds']:g} s and"
            f" {learnt['width']}x{learnt['height']} pixels, and {' and '.join(asked)} are beyond"
            " that; picture and sound may fall apart"
        )

    def with_audio(self, latents: int) -> Plan:
        """The plan for driving audio of so many latents."""
        return dataclasses.replace(self, audio=latents)

    def with_note(self, note: str | None) -> Plan:
        """The plan with one more warning, where there is one."""
        return self if note is None else dataclasses.replace(self, warnings=(*self.warnings, note))


@dataclass(frozen=True)
class Progress:
    """One report to `on_progress`: stage, steps finished of how many, seconds since the start."""

    stage: str
    step: int
    of: int
    elapsed_s: float


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Chunk:
    """Some frames of a clip that is still being decoded, with their sound.

    Attributes:
        frames: uint8 [n, H, W, 3], RGB; at least one.
        first_frame: index of the first of them in the clip.
        audio: float32 [samples, 2], of the same span; in the last chunk, also what the sound is
            longer than the picture.
        fps, sample_rate_hz: as in `Video`.
        is_last: whether the clip ends here.
        seed: the request's.
        timings_s, warnings: as in `Video`, in the last chunk alone.
    """

    frames: npt.NDArray[np.uint8]
    first_frame: int
    audio: npt.NDArray[np.float32]
    fps: int
    sample_rate_hz: int
    is_last: bool
    seed: int
    timings_s: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tail:
    """The end of a clip as the engine made it, so that the next goes on without encoding it again.

    Attributes:
        maker: of the engine, whose latents mean nothing to another.
        video: float32 [1, 48, n, H, W], the last latents, before super-resolution.
        sr_video: the same after super-resolution, where there was one.
        audio: float32 [1, n, 64], the last latents of the sound.
        look: float32 [48], mean of each channel in the first clip of a row of them.
        drift: float32 [48], how far this clip's mean is from that.
    """

    maker: str
    video: npt.NDArray[np.float32]
    sr_video: npt.NDArray[np.float32] | None
    audio: npt.NDArray[np.float32]
    look: npt.NDArray[np.float32]
    drift: npt.NDArray[np.float32]

    @property
    def seen(self) -> npt.NDArray[np.float32]:
        """The last latents of the clip as it is decoded."""
        return self.video if self.sr_video is None else self.sr_video


@dataclass(frozen=True)
class Video:
    """A finished clip.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB.
        audio: float32 [samples, 2], about [-1, 1].
        fps: frames a second.
        sample_rate_hz: of `audio`.
        timings_s: seconds per stage, in order; "queue" is time spent waiting for others.
        seed: the request's.
        warnings: where the clip differs from what was asked for, and why.
        prompt: the request's.
        model: the name of the model that has made it.
        tail: what a clip that goes on from this begins with; None where no engine made it.
    """

    frames: npt.NDArray[np.uint8]
    audio: npt.NDArray[np.float32]
    fps: int
    sample_rate_hz: int
    timings_s: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    warnings: tuple[str, ...] = ()
    prompt: str = ""
    model: str = ""

    def __repr__(self) -> str:
        height, width = self.frames.shape[1:3]
        return (
            f"<Video of {len(self.frames)} frames of {width}x{height}, {self.duration_s:.2f} s,"
            f" seed {self.seed}>"
        )

    tail: Tail | None = field(default=None, repr=False, compare=False)

    @property
    def made_at(self) -> FrameSize:
        """Width and height in pixels, before super-resolution where that is known."""
        stride = config.VIDEO_STRIDE[1]
        if self.tail is not None:
            rows, columns = self.tail.video.shape[3:]
            return FrameSize(width=columns * stride, height=rows * stride)
        return FrameSize(width=self.frames.shape[2], height=self.frames.shape[1])

    @property
    def duration_s(self) -> float:
        """Seconds that the picture lasts."""
        return len(self.frames) / self.fps

    @property
    def origin(self) -> Origin:
        """What a file's tags say of it."""
        from magihuman.runtime.media import Origin

        is_known = bool(self.prompt or self.model)  # else a caller has made it of frames
        return Origin(self.prompt, self.seed if is_known else None, self.model)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        crf: int | None = None,
        preset: str | None = None,
        tags: bool = True,
    ) -> Path:
        """Write the clip in the format of the path's suffix, and return its absolute path.

        The file appears whole or not at all. path, crf, preset, tags: as of `Output`; an mp4 is of
        H.264 (yuv420p) and AAC, ready for streaming.

        Raises:
            OutputError: the suffix is none that is known, or the file cannot be written.
            InvalidRequestError: the format has no such rate factor or preset.
        """
        from magihuman.runtime.media import Output, write_clip

        output = Output(path, crf, preset, tags)
        origin = self.origin
        return write_clip(output, self.frames, self.audio, self.fps, self.sample_rate_hz, origin)

    def save_thumbnail(self, path: str | os.PathLike[str]) -> Path:
        """Write the frame in the middle as WebP, JPEG or PNG, at most 512 pixels on a side.

        The file appears whole or not at all. Raises `OutputError`.
        """
        from magihuman.runtime.media import write_thumbnail

        return write_thumbnail(Path(path), self.frames)


def _check_samples(audio: npt.NDArray[np.float32]) -> None:
    shortest = int(MIN_SECONDS * config.LATENT_AUDIO_RATE_HZ)
    longest = int(MAX_SECONDS * config.LATENT_AUDIO_RATE_HZ)
    if audio.ndim != 1 or audio.dtype != np.float32 or not shortest <= len(audio) <= longest:
        raise InvalidRequestError(
            f"audio must be a path, or {shortest} to {longest} mono float32 samples at 51.2 kHz,"
            f" got {audio.dtype} of shape {audio.shape}"
        )
    if not np.isfinite(audio).all():
        raise InvalidRequestError("audio must have finite samples, got NaN or infinity")


def _check_continued(before: object, image: object) -> None:
    if not isinstance(before, (Video, str, os.PathLike)):
        raise InvalidRequestError(
            f"continue_from must be a Video or the path of a clip, got {shown(before)}"
        )
    if image is not None:
        raise InvalidRequestError(
            "continue_from and image both give the first frame: leave one of them out"
        )
    if isinstance(before, Video) and not len(before.frames):
        raise InvalidRequestError("continue_from must have frames, got a Video without any")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # so NaN is none
        raise InvalidRequestError(
            f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}"
        )


def _whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequestError(
            f"{name} must be a whole number from {low} to {high}, got {shown(value)}"
        )
