"""What a model's files hold, bounded before it is read: JSON, headers, pickles of tensors.

A file can say anything. Whatever it says, the worst that happens is a `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from magihuman.runtime.errors import CheckpointError

MOST_JSON_BYTES = 2**22  # an index of the published files has 30 thousand
MOST_HEADER_BYTES = 2**23  # of a safetensors file; the published have at most 300 thousand
LONGEST_NAME_BYTES = 255  # of a file
NAMED_IN_ERRORS = 8
LONGEST_IN_ERRORS = 120
LONGEST_REASON = 500  # of a library's message, which may quote the file


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """A JSON object, or a `CheckpointError` that says what is wrong with the file."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{path} must be a file")
        if facts.st_size > most_bytes:
            raise CheckpointError(
                f"{path} must have at most {most_bytes} bytes, got {facts.st_size}; it is not what"
                " its name says"
            )
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:  # also of numbers with 5,000 digits
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def is_file_name(name: object) -> TypeGuard[str]:
    """Whether this names a file in whatever folder it is looked up, and no other folder's."""
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        return False
    try:
        return len(name.encode()) <= LONGEST_NAME_BYTES and Path(name).name == name
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False


def exists(path: Path) -> bool:
    """Whether something is there; what no file system can name is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a file is there, itself or behind a link, as the hub's cache has them."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped; damage raises `CheckpointError`."""
    if not is_file(path):
        raise CheckpointError(f"{path} is missing; download the folder again")
    try:
        _check_header(path)
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({str(error)[:LONGEST_REASON]}); compare its size with"
            " the published one and download it again"
        ) from error


def _check_header(path: Path) -> None:
    """Refuse a header that would be read whole, and turned into objects, whatever its length."""
    with path.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if length > MOST_HEADER_BYTES:
        raise OSError(f"its header has {length} bytes, and at most {MOST_HEADER_BYTES} are read")


def scan_files(
    files: Iterable[Path], owners: Mapping[str, Path] | None = None
) -> dict[str, TensorInfo]:
    """Every tensor of these files, from their headers.

    owners: the file that a tensor is taken from, whichever others have one of that name. Raises
    `CheckpointError` where two files have one that is not among them.
    """
    owners = owners or {}
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        with open_shard(file) as shard:
            for key in shard.keys():  # noqa: SIM118 - not a mapping
                if owners.get(key, file) != file:
                    continue
                if key in tensors:
                    raise CheckpointError(
                        f"{file} holds {key}, and so does {tensors[key].file}; download the folder"
                        " again"
                    )
                part = shard.get_slice(key)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                width = int(re.sub(r"\D", "", dtype.split("_")[0]) or 8) // 8
                tensors[key] = TensorInfo(file, shape, dtype, width * math.prod(shape))
    return tensors


def load_pickle(path: Path) -> dict[str, Any]:
    """A PyTorch pickle, tensors only, mapped where its format (zip, since PyTorch 1.6) allows."""
    if not is_file(path):
        raise CheckpointError(f"{path} is missing")
    try:
        mmap = zipfile.is_zipfile(path)
        if mmap:
            _check_stored(path)
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of damaged bytes, the unpickler raises anything
        raise CheckpointError(
            f"{path} is damaged, cut short or holds more than tensors ({type(error).__name__});"
            " download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a dictionary, got {type(value).__name__}")
    return value


def _check_stored(path: Path) -> None:
    """PyTorch compresses nothing, and what is compressed could be of any size."""
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError("compressed")


def shapes(state: Mapping[str, object], source: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file's dictionary.

    Raises:
        CheckpointError: a value is no tensor of floats that has each of its values in the file.
    """
    sizes = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: {names([key])} must be a tensor, got {type(value).__name__}"
            )
        if not _is_whole(value):
            raise CheckpointError(
                f"{source}: {names([key])} must be a dense tensor of floats, with each value in the"
                " file; download it again"
            )
        sizes[key] = tuple(value.shape)
    return sizes


def _is_whole(value: Tensor) -> bool:
    """Whether a tensor is what it says, and not one value that is to be read as a thousand."""
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    held = value.untyped_storage().nbytes()
    return value.is_floating_point() and value.numel() * value.element_size() <= held


def names(keys: Iterable[str]) -> str:
    """Names out of a file, for a message: the first few, none long, in letters that print."""
    every = list(keys)
    more = len(every) - NAMED_IN_ERRORS
    return ", ".join(map(_printed, every[:NAMED_IN_ERRORS])) + (
        f" and {more} more" if more > 0 else ""
    )


def _printed(name: str) -> str:
    if len(name) > LONGEST_IN_ERRORS:
        name = name[:LONGEST_IN_ERRORS] + "..."
    return name if name.isprintable() else ascii(name)
