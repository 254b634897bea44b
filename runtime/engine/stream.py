"""Clips as they are made: a thread makes them, whoever asked takes them piece by piece."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

from magihuman.runtime.config import FPS, SAMPLE_RATE_HZ
from magihuman.runtime.engine.callers import Callers
from magihuman.runtime.pipeline import Frames, Limits, Waveform
from magihuman.runtime.request import Chunk, Video
from magihuman.runtime.threads import spawn

Result = TypeVar("Result")
Piece = TypeVar("Piece", bound=Chunk)
Emit = Callable[[Chunk], None]
Part = Chunk | BaseException | None  # a piece, why there are no more, or that it was the last


def awaited(limits: Limits, work: Callable[[], Result]) -> Awaitable[Result]:
    """Run work in another thread, from now on, for an event loop to await.

    A task that is cancelled while it awaits the result ends the request by its limits, and returns
    once the work has ended.
    """
    future = spawn(work)

    async def result_of() -> Result:
        result = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            limits.stop.set()
            with suppress(Exception):
                await result
            raise

    return result_of()


class Chunker:
    """Cuts a clip that is being decoded into `Chunk`s, each emitted as soon as it is decoded.

    The last alone is kept, until all is known of the clip.
    """

    def __init__(self, emit: Emit, seed: int, frames: int) -> None:
        """frames: of the whole clip."""
        self._emit, self._seed, self._frames = emit, seed, frames
        self._first = 0
        self._kept: tuple[Frames, Waveform] | None = None

    def add(self, frames: Frames, audio: Waveform) -> None:
        """Take the next frames, uint8 [n, H, W, 3], and all of the sound, [samples, 2]."""
        if self._first + len(frames) < self._frames:
            self._emit(self._cut(frames, audio, is_last=False))
        else:
            self._kept = frames, audio

    def finish(self, video: Video) -> None:
        """Emit the last chunk, with what is known of the whole clip."""
        assert self._kept is not None
        self._emit(self._cut(*self._kept, is_last=True, video=video))

    def _cut(
        self, frames: Frames, audio: Waveform, is_last: bool, video: Video | None = None
    ) -> Chunk:
        first, self._first = self._first, self._first + len(frames)
        begin, end = (index * SAMPLE_RATE_HZ // FPS for index in (first, self._first))
        return Chunk(
            frames=frames,
            first_frame=first,
            audio=audio[begin : None if is_last else end],
            fps=FPS,
            sample_rate_hz=SAMPLE_RATE_HZ,
            is_last=is_last,
            seed=self._seed,
            timings_s={} if video is None else video.timings_s,
            warnings=() if video is None else video.warnings,
        )


class _Pipe:
    """Chunks on their way from one thread to another, or to an event loop."""

    def __init__(self, limits: Limits, most: int | None) -> None:
        """limits: end what waits to put. most: chunks that may lie here; None for any number."""
        self.maker: int | None = None  # the thread that makes chunks, while it does
        self._limits, self._most = limits, most
        self._changed = threading.Condition()
        self._ready: deque[Part] = deque()
        self._waiting: Future[Part] | None = None

    @property
    def has_next(self) -> bool:
        """Whether what comes next is there."""
        return bool(self._ready)

    def next(self) -> Future[Part]:
        """A future of what comes next, for one consumer."""
        with self._changed:
            future: Future[Part] = Future()
            if self._ready:
                future.set_result(self._ready.popleft())
                self._changed.notify_all()
            else:
                self._waiting = future
            return future

    def put(self, part: Part) -> None:
        """Add what comes next; a chunk waits for the consumer where as many lie here as may."""
        with self._changed:
            while isinstance(part, Chunk) and self._most is not None:
                self._limits.check()
                if len(self._ready) < self._most:
                    break
                self._changed.wait(self._limits.look_s())
            waiting, self._waiting = self._waiting, None
            if waiting is not None and waiting.set_running_or_notify_cancel():
                waiting.set_result(part)
            else:
                self._ready.append(part)


class Stream(Generic[Piece]):
    """The chunks of one clip, in order: an iterator, and a context that closes itself.

    The clip is made in another thread, whether or not chunks are taken, so a slow consumer
    does not hold the device. A stream that nobody holds any more is cancelled.
    """

    def __init__(
        self,
        limits: Limits,
        work: Callable[[Emit], object],
        callers: Callers,
        most: int | None = None,
    ) -> None:
        """Begin. callers: of the engine that makes the clip. most: chunks that may wait to be
        taken, after which work waits; None for any number.
        """
        self._limits, self._callers = limits, callers
        self._is_over = False
        self._pipe = pipe = _Pipe(limits, most)

        def run() -> None:
            pipe.maker = threading.get_ident()
            try:
                work(pipe.put)
            except BaseException as error:  # raised in the consumer's thread
                pipe.put(error)
            else:
                pipe.put(None)
            finally:
                pipe.maker = None

        self._made = spawn(run)  # which holds the pipe, not the stream

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if not self._is_over:
            self._check()
        chunk = None if self._is_over else self._taken(self._pipe.next().result())
        if chunk is None:
            raise StopIteration
        return chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._callers.are_forked:  # where a lock may be held for good
            self._limits.stop.set()

    def close(self) -> None:
        """Cancel what is not yet made, and return once the device is free."""
        self._callers.check_process()
        self._is_over = True
        self._limits.stop.set()
        if self._pipe.maker != threading.get_ident():
            wait([self._made])

    async def take(self) -> Piece | None:
        """The next chunk, None after the last; cancelling this cancels the clip."""
        if self._is_over:
            return None
        self._check()
        try:
            return self._taken(await asyncio.wrap_future(self._pipe.next()))
        except asyncio.CancelledError:
            self._is_over = True
            self._limits.stop.set()
            raise

    def _check(self) -> None:
        """Raise `MagiHumanError` where waiting for the next chunk would have no end."""
        self._callers.check_process()
        if not self._pipe.has_next:
            self._callers.check("a stream that has nothing ready")

    def _taken(self, part: Part) -> Piece | None:
        self._is_over = not isinstance(part, Chunk)
        if isinstance(part, BaseException):
            raise part
        return cast("Piece | None", part)


class AsyncStream(Generic[Piece]):
    """A `Stream` for `async for`, and a context that closes itself."""

    def __init__(self, stream: Stream[Piece]) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        chunk = await self._stream.take()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is not yet made, and return once the device is free."""
        await asyncio.to_thread(self._stream.close)
