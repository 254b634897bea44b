"""Strangers' files decoded in processes of their own, whose death costs one answer.

A decoder is native code, and a file may be made to crash it, to fill the memory or never to end. So
it runs in a process with bounds, which holds nothing of others, and what it leaves is a plain file
that this package has written itself. `main` is such a process: it takes tasks, a line of JSON each,
from its standard input.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError, MagiHumanError

MEMORY_BYTES = 4 * 2**30  # addresses; 32 million pixels with transparency take 1 GiB of them
FILE_BYTES = 2**30  # of what is written
DEADLINE_S = 30.0
END_S = 5.0  # for a process whose answers have ended to end itself
ANSWER_BYTES = 2**16
STARTS = 3  # of a process that ends before it is ready, as one that the kernel takes
START_S = 120.0  # to import numpy, Pillow and PyAV on a busy machine
TASKS = 100  # of one process: what a file may have damaged in it does not stay for long
# A process is given no more of the environment, which has tokens in it.
VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
Answer = dict[str, str | int | None]  # what is wrong with the file, and `errno` of writing
SAID = {"image": "image", "sound": "audio", "frame": "a video", "still": "a video"}
READY: Answer = {"error": None, "errno": None}


@dataclass(frozen=True)
class ImageTask:
    """Decode an image to an RGB bitmap file. max_pixels, formats: see `open_image`."""

    source: str
    target: str
    max_pixels: int
    formats: tuple[str, ...]

    def run(self) -> None:
        """Raises `InvalidRequestError`."""
        from magihuman.runtime.media.image import open_image

        image = open_image(self.source, max_pixels=self.max_pixels, formats=self.formats)
        image.save(self.target, "BMP")  # at once, where packing takes as long as all else


@dataclass(frozen=True)
class SoundTask:
    """Decode a driving voice to a WAV file of one float32 channel at 51.2 kHz.

    Attributes:
        limit_s: refused where it is longer.
        kept_s: what is written of it, and a second more, so that it can be seen to be longer.
        formats: see `read_audio`.
    """

    source: str
    target: str
    limit_s: float
    kept_s: float
    formats: tuple[str, ...]

    def run(self) -> None:
        """Raises `InvalidRequestError`."""
        from magihuman.runtime.media.voice import SPARE_S, open_driving_audio

        rate = config.LATENT_AUDIO_RATE_HZ
        samples, _ = open_driving_audio(self.source, self.limit_s + 1, formats=self.formats)
        if len(samples) > self.limit_s * rate:
            raise InvalidRequestError(
                f"audio must be no longer than {self.limit_s:g} s, got more; cut it"
            )
        content = samples[: round((self.kept_s + SPARE_S) * rate)].astype("<f4").tobytes()
        layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32)
        body = b"WAVE" + layout + b"data" + struct.pack("<I", len(content)) + content
        Path(self.target).write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


@dataclass(frozen=True)
class FrameTask:
    """Decode the last frame of a video to an RGB bitmap file, as `read_last_frame` does."""

    source: str
    target: str
    max_pixels: int
    formats: tuple[str, ...]

    def run(self) -> None:
        """Raises `InvalidRequestError`."""
        from magihuman.runtime.media.output import read_last_frame

        read_last_frame(self.source, self.max_pixels, self.formats).save(self.target, "BMP")


@dataclass(frozen=True)
class StillTask:
    """Make a WebP file of a clip: a frame of it, or a sheet of several."""

    source: str
    target: str
    which: Literal["thumbnail", "spritesheet"]

    def run(self) -> None:
        """Raises `InvalidRequestError`."""
        from magihuman.runtime.media.output import spritesheet, thumbnail

        make = thumbnail if self.which == "thumbnail" else spritesheet
        Path(self.target).write_bytes(make(Path(self.source)))


Task = ImageTask | SoundTask | FrameTask | StillTask
TASK_TYPES: dict[str, type[Task]] = {
    "image": ImageTask,
    "sound": SoundTask,
    "frame": FrameTask,
    "still": StillTask,
}


class Decoders:
    """Processes that decode, kept for the next file. For any number of threads."""

    def __init__(self, deadline_s: float = DEADLINE_S, memory_bytes: int = MEMORY_BYTES) -> None:
        """deadline_s: for one file. memory_bytes: for one process. None is started yet."""
        self._deadline_s, self._memory_bytes = deadline_s, memory_bytes
        self._lock = threading.Lock()
        self._idle: list[_Process] = []

    def warm(self) -> None:
        """Start a process for the next file, if none waits and it can be. Returns at once."""
        with self._lock, suppress(MagiHumanError):
            if not self._idle:
                self._idle.append(self._start())

    def run(self, kind: str, task: Task) -> None:
        """Do a task in a process of its own; what it writes is there when this returns.

        kind: of `TASK_TYPES`. Raises `InvalidRequestError` where the file cannot be
        used, also where it ends its process, fills the memory or takes too long, `OSError` where
        the disk does not take what is written, and `MagiHumanError` where no process can be
        started.
        """
        process = self._take()
        try:
            error = process.ask(kind, task, self._deadline_s)
        except _EndedError as ended:
            raise InvalidRequestError(
                f"{SAID[kind]} must be a file that can be decoded, got one {ended}; save it again"
            ) from None
        finally:
            if process.is_worn:
                process.end()
                self.warm()
            else:
                with self._lock:
                    self._idle.append(process)
        if error is not None:
            raise InvalidRequestError(error)

    def processes(self) -> list[int]:
        """Ids of those that wait."""
        with self._lock:
            return [process.id for process in self._idle]

    def close(self) -> None:
        """End those that wait. More are started when they are needed."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    def _take(self) -> _Process:
        failures: list[_EndedError] = []
        while len(failures) < STARTS:
            with self._lock:
                process = self._idle.pop() if self._idle else self._start()
            try:
                if process.is_ready():
                    return process
            except _EndedError as error:
                failures.append(error)
            process.end()
        raise MagiHumanError(
            f"files cannot be decoded: a process for it must start, got one {failures[-1]}; the"
            " server's log says more"
        )

    def _start(self) -> _Process:
        try:
            return _Process(self._deadline_s, self._memory_bytes)
        except OSError as error:  # too many processes, or too little memory
            raise MagiHumanError(
                f"files cannot be decoded: a process for it must start, got {error.strerror}"
            ) from error


class _EndedError(Exception):
    """A process gave no answer; the text says why, after "a file"."""


class _Process:
    """One of them, from the outside. `is_worn`: whether it takes no more tasks."""

    def __init__(self, deadline_s: float, memory_bytes: int) -> None:
        # Not forked: a fork has all that its parent has, locks in any state among it.
        variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        entry = f"from {__name__} import main; main()"  # by -m, the module would be imported twice
        command = [sys.executable, "-P", "-c", entry, str(deadline_s), str(memory_bytes)]
        self._process = subprocess.Popen(  # noqa: S603 - of constants and numbers
            command,
            env={**variables, **ONE_THREAD},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for its parent, at whose end its input ends
        )
        self.id = self._process.pid
        self._tasks, self._has_begun, self.is_worn = 0, False, False

    def is_ready(self) -> bool:
        """Whether it can take a task; False where it has ended after it had begun to wait.

        Raises `_EndedError` where it does not come so far.
        """
        if not self._has_begun:
            self._answer(START_S)
            self._has_begun = True
        return self._process.poll() is None

    def ask(self, kind: str, task: Task, deadline_s: float) -> str | None:
        """What is wrong with a task's file, None where it is done.

        Raises `_EndedError`, and `OSError` where the result could not be written.
        """
        assert self._process.stdin is not None
        self._tasks += 1
        self.is_worn = True  # unless it answers
        line = json.dumps({"kind": kind, "task": asdict(task)}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._answer(deadline_s)
        self.is_worn = self._tasks >= TASKS
        number = answer["errno"]
        if isinstance(number, int):
            raise OSError(number, os.strerror(number))
        return None if answer["error"] is None else str(answer["error"])

    def end(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _answer(self, deadline_s: float) -> Answer:
        assert self._process.stdout is not None
        line, end_s = b"", time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end_s - time.monotonic())):
                    raise _EndedError(f"that takes longer than {deadline_s:g} s")
                part = self._process.stdout.read(2**16)
                if not part:
                    raise self._ended()
                line += part
                if len(line) > ANSWER_BYTES:
                    raise _EndedError("that makes its decoder say what it should not")
        return _answer(line)

    def _ended(self) -> _EndedError:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return _EndedError("whose decoder does not end")
        return _EndedError(f"that ends its decoder ({_ending(code)})")


def _answer(line: bytes) -> Answer:
    """Read an answer; whatever a file has made of its decoder may have written it."""
    try:
        values = json.loads(line)
        error, number = values["error"], values["errno"]
    except (ValueError, RecursionError, TypeError, KeyError):
        error = number = object()
    is_number = number is None or number in errno.errorcode
    if not is_number or not isinstance(error, (str, type(None))):
        raise _EndedError("that makes its decoder say what it should not")
    return {"error": error, "errno": number}


def _ending(code: int) -> str:
    """Name what has ended a process, by its exit code."""
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:  # signals that have no name
        return f"signal {-code}"


def serve(deadline_s: float, memory_bytes: int) -> None:
    """Do tasks until the input ends. For a process of its own, which it limits."""
    import resource  # which Windows has not

    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    # Imported before the first file comes, and before memory is bounded.
    from magihuman.runtime.media import image, voice  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _go_first()
    _say(answers, READY)
    for line in sys.stdin.buffer:
        message = json.loads(line)
        # Its parent ends it before; where that has gone, nobody else would.
        signal.setitimer(signal.ITIMER_REAL, 2 * deadline_s)
        _say(answers, _done(message["kind"], message["task"]))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _go_first() -> None:
    """Have the kernel take this process, and no engine, where the machine's memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _done(kind: str, values: dict[str, Any]) -> Answer:
    """Do a task and say what went wrong."""
    try:
        TASK_TYPES[kind](**values).run()
    except InvalidRequestError as error:
        return {"error": str(error), "errno": None}
    except MemoryError:  # while it was written
        return {"error": f"the {kind} must fit into the memory; send a smaller one", "errno": None}
    except OSError as error:  # of reading it is an `InvalidRequestError`
        return {"error": None, "errno": error.errno}
    return READY


def _say(answers: int, answer: Answer) -> None:
    os.write(answers, json.dumps(answer).encode() + b"\n")


def main() -> None:
    """Serve with the arguments of the process: seconds for a file, and bytes for all."""
    serve(float(sys.argv[1]), int(sys.argv[2]))
