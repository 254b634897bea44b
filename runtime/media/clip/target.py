"""Where a clip goes, and how it is encoded there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

FOLDER_ENDS = tuple({os.sep, "/"})


@dataclass(frozen=True)
class Output:
    """A file for a clip, and how it is encoded.

    Attributes:
        path: its suffix says the format: .mp4, .webm, .gif or .wav. One that ends in a slash is of
            a new folder of PNG files, and the sound beside them.
        crf: the encoder's constant rate factor, lower for better and larger: 0 to 51 for mp4 (17
            where it is left out), 0 to 63 for webm (24). Other formats have none.
        preset: x264's trade of speed against size, "ultrafast" to "veryslow", for mp4 alone;
            "veryfast" where it is left out.
        tags: whether the file names prompt, seed, model and version. That a model has made it is
            said in any case.
    """

    path: str | os.PathLike[str]
    crf: int | None = None
    preset: str | None = None
    tags: bool = True

    def __post_init__(self) -> None:
        if not isinstance(os.fspath(self.path), str):
            raise TypeError(f"path must be text or a path, got {self.path!r}")

    @classmethod
    def of(cls, output: str | os.PathLike[str] | Self) -> Self:
        """Return an `Output` as it is, and of a path one that leaves all else at its default."""
        return output if isinstance(output, cls) else cls(output)  # type: ignore[arg-type]

    @property
    def file(self) -> Path:
        """The absolute path, of a folder without its slash."""
        return Path(self.path).absolute()

    @property
    def is_folder(self) -> bool:
        """Whether the path ends in a slash."""
        return os.fspath(self.path).endswith(FOLDER_ENDS)

    @property
    def suffix(self) -> str:
        """What follows the last dot of a file's name, with it, in lower case."""
        return "/" if self.is_folder else self.file.suffix.lower()
