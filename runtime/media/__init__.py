"""Files of pictures and sound, in and out.

`image` and `sound` read what a request names, `voice` a sound as a driving voice. `colour`,
`orientation`, `png` and `jpeg` are parts of the one, `downmix` and `ogg` of the other,
`guard` of both; `apart` does it in processes of their own. `mp4` writes films and reads them back,
over `clip`; `fragments` writes them so that they play while they are made; `output` has all
formats, and stills. `quality` says how far two clips are apart.
"""

from magihuman.runtime.media import quality
from magihuman.runtime.media.apart import Decoders, FrameTask, ImageTask, SoundTask, StillTask
from magihuman.runtime.media.clip import ClipWriter, Origin, Output, mark, xmp_of
from magihuman.runtime.media.fragments import Fragments, FragmentWriter
from magihuman.runtime.media.image import fit, open_image
from magihuman.runtime.media.mp4 import Mp4Writer, read_frames, write_mp4
from magihuman.runtime.media.output import (
    check_output,
    check_thumbnail,
    is_video,
    read_last_frame,
    spritesheet,
    thumbnail,
    write_clip,
    write_thumbnail,
    writer_type,
)
from magihuman.runtime.media.quality import Frames, psnr_db
from magihuman.runtime.media.sound import MAX_PEAK, read_audio
from magihuman.runtime.media.voice import open_driving_audio

__all__ = [
    "MAX_PEAK",
    "ClipWriter",
    "Decoders",
    "FragmentWriter",
    "Fragments",
    "FrameTask",
    "Frames",
    "ImageTask",
    "Mp4Writer",
    "Origin",
    "Output",
    "SoundTask",
    "StillTask",
    "check_output",
    "check_thumbnail",
    "fit",
    "is_video",
    "mark",
    "open_driving_audio",
    "open_image",
    "psnr_db",
    "quality",
    "read_audio",
    "read_frames",
    "read_last_frame",
    "spritesheet",
    "thumbnail",
    "write_clip",
    "write_mp4",
    "write_thumbnail",
    "writer_type",
    "xmp_of",
]
