"""Movie fragments of ISO/IEC 14496-12, laid out by hand: FFmpeg keeps one until the next begins."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

START_CODE = re.compile(rb"\x00?\x00\x00\x01")
BASE_IS_MOOF = 0x020000  # of a tfhd: offsets count from the fragment's beginning
# Of a trun: an offset to the data; duration, size and flags of each sample.
OFFSET, DURATION, SIZE, FLAGS = 0x1, 0x100, 0x200, 0x400
SYNC, NOT_SYNC = 0x02000000, 0x01010000  # flags of a sample: whether others are needed for it


@dataclass(frozen=True)
class Sample:
    """A picture, or a block of sound, as its decoder takes it."""

    data: bytes
    duration: int  # in units of the track's timescale
    is_sync: bool


@dataclass(frozen=True)
class Run:
    """Samples of one track that follow each other, the first at a time of the track's timescale."""

    track: int
    begin: int
    samples: Sequence[Sample]


def box(kind: bytes, *parts: bytes) -> bytes:
    """Return a box of four letters with what it holds."""
    content = b"".join(parts)
    return struct.pack(">I4s", len(content) + 8, kind) + content


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind of each box of a file, and all of it, header included."""
    begin = 0
    while begin < len(data):
        size = int.from_bytes(data[begin : begin + 4], "big")
        yield data[begin + 4 : begin + 8], data[begin : begin + size]
        begin += size


def init_segment(file: bytes) -> bytes:
    """Return what comes before the first fragment of a file: the boxes ftyp and moov."""
    return b"".join(whole for kind, whole in boxes(file) if kind in (b"ftyp", b"moov"))


def fragment(number: int, runs: Sequence[Run]) -> bytes:
    """Return the `number`th fragment from 1, with these runs, of different tracks each."""
    size = len(_moof(number, runs, 0))
    return _moof(number, runs, size + 8) + box(b"mdat", *(s.data for r in runs for s in r.samples))


def length_prefixed(units: bytes) -> bytes:
    """Return NAL units with their lengths before them, as in files, in place of start codes."""
    parts = [part for part in START_CODE.split(units) if part]
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def _moof(number: int, runs: Sequence[Run], offset: int) -> bytes:
    """Return the box that says what is in a fragment. offset: from it to the first sample."""
    tracks = []
    for run in runs:
        tracks.append(_traf(run, offset))
        offset += sum(len(sample.data) for sample in run.samples)
    return box(b"moof", box(b"mfhd", struct.pack(">II", 0, number)), *tracks)


def _traf(run: Run, offset: int) -> bytes:
    samples = (
        struct.pack(">III", s.duration, len(s.data), SYNC if s.is_sync else NOT_SYNC)
        for s in run.samples
    )
    flags = OFFSET | DURATION | SIZE | FLAGS
    return box(
        b"traf",
        box(b"tfhd", struct.pack(">II", BASE_IS_MOOF, run.track)),
        box(b"tfdt", struct.pack(">IQ", 1 << 24, run.begin)),
        box(b"trun", struct.pack(">IIi", flags, len(run.samples), offset), *samples),
    )
