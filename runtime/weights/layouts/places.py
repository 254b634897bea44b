"""Where the files of a transformer lie, by the names that they have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from magihuman.runtime.config import BASE_VARIANTS, Variant
from magihuman.runtime.errors import CheckpointError, shown
from magihuman.runtime.weights.reading import (
    TensorInfo,
    exists,
    is_file,
    is_file_name,
    names,
    read_json,
    scan_files,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DIFFUSERS_STEM = "diffusion_pytorch_model"
DIFFUSERS_INDEX = f"{DIFFUSERS_STEM}.safetensors.index.json"
BASE_PART, SR_PART = "transformer", "sr_transformer"  # folders of a pipeline of Diffusers
# Folders of a repository with a pipeline for each variant, where they are not called as published;
# each has the base transformer too.
SR_PIPELINES = {"540p_sr": "sr_540p", "1080p_sr": "sr_1080p"}
# What the parts of a pipeline hold, by the name of its folder.
SRS = {folder: name for name, folder in SR_PIPELINES.items()}
BASES = {**{name: name for name in BASE_VARIANTS}, **dict.fromkeys(SRS, "base")}
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Layout:
    """The files of one model.

    Attributes:
        name: of the layout, for people.
        files: that hold tensors.
        index: that says which file has which tensor; None where there is none.
    """

    name: str
    files: tuple[Path, ...]
    index: Path | None = None


def nested(place: Path, variant: Variant) -> Path:
    """The folder of a variant's files where `place` is a pipeline of Diffusers that has it, else
    `place`.
    """
    if _holds_weights(place):
        return place
    return next((place / part for part in parts_of(variant) if exists(place / part)), place)


def parts_of(variant: Variant) -> tuple[str, ...]:
    """Folders of a pipeline that may hold a variant, the likelier first."""
    return (BASE_PART,) if variant.sr is None else (SR_PART, BASE_PART)


def pipeline_patterns(variant: Variant) -> list[str]:
    """Patterns for a variant in a repository with a pipeline for each, beside its own folder."""
    return [f"{SR_PIPELINES[variant.name]}/{SR_PART}/*"] if variant.sr else []


def in_model(root: Path, variant: Variant) -> Path | None:
    """Where a model's directory has a variant: its folder, its file, or the part of a pipeline.

    Raises:
        CheckpointError: the directory is the pipeline of another variant.
    """
    own = [variant.name, *([SR_PIPELINES[variant.name]] if variant.sr else [])]
    for name in (*own, *(name + SUFFIX for name in own)):
        if exists(root / name):
            return root / name
    part = root / (BASE_PART if variant.sr is None else SR_PART)
    if not exists(part):
        return None
    holds = (BASES if variant.sr is None else SRS).get(root.name, variant.name)
    if holds != variant.name:
        raise CheckpointError(
            f"{part} must hold {variant.name}, and by the name of its folder it holds {holds}; ask"
            f" for {holds}, or give the folder of {variant.name}"
        )
    return part


def find(place: Path) -> Layout:
    """The files of a transformer, or of another model that is stored like one.

    place: their folder, or the one file.

    Raises:
        CheckpointError: there are none, or more than one file without an index.
    """
    if is_file(place):
        return _single(place)
    for index, name in (
        (INDEX_NAME, "published, sharded"),
        (DIFFUSERS_INDEX, "Diffusers, sharded"),
    ):
        if is_file(place / index):
            return Layout(name, _indexed(place / index), place / index)
    if is_file(place / SINGLE_NAME):
        return Layout("published, one file", (place / SINGLE_NAME,))
    parts = weight_files(place, f"{DIFFUSERS_STEM}*{SUFFIX}")
    if parts:
        return Layout("Diffusers" if len(parts) > 1 else "Diffusers, one file", parts)
    files = weight_files(place)
    if len(files) == 1:
        return _single(files[0])
    raise CheckpointError(
        f"{place} holds neither {INDEX_NAME} nor {SINGLE_NAME}, nor {DIFFUSERS_STEM}*{SUFFIX}, nor"
        f" one file of another name; {_instead(place)}"
    )


def beside(place: Path) -> Path:
    """The folder that a place's files lie in."""
    return place.parent if is_file(place) else place


def weight_files(folder: Path, pattern: str = f"*{SUFFIX}") -> tuple[Path, ...]:
    """Files of a folder by a pattern, in order; none where there is no folder."""
    try:
        return tuple(sorted(file for file in folder.glob(pattern) if is_file(file)))
    except OSError:
        return ()


def scan(place: Path) -> dict[str, TensorInfo]:
    """Every tensor at a place that `find` knows, from headers alone.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks what its index names.
    """
    layout = find(place)
    if layout.index is None:
        return scan_files(layout.files)
    weight_map = _weight_map(layout.index)
    owners = {key: layout.index.parent / name for key, name in weight_map.items()}
    tensors = scan_files(layout.files, owners)
    lost = [key for key in weight_map if key not in tensors]
    if lost:
        raise CheckpointError(f"{layout.index} names tensors that its files lack: {names(lost)}")
    return tensors


def _holds_weights(place: Path) -> bool:
    return is_file(place) or bool(weight_files(place)) or exists(place / INDEX_NAME)


def _single(file: Path) -> Layout:
    if file.suffix != SUFFIX:
        raise CheckpointError(
            f"{file} must be a {SUFFIX} file with the published names, got one that ends in"
            f" {shown(file.suffix)}; {_REMEDIES.get(file.suffix, 'convert it to safetensors')}"
        )
    return Layout(f"one file, {file.name}", (file,))


def _indexed(index: Path) -> tuple[Path, ...]:
    return tuple(index.parent / name for name in sorted(set(_weight_map(index).values())))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must have a weight_map of tensor names to files")
    for name in weight_map.values():
        if not is_file_name(name):
            raise CheckpointError(
                f"{index} must have a weight_map of tensor names to files in the same folder, got"
                f" {shown(name)}; download it again"
            )
    return weight_map


_REMEDIES = {
    ".gguf": "GGUF files are not read, take a safetensors file in bf16",
    ".pth": "pickles of transformers are not read, take a safetensors file",
    ".pt": "pickles of transformers are not read, take a safetensors file",
    ".bin": "pickles of transformers are not read, take a safetensors file",
    ".ckpt": "pickles of transformers are not read, take a safetensors file",
}


def _instead(place: Path) -> str:
    """What a folder has in place of what is read, and what to do about it."""
    files = weight_files(place, "*")
    if not files:
        return "it holds no files"
    kinds = {_REMEDIES[file.suffix] for file in files if file.suffix in _REMEDIES}
    remedy = sorted(kinds)[0] if kinds else "give the one file, or add the index"
    return f"it holds {names([file.name for file in files])}: {remedy}"
