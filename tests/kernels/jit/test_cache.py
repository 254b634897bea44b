"""What is kept between processes: read only as it was written, and never a reason to fail."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from magihuman.kernels.jit import cache

NO_HOME = """
import pwd
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
import magihuman.export.tensorrt, magihuman.graphs.graph_cache
import magihuman.kernels.jit.measured, magihuman.kernels.jit.nvrtc
from magihuman.kernels.jit import cache
cache.write("kind", "key", b"content")
print(cache.folder_of("kind"), cache.read("kind", "key"))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "root"))
    return tmp_path / "root" / "kind"


def test_where_it_is_is_looked_up_at_every_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder_of("kind") == tmp_path / ".cache" / "magihuman" / "kind"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder_of("kind") == tmp_path / "xdg" / "magihuman" / "kind"
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "own"))
    assert cache.folder_of("kind") == tmp_path / "own" / "kind"
    cache.write("kind", "key", b"content")
    assert os.listdir(tmp_path) == ["own"]
    assert cache.read("kind", "key") == b"content"
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "other"))
    assert cache.read("kind", "key") is None


def test_without_a_home_nothing_is_kept(tmp_path: Path) -> None:
    """Not a reason to fail, of an import either."""
    left_out = ("HOME", "XDG_CACHE_HOME", cache.VARIABLE)
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [sys.executable, "-c", NO_HOME],
        env={**environment, "TRITON_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "None None\n"), done.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("content", [b"", b"\n", b"first\nsecond", bytes(range(256)) * 100])
def test_what_was_written_is_read(content: bytes, folder: Path) -> None:
    assert cache.read("kind", "key") is None
    cache.write("kind", "key", b"earlier")
    cache.write("kind", "key", content)
    assert cache.read("kind", "key") == content
    assert cache.read("kind", "other") is None
    assert os.listdir(folder) == ["key"]
    for path, mode in ((folder.parent, 0o700), (folder, 0o700), (folder / "key", 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def _swap(file: Path) -> None:
    """What was kept under another key."""
    cache.write("kind", "other", b"other")
    os.replace(file.with_name("other"), file)


def _change(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def _link(file: Path) -> None:
    os.replace(file, file.with_name("aside"))
    file.symlink_to("aside")


def _link_folder(file: Path) -> None:
    aside = file.parent.with_name("aside")
    os.rename(file.parent, aside)
    file.parent.symlink_to(aside)


def _pipe(file: Path) -> None:
    """One that nobody writes to: to open it would wait for ever."""
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"!"),
    "changed": _change,
    "without a header": lambda file: file.write_bytes(b"content"),
    "of another key": _swap,
    "a link": _link,
    "in a linked folder": _link_folder,
    "a pipe": _pipe,
    "a folder": _folder,
    "a group's": lambda file: file.chmod(0o660),
    "everybody's": lambda file: file.chmod(0o606),
    "in a group's folder": lambda file: file.parent.chmod(0o770),
    "in everybody's folder": lambda file: file.parent.chmod(0o707),
    "below a group's folder": lambda file: file.parent.parent.chmod(0o770),
    "below everybody's folder": lambda file: file.parent.parent.chmod(0o707),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_odd_is_a_miss(damage: str, folder: Path) -> None:
    cache.write("kind", "key", b"content")
    assert cache.read("kind", "key") == b"content"
    DAMAGES[damage](folder / "key")
    assert cache.read("kind", "key") is None


def test_a_folder_below_one_that_is_shared_as_tmp_is_will_do(folder: Path) -> None:
    cache.write("kind", "key", b"content")
    folder.parent.chmod(0o1777)
    assert cache.read("kind", "key") == b"content"


def test_a_long_file_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("kind", "key", bytes(100))
    monkeypatch.setattr(cache, "MOST_BYTES", 100)
    assert cache.read("kind", "key") is None


def test_no_more_is_kept_than_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_BYTES", 100)
    for length, is_kept in ((10, True), (100, False)):
        cache.write("kind", f"{length}", bytes(length))
        assert cache.read("kind", f"{length}") == (bytes(length) if is_kept else None)
    assert os.listdir(folder) == ["10"]


def test_what_is_somebody_elses_is_a_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("kind", "key", b"content")
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert cache.read("kind", "key") is None


def test_nothing_is_written_where_others_may_write(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    for _ in range(2):
        cache.write("kind", "key", b"content")
    assert os.listdir(folder) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"a cache folder must be a folder that its user alone may write to, and {folder} is not:"
        " nothing is kept there; give it to this user with mode 0700, or name another in"
        " MAGIHUMAN_CACHE"
    ]


def test_a_disk_that_is_full_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("kind", "key", b"earlier")

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        cache.write("kind", "key", b"later")
    assert os.listdir(folder) == ["key"]
    assert cache.read("kind", "key") == b"earlier"


def test_a_folder_that_cannot_be_made_is_no_error(folder: Path) -> None:
    folder.parent.write_bytes(b"a file in its place")
    cache.write("kind", "key", b"content")
    assert cache.read("kind", "key") is None


@pytest.mark.parametrize("key", ["", "..", "../key", "folder/key", "/key"])
def test_keys_are_names_of_files(key: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="a key must be a file's name"):
        cache.write("kind", key, b"content")
