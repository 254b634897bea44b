"""One request, top to bottom: text -> tokens -> denoise [-> super-resolve] -> decode -> Video."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from magihuman.runtime import config, denoise
from magihuman.runtime.audio import AudioVAE, Waveform, open_driving_audio
from magihuman.runtime.decode import Decoder, Frames, VideoDecoder, decode_frames
from magihuman.runtime.errors import Cancelled, DeviceError, InvalidRequestError, MagiHumanError
from magihuman.runtime.image import ImageVAE, open_image
from magihuman.runtime.media import Mp4Writer, check_output
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.request import (
    DEFAULT_NEGATIVE_PROMPT,
    Plan,
    Progress,
    ProgressCallback,
    Request,
    Video,
)
from magihuman.runtime.tensorrt import TensorRTVAE
from magihuman.runtime.text import TextEncoder
from magihuman.runtime.tokens import Layout

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("magihuman")


@dataclass
class Components:
    """The loaded models of an engine."""

    dit: DiT
    turbo_vae: VideoDecoder
    text_encoder: TextEncoder
    audio_vae: AudioVAE
    image_vae: ImageVAE | None = None
    sr_dit: DiT | None = None
    forward: denoise.Forward | None = None  # compiled, in place of the transformer's own
    sr_forward: denoise.Forward | None = None
    decoder: Decoder | None = None  # compiled, in place of the Turbo VAE's own


class Engine:
    """A loaded model. Made by `load`; calls from several threads run one after another.

    Attributes:
        variant: the base variant's name.
        sr: None, "540p" or "1080p".
        precision: of the transformer's linears.
        device: where everything runs.
        is_compiled: whether the base transformer runs as captured graphs of fused kernels.
        vae: how frames are decoded, "fast", "plain" or "tensorrt".
    """

    def __init__(
        self,
        components: Components,
        variant: config.Variant,
        sr: str | None,
        precision: str,
        device: torch.device,
    ) -> None:
        self.variant = variant.name
        self.sr = sr
        self.precision = precision
        self.device = device
        self.is_compiled = components.forward is not None
        is_engine = isinstance(components.turbo_vae, TensorRTVAE)
        self.vae = "tensorrt" if is_engine else "plain" if components.decoder is None else "fast"
        self._parts: Components | None = components
        self._variant = variant
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory. Waits for a running request; later requests raise."""
        with self._lock:
            self._parts = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def generate(
        self,
        prompt: str | Request,
        *,
        image: str | os.PathLike[str] | Image | None = None,
        audio: str | os.PathLike[str] | None = None,
        seconds: float = 5.0,
        width: int = 480,
        height: int = 272,
        sr_width: int | None = None,
        sr_height: int | None = None,
        seed: int = 42,
        negative_prompt: str = DEFAULT_NEGATIVE_PROMPT,
        steps: int | None = None,
        sr_steps: int | None = None,
        guidance: float | None = None,
        sr_guidance: float | None = None,
        save: str | os.PathLike[str] | None = None,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
    ) -> Video:
        """Make one clip. Arguments are those of `Request`, or a `Request` stands for all.

        Args:
            save: also write the clip to this mp4, as `Video.save` does, while it is being decoded.
                The file appears whole or not at all.
            on_progress: called after every step with a `Progress`, from the calling thread.
            cancel: an event checked between steps; once set, `Cancelled` is raised.

        Raises:
            InvalidRequestError: the request cannot be served; nothing has run.
            OutputError: `save` cannot be written.
            Cancelled: `cancel` was set. The engine stays usable.
            DeviceError: the device ran out of memory. The engine stays usable.
        """
        options = {
            "image": image,
            "audio": audio,
            "seconds": seconds,
            "width": width,
            "height": height,
            "sr_width": sr_width,
            "sr_height": sr_height,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "steps": steps,
            "sr_steps": sr_steps,
            "guidance": guidance,
            "sr_guidance": sr_guidance,
        }
        with self.hold(_request(prompt, options), on_progress, cancel) as run:
            return run.video(None if save is None else Path(save))

    @contextmanager
    def hold(
        self,
        request: Request,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Run]:
        """A request with the engine to itself, nothing of it done yet."""
        with self._lock:
            if self._parts is None:
                raise MagiHumanError("the engine is closed; load another")
            try:
                yield Run(
                    self._parts, self._variant, self.sr, self.device, request, on_progress, cancel
                )
            except torch.cuda.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                raise DeviceError(
                    f"{self.device} ran out of memory; ask for a smaller or shorter clip: {error}"
                ) from error


def _request(prompt: str | Request, options: dict[str, Any]) -> Request:
    if not isinstance(prompt, Request):
        return Request(prompt=prompt, **options)
    defaults = {field.name: field.default for field in dataclasses.fields(Request)}
    given = [name for name, value in options.items() if value != defaults[name]]
    if given:
        raise InvalidRequestError(
            f"a Request must stand alone, got {', '.join(given)} beside it; set it in the Request"
        )
    return prompt


class Run:
    """State of one request on its way through the stages."""

    def __init__(
        self,
        parts: Components,
        variant: config.Variant,
        sr: str | None,
        device: torch.device,
        request: Request,
        on_progress: ProgressCallback | None,
        cancel: threading.Event | None,
    ) -> None:
        self.parts, self.variant, self.sr, self.device = parts, variant, sr, device
        self.request, self.on_progress, self.cancel = request, on_progress, cancel
        self.timings_s: dict[str, float] = {}
        self.start_s = time.perf_counter()
        self.generator = torch.Generator(device)
        self.generator.manual_seed(request.seed)

    @torch.inference_mode()
    def video(self, save: Path | None = None) -> Video:
        """All stages in order; the clip goes to the file `save`, too."""
        request, parts = self.request, self.parts
        plan, image, samples, ids = self.prepare()
        if save is not None:
            check_output(save, config.video_frames(plan.frames), *plan.size_px)

        with self.stage("text"):
            text = parts.text_encoder.encode(ids)
            null_text = None
            if plan.guidance is not None or plan.sr_guidance is not None:
                null_ids, _ = parts.text_encoder.tokenize(request.negative_prompt)
                null_text = parts.text_encoder.encode(null_ids)

        with self.stage("audio"):
            if samples is None:
                audio = self.draw(1, plan.audio, config.AUDIO_CHANNELS)
            else:
                audio = parts.audio_vae.encode(samples, self.noise)
                plan = plan.with_audio(audio.shape[1])
        video = self.draw(1, config.LATENT_CHANNELS, plan.frames, plan.rows, plan.columns)

        with self.stage("image"):
            latent = self.encode_image(image, plan.rows, plan.columns)
        with self.stage("denoise"):
            video, audio = self.run_base(plan, text, null_text, video, audio, latent)
        if self.sr is not None:
            assert plan.sr_rows is not None and plan.sr_columns is not None
            with self.stage("image_sr"):
                latent = self.encode_image(image, plan.sr_rows, plan.sr_columns)
            with self.stage("super_resolve"):
                video = self.run_sr(plan, text, null_text, video, audio, latent)

        writer: AbstractContextManager[Mp4Writer | None] = nullcontext()
        if save is not None:
            _, _, frames, rows, columns = video.shape
            size = columns * config.VIDEO_STRIDE[2], rows * config.VIDEO_STRIDE[1]
            writer = Mp4Writer(
                save, config.video_frames(frames), *size, config.FPS, config.SAMPLE_RATE_HZ
            )
        with writer as file:
            pictures, wave = self.decode(video, audio, file)
            if file is not None:
                with self.stage("write"):
                    file.finish()
        return Video(
            frames=pictures,
            audio=wave,
            fps=config.FPS,
            sample_rate_hz=config.SAMPLE_RATE_HZ,
            timings_s=self.timings_s,
            seed=request.seed,
            warnings=plan.warnings,
        )

    def decode(
        self, video: Tensor, audio: Tensor, file: Mp4Writer | None
    ) -> tuple[Frames, Waveform]:
        """Frames and sound; on a GPU the sound on a stream and a thread of its own meanwhile."""
        parts = self.parts

        def frames() -> Frames:
            with self.stage("decode_video"):
                return decode_frames(
                    parts.turbo_vae,
                    video,
                    self.reporter("decode_video"),
                    parts.decoder,
                    None if file is None else file.add,
                )

        def sound() -> Waveform:
            wave = parts.audio_vae.decode(audio)
            if file is not None:
                file.add_sound(wave)
            return wave

        if self.device.type != "cuda":
            pictures = frames()
            with self.stage("decode_audio"):
                return pictures, sound()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))

        def meanwhile() -> Waveform:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                return sound()

        # Leaving the pool waits for the sound, also where decoding frames raises.
        with ThreadPoolExecutor(1, "sound") as pool:
            decoding = pool.submit(meanwhile)
            pictures = frames()
            with self.stage("decode_audio"):
                return pictures, decoding.result()

    def prepare(self) -> tuple[Plan, Image | None, Waveform | None, Tensor]:
        """Everything that can be wrong with a request, found before any work on the device."""
        request = self.request
        plan = request.plan(self.variant, self.sr)
        if isinstance(self.parts.turbo_vae, TensorRTVAE):
            rows, columns = (side // config.VIDEO_STRIDE[1] for side in plan.size_px[::-1])
            self.parts.turbo_vae.exported.check_size(rows, columns)
        image = samples = None
        if request.image is not None:
            if self.parts.image_vae is None:
                raise InvalidRequestError(
                    "image needs the Wan 2.2 image encoder, which this engine was loaded"
                    " without; put Wan2.2-TI2V-5B into the model directory or give load(...,"
                    " image_vae=PATH)"
                )
            image = open_image(request.image)
        if request.audio is not None:
            samples, note = open_driving_audio(request.audio, request.seconds)
            plan = plan.with_note(note)
        ids, note = self.parts.text_encoder.tokenize(request.prompt)
        plan = plan.with_note(note)
        for warning in plan.warnings:
            log.warning(warning)
        return plan, image, samples, ids

    def run_base(
        self,
        plan: Plan,
        text: Tensor,
        null_text: Tensor | None,
        video: Tensor,
        audio: Tensor,
        image: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The base model's loop."""
        keep_audio = self.request.audio is not None
        on_step = self.reporter("denoise")
        forward = self.parts.forward
        velocity = self.velocity(self.parts.dit, self.variant, video, audio, text, forward)
        if self.variant.guidance is None:
            return denoise.distilled(
                velocity,
                video,
                audio,
                steps=plan.steps,
                noise=self.noise,
                image=image,
                keep_audio=keep_audio,
                on_step=on_step,
            )
        null = None
        if plan.guidance is not None and null_text is not None:
            null = self.velocity(self.parts.dit, self.variant, video, audio, null_text, forward)
        return denoise.guided(
            velocity,
            null,
            video,
            audio,
            steps=plan.steps,
            guidance=plan.guidance or 1.0,
            image=image,
            keep_audio=keep_audio,
            on_step=on_step,
        )

    def run_sr(
        self,
        plan: Plan,
        text: Tensor,
        null_text: Tensor | None,
        video: Tensor,
        audio: Tensor,
        image: Tensor | None,
    ) -> Tensor:
        """The super-resolution model's loop; its audio stream only conditions it."""
        model = self.parts.sr_dit
        assert model is not None and plan.sr_rows is not None and plan.sr_columns is not None
        variant, forward = config.VARIANTS[f"{self.sr}_sr"], self.parts.sr_forward
        video, audio = denoise.sr_start(video, audio, plan.sr_rows, plan.sr_columns, self.noise)
        null = None
        if plan.sr_guidance is not None and null_text is not None:
            null = self.velocity(model, variant, video, audio, null_text, forward)
        return denoise.super_resolve(
            self.velocity(model, variant, video, audio, text, forward),
            null,
            video,
            audio,
            steps=plan.sr_steps,
            guidance=plan.sr_guidance or 1.0,
            image=image,
            on_step=self.reporter("super_resolve"),
        )

    def velocity(
        self,
        model: DiT,
        variant: config.Variant,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        forward: denoise.Forward | None,
    ) -> denoise.Velocity:
        """The model with its tables for these streams and this text."""
        frames, rows, columns = video.shape[2:]
        layout = Layout(frames, rows, columns, audio.shape[1], text.shape[0])
        return denoise.velocity_of(model, layout, text, variant.coordinates, forward)

    def encode_image(self, image: Image | None, rows: int, columns: int) -> Tensor | None:
        """The reference image's latent at this size."""
        if image is None:
            return None
        assert self.parts.image_vae is not None
        stride = config.VIDEO_STRIDE[1]
        return self.parts.image_vae.encode(image, columns * stride, rows * stride)

    def draw(self, *shape: int) -> Tensor:
        """Fresh fp32 noise from the request's generator, on the device."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def noise(self, like: Tensor) -> Tensor:
        """Fresh noise of this shape."""
        return self.draw(*like.shape)

    def reporter(self, stage: str) -> Callable[[int, int], None]:
        """A callback for the loops: checks for cancellation, then reports progress."""

        def report(step: int, of: int) -> None:
            self.check_cancel()
            if self.on_progress is not None:
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                elapsed_s = time.perf_counter() - self.start_s
                self.on_progress(Progress(stage, step, of, elapsed_s))

        return report

    def check_cancel(self) -> None:
        """Raise `Cancelled` once the caller's event is set."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("the request was cancelled")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, device work included."""
        self.check_cancel()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.timings_s[name] = time.perf_counter() - start
