"""One request, top to bottom, in the order in which it runs.

`pipeline` has the stages, `components` the models they use and what they hand on. `denoise` has the
loops over `schedulers`, `decode` makes frames, `audio` sound, `limits` ends a request early, and
`finite` one that would make a wrong clip. `continuing` has one clip go on from another, and
`windows` a row of them without an end.
"""

from magihuman.runtime.pipeline.audio import (
    LATENT_SAMPLES,
    AudioVAE,
    Waveform,
    resample,
    whole_frames,
)
from magihuman.runtime.pipeline.banded import BandedDecoder
from magihuman.runtime.pipeline.components import Components, Encoded, Prepared
from magihuman.runtime.pipeline.continuing import joined
from magihuman.runtime.pipeline.decode import (
    Decoder,
    Frames,
    PlainDecoder,
    VideoDecoder,
    decode_frames,
    decode_group,
    frames_shape,
    whole_picture,
)
from magihuman.runtime.pipeline.denoise import EmbedsText, Forward
from magihuman.runtime.pipeline.limits import Limits
from magihuman.runtime.pipeline.pipeline import Pipeline
from magihuman.runtime.pipeline.windows import Row, WindowPipeline

__all__ = [
    "LATENT_SAMPLES",
    "AudioVAE",
    "BandedDecoder",
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
    "Row",
    "VideoDecoder",
    "Waveform",
    "WindowPipeline",
    "decode_frames",
    "decode_group",
    "frames_shape",
    "joined",
    "resample",
    "whole_frames",
    "whole_picture",
]
