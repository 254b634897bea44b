"""What is handed over of a picture that speaks while its voice is still coming."""

from __future__ import annotations

from dataclasses import dataclass

from magihuman.runtime.request import Chunk


@dataclass(frozen=True)
class LiveChunk(Chunk):
    """A window of frames, with the voice that belongs to them: float32 [samples, 2] at 44.1 kHz.

    Attributes:
        index: of the chunk, from 0.
        start_s: where it begins, from the beginning of the voice.
        window_s: seconds of the window that was made; the last chunk can be shorter than that.
        delay_s: from when its first sound came in until it was handed over.
        late: whether it took longer than the window lasts, from when its voice was there.
        repeated: frames that are the last one before them again, since nothing could be made in
            time; all of the chunk, or none.
    """

    index: int = 0
    start_s: float = 0.0
    window_s: float = 0.0
    delay_s: float = 0.0
    late: bool = False
    repeated: int = 0
