from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from magihuman.runtime.files import atomic_folder, atomic_path, staged_folder, write_text


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def filled(folder: Path) -> None:
    """As exporters fill one: some libraries have modes of their own."""
    (folder / "part").mkdir()
    (folder / "manifest.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / "part" / "weights.safetensors")


def test_all_files_of_a_folder_are_alike(tmp_path, umask):
    for context in (atomic_folder, staged_folder):
        folder = tmp_path / context.__name__
        with context(folder) as draft:
            filled(draft)
        assert {mode(path) for path in (folder, folder / "part")} == {0o777 & ~umask}
        files = folder / "manifest.json", folder / "part" / "weights.safetensors"
        assert {mode(path) for path in files} == {0o666 & ~umask}


def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path, umask):
    private, public = tmp_path / "private", tmp_path / "public"
    for path, own in ((private, 0o600), (public, 0o644)):
        path.write_text("old")
        path.chmod(own)
    for path in (private, public):
        write_text(path, "new")
    with staged_folder(tmp_path) as draft:
        (draft / "private").write_text("newer")
    assert (mode(private), mode(public)) == (0o600, 0o644)
    assert (private.read_text(), public.read_text()) == ("newer", "new")


def test_a_folder_keeps_the_mode_that_it_is_given(tmp_path, umask):
    with atomic_folder(tmp_path / "job", 0o700) as draft:
        filled(draft)
    assert mode(tmp_path / "job") == mode(tmp_path / "job" / "part") == 0o700
    assert mode(tmp_path / "job" / "manifest.json") == 0o600


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
