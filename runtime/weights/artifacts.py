"""Converted transformers: a folder of weights laid out for loading, and the manifest beside them.

The folder takes the place of a published one. Its tensors have the published names, block linears
in bf16 or, with `.weight_scale` beside them, in 8 bits; rows are padded as the kernels want them.
So loading copies bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from magihuman.graphs.quantization import KeepBf16, linears, quantized_linears
from magihuman.kernels.reference import padded_width
from magihuman.runtime.config import DiTConfig
from magihuman.runtime.errors import CheckpointError, shown
from magihuman.runtime.model import DiT
from magihuman.runtime.weights import checkpoint, layouts
from magihuman.runtime.weights.precision import PrecisionPolicy
from magihuman.runtime.weights.reading import LONGEST_REASON, exists, is_file, is_file_name

MANIFEST_NAME = "manifest.json"
FORMAT = "magihuman transformer"
FORMAT_VERSION = 1
PRECISIONS = (PrecisionPolicy.FP8, PrecisionPolicy.INT8, PrecisionPolicy.BF16)  # that are written
SCALE = ".weight_scale"
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
LONGEST_PATTERN = 100
AGAIN = "convert the published files again"


@dataclass(frozen=True)
class Artifact:
    """A converted transformer whose manifest has been read and whose files are there."""

    folder: Path
    config: DiTConfig
    precision: PrecisionPolicy
    quantized: tuple[str, ...]  # linears in 8 bits
    files: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds a manifest in place of published files."""
    others = (checkpoint.INDEX_NAME, checkpoint.SINGLE_NAME, layouts.CONFIG_NAME)
    return is_file(folder / MANIFEST_NAME) and not any(exists(folder / n) for n in others)


def layout(
    config: DiTConfig, quantized: Collection[str], narrow: torch.dtype = torch.float8_e4m3fn
) -> dict[str, Stored]:
    """Every tensor of an artifact, in the order of the model; narrow: of the linears quantised."""
    with torch.device("meta"):
        state = DiT(config).state_dict()
    stored: dict[str, Stored] = {}
    for key, value in state.items():
        shape, dtype = tuple(value.shape), value.dtype
        name = key.removesuffix(".weight")
        if name in quantized:
            stored[name + SCALE] = Stored(shape[:1], torch.float32)
            dtype = narrow
        if name in quantized or name.endswith("down_proj"):
            shape = (shape[0], padded_width(shape[1]))
        stored[key] = Stored(shape, dtype)
    return stored


def read_manifest(folder: Path, variant: str) -> Artifact:
    """What an artifact holds, or a `CheckpointError` that says why it cannot serve as `variant`."""
    path = folder / MANIFEST_NAME
    values = checkpoint.read_json(path)
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must be of the format {FORMAT!r}, got {shown(values.get('format'))}; it"
            " belongs to something else"
        )
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} must be of format version {FORMAT_VERSION}, got"
            f" {shown(values.get('format_version'))}; {AGAIN} with this version"
        )
    if values.get("variant") != variant:
        raise CheckpointError(
            f"{path} must be of the variant {variant!r}, got {shown(values.get('variant'))}"
        )
    config = _architecture(values.get("architecture"), path)
    precision, keep_bf16 = values.get("precision"), values.get("keep_bf16")
    if precision not in PRECISIONS or not _is_kept(keep_bf16, config):
        raise CheckpointError(
            f"{path} must have a precision of {' or '.join(PRECISIONS)} and a keep_bf16, got"
            f" {shown(precision)} and {shown(keep_bf16)}; {AGAIN}"
        )
    policy = PrecisionPolicy(precision)
    quantized: tuple[str, ...] = ()
    if policy.narrow is not None:
        try:
            quantized = tuple(quantized_linears(config, cast(KeepBf16, keep_bf16)))
        except ValueError as error:
            raise CheckpointError(f"{path}: {str(error)[:LONGEST_REASON]}; {AGAIN}") from error
    files = _files(values.get("files"), path)
    return Artifact(folder, config, policy, quantized, files)


def scan(artifact: Artifact) -> dict[str, checkpoint.TensorInfo]:
    """Every tensor, from headers alone; raises unless they are those of the manifest."""
    tensors = checkpoint.scan_files(artifact.folder / name for name in artifact.files)
    if artifact.config.num_layers > len(tensors):
        raise CheckpointError(
            f"{artifact.folder} does not fit its manifest: num_layers is"
            f" {artifact.config.num_layers}, and its files hold {len(tensors)} tensors"
        )
    narrow = artifact.precision.narrow or torch.float8_e4m3fn
    expected = layout(artifact.config, artifact.quantized, narrow)
    checkpoint.check_shapes(
        {key: info.shape for key, info in tensors.items()},
        {key: stored.shape for key, stored in expected.items()},
        str(artifact.folder),
    )
    for key, info in tensors.items():
        if DTYPES.get(info.dtype) != expected[key].dtype:
            raise CheckpointError(
                f"{artifact.folder}: {key} must be {expected[key].dtype}, got {info.dtype}; {AGAIN}"
            )
    return tensors


def load(
    artifact: Artifact,
    device: torch.device,
    on_read: checkpoint.OnRead = lambda done, total: None,
) -> DiT:
    """The DiT on the device, as it is on disk. Shards are mapped and copied tensor by tensor."""
    tensors = scan(artifact)
    with torch.device("meta"):
        model = DiT(artifact.config)  # whose tensors the files have
    total, done = sum(info.size_bytes for info in tensors.values()), 0
    for name in artifact.files:
        with checkpoint.open_shard(artifact.folder / name) as shard:
            for key in shard.keys():  # noqa: SIM118 - not a mapping
                _place(model, key, shard.get_tensor(key).to(device, copy=True))
                done += tensors[key].size_bytes
                on_read(done, total)
    return checkpoint.frozen(model)


def _place(model: nn.Module, key: str, value: Tensor) -> None:
    """Put a stored tensor where the model has it, of the model's width."""
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    if key.endswith(SCALE):
        owner.register_buffer(name, value)
    elif name in owner._buffers:
        setattr(owner, name, value)
    else:
        width = owner.get_parameter(name).shape[-1]
        setattr(owner, name, nn.Parameter(value[..., :width], requires_grad=False))


def _is_kept(value: object, config: DiTConfig) -> bool:
    """Whether this can be the `keep_bf16` of a manifest: a word, or patterns, few and short."""
    patterns = value if isinstance(value, list) else [value]
    return len(patterns) <= len(linears(config)) and all(
        isinstance(pattern, str) and len(pattern) <= LONGEST_PATTERN for pattern in patterns
    )


def _architecture(values: object, path: Path) -> DiTConfig:
    """All fields have to be there: a default of today may not have been one when it was written."""
    fields = [field.name for field in dataclasses.fields(DiTConfig)]
    lacking = [name for name in fields if not isinstance(values, dict) or name not in values]
    if lacking:
        raise CheckpointError(f"{path}: architecture must have {', '.join(lacking)}; {AGAIN}")
    return DiTConfig.from_dict(cast(dict[str, object], values), f"{path}, architecture")


def _files(values: Any, path: Path) -> tuple[str, ...]:
    """Names of the weight files, each of which is there at its full size."""
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{path} must have files, names to sizes in bytes; {AGAIN}")
    for name, size in values.items():
        if not is_file_name(name) or type(size) is not int:
            raise CheckpointError(
                f"{path}: files must be names in the same folder with their bytes, got"
                f" {shown(name)}: {shown(size)}; {AGAIN}"
            )
        file = path.parent / name
        if not is_file(file):
            raise CheckpointError(f"{file} is missing; copy the folder whole, or {AGAIN}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} must have {size} bytes, got {file.stat().st_size}; copy the folder whole,"
                f" or {AGAIN}"
            )
    return tuple(values)
