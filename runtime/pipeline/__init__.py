"""One request, top to bottom, in the order in which it runs.

`pipeline` has the stages, `components` the models they use and what they hand on. `denoise` has the
loops over `schedulers`, `decode` makes frames, `audio` sound, `limits` ends a request early, and
`finite` one that would make a wrong clip.
"""

from magihuman.runtime.pipeline.audio import AudioVAE, Waveform, resample
from magihuman.runtime.pipeline.components import Components, Encoded, Prepared
from magihuman.runtime.pipeline.decode import (
    Decoder,
    Frames,
    PlainDecoder,
    VideoDecoder,
    decode_frames,
    decode_group,
    frames_shape,
)
from magihuman.runtime.pipeline.denoise import EmbedsText, Forward
from magihuman.runtime.pipeline.limits import Limits
from magihuman.runtime.pipeline.pipeline import Pipeline

__all__ = [
    "AudioVAE",
    "Components",
    "Decoder",
    "EmbedsText",
    "Encoded",
    "Forward",
    "Frames",
    "Limits",
    "Pipeline",
    "PlainDecoder",
    "Prepared",
    "VideoDecoder",
    "Waveform",
    "decode_frames",
    "decode_group",
    "frames_shape",
    "resample",
]
