"""A picture that speaks while its voice is still coming.

`options` are checked, `voice` takes the samples, `pump` from an iterator, and `session` makes one
window after the other, each of which is handed over as a `chunk`.
"""

from magihuman.runtime.engine.live.chunk import LiveChunk
from magihuman.runtime.engine.live.options import LiveOptions, live_options
from magihuman.runtime.engine.live.pump import pump_of
from magihuman.runtime.engine.live.session import Session
from magihuman.runtime.engine.live.voice import LiveVoice

__all__ = ["LiveChunk", "LiveOptions", "LiveVoice", "Session", "live_options", "pump_of"]
