"""Score a model of the nano world: clips from held-out prompts, from images and from voices."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from magihuman.runtime import config
from magihuman.runtime.engine import Engine
from magihuman.runtime.errors import CheckpointError, InvalidRequestError
from magihuman.runtime.evaluate.clip_score import ClipScore, Synchrony, score
from magihuman.runtime.media import fit, open_driving_audio, open_image, psnr_db
from magihuman.runtime.pipeline import resample
from magihuman.runtime.request import Request

# In the model's folder. prompts.txt: a held-out prompt on each line. 0.png and 0.flac, and so on:
# the first frame and the sound of a clip that the line of this number describes.
SCORE_FOLDER, PROMPTS = "score", "prompts.txt"
SIZE_PX, SECONDS = 160, 3.2  # of the nano world's clips
# One frame alone, its latent repeated to fill a window, is what no decoder of clips has learnt.
STILL_FRAMES = 29

OnClip = Callable[[str, int, int], None]  # (kind of clip, clips done, of how many)
Wave = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModelScore:
    """Means over all clips of a kind.

    Attributes:
        prompts, references: how many clips were made from a prompt, and from an image or a voice.
        colours: share of the colours named in prompts that are where they belong.
        synchrony: correlation of mouth and sound; 0 of a clip whose best lag is above one frame.
        first_frame_db: PSNR of the first frame with the reference image.
        voice: as synchrony, of the mouth with a given voice that the prompt does not say.
        image_db: PSNR of reference images, as clips that do not move, through the image encoder and
            the decoder of frames.
        sound_db: SNR of the spectra of reference sounds through the audio autoencoder.
    """

    prompts: int
    references: int
    colours: float
    synchrony: float
    first_frame_db: float
    voice: float
    image_db: float
    sound_db: float

    @property
    def broken(self) -> list[str]:
        """A sentence for each threshold that is not met."""
        return [
            f"{name} must be {least:g} at least, got {value:.3g}"
            for name, least in LEAST.items()
            if not (value := getattr(self, name)) >= least
        ]

    def to_dict(self) -> dict[str, object]:
        """The figures and the sentences of `broken`, ready for JSON."""
        return {**asdict(self), "broken": self.broken}


# Noise has 0 of all that are shares or correlations, and below 10 and 0 dB.
LEAST = {
    "colours": 0.9,
    "synchrony": 0.7,
    "first_frame_db": 25.0,
    "voice": 0.7,
    "image_db": 26.0,
    "sound_db": 8.0,
}


def score_model(
    engine: Engine,
    folder: Path,
    clips: int | None = None,
    on_clip: OnClip = lambda kind, done, of: None,
    seconds: float = SECONDS,
) -> ModelScore:
    """Make clips and score them.

    Args:
        engine: with an image encoder.
        folder: the model's, with `SCORE_FOLDER` in it.
        clips: of each kind at most; by default all.
        on_clip: told of progress.
        seconds: of the clips; thresholds are for the default, which has the whole prompt.

    Raises:
        CheckpointError: the folder lacks a prompt, an image or a voice.
        InvalidRequestError: `clips` is below 1.
    """
    if clips is not None and clips < 1:
        raise InvalidRequestError(f"clips must be 1 at least, got {clips}")
    prompts, numbers = _read(folder / SCORE_FOLDER)
    asked, references = prompts[:clips], numbers[:clips]
    prompted: list[ClipScore] = []
    for i, prompt in enumerate(asked):
        on_clip("prompts", i, len(asked))
        prompted.append(_score(engine, _request(prompt, i, seconds)))
    on_clip("prompts", len(asked), len(asked))

    pictured, voiced, pixels, sounds = [], [], [], []
    for i in references:
        on_clip("references", i, len(references))
        image, voice = (folder / SCORE_FOLDER / f"{i}.{kind}" for kind in ("png", "flac"))
        pictured.append(_score(engine, _request(prompts[i], i, seconds, image=image)))
        # What another prompt says, so that the mouth can know it from the sound alone.
        said = prompts[(i + 1) % len(numbers)]
        voiced.append(_score(engine, _request(said, i, seconds, audio=voice)))
        with engine.hold(_request(prompts[i], i, seconds)) as pipeline, torch.inference_mode():
            image_vae, audio_vae = pipeline.components.image_vae, pipeline.audio_vae
            assert image_vae is not None
            wave, _ = open_driving_audio(voice, seconds)
            frames, again = pipeline.decode(
                image_vae.encode(open_image(image), SIZE_PX, SIZE_PX, STILL_FRAMES),
                audio_vae.encode(wave, pipeline.noise),
            )
            still = np.broadcast_to(_pixels(image), frames.shape)
            pixels.append(psnr_db(frames, still))
            sounds.append(spectral_snr_db(again.mean(1), resample(wave)))
    on_clip("references", len(references), len(references))
    named = sum(len(clip.named) for clip in prompted)
    return ModelScore(
        prompts=len(prompted),
        references=len(references),
        colours=sum(clip.right for clip in prompted) / max(named, 1),
        synchrony=statistics.fmean(_in_time(clip.synchrony) for clip in prompted),
        first_frame_db=statistics.fmean(clip.first_frame_db or 0.0 for clip in pictured),
        voice=statistics.fmean(_in_time(clip.voice) for clip in voiced),
        image_db=statistics.fmean(pixels),
        sound_db=statistics.fmean(sounds),
    )


def spectral_snr_db(wave: Wave, expected: Wave) -> float:
    """SNR of the magnitudes of two sounds' spectra, in windows of 1024 samples.

    Phases do not count: nobody hears them.
    """
    length = min(len(wave), len(expected))
    window = torch.hann_window(1024, dtype=torch.float32)
    a, b = (
        torch.stft(torch.from_numpy(x[:length]), 1024, 256, window=window, return_complex=True)
        .abs()
        .double()
        for x in (wave, expected)
    )
    error = (a - b).square().sum().clamp(min=1e-12)
    return float(10 * (b.square().sum().clamp(min=1e-12) / error).log10())


def _request(
    prompt: str,
    seed: int,
    seconds: float,
    image: Path | None = None,
    audio: Path | None = None,
) -> Request:
    return Request(prompt, image, audio, seconds, SIZE_PX, SIZE_PX, seed=seed)


def _score(engine: Engine, request: Request) -> ClipScore:
    video = engine.generate(request)
    image = voice = None
    if request.image is not None:
        image = _pixels(request.image)
    if request.audio is not None:
        wave, _ = open_driving_audio(request.audio, request.seconds)
        voice = wave, config.LATENT_AUDIO_RATE_HZ
    return score(
        video.frames, video.audio, video.sample_rate_hz, video.fps, request.prompt, image, voice
    )


def _pixels(image: Any) -> npt.NDArray[np.uint8]:
    return np.asarray(fit(open_image(image), SIZE_PX, SIZE_PX))


def _in_time(synchrony: Synchrony | None) -> float:
    """The correlation, or 0 where mouth and sound are more than one frame apart."""
    if synchrony is None or abs(synchrony.lag_frames) > 1:
        return 0.0
    return synchrony.correlation


def _read(folder: Path) -> tuple[list[str], range]:
    """The prompts, and the numbers of the references."""
    try:
        lines = (folder / PROMPTS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"a model to be scored must have {folder / PROMPTS}, as the nano model has:"
            f" {error.strerror}"
        ) from error
    prompts = [line for line in lines if line.strip()]
    count = len(list(folder.glob("*.png")))
    lost = [
        name
        for i in range(count)
        for name in (f"{i}.png", f"{i}.flac")
        if not (folder / name).is_file()
    ]
    if lost or count < 2 or len(prompts) < count:
        raise CheckpointError(
            f"{folder} must have a prompt, a .png and a .flac for each of two references or more,"
            f" numbered from 0, got {len(prompts)} prompts and {count} images, without"
            f" {', '.join(lost) or 'any missing'}"
        )
    return prompts, range(count)
