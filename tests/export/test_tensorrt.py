"""Timings of earlier builds. Full TensorRT, which alone takes them, needs a GPU to be imported."""

from __future__ import annotations

import pytest

from magihuman.export.tensorrt import take_timings


class Config:
    """Takes timings as TensorRT's configuration does: none for bytes that it cannot read."""

    def __init__(self) -> None:
        self.taken: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"damaged" else content

    def set_timing_cache(self, timings: bytes, ignore_mismatch: bool) -> bool:
        if timings == b"of another GPU":
            return False
        self.taken = timings
        return True


@pytest.mark.parametrize(
    ("kept", "taken"),
    [(b"kept", b"kept"), (None, b""), (b"", b""), (b"damaged", b""), (b"of another GPU", b"")],
)
def test_timings_that_are_refused_are_left_out(kept: bytes | None, taken: bytes) -> None:
    config = Config()
    take_timings(config, kept)
    assert config.taken == taken
