"""A loaded model that takes requests from any thread, one at a time on the device."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import torch

from magihuman.kernels.target import KernelSet
from magihuman.runtime import config
from magihuman.runtime.device import forget, neutral
from magihuman.runtime.engine.callers import Callers
from magihuman.runtime.engine.failures import Failures, advice
from magihuman.runtime.engine.live import (
    LiveChunk,
    LiveOptions,
    LiveVoice,
    Session,
    live_options,
    pump_of,
)
from magihuman.runtime.engine.long import LongOptions, checked_window_s, chunks, long_request
from magihuman.runtime.engine.queue import QueueStage, RequestQueue, Ticket
from magihuman.runtime.engine.stream import AsyncStream, Chunker, Emit, Stream, awaited
from magihuman.runtime.engine.warmup import Size, requests_of, warm
from magihuman.runtime.errors import InvalidRequestError, MagiHumanError, shown
from magihuman.runtime.exported import TensorRTVAE
from magihuman.runtime.hooks import REQUEST, Hooks, spans
from magihuman.runtime.media import ClipWriter, Output, check_output
from magihuman.runtime.memory import MemoryPlan
from magihuman.runtime.parallel import ContextParallel
from magihuman.runtime.pipeline import Components, Limits, Pipeline, Row, WindowPipeline
from magihuman.runtime.prompts import Prompt, Scene
from magihuman.runtime.request import (
    STANDARD_SIZE,
    Chunk,
    ClipSize,
    LookOptions,
    ProgressCallback,
    Request,
    RequestOptions,
    Video,
    request_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("magihuman")

MOST_KEPT = 2  # chunks of a live picture that nobody has taken yet
PROMPT_STEP = 64  # letters by which prompts are told apart that may need graphs of their own


@dataclass(frozen=True)
class Call:
    """A request that has arrived: its place in the queue, the file it goes to and its callback.

    row: of a window of a picture that goes on.
    """

    request: Request
    ticket: Ticket
    save: Output | None
    on_progress: ProgressCallback | None
    row: Row | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What a model was loaded as.

    Attributes:
        variant: the base variant.
        sr: None, "540p" or "1080p".
        precision: of the base transformer, by its name.
        device: where everything runs.
        is_compiled: whether the base transformer runs as captured graphs of fused kernels.
        kernels: where it does, the set that they come from, "hopper" or "portable".
        memory_plan: where weights are in each stage; None on a CPU.
        model: its name.
        rank_plans: with `context_parallel`, the plans of all processes.
    """

    variant: config.Variant
    sr: str | None
    precision: str
    device: torch.device
    is_compiled: bool
    kernels: KernelSet | None = None
    memory_plan: MemoryPlan | None = None
    model: str = ""
    rank_plans: tuple[MemoryPlan, ...] = ()


class Engine:
    """A loaded model. Made by `load`. Safe to call from many threads: requests are served in the
    order of arrival, one at a time on the device, while neighbours encode and write files.

    Attributes:
        model: its name, of a folder's path the last part.
        variant: the base variant's name.
        sr: None, "540p" or "1080p".
        precision: of the transformer's linears.
        device: where everything runs.
        is_compiled: whether the base transformer runs as captured graphs of fused kernels.
        kernels: where it does, the set that they come from, "hopper" or "portable"; else None.
        vae: how frames are decoded, "fast", "plain" or "tensorrt".
        rank: of this process among those of `context_parallel`; only rank 0 takes requests.
        hooks: that are told of requests and stages.
        memory_plan: what is on the GPU in each stage, and what rests in host memory; None on a CPU.
        rank_plans: the same of every GPU that works on a request, in the order of ranks; empty on a
            CPU and without `context_parallel`.
    """

    def __init__(
        self,
        components: Components,
        info: EngineInfo,
        queue_limit: int,
        hooks: Sequence[Hooks],
        shared: ContextParallel | None = None,
    ) -> None:
        """shared: what this process does together with others, where it is one of a team."""
        self.memory_plan = info.memory_plan
        self.model = info.model
        self.rank_plans = info.rank_plans
        self.variant = info.variant.name
        self.sr = info.sr
        self.precision = info.precision
        self.device = info.device
        self.is_compiled = info.is_compiled
        self.kernels = info.kernels
        is_engine = isinstance(components.turbo_vae, TensorRTVAE)
        self.vae = "tensorrt" if is_engine else "plain" if components.decoder is None else "fast"
        self.hooks = tuple(hooks)
        self._suited = components.learnt
        self._parts: Components | None = components
        self._variant = info.variant
        self._callers = Callers()
        self._queue = RequestQueue(queue_limit)
        self._live_costs: dict[tuple[object, ...], dict[int, float]] = {}
        self._failures = Failures(info.device, self._queue)
        self._context_parallel = shared
        self.rank = 0 if shared is None else shared.team.rank

    def __repr__(self) -> str:
        parts = [self.variant, *([self.sr] if self.sr else []), self.precision]
        state = "" if self.is_usable else ", unusable"
        return f"<Engine {self.model}: {' '.join(parts)} on {self.device}{state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_usable(self) -> bool:
        """Whether it takes requests: not closed, its GPU has not failed for good, and no process
        that shares its requests has ended.
        """
        shared = self._context_parallel
        is_whole = shared is None or shared.team.lost is None
        return self._parts is not None and self._failures.first is None and is_whole

    @property
    def defaults(self) -> ClipSize:
        """Seconds, width and height of a clip that is asked for without: those of the model's
        request.json, else the standard ones.
        """
        return ClipSize(**(self._suited or STANDARD_SIZE))

    @property
    def queue_length(self) -> int:
        """How many requests wait or run."""
        return len(self._queue)

    def close(self) -> None:
        """Free the memory, once the running request is done.

        Requests that wait, and later ones, raise `MagiHumanError`. Closing again does nothing.

        Raises:
            MagiHumanError: a callback of a request calls it, which would wait for itself, or a
                forked process, which has nothing of it to free.
        """
        self._callers.check("close()")
        self._queue.refuse(lambda: MagiHumanError("the engine is closed; load another"))
        self._queue.wait_until_empty()
        if self._context_parallel is not None:
            self._context_parallel.close()
        self._parts = self._context_parallel = None
        gc.collect()  # models and what brings their weights over refer to each other
        if self.device.type == "cuda" and self._failures.first is None:
            torch.cuda.empty_cache()

    def follow(self) -> None:
        """With `context_parallel` under torchrun, on every rank but 0: serve rank 0 until it closes
        its engine. On rank 0 it returns at once.

        Raises:
            EngineUnusable: another process has ended.
        """
        self._callers.check("follow()")
        if self._context_parallel is not None and self.rank:
            with neutral(), self._failures.on_device(), self._failures.guard(None):
                self._context_parallel.follow()

    def generate(
        self,
        prompt: str | Prompt | Request,
        *,
        save: str | os.PathLike[str] | Output | None = None,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Video:
        """Make one clip.

        Args:
            prompt: text, a `Prompt`, or a `Request`, which stands for all options.
            save: also write the clip to this path, as `Video.save` does, while it is being decoded;
                an `Output` says how it is encoded. The file appears whole or not at all.
            on_progress: called after every step with a `Progress`, from the thread that runs it.
            cancel: an event checked between steps and while waiting; once set, `Cancelled` is
                raised.
            deadline_s: seconds from now, waiting included, after which `DeadlineExceeded` is
                raised, checked as `cancel` is.
            options: the other fields of `Request`; length and size by default as `defaults` has
                them.

        Raises:
            InvalidRequestError: the request cannot be served; nothing has run.
            QueueFull: too many wait already.
            OutputError: `save` cannot be written, or has a suffix that is not known.
            Cancelled, DeadlineExceeded: see above. The engine stays usable.
            DeviceError: the device ran out of memory. The engine stays usable.
            EngineUnusable: the GPU has failed for good, now or before.
            MagiHumanError: the engine is closed; a callback or hook of a request calls this, which
                would wait for itself; or a process that was forked from the one that loaded.
        """
        return self._serve(self._arrive(prompt, options, save, on_progress, cancel, deadline_s))

    def generate_stream(
        self,
        prompt: str | Prompt | Request,
        *,
        save: str | os.PathLike[str] | Output | None = None,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Stream[Chunk]:
        """Make one clip, and hand it over as `Chunk`s: frames with their sound as they are decoded.

        Arguments and errors are those of `generate`. What is wrong with the request, or with the
        queue, is raised here; all else where the next chunk is taken. Closing the stream, or
        forgetting it, cancels the request.
        """
        call = self._arrive(prompt, options, save, on_progress, cancel, deadline_s)
        limits = call.ticket.limits
        return call.ticket.start(
            lambda: Stream(limits, lambda emit: self._serve(call, emit), self._callers)
        )

    def generate_long(
        self,
        prompt: str | Prompt | Sequence[Scene],
        *,
        window_seconds: float | None = None,
        save: str | os.PathLike[str] | None = None,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Iterator[Chunk]:
        """Make a clip of any length, window by window, and yield each as a `Chunk`.

        Each window goes on from the last frame of the one before, and is a request of its own,
        between which others have their turn. Memory is that of one window, and of the voice.

        Args:
            prompt: or `Scene`s, whose seconds stand for `seconds`.
            window_seconds: of a window at most; by default what suits the model.
            save: the mp4 to write. It is fragmented: it grows with each window, in its place, and
                what is there can be played, whatever ends it.
            on_progress: as `generate` says, of each window.
            cancel, deadline_s: of all of it.
            options: as of `generate`. `audio` may last up to an hour, and is cut at its pauses;
                the clip ends with it, or after `seconds` where these are given. The seed counts up
                by one with each window.

        Raises `InvalidRequestError` here, and what `generate` raises where a chunk is taken.
        """
        scenes, voice, values = long_request(prompt, options, self._suited)
        window_s = checked_window_s(window_seconds, self.defaults)
        path = None if save is None else Path(save)
        made = LongOptions(window_s, path, on_progress, cancel, deadline_s, values)
        return chunks(self.generate, scenes, voice, made)

    def live(
        self,
        image: str | os.PathLike[str] | Image,
        voice: LiveVoice,
        prompt: str | Prompt = config.LIVE_PROMPT,
        *,
        window_seconds: float = config.LIVE_WINDOW_S,
        on_ready: Callable[[], None] | None = None,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[LookOptions],
    ) -> Stream[LiveChunk]:
        """Have a face speak while its voice is still coming, and yield `LiveChunk`s.

        Each is a window of the voice that has come since the one before; where none has, the face
        idles. A window goes on from the last frame of the one before. No more of them are kept than
        are under way: chunks that nobody takes hold the session up, and make it late.

        Args:
            image: of the face.
            voice: that is fed, or has a source, meanwhile.
            prompt: of all windows.
            window_seconds: of a window, 0.64 to 4; up to twice as long where the device falls
                behind. A sound is seen after a window and what making it takes.
            on_ready: called once every model has run and the clock starts, from another thread;
                feed a microphone from then on.
            on_progress: as `generate` says, of each window.
            cancel: as of `generate`; closing the stream does the same.
            options: size, steps, guidance and seed, as of `generate`. The seed counts up by one
                with each window.

        Raises `InvalidRequestError` here, and what `generate` raises where a chunk is taken.
        """
        asked = live_options(
            image,
            prompt,
            window_seconds,
            options,
            self._suited,
            on_ready=on_ready,
            on_progress=on_progress,
            cancel=cancel,
        )
        return self._live(voice, asked, None)

    def alive(
        self,
        image: str | os.PathLike[str] | Image,
        voice: LiveVoice,
        prompt: str | Prompt = config.LIVE_PROMPT,
        *,
        window_seconds: float = config.LIVE_WINDOW_S,
        on_ready: Callable[[], None] | None = None,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[LookOptions],
    ) -> AsyncStream[LiveChunk]:
        """As `live`, for `async for` and `async with`; the voice may have an async source."""
        asked = live_options(
            image,
            prompt,
            window_seconds,
            options,
            self._suited,
            on_ready=on_ready,
            on_progress=on_progress,
            cancel=cancel,
        )
        return AsyncStream(self._live(voice, asked, asyncio.get_running_loop()))

    async def agenerate(
        self,
        prompt: str | Prompt | Request,
        *,
        save: str | os.PathLike[str] | Output | None = None,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Video:
        """Make one clip in a thread of its own, from which `on_progress` is called.

        Arguments and errors are those of `generate`. Cancelling the task cancels the request, and
        returns once the device is free.
        """
        call = self._arrive(prompt, options, save, on_progress, cancel, deadline_s)
        limits = call.ticket.limits
        return await call.ticket.start(lambda: awaited(limits, lambda: self._serve(call)))

    def agenerate_stream(
        self,
        prompt: str | Prompt | Request,
        *,
        save: str | os.PathLike[str] | Output | None = None,
        on_progress: ProgressCallback | None = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncStream[Chunk]:
        """Make one clip as `generate_stream` does, for `async for` and `async with`."""
        return AsyncStream(
            self.generate_stream(
                prompt,
                save=save,
                on_progress=on_progress,
                cancel=cancel,
                deadline_s=deadline_s,
                **options,
            )
        )

    def warmup(
        self, sizes: Iterable[Size], text_tokens: Sequence[int] = (config.MAX_TEXT_TOKENS,)
    ) -> dict[Size, float]:
        """Compile, capture and load what clips of these sizes need, without making one.

        Every model runs once for each size and length, over zeros. Where nothing is compiled, as on
        a CPU, that only fills caches of libraries, and the log says so.

        Args:
            sizes: (width, height, seconds) of clips, as for `Request`.
            text_tokens: lengths of prompts, 1 to 640; graphs serve up to the next multiple of 64.
                With guidance, the negative prompt's too.

        Returns:
            Seconds taken by each size.

        Raises:
            InvalidRequestError: before anything has run.
            DeviceError, EngineUnusable: as `generate`.
        """
        self._callers.check("warmup()")
        requests = requests_of(sizes, text_tokens)
        for request in requests.values():
            request.plan(self._variant, self.sr)
        if not self.is_compiled:
            log.info("nothing is compiled on %s: warming up runs the plain models", self.device)
        taken_s = {}
        for size, request in requests.items():
            with self.hold(request) as pipeline:
                start = time.perf_counter()
                warm(pipeline, text_tokens)
                taken_s[size] = time.perf_counter() - start
        return taken_s

    @contextmanager
    def hold(self, request: Request, on_step: ProgressCallback | None = None) -> Iterator[Pipeline]:
        """The pipeline of a request that has the engine to itself, before any of its stages.

        on_step: as `generate` says of `on_progress`.
        """
        self._callers.check("hold()")
        self._check_rank()
        ticket = self._queue.join(Limits())
        with ticket, self._callers.serving(), neutral(), self._failures.on_device():
            ticket.check()
            pipeline = self._pipeline(Call(request, ticket, None, on_step))
            ticket.wait(QueueStage.DEVICE)
            with ticket.at(QueueStage.DEVICE), self._alone(pipeline):
                yield pipeline

    def _arrive(
        self,
        prompt: str | Prompt | Request,
        options: RequestOptions,
        save: str | os.PathLike[str] | Output | None,
        on_progress: ProgressCallback | None,
        cancel: threading.Event | None,
        deadline_s: float | None,
    ) -> Call:
        """Check what costs nothing to check, and take a place in the queue."""
        self._callers.check("a request")
        self._check_rank()
        # What can raise, before there is a place.
        output = None if save is None else Output.of(save)
        try:
            limits = Limits(cancel, deadline_s)
            request = request_of(prompt, options, self._suited)
            request.plan(self._variant, self.sr)
        except InvalidRequestError as error:
            with self._span(REQUEST, self._queue.join(Limits(), error).number):
                raise
        ticket = self._queue.join(limits)
        call = Call(request, ticket, output, on_progress)
        if ticket.refusal is not None:
            self._serve(call)
        return call

    def _live(
        self, voice: LiveVoice, options: LiveOptions, loop: asyncio.AbstractEventLoop | None
    ) -> Stream[LiveChunk]:
        """Begin what `live` says. loop: where a source of the voice runs that is asynchronous."""
        self._callers.check("live()")
        self._check_rank()
        if not isinstance(voice, LiveVoice):
            raise InvalidRequestError(
                f"voice must be a LiveVoice, got {shown(voice)}; make one of the rate and, where"
                " there is one, the iterator of its samples"
            )
        request = options.request
        size = request.plan(self._variant, self.sr).size_px
        longest_s = options.lengths[-1] / config.FPS
        pump = pump_of(voice, 2 * longest_s, loop)
        limits, row = Limits(options.cancel), Row()
        voice.take()

        def begin(request: Request) -> Callable[[], Video]:
            call = Call(request, self._queue.join(limits), None, options.on_progress, row)
            return partial(self._serve, call)

        known = (size, request.steps, options.lengths, len(request.prompt) // PROMPT_STEP)
        costs = self._live_costs.setdefault(known, {})
        session = Session(begin, row.begin_again, voice, options, limits, costs)
        return Stream(limits, lambda emit: session.run(emit, pump), self._callers, most=MOST_KEPT)

    def _check_rank(self) -> None:
        if self.rank:
            raise InvalidRequestError(
                f"requests must go to rank 0, and this is rank {self.rank}; call follow() here"
            )

    def _serve(self, call: Call, emit: Emit | None = None) -> Video:
        """From its place in the queue to the finished clip, in the thread of the caller."""
        try:
            with self._callers.serving():
                return self._make(call, emit)
        except BaseException as error:
            forget(error)  # futures and services keep errors for longer than tensors may stay
            raise

    def _make(self, call: Call, emit: Emit | None) -> Video:
        """All stages of a request, one after another, each where the queue has it."""
        ticket, on_device = call.ticket, self._failures.on_device
        with (
            ticket,
            self._span(REQUEST, ticket.number),
            neutral(),
            on_device(),
            ExitStack() as files,
        ):
            ticket.check()
            pipeline = self._pipeline(call)
            with pipeline.stage("prepare", on_device=False):
                prepared = pipeline.prepare()
                plan = prepared.plan
                if call.save is not None:
                    check_output(call.save, config.video_frames(plan.frames), *plan.size_px)
            with pipeline.stage("queue", on_device=False):
                ticket.wait(QueueStage.ENCODE)
            encode_stream = pipeline.components.encode_stream
            with ticket.at(QueueStage.ENCODE), self._failures.guard(None, encode_stream):
                encoded = pipeline.encode_beside(prepared)
            with pipeline.stage("queue", on_device=False):
                ticket.wait(QueueStage.DEVICE)
            total = config.video_frames(plan.frames)
            chunker = None if emit is None else Chunker(emit, call.request.seed, total)
            with ticket.at(QueueStage.DEVICE), self._alone(pipeline):
                if encoded is None:
                    encoded = pipeline.encode(prepared)
                video, audio = pipeline.sample(encoded)
                file: ClipWriter | None = None
                if call.save is not None:
                    file = files.enter_context(pipeline.writer(call.save, self.model, video))
                on_window = None if chunker is None else chunker.add
                frames, wave = pipeline.decode(video, audio, file, on_window, encoded.tail)
            del encoded, video, audio, pipeline.components  # not held while the file is finished
            ticket.leave()
            if file is not None:
                with pipeline.stage("write", on_device=False):
                    file.finish()
            clip = Video(
                frames=frames,
                audio=wave,
                fps=config.FPS,
                sample_rate_hz=config.SAMPLE_RATE_HZ,
                timings_s=pipeline.timings_s,
                seed=call.request.seed,
                warnings=plan.warnings,
                prompt=call.request.prompt,
                model=self.model,
                tail=pipeline.tail,
            )
            if chunker is not None:
                chunker.finish(clip)
            return clip

    def _pipeline(self, call: Call) -> Pipeline:
        """The stages of a request, none of them done yet."""
        assert self._parts is not None  # for as long as a request has a place
        kind = Pipeline if call.row is None else partial(WindowPipeline, call.row)
        return kind(
            self._parts,
            self._variant,
            self.sr,
            self.device,
            call.request,
            call.ticket.limits,
            call.on_progress,
            lambda name: self._span(name, call.ticket.number),
        )

    @contextmanager
    def _alone(self, pipeline: Pipeline) -> Iterator[None]:
        """Say what a failure means of a request that has the device to itself."""
        with self._failures.guard(lambda: advice(pipeline)):
            yield
            if self._context_parallel is not None:
                self._context_parallel.team.check()

    def _span(self, name: str, request: int) -> AbstractContextManager[None]:
        return spans(self.hooks, name, request)
