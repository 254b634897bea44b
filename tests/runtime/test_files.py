from __future__ import annotations

import os

import pytest

from magihuman.runtime.files import atomic_path


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path, error):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert path.read_bytes() == b"old"
