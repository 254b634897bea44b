"""Where a model's components lie: a folder, folders given one by one, or a hub's cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from magihuman.runtime import config
from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.weights import layouts
from magihuman.runtime.weights.reading import exists, names
from magihuman.runtime.weights.shipped import model_folder
from magihuman.runtime.weights.wan_vae import WEIGHTS_NAME

log = logging.getLogger("magihuman")

TURBO_FOLDER = "turbo_vae"
TEXT_FOLDER = "t5gemma-9b-9b-ul2"
AUDIO_FOLDER = "stable-audio-open-1.0"
IMAGE_FOLDER = "Wan2.2-TI2V-5B"
IMAGE_FOLDERS = (IMAGE_FOLDER, f"{IMAGE_FOLDER}-Diffusers", "vae")  # of one of its layouts
PUBLISHED_ID = "GAIR/daVinci-MagiHuman"
HUB_IDS = {
    TEXT_FOLDER: "google/t5gemma-9b-9b-ul2",
    AUDIO_FOLDER: "stabilityai/stable-audio-open-1.0",
    IMAGE_FOLDER: "Wan-AI/Wan2.2-TI2V-5B",
}
HUB_FILES = {
    TEXT_FOLDER: ["*.json", "*.safetensors", "tokenizer.model"],
    AUDIO_FOLDER: ["model_config.json", "model.safetensors"],
    IMAGE_FOLDER: [WEIGHTS_NAME, "vae/*"],
    TURBO_FOLDER: [f"{TURBO_FOLDER}/*"],
}
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)")  # and, behind it, a folder there
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Paths:
    """Where each component lies."""

    dit: Path
    turbo_vae: Path
    text_encoder: Path
    audio_vae: Path
    image_vae: Path | None
    sr: Path | None


def find(
    model: PathLike,
    variant: config.Variant,
    sr: config.Variant | None,
    overrides: dict[str, PathLike | None],
    revision: str | None = None,
) -> Paths:
    """Locate every component, downloading what a hub id names.

    Raises:
        CheckpointError: components are missing, all of which it names, or cannot be downloaded.
    """
    root = model_folder(model)
    variants = {each.name: each for each in (variant, sr) if each is not None}
    folders = [variant.name, TURBO_FOLDER, *([sr.name] if sr else [])]
    is_hub = not exists(root) and HUB_ID.fullmatch(os.fspath(model)) is not None
    roots = [root]
    if is_hub:
        wanted = [name for name in folders if overrides.get(name) is None]
        roots = _model_from_hub(os.fspath(model), wanted, revision)
        root = roots[0]
    elif not exists(root) or not root.is_dir():
        raise CheckpointError(
            f"model must be a directory with the published folders or a hub id (owner/name), got"
            f" {names([os.fspath(model)])}"
        )

    places: dict[str, Path | None] = {}
    for name in (*folders, TEXT_FOLDER, AUDIO_FOLDER, IMAGE_FOLDER):
        override = overrides.get(name)
        if override is None:
            place = next(filter(exists, (_inside(r, name, variants) for r in roots)), root / name)
            if not exists(place) and is_hub and name in HUB_FILES:
                place = _third_party(name, place)
        else:
            place = Path(override)
            if not exists(place) and name != TURBO_FOLDER:
                repo, folder = _hub_place(os.fspath(override))
                patterns = HUB_FILES.get(name, _of_folder(folder, variants.get(name)))
                place = _download(repo, patterns, None) / folder if repo else place
        places[name] = place if exists(place) else None
        if places[name] is None and override is not None:
            raise CheckpointError(
                f"{name} must be at the path given, {names([str(place)])}, which does not exist"
            )
    missing = [name for name, place in places.items() if place is None and name != IMAGE_FOLDER]
    if missing:
        raise CheckpointError(
            f"{root} lacks {', '.join(missing)}; download what is missing or give its path"
        )

    def required(name: str) -> Path:
        place = places[name]
        assert place is not None
        return place

    return Paths(
        dit=required(variant.name),
        turbo_vae=required(TURBO_FOLDER),
        text_encoder=required(TEXT_FOLDER),
        audio_vae=required(AUDIO_FOLDER),
        image_vae=places[IMAGE_FOLDER],
        sr=required(sr.name) if sr else None,
    )


def _inside(root: Path, name: str, variants: Mapping[str, config.Variant]) -> Path:
    """Where a component is in a model's directory, or would be."""
    if name in variants:
        return layouts.in_model(root, variants[name]) or root / name
    return image_folder(root) if name == IMAGE_FOLDER else root / name


def image_folder(root: Path) -> Path:
    """Where a model's directory has the image encoder, in whichever layout, or would have it."""
    places = (root / folder for folder in IMAGE_FOLDERS)
    return next(filter(exists, places), root / IMAGE_FOLDER)


def _hub_place(given: str) -> tuple[str, str]:
    """The repository of a hub id, and the folder there that it goes on with; empty where it is
    none.
    """
    matched = HUB_ID.fullmatch(given)
    return (matched[1], matched[2].strip("/")) if matched else ("", "")


def _model_from_hub(given: str, wanted: list[str], revision: str | None) -> list[Path]:
    """Download components of a model, and return the folders to look for them in."""
    repo, folder = _hub_place(given)
    patterns = [f"{TURBO_FOLDER}/*"] if TURBO_FOLDER in wanted else []
    for name in wanted:
        variant = config.VARIANTS.get(name)
        if variant is not None:
            patterns += [f"{name}/*", *layouts.pipeline_patterns(variant)]
            patterns += _of_folder(folder, variant) if folder else []
    root = _download(repo, patterns, revision)
    return [root / folder, root] if folder else [root]


def _of_folder(folder: str, variant: config.Variant | None) -> list[str]:
    """Patterns for a transformer in a folder of a repository, or at its root."""
    start = f"{folder}/" if folder else ""
    parts = layouts.parts_of(variant) if variant else ()
    return [f"{start}*.json", f"{start}*.safetensors", *(f"{start}{part}/*" for part in parts)]


def _third_party(name: str, place: Path) -> Path:
    """A third-party model from its own repository; the image encoder is optional there too."""
    if name == TURBO_FOLDER:
        return _download(PUBLISHED_ID, HUB_FILES[name], None) / name
    try:
        return _download(HUB_IDS[name], HUB_FILES[name], None)
    except CheckpointError as error:
        if name != IMAGE_FOLDER:
            raise
        log.warning("no image encoder, so requests with an image will be refused: %s", error)
        return place


def _download(repo: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is not in the local Hugging Face cache and cannot be downloaded (offline"
            " mode, or no network); go online once, or give a directory"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo} cannot be downloaded: {error}") from error
