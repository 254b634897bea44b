"""The webm of a clip: VP9 and Opus."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from magihuman.runtime.media.clip import AI_GENERATED
from magihuman.runtime.media.mp4 import FilmWriter

ENCODER = {
    "crf": "24",
    "b": "0",  # or the rate factor would be a bound alone
    "deadline": "good",
    "cpu-used": "4",  # faster than a CPU makes frames, and little larger than slower ones
    "row-mt": "1",
}
# Bit-exact files have no random numbers for names.
CONTAINER = {"fflags": "+bitexact", "max_interleave_delta": "0"}
OPUS_HZ = 48_000  # Opus has no 44.1 kHz
OPUS_BIT_RATE = 160_000


class WebmWriter(FilmWriter):
    """Writes VP9 and Opus; the sound is resampled."""

    container, container_options = "webm", CONTAINER
    most_crf = 63
    marks = {"digital_source_type": AI_GENERATED}

    def _add_streams(self, container: Any) -> tuple[Any, Any]:
        options = {**ENCODER, "g": self._keyframe_distance}
        if self.output.crf is not None:
            options["crf"] = str(self.output.crf)
        picture = container.add_stream("libvpx-vp9", rate=Fraction(self._fps), options=options)
        picture.codec_context.thread_count = 0  # as many as there are cores
        sound = container.add_stream("libopus", rate=OPUS_HZ, layout="stereo")
        sound.bit_rate = OPUS_BIT_RATE
        return picture, sound
