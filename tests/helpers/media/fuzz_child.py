"""Reads mutants of seeds until one does what no file may do: see tests/runtime/media/test_fuzz.py.

Arguments: "image" or "sound", a folder of seeds, the first index and the one after the last. Each
index gives its mutant, a file beside that folder, which goes once it has been read. It is still
there where it ends in anything but a result or `InvalidRequestError`, takes longer than a minute,
or ends this process.
"""

from __future__ import annotations

import faulthandler
import resource
import sys
import traceback
from pathlib import Path

import numpy as np
from mutants import mutated

from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.media import open_driving_audio, open_image

MAX_PIXELS = 1_000_000
MEMORY_BYTES = 4 * 2**30
ONE_S = 60.0


def read(kind: str, path: Path) -> None:
    if kind == "image":
        image = open_image(path, max_pixels=MAX_PIXELS)
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        assert len(image.tobytes()) == 3 * image.width * image.height
    else:
        samples, _ = open_driving_audio(path, 5.0)
        assert samples.dtype == np.float32 and 0 < len(samples) <= 5 * 51200
        assert np.isfinite(samples).all()


def main(kind: str, folder: Path, first: int, end: int) -> int:
    seeds = [path.read_bytes() for path in sorted(folder.iterdir())]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    read_well = 0
    for index in range(first, end):
        random = np.random.default_rng([index, kind == "sound"])
        path = folder.parent / f"mutant-{index}"
        path.write_bytes(mutated(seeds[index % len(seeds)], random))
        faulthandler.dump_traceback_later(ONE_S, exit=True)
        try:
            read(kind, path)
            read_well += 1
        except InvalidRequestError:
            pass
        except Exception:
            traceback.print_exc()
            return 1
        path.unlink()
    print(read_well)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
