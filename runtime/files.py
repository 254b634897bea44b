"""Files and folders that this package makes, whole or not at all, and hashes of what they hold.

Who may read them is said by the umask, the file that is replaced, or the folder made for them,
and not by the library that writes them: all files of a folder are alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from magihuman.kernels.jit import cache
from magihuman.runtime.errors import CheckpointError, OutputError

OnBytes = Callable[[str, int, int], None]  # (stage, bytes done, of how many)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to `path` on success and removed otherwise.

    A file that is replaced hands on its mode.
    """
    with cache.atomic_path(path) as temporary:
        _inherit(temporary, path)
        yield temporary


@contextmanager
def atomic_folder(folder: Path, mode: int = 0o777) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to that on success and removed otherwise.

    mode: of the folder, less what the umask takes away; what is in it is as open as that.
    """
    temporary = folder.parent / f".magihuman-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(mode)
        yield temporary
        _settle(temporary)
        if folder.exists():  # a rename would replace an empty folder
            raise FileExistsError(f"{folder} has been made by somebody else meanwhile")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `folder`, whose files go there on success, and nothing
    otherwise.

    `folder` is made where it is not there; else files of the same names are replaced, once all are
    written, and others stay.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    place = missing[-1].parent if missing else folder
    temporary = place / f".magihuman-{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        if missing:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(folder)
            return
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                _inherit(file, target)
                os.replace(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def close_to_others(path: Path) -> None:
    """Let nobody but its owner use a file or folder. Raises `OSError`; a link is left as it is."""
    if not path.is_symlink() and _mode(path) & 0o077:
        path.chmod(_mode(path) & ~0o077)


def _settle(folder: Path) -> None:
    """Make all that lies in a folder as open as the folder is."""
    mode = _mode(folder)
    for place in folder.rglob("*"):
        if not place.is_symlink():
            _chmod(place, mode if place.is_dir() else mode & 0o666)


def _inherit(temporary: Path, path: Path) -> None:
    """Give a file the mode of that which it replaces, if there is one."""
    with suppress(FileNotFoundError):
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode):
            _chmod(temporary, facts.st_mode & 0o777 | 0o600)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _chmod(path: Path, mode: int) -> None:
    """Set the mode, where the file system knows any."""
    if _mode(path) != mode:
        with suppress(PermissionError):
            path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8; what is no file, such as a pipe, as it is.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        with atomic_path(path.absolute()) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def check_new_folder(folder: Path, needed: int) -> None:
    """Raise `OutputError` now where a folder of `needed` bytes could not be written later."""
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"the output must not exist yet, got {folder}; name another or remove it")
    if not folder.parent.is_dir():
        raise OutputError(f"the output's folder must exist, got {folder.parent}; create it first")
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OutputError(
            f"the disk of {folder.parent} must have {needed / 2**30:.1f} GiB free, got"
            f" {free / 2**30:.1f} GiB"
        )


def hashed(
    files: Sequence[Path], report: OnBytes = lambda stage, done, of: None
) -> dict[str, dict[str, object]]:
    """Size in bytes and SHA-256 of each file, by its name.

    report: called with ("hash", bytes done, bytes in all). Raises `CheckpointError` for a file that
    cannot be read.
    """
    sizes = [file.stat().st_size for file in files]
    hashes: dict[str, dict[str, object]] = {}
    done = 0
    for file, size in zip(files, sizes, strict=True):
        try:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        hashes[file.name] = {"bytes": size, "sha256": digest}
        done += size
        report("hash", done, sum(sizes))
    return hashes


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a JSON object, which is on the disk when this returns."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Return once the disk has taken a file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the disk has taken a folder's names, where its file system can say so."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def version() -> str:
    """The version of this package, "unknown" where it is run from its sources."""
    try:
        return metadata.version("magihuman")
    except metadata.PackageNotFoundError:  # run from its sources
        return "unknown"
