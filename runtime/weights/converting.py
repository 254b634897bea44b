"""Published transformer in, artifact out: whole, or nothing at all."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from magihuman.graphs.quantization import KEEP_NONE, KeepBf16, quantize
from magihuman.runtime.config import VARIANTS, DiTConfig, Precision, Variant
from magihuman.runtime.errors import CheckpointError, InvalidRequestError, OutputError, one_of
from magihuman.runtime.files import (
    OnBytes,
    atomic_folder,
    check_new_folder,
    hashed,
    sync,
    version,
    write_json,
)
from magihuman.runtime.weights import artifacts, checkpoint, layouts
from magihuman.runtime.weights.artifacts import SCALE, Stored
from magihuman.runtime.weights.precision import PrecisionPolicy
from magihuman.runtime.weights.shipped import model_folder
from magihuman.runtime.weights.transformer import linears_in_8_bits

SHARD_BYTES = 4 * 2**30 - 2**20  # of tensors in a file, which also has a header

PathLike = str | os.PathLike[str]


def convert(
    model: PathLike,
    folder: PathLike,
    *,
    variant: str = "distill",
    precision: Precision = "fp8",
    keep_bf16: KeepBf16 = KEEP_NONE,
    on_progress: OnBytes | None = None,
) -> Path:
    """Write one transformer of a model as an artifact, for `load(..., transformer=folder)`.

    It appears whole under its name or not at all, also when interrupted. Needs no GPU, and host
    memory for one file of 4 GiB.

    Args:
        model: a directory with the published folders.
        folder: to make; must not exist.
        variant: "base", "distill", "540p_sr" or "1080p_sr".
        precision: of the block linears: "fp8", "int8" or "bf16".
        keep_bf16: with fp8 or int8, the linears that stay bf16, as for `load`.
        on_progress: called with ("hash" or "convert", bytes done, bytes in all).

    Raises:
        InvalidRequestError: an argument is not one of those above.
        CheckpointError: a published file is missing, damaged, or does not fit.
        OutputError: the folder cannot be written; nothing is left of it.
    """
    one_of("variant", variant, tuple(VARIANTS))
    one_of("precision", precision, artifacts.PRECISIONS)
    policy = PrecisionPolicy(precision)
    if policy.narrow is None and keep_bf16 != KEEP_NONE:
        raise InvalidRequestError(
            "keep_bf16 must go with precision='fp8' or 'int8', got"
            f" {keep_bf16!r} with {precision!r}"
        )
    source = _Source(model_folder(model), VARIANTS[variant])
    layout = _layout(source.config, policy, keep_bf16)
    report = on_progress or (lambda stage, done, of: None)
    target = Path(folder).absolute()
    check_new_folder(target, sum(stored.size_bytes for stored in layout.values()))
    try:
        with atomic_folder(target) as temporary:
            sources = hashed(source.files, report)
            write_artifact(temporary, source, variant, policy, keep_bf16, sources, report)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{target} could not be written: {error}; nothing is left of it"
        ) from error
    return target


class Source(Protocol):
    """Where an artifact's weights come from, under their published names."""

    config: DiTConfig

    @property
    def tensors(self) -> Collection[str]:
        """The names of all tensors."""

    def read(self, keys: list[str]) -> Iterable[tuple[str, Tensor]]:
        """Tensors by name, on any device, one after another."""


def write_artifact(
    folder: Path,
    source: Source,
    variant: str,
    precision: PrecisionPolicy,
    keep_bf16: KeepBf16,
    sources: dict[str, dict[str, object]],
    report: OnBytes = lambda stage, done, of: None,
) -> None:
    """Write the weights and, last, the manifest into an empty folder, as `convert` describes.

    sources: size and hash of every file that the weights came from.
    """
    layout = _layout(source.config, precision, keep_bf16)
    files = _write_shards(folder, source, layout, report)
    manifest = {
        "format": artifacts.FORMAT,
        "format_version": artifacts.FORMAT_VERSION,
        "variant": variant,
        "architecture": dataclasses.asdict(source.config),
        "precision": precision,
        "keep_bf16": keep_bf16 if isinstance(keep_bf16, str) else list(keep_bf16),
        "files": files,
        "sources": sources,
        "magihuman": version(),
        "torch": torch.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / artifacts.MANIFEST_NAME, manifest)


def _layout(
    config: DiTConfig, precision: PrecisionPolicy, keep_bf16: KeepBf16
) -> dict[str, Stored]:
    """Every tensor of an artifact in this precision."""
    if precision.narrow is None:
        return artifacts.layout(config, ())
    return artifacts.layout(config, linears_in_8_bits(config, keep_bf16), precision.narrow)


class _Source:
    """A transformer of a model's directory, its names and shapes checked."""

    def __init__(self, root: Path, variant: Variant) -> None:
        place = layouts.in_model(root, variant)
        if place is None:
            raise CheckpointError(
                f"model must be a directory that holds {variant.name}, got {root}"
            )
        if artifacts.is_artifact(place):
            raise CheckpointError(
                f"{place} must hold the published files, got an artifact, converted before"
            )
        place = layouts.nested(place, variant)
        tensors = checkpoint.scan(place)
        held = layouts.split(tensors, str(place))
        if held.scales:
            raise CheckpointError(
                f"{place} must hold weights in bf16 or fp32, got fp8, which would be rounded again;"
                " load it as it is, or convert the published files"
            )
        self.config, self.tensors = checkpoint.dit_config(place, variant), held.weights
        checkpoint.sketched(self.config, self.tensors, str(place))
        self.files = sorted({info.file for info in tensors.values()})

    def read(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, mapped; each file is opened once."""
        with ExitStack() as opened:
            shards = {
                file: opened.enter_context(checkpoint.open_shard(file))
                for file in {self.tensors[key].file for key in keys}
            }
            for key in keys:
                yield key, shards[self.tensors[key].file].get_tensor(key)


def _write_shards(
    folder: Path, source: Source, layout: dict[str, Stored], report: OnBytes
) -> dict[str, int]:
    """Write the weights to files of at most `SHARD_BYTES`, and return their names and bytes."""
    shards = _grouped(source, layout)
    total, done = sum(stored.size_bytes for stored in layout.values()), 0
    files: dict[str, int] = {}
    for i, keys in enumerate(shards, 1):
        state: dict[str, Tensor] = {}
        for key, value in source.read(keys):
            state.update(_stored(key, value, layout))
        file = folder / f"weights-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(state, file, metadata={"format": "pt"})
        sync(file)
        files[file.name] = file.stat().st_size
        done += sum(value.nbytes for value in state.values())
        report("convert", done, total)
    return files


def _grouped(source: Source, layout: dict[str, Stored]) -> list[list[str]]:
    """Published names by file, in the order of the model; a scale goes with its weight."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key in (key for key in layout if key in source.tensors):
        scale = layout.get(key.removesuffix(".weight") + SCALE)
        size = layout[key].size_bytes + (scale.size_bytes if scale else 0)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _stored(key: str, value: Tensor, layout: dict[str, Stored]) -> dict[str, Tensor]:
    """A published tensor as an artifact has it, with its scale where it has one."""
    stored, scale_key = layout[key], key.removesuffix(".weight") + SCALE
    if scale_key in layout:
        values, scale = quantize(value.to(torch.bfloat16), stored.dtype)
        rows = values.as_strided(stored.shape, values.stride())  # the padding too
        return {key: rows, scale_key: scale}
    laid_out = value.new_zeros(stored.shape, dtype=stored.dtype)
    laid_out[..., : value.shape[-1]] = value
    return {key: laid_out}
