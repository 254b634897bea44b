"""The model that comes with this package, and what suits a model beside its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from magihuman.runtime.config import NANO
from magihuman.runtime.errors import CheckpointError, InvalidRequestError, shown
from magihuman.runtime.request import (
    MAX_SECONDS,
    MAX_SIDE_PX,
    STANDARD_SIZE,
    ClipSize,
    Request,
)
from magihuman.runtime.weights.reading import exists, read_json

NANO_FOLDER = Path(__file__).parent / NANO
# In a model's folder, where that is not made for requests as they are by default: {"seconds": 3.2,
# "width": 160, "height": 160}.
SUITED = "request.json"
PROMPTS = "prompts"  # what that file may have beside them: prompts to try
MAX_PROMPTS, MAX_PROMPT_CHARS = 20, 1000
EXAMPLES = (
    'A woman looks into the camera, smiles and says: "Hello, how are you today?"',
    'An old man with a white beard sits by a fire, looks up and says: "Once upon a time."',
    'A news presenter at her desk says in a calm voice: "Good evening, and welcome."',
)
STANDARD = STANDARD_SIZE
# What it may have beside them: the longest and largest clip that a server is to make.
MOST = {"seconds": "max_seconds", "width": "max_width", "height": "max_height"}


def model_folder(model: str | os.PathLike[str]) -> Path:
    """Where a model lies: of "nano" in this package, unless a folder here has that name."""
    given = Path(model)
    if os.fspath(model) != NANO or exists(given):
        return given
    if not NANO_FOLDER.is_dir():
        raise CheckpointError(
            f"the weights of {NANO} must be in {NANO_FOLDER}, and this copy of the package came"
            " without: train them as examples/nano/README.md says, or give a model directory"
        )
    return NANO_FOLDER


def suited(model: str | os.PathLike[str]) -> ClipSize:
    """Length and size of a clip that a model makes best: those in its folder, else the standard.

    Raises `CheckpointError` where the folder's cannot be used.
    """
    return learnt(model) or ClipSize(**STANDARD)


def learnt(model: str | os.PathLike[str]) -> ClipSize | None:
    """Longest and largest clip that a model was trained on, or None where its folder does not tell.

    Raises `CheckpointError` where what the folder has cannot be used.
    """
    return _told(model)[0]


def largest(model: str | os.PathLike[str]) -> ClipSize:
    """Longest and largest clip that a server of the model makes: those its folder tells, or all.

    Raises `CheckpointError` as `learnt` does.
    """
    return _told(model)[1]


def _told(model: str | os.PathLike[str]) -> tuple[ClipSize | None, ClipSize]:
    """What a model's folder tells: what it has learnt, and the most that is to be made."""
    most = ClipSize(seconds=MAX_SECONDS, width=MAX_SIDE_PX, height=MAX_SIDE_PX)
    path = model_folder(model) / SUITED
    if not exists(path):
        return None, most
    values = read_json(path)
    values.pop(PROMPTS, None)
    known = {*STANDARD, *MOST.values()}
    if not set(STANDARD) <= set(values) <= known or not all(map(_is_number, values.values())):
        raise CheckpointError(
            f"{path} must hold a number for each of {', '.join(STANDARD)}, and may for"
            f" {', '.join(MOST.values())}, got {shown(values)}"
        )
    size = ClipSize(**{name: values[name] for name in STANDARD})  # type: ignore[typeddict-item]
    told = {name: values[key] for name, key in MOST.items() if key in values}
    most.update(told)  # type: ignore[typeddict-item]  # its keys were looked at
    try:
        for each in (size, most):
            Request("-", **each)
    except InvalidRequestError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for name in STANDARD:
        if most[name] < size[name]:  # type: ignore[literal-required]
            raise CheckpointError(
                f"{path}: {MOST[name]} must be no less than {name}, {values[name]}, got"
                f" {values[MOST[name]]}"
            )
    return size, most


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def prompts(model: str | os.PathLike[str]) -> tuple[str, ...]:
    """Prompts to try with a model: those in its folder, else some that suit the published ones.

    Raises `CheckpointError` where the folder's cannot be used.
    """
    path = model_folder(model) / SUITED
    given = read_json(path).get(PROMPTS) if exists(path) else None
    if given is None:
        return EXAMPLES
    is_list = isinstance(given, list) and len(given) <= MAX_PROMPTS
    if not is_list or not all(map(_is_prompt, given)):
        raise CheckpointError(
            f"{path}: {PROMPTS} must be a list of at most {MAX_PROMPTS} texts of at most"
            f" {MAX_PROMPT_CHARS} characters that are not blank, got {shown(given)}"
        )
    return tuple(given)


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= MAX_PROMPT_CHARS


def sized(model: str | os.PathLike[str], **given: float | None) -> dict[str, Any]:
    """Length and size as given, by the names of `Request`, and what suits the model for None."""
    return {
        name: suits if given[name] is None else given[name] for name, suits in suited(model).items()
    }
