"""What every kind of clip has in common, whatever its format.

`target` says where a clip goes and how it is encoded, `place` whether it can, `writer` has the
thread that writes it, and `provenance` what a file says of where it comes from.
"""

from magihuman.runtime.media.clip.place import check_folder, check_place, check_room
from magihuman.runtime.media.clip.provenance import (
    AI_GENERATED,
    NAME,
    XMP,
    XMP_BOX,
    Origin,
    mark,
    xmp_of,
)
from magihuman.runtime.media.clip.target import Output
from magihuman.runtime.media.clip.writer import (
    NOTHING_KNOWN,
    ClipWriter,
    Frames,
    GivenUpError,
    Sound,
)

__all__ = [
    "AI_GENERATED",
    "NAME",
    "NOTHING_KNOWN",
    "XMP",
    "XMP_BOX",
    "ClipWriter",
    "Frames",
    "GivenUpError",
    "Origin",
    "Output",
    "Sound",
    "check_folder",
    "check_place",
    "check_room",
    "mark",
    "xmp_of",
]
