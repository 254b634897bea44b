"""Files that are made of clips: `thumbnail` has stills and sheets of them."""

from magihuman.runtime.media.output.thumbnail import (
    check_thumbnail,
    spritesheet,
    thumbnail,
    write_thumbnail,
)

__all__ = ["check_thumbnail", "spritesheet", "thumbnail", "write_thumbnail"]
