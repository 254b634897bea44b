"""Files that are made of clips.

`formats` picks one by the file's name: `webm`, `gif`, `wav`, a `folder` of PNG files, or the mp4.
`thumbnail` has stills and sheets of them, and `last` the last frame of any video.
"""

from magihuman.runtime.media.output.formats import check_output, write_clip, writer_type
from magihuman.runtime.media.output.last import is_video, read_last_frame
from magihuman.runtime.media.output.thumbnail import (
    check_thumbnail,
    spritesheet,
    thumbnail,
    write_thumbnail,
)

__all__ = [
    "check_output",
    "check_thumbnail",
    "is_video",
    "read_last_frame",
    "spritesheet",
    "thumbnail",
    "write_clip",
    "write_thumbnail",
    "writer_type",
]
