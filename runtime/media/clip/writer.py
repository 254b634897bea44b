"""What writes a clip's file in a thread of its own, while frames are still being made."""

from __future__ import annotations

import json
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from magihuman.runtime.errors import InvalidRequestError, OutputError
from magihuman.runtime.files import atomic_path, sync
from magihuman.runtime.media.clip.place import check_place
from magihuman.runtime.media.clip.provenance import Origin
from magihuman.runtime.media.clip.target import Output

NOTHING_KNOWN = Origin()


class GivenUpError(Exception):
    """The caller left before the end."""


@dataclass(frozen=True)
class Frames:
    """Some frames [n, H, W, 3], and their planes where they are made already."""

    pixels: npt.NDArray[np.uint8]
    planes: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Sound:
    """All of the sound, [samples, 2]."""

    samples: npt.NDArray[np.float32]


@dataclass(frozen=True)
class End:
    """Nothing follows; and whether the file is wanted."""

    is_wanted: bool


class ClipWriter(ABC):
    """Writes a clip in a thread of its own, whole or not at all. A format is a class over this.

    A context that ends without `finish` leaves nothing of the file, and raises nothing of its own.
    """

    bits_per_pixel: ClassVar[int]  # at most, for the check of free space
    most_crf: ClassVar[int | None] = None  # None where the format has none
    presets: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        path: str | os.PathLike[str] | Output,
        frames: int,
        width_px: int,
        height_px: int,
        fps: int,
        sample_rate_hz: int,
        origin: Origin = NOTHING_KNOWN,
    ) -> None:
        """Raises as `check` does. Nothing is written yet.

        path: and how the clip is encoded, as an `Output`. origin: what the file's tags say.
        """
        self.output = Output.of(path)
        self.path = self.output.file
        self.check(self.output, frames, width_px, height_px)
        self._frames, self._fps, self._rate = frames, fps, sample_rate_hz
        self._size = width_px, height_px
        self._tags = origin.tags() if self.output.tags else {}
        self._parts: queue.SimpleQueue[Frames | Sound | End] = queue.SimpleQueue()
        self._first: Frames | Sound | End
        self._error: BaseException | None = None
        self._is_finished = self._is_given_up = False
        self._thread = threading.Thread(target=self._run, name="clip", daemon=True)
        self._thread.start()

    @classmethod
    def check(cls, output: Output, frames: int = 0, width_px: int = 0, height_px: int = 0) -> None:
        """Raise now where such a clip could not be written later.

        Raises:
            OutputError: there is no place for it.
            InvalidRequestError: the format has no such rate factor or preset.
        """
        cls.check_encoding(output)
        cls._check_place(output, frames * width_px * height_px * cls.bits_per_pixel // 8)

    @classmethod
    def check_encoding(cls, output: Output) -> None:
        """Raise `InvalidRequestError` for a rate factor or preset that the format has not."""
        crf, preset, kind = output.crf, output.preset, output.suffix
        for name, value, has in (("crf", crf, cls.most_crf), ("preset", preset, cls.presets)):
            if value is not None and not has:
                raise InvalidRequestError(f"{name} must be left out for {kind}, got {value!r}")
        if crf is not None and (type(crf) is not int or not 0 <= crf <= (cls.most_crf or 0)):
            raise InvalidRequestError(
                f"crf must be a whole number from 0 to {cls.most_crf} for {kind}, got {crf!r}"
            )
        if preset is not None and preset not in cls.presets:
            raise InvalidRequestError(
                f"preset must be one of {', '.join(cls.presets)}, got {preset!r}"
            )

    @classmethod
    def _check_place(cls, output: Output, needed_bytes: int) -> None:
        check_place(output.file, needed_bytes=needed_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_finished:
            self._is_given_up = True  # what waits to be encoded is not
            self._parts.put(End(is_wanted=False))
            self._thread.join()

    def add(
        self, frames: npt.NDArray[np.uint8], planes: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """The next frames, [n, H, W, 3]; they are read later and must stay as they are.

        planes: what `kernels/decoder/reference.py`'s `to_yuv420` makes of them, if made already:
            [n, 3 H / 2, W], of H a multiple of 4.
        """
        self._parts.put(Frames(frames, planes))

    def add_sound(self, audio: npt.NDArray[np.float32]) -> None:
        """All of the sound, [samples, 2], at any time; from any thread."""
        self._parts.put(Sound(audio))

    def finish(self) -> Path:
        """Wait for the file, once all frames and the sound are added. Before, there is none.

        Raises:
            OutputError: it could not be written; nothing is left of it.
        """
        self._parts.put(End(is_wanted=True))
        self._thread.join()
        self._is_finished = True
        if self._error is not None:
            raise self._error
        return self.path

    @property
    def _comment(self) -> str | None:
        """The tags as one JSON object, for formats that have one text alone."""
        return json.dumps(self._tags, ensure_ascii=False) if self._tags else None

    @abstractmethod
    def _write(self, temporary: Path) -> None:
        """Write what `_whole` yields, and return once it is complete but for being renamed."""

    def _temporary(self) -> AbstractContextManager[Path]:
        """A name to write to, which is renamed on success and removed otherwise."""
        return atomic_path(self.path)

    def _settle(self, temporary: Path) -> None:
        sync(temporary)

    def _whole(self) -> Iterator[Frames | Sound]:
        """All frames and the sound, as they come. Raises `GivenUpError`, also after the last."""
        done, is_heard = 0, False
        parts = self._given()
        while done < self._frames or not is_heard:
            part = next(parts)
            if isinstance(part, End):
                raise GivenUpError
            yield part
            if isinstance(part, Sound):
                is_heard = True
            else:
                done += len(part.pixels)
        end = next(parts)  # the caller may give up even now
        if not isinstance(end, End) or not end.is_wanted:
            raise GivenUpError

    def _given(self) -> Iterator[Frames | Sound | End]:
        yield self._first
        while True:
            yield self._parts.get()

    def _each(self, part: Frames) -> Iterator[npt.NDArray[np.uint8]]:
        """Frames [H, W, 3], one after the other. Raises `GivenUpError`."""
        for pixels in part.pixels:
            if self._is_given_up:
                raise GivenUpError
            yield np.ascontiguousarray(pixels)

    def _heard(self, part: Sound) -> npt.NDArray[np.float32]:
        """The sound as far as the picture goes, [samples, 2], within [-1, 1]."""
        length = min(len(part.samples), round(self._frames / self._fps * self._rate))
        return part.samples[:length].astype(np.float32).clip(-1, 1)

    def _run(self) -> None:
        import av

        # Only in its context does a caller who is ended by a signal remove what is half-written.
        self._first = self._parts.get()
        if isinstance(self._first, End):
            return
        try:
            with self._temporary() as temporary:
                self._write(temporary)
                self._settle(temporary)
        except GivenUpError:
            pass
        except (OSError, av.FFmpegError) as error:
            self._error = OutputError(
                f"{self.path} could not be written: {error}; nothing is left of it"
            )
            self._error.__cause__ = error
        except BaseException as error:  # raised in the caller's thread
            self._error = error
