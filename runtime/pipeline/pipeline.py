"""One request, top to bottom: prepare -> encode -> denoise [-> super-resolve] -> decode.

`Pipeline.encode` and the loops of `denoise` are all that draws random numbers; ARCHITECTURE.md has
the order.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from magihuman.runtime import config
from magihuman.runtime.device import is_out_of_memory
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.exported import TensorRTVAE
from magihuman.runtime.media import (
    ClipWriter,
    Origin,
    Output,
    open_driving_audio,
    open_image,
    read_last_frame,
    writer_type,
)
from magihuman.runtime.memory import AUDIO, BASE, IMAGE, SR, TEXT, VIDEO, estimate
from magihuman.runtime.model import DiT, Layout, TextEncoder
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.pipeline.audio import LATENT_SAMPLES, AudioVAE, Waveform, whole_frames
from magihuman.runtime.pipeline.components import Components, Encoded, Prepared
from magihuman.runtime.pipeline.continuing import (
    Skipping,
    context_frames,
    context_samples,
    first_latents,
    new_tail,
    tail_of,
    with_context,
)
from magihuman.runtime.pipeline.decode import Frames, decode_frames, frames_shape
from magihuman.runtime.pipeline.finite import (
    AUDIO_ENCODER,
    IMAGE_ENCODER,
    SR_TRANSFORMER,
    TEXT_ENCODER,
    TRANSFORMER,
    Finite,
)
from magihuman.runtime.pipeline.limits import Limits
from magihuman.runtime.request import Progress, ProgressCallback, Request, Tail, Video
from magihuman.runtime.threads import spawn

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("magihuman")

# Below this a request is encoded alone: an image of 1920x1088 takes most of it.
FREE_TO_ENCODE_BYTES = 8 * 2**30


class Pipeline:
    """One request on its way through the stages, whose methods stand in the order of their runs.

    Attributes:
        components: the models that run; `Engine` takes them away once the clip is decoded.
        variant: of the base transformer.
        sr: None, "540p" or "1080p".
        device: where everything runs.
        request: what is asked for.
        limits: what ends the request early.
        on_step: called after every step, as `Engine.generate` says of `on_progress`.
        span: the context around a stage of this name, for hooks.
        timings_s: seconds of each finished stage by its name, in order.
        start_s: when the request began, by `time.perf_counter`.
        generator: the only source of random numbers, on `device`.
        finite: what is checked at the end of the stage that runs.
        tail: what a clip can go on with from this, once `sample` has returned.
    """

    def __init__(
        self,
        components: Components,
        variant: config.Variant,
        sr: str | None,
        device: torch.device,
        request: Request,
        limits: Limits,
        on_step: ProgressCallback | None,
        span: Callable[[str], AbstractContextManager[object]],
    ) -> None:
        self.components, self.variant, self.sr, self.device = components, variant, sr, device
        self.request, self.limits, self.on_step, self.span = request, limits, on_step, span
        self.timings_s: dict[str, float] = {}
        self.start_s = time.perf_counter()
        self.finite = Finite()
        self.tail: Tail | None = None
        self.generator = torch.Generator(device)
        self.generator.manual_seed(request.seed)

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, which every engine has that takes requests."""
        assert self.components.text_encoder is not None
        return self.components.text_encoder

    @property
    def audio_vae(self) -> AudioVAE:
        """The audio autoencoder, which every engine has that takes requests."""
        assert self.components.audio_vae is not None
        return self.components.audio_vae

    def prepare(self) -> Prepared:
        """Open image and sound, and tokenize the prompt, before any work on the device.

        Raises:
            InvalidRequestError: an input cannot be read, or the engine cannot serve it.
        """
        request = self.request
        plan = request.plan(self.variant, self.sr)
        if isinstance(self.components.turbo_vae, TensorRTVAE):
            rows, columns = (side // config.VIDEO_STRIDE[1] for side in plan.size_px[::-1])
            self.components.turbo_vae.exported.check_size(rows, columns)
        image = samples = None
        tail = tail_of(request, plan, self.components.maker)
        first = request.image
        if request.continue_from is not None and tail is None:
            first = last_frame(request.continue_from)
        if first is not None:
            if self.components.image_vae is None:
                raise InvalidRequestError(
                    "image, and continue_from of a clip that this engine has not made, need the Wan"
                    " 2.2 image encoder, which this engine was loaded without; put Wan2.2-TI2V-5B"
                    " into the model directory or give load(..., image_vae=PATH)"
                )
            image = open_image(first)
        if request.audio is not None:
            samples, note = open_driving_audio(request.audio, request.seconds)
            samples = whole_frames(samples)
            plan = plan.with_audio(len(samples) // LATENT_SAMPLES).with_note(note)
        seconds = request.seconds
        if samples is not None:
            seconds = min(seconds, len(samples) / config.LATENT_AUDIO_RATE_HZ)
        plan = plan.with_note(plan.beyond(self.components.learnt, seconds))
        ids, note = self.text_encoder.tokenize(request.prompt)
        plan = plan.with_note(note)
        for warning in plan.warnings:
            log.warning(warning)
        return Prepared(plan, image, samples, ids, tail)

    @torch.inference_mode()
    def encode(self, prepared: Prepared) -> Encoded:
        """Text, sound and picture through their encoders, and the first noise.

        Seeds the generator, and draws the audio's noise and then the video's, fp32; so it may be
        called again, and denoising starts from the same noise each time. On a GPU it runs on a
        stream of its own, so that another request can denoise meanwhile.
        """
        plan, components = prepared.plan, self.components
        with self.encoders(), self.on_stream(components.encode_stream):
            self.generator.manual_seed(self.request.seed)
            text, null_text = self.encode_text(prepared)
            with self.stage("audio", *(() if prepared.samples is None else (AUDIO,))):
                if prepared.samples is None:
                    audio = self.draw(1, plan.audio, config.AUDIO_CHANNELS)
                else:
                    audio = self.audio_vae.encode(prepared.samples, self.noise)
                    self.finite.watch(audio, AUDIO_ENCODER)
                    plan = plan.with_audio(audio.shape[1])
                video = self.draw(1, config.LATENT_CHANNELS, plan.frames, plan.rows, plan.columns)
            pictured = () if prepared.image is None else (IMAGE,)
            with self.stage("image", *pictured):
                image = self.encode_image(prepared.image, plan.rows, plan.columns)
            sr_image = None
            if plan.sr_rows is not None and plan.sr_columns is not None:
                with self.stage("image_sr", *pictured):
                    sr_image = self.encode_image(prepared.image, plan.sr_rows, plan.sr_columns)
        tail = prepared.tail
        if tail is not None:
            image, sr_image = first_latents(tail, self.device)
        encoded = Encoded(plan, text, null_text, audio, video, image, sr_image, tail)
        if self.device.type == "cuda":
            for tensor in encoded.tensors():  # made on another stream than that of the loops
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return encoded

    def encode_beside(self, prepared: Prepared) -> Encoded | None:
        """`encode`, while another request denoises; None where there is no memory for both."""
        if self.components.residency.moves:  # the plan has stages one after another
            return None
        if self.device.type == "cuda":
            with self.encoders():
                if estimate.free_bytes(self.device) < FREE_TO_ENCODE_BYTES:
                    return None
        try:
            return self.encode(prepared)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    @torch.inference_mode()
    def sample(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Clean latents, super-resolved where the engine does that, both fp32 on the device.

        Returns:
            video [1, 48, T, H, W] and audio [1, A, 64].
        """
        with self.stage("denoise", BASE):
            video, audio = self.run_base(encoded)
            self.finite.watch(video, TRANSFORMER)
            self.finite.watch(audio, TRANSFORMER)
        base = video
        if self.sr is not None:
            with self.stage("super_resolve", SR):
                video = self.run_sr(encoded, video, audio)
                self.finite.watch(video, SR_TRANSFORMER)
        sr = None if self.sr is None else video
        self.tail = new_tail(self.components.maker, base, sr, audio, encoded.tail)
        return video, audio

    @torch.inference_mode()
    def run_base(
        self, encoded: Encoded, forward: denoise.Forward | None = None
    ) -> tuple[Tensor, Tensor]:
        """The base model's loop, as `sample` runs it: video and audio latents.

        forward: stands in for the base transformer's; by default that of the components, if any.
        """
        plan, video, audio = encoded.plan, encoded.video, encoded.audio
        model, variant = self.components.dit, self.variant
        forward = forward or self.components.forward
        options: denoise.LoopOptions = {
            "image": encoded.image,
            "keep_audio": self.request.audio is not None,
            "on_step": self.reporter("denoise"),
        }
        velocity = self.velocity(model, variant, video, audio, encoded.text, forward)
        if variant.guidance is None:
            return denoise.distilled(
                velocity, video, audio, steps=plan.steps, noise=self.noise, **options
            )
        null = None
        if plan.guidance is not None and encoded.null_text is not None:
            null = self.velocity(model, variant, video, audio, encoded.null_text, forward)
        return denoise.guided(
            velocity,
            null,
            video,
            audio,
            steps=plan.steps,
            guidance=plan.guidance or 1.0,
            **options,
        )

    @torch.inference_mode()
    def run_sr(self, encoded: Encoded, video: Tensor, audio: Tensor) -> Tensor:
        """The super-resolution model's loop, as `sample` runs it: video latents at the new size.

        video, audio: clean latents of the base model; the audio only conditions the video.
        """
        plan, model = encoded.plan, self.components.sr_dit
        assert model is not None and self.sr is not None
        assert plan.sr_rows is not None and plan.sr_columns is not None
        variant, forward = config.upscaler(self.sr), self.components.sr_forward
        video, audio = denoise.sr_start(video, audio, plan.sr_rows, plan.sr_columns, self.noise)
        null = None
        if plan.sr_guidance is not None and encoded.null_text is not None:
            null = self.velocity(model, variant, video, audio, encoded.null_text, forward)
        return denoise.super_resolve(
            self.velocity(model, variant, video, audio, encoded.text, forward),
            null,
            video,
            audio,
            steps=plan.sr_steps,
            guidance=plan.sr_guidance or 1.0,
            image=encoded.sr_image,
            on_step=self.reporter("super_resolve"),
        )

    def writer(self, output: Output, model: str, video: Tensor) -> ClipWriter:
        """A writer of the clip that is decoded from latents [1, 48, T, H, W].

        model: its name, for the file's tags. Raises `OutputError` where such a file could not be
        written.
        """
        frames, height, width, _ = frames_shape(video)
        rates = config.FPS, config.SAMPLE_RATE_HZ
        origin = Origin(self.request.prompt, self.request.seed, model)
        return writer_type(output)(output, frames, width, height, *rates, origin)

    @torch.inference_mode()
    def decode(
        self,
        video: Tensor,
        audio: Tensor,
        file: ClipWriter | None = None,
        on_window: Callable[[Frames, Waveform], None] | None = None,
        before: Tail | None = None,
    ) -> tuple[Frames, Waveform]:
        """Frames uint8 [frames, height, width, 3] and sound float32 [samples, 2] of clean latents.

        On a GPU the sound is decoded on a stream and a thread of its own meanwhile. video: [1, 48,
        T, H, W]. audio: [1, A, 64]. file: takes frames and sound as they come. on_window: called
        with the next frames, as they come, and the whole sound. before: context for both decoders,
        of the clip that this goes on from.
        """
        with self.components.residency.present(VIDEO, AUDIO):
            return self.decode_both(video, audio, file, on_window, before)

    def decode_both(
        self,
        video: Tensor,
        audio: Tensor,
        file: ClipWriter | None,
        on_window: Callable[[Frames, Waveform], None] | None,
        before: Tail | None,
    ) -> tuple[Frames, Waveform]:
        """Do what `decode` says, once both decoders are on the device."""
        components = self.components
        skipped = skipped_samples = 0
        if before is not None:
            video, audio = with_context(video, before.seen, 2), with_context(audio, before.audio, 1)
            skipped, skipped_samples = context_frames(before), context_samples(before)
        skip = Skipping(skipped)

        # An argument, not closed over: `failures.forget` cannot take that from an error.
        def frames(latents: Tensor, heard: Callable[[], Waveform]) -> Frames:
            def add(decoded: Frames, decoded_planes: Frames | None) -> None:
                kept = skip(decoded, decoded_planes)
                if kept is None:
                    return
                window, planes = kept
                assert window is not None
                if file is not None:
                    file.add(window, planes)
                if on_window is not None:
                    on_window(window, heard())

            with self.stage("decode_video"):
                is_heard = file is not None or on_window is not None
                return decode_frames(
                    components.turbo_vae,
                    latents,
                    self.reporter("decode_video"),
                    components.decoder,
                    add if is_heard else None,
                    components.distributed,
                )[skipped:]

        @torch.inference_mode()
        def sound() -> Waveform:
            with self.on_stream(components.sound_stream):
                wave = self.audio_vae.decode(audio)[skipped_samples:]
            if file is not None:
                file.add_sound(wave)
            return wave

        if components.sound_stream is None:
            with self.stage("decode_audio"):
                wave = sound()
            return frames(video, lambda: wave), wave
        components.sound_stream.wait_stream(torch.cuda.current_stream(self.device))
        decoding = spawn(sound, "magihuman sound")
        try:
            pictures = frames(video, decoding.result)
            with self.stage("decode_audio"):
                return pictures, decoding.result()
        finally:  # also where decoding frames raises
            wait([decoding])

    def velocity(
        self,
        model: DiT,
        variant: config.Variant,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        forward: denoise.Forward | None,
    ) -> denoise.Velocity:
        """The velocity of a model for streams of these sizes and this text, its tables made once,
        watched as far as the loops use it.

        forward: stands in for the model's own.
        """
        frames, rows, columns = video.shape[2:]
        layout = Layout(frames, rows, columns, audio.shape[1], text.shape[0])
        velocity = denoise.velocity_of(model, layout, text, variant.coordinates, forward)
        is_sr = model is self.components.sr_dit
        component = SR_TRANSFORMER if is_sr else TRANSFORMER
        steps = itertools.count(1)

        def watched(video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
            v_video, v_audio = velocity(video, audio)
            step = next(steps)
            self.finite.watch(v_video, component, step)
            if not is_sr and self.request.audio is None:
                self.finite.watch(v_audio, component, step)
            return v_video, v_audio

        return watched

    def encode_text(self, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompt and, where there is guidance, of the negative prompt."""
        plan = prepared.plan
        with self.stage("text", TEXT):
            text = self.text_encoder.encode(prepared.ids)
            null_text = None
            if plan.guidance is not None or plan.sr_guidance is not None:
                null_ids, _ = self.text_encoder.tokenize(self.request.negative_prompt)
                null_text = self.text_encoder.encode(null_ids)
            self.finite.watch(text, TEXT_ENCODER)
            self.finite.watch(null_text, TEXT_ENCODER)
        return text, null_text

    def encode_image(self, image: Image | None, rows: int, columns: int) -> Tensor | None:
        """The reference image's latent [1, 48, 1, rows, columns], where there is an image."""
        if image is None:
            return None
        assert self.components.image_vae is not None
        stride = config.VIDEO_STRIDE[1]
        latent = self.components.image_vae.encode(image, columns * stride, rows * stride)
        self.finite.watch(latent, IMAGE_ENCODER)
        return latent

    def draw(self, *shape: int) -> Tensor:
        """Fresh fp32 noise from the request's generator, on the device."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def noise(self, like: Tensor) -> Tensor:
        """Fresh fp32 noise of this tensor's shape, as `draw` makes it."""
        return self.draw(*like.shape)

    def reporter(self, stage: str) -> Callable[[int, int], None]:
        """A callback for the loops: ends a request that is to end, then reports progress."""

        def report(step: int, of: int) -> None:
            self.limits.check()
            if self.on_step is not None:
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                elapsed_s = time.perf_counter() - self.start_s
                self.on_step(Progress(stage, step, of, elapsed_s))

        return report

    @contextmanager
    def encoders(self) -> Iterator[None]:
        """Hold `Components.encoding`, which another's first capture can keep for a minute."""
        while not self.components.encoding.acquire(timeout=self.limits.look_s()):
            self.limits.check()
        try:
            yield
        finally:
            self.components.encoding.release()

    @contextmanager
    def on_stream(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Launch on this stream, where there is one, and wait for it at the end."""
        if stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            yield
        stream.synchronize()

    @contextmanager
    def stage(self, name: str, *parts: str, on_device: bool = True) -> Iterator[None]:
        """Time a stage, for the clip and for hooks, its work on the device included.

        parts: of the memory plan, that are on the device meanwhile.

        Raises:
            NonFiniteError: something that was watched meanwhile is not finite.
        """
        self.limits.check()
        start = time.perf_counter()
        present = self.components.residency.present(*parts) if on_device else nullcontext()
        self.finite.start()
        with self.span(name), present:
            yield
            magnitudes = self.finite.read()
            if on_device and self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            magnitudes.check(name)
        elapsed_s = time.perf_counter() - start
        self.timings_s[name] = self.timings_s.get(name, 0.0) + elapsed_s


def last_frame(before: Video | str | os.PathLike[str]) -> Image:
    """The last frame of a clip, as a picture. Raises `InvalidRequestError` for no clip."""
    from PIL import Image

    if isinstance(before, Video):
        return Image.fromarray(before.frames[-1])
    return read_last_frame(Path(before))
