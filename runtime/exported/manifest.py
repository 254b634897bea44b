"""Exported decoders: a folder of ONNX graphs or TensorRT engines, and the manifest beside them.

`magihuman export` writes one; `load` takes one with engines in place of the Turbo VAE's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from magihuman.runtime.config import VIDEO_STRIDE, TurboVAEConfig
from magihuman.runtime.errors import CheckpointError, InvalidRequestError, shown
from magihuman.runtime.files import hashed
from magihuman.runtime.model import window_kinds
from magihuman.runtime.weights import checkpoint, is_file, is_file_name

MANIFEST_NAME = "manifest.json"
FORMAT = "magihuman exported decoder"
FORMAT_VERSION = 1
TURBO_VAE, AUDIO_VAE = "turbo_vae", "audio_vae"
TARGETS = ("onnx", "tensorrt")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INPUT, OUTPUT = "latents", "decoded"  # of every graph
AGAIN = "export it again"
SHA256_LETTERS = 64

Dims = tuple[int, int, int]  # fewest, best, most


@dataclass(frozen=True)
class Builder:
    """What made engines: they run on nothing else."""

    flavour: str  # "tensorrt" or "tensorrt_rtx"
    version: str
    sm: int  # compute capability, as 89 for 8.9

    def __str__(self) -> str:
        return f"{self.flavour} {self.version} for sm_{self.sm}"


@dataclass(frozen=True)
class Graph:
    """One graph: a kind of window, and the latents [.., t, H, W] or [.., A] that it takes."""

    kind: str
    dims: dict[str, Dims]  # latents, height, width; of the sound, latents alone
    onnx: str
    engine: str | None = None

    @property
    def size(self) -> str:
        """The size of its clips in pixels, as "480x256", or "256x256 to 896x512"."""
        ends = (
            f"{self.dims['width'][i] * VIDEO_STRIDE[2]}x{self.dims['height'][i] * VIDEO_STRIDE[1]}"
            for i in (0, 2)
        )
        return " to ".join(dict.fromkeys(ends))

    def takes(self, **sizes: int) -> bool:
        """Whether it runs latents of these sizes; those not named are not asked about."""
        ends = {name: (self.dims[name][0], self.dims[name][2]) for name in sizes}
        return all(low <= sizes[name] <= high for name, (low, high) in ends.items())


@dataclass(frozen=True)
class Exported:
    """A folder whose manifest has been read and whose files are there, byte for byte."""

    folder: Path
    decoder: str
    target: str
    dtype: torch.dtype
    config: TurboVAEConfig | None  # of a Turbo VAE
    graphs: tuple[Graph, ...]
    sources: dict[str, object]
    builder: Builder | None  # of engines

    def check_size(self, rows: int, columns: int) -> None:
        """Raise `InvalidRequestError` for latents of a clip that no graph takes."""
        if not any(graph.takes(height=rows, width=columns) for graph in self.graphs):
            stride = VIDEO_STRIDE[1]
            raise InvalidRequestError(
                "width and height must be of an exported size,"
                f" {', '.join(sorted({graph.size for graph in self.graphs}))}, got"
                f" {columns * stride}x{rows * stride}; export that size too, or load the published"
                " decoder"
            )


def is_exported(folder: Path) -> bool:
    """Whether a folder holds a manifest in place of the published decoder."""
    return is_file(folder / MANIFEST_NAME) and not any(folder.glob("*.ckpt"))


def read_manifest(folder: Path) -> Exported:
    """What a folder holds, or a `CheckpointError` that says why it cannot be used."""
    path = folder / MANIFEST_NAME
    values = checkpoint.read_json(path)
    for name, wanted, remedy in (
        ("format", (FORMAT,), "it belongs to something else"),
        ("format_version", (FORMAT_VERSION,), f"{AGAIN} with this version"),
        ("decoder", (TURBO_VAE, AUDIO_VAE), AGAIN),
        ("target", TARGETS, AGAIN),
        ("dtype", tuple(DTYPES), AGAIN),
    ):
        if values.get(name) not in wanted:
            options = " or ".join(map(repr, wanted))
            raise CheckpointError(
                f"{path} must have {name} {options}, got {shown(values.get(name))}; {remedy}"
            )
    decoder, target = values["decoder"], values["target"]
    config = _architecture(values.get("architecture"), path) if decoder == TURBO_VAE else None
    builder = _builder(values.get("builder"), path) if target == "tensorrt" else None
    sources = values.get("sources")
    if not isinstance(sources, dict) or not sources:
        raise CheckpointError(f"{path} must have sources, the hashes of the weights; {AGAIN}")
    graphs = tuple(_graph(item, target, path) for item in _list(values.get("graphs"), path))
    if config is not None:
        _check_kinds(graphs, config, path)
    _check_files(values.get("files"), graphs, path)
    dtype = DTYPES[values["dtype"]]
    return Exported(folder, decoder, target, dtype, config, graphs, sources, builder)


def check_sources(exported: Exported, files: list[Path]) -> None:
    """Raise `CheckpointError` unless these are, byte for byte, the weights that were exported."""
    hashes = hashed(files)
    for name, facts in hashes.items():
        if exported.sources.get(name) != facts:
            raise CheckpointError(
                f"{exported.folder} must have been exported from {name} of SHA-256"
                f" {facts['sha256']}, got {_digest(exported.sources.get(name))}; {AGAIN} from"
                f" {files[0].parent}"
            )


def check_builder(exported: Exported, here: Builder) -> None:
    """Raise `CheckpointError` unless engines were made by, and for, what is here."""
    builder = exported.builder
    if builder is None:
        raise CheckpointError(
            f"{exported.folder} must hold TensorRT engines, got ONNX alone; export it with"
            " --target tensorrt"
        )
    for name, ours, theirs in (
        ("flavour of TensorRT", here.flavour, builder.flavour),
        ("version of TensorRT", here.version, builder.version),
        ("GPU", f"sm_{here.sm}", f"sm_{builder.sm}"),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"{exported.folder}: engines run only where they were made for; the {name} here is"
                f" {ours}, theirs {theirs}; {AGAIN} for {here}"
            )


def _digest(facts: object) -> str:
    digest = facts.get("sha256") if isinstance(facts, dict) else None
    return digest if isinstance(digest, str) and len(digest) == SHA256_LETTERS else shown(digest)


def _architecture(values: object, path: Path) -> TurboVAEConfig:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must have an architecture, got {shown(values)}; {AGAIN}")
    return TurboVAEConfig.from_dict(values, f"{path}, architecture")


def _builder(values: object, path: Path) -> Builder:
    kinds = {"flavour": str, "version": str, "sm": int}
    if not isinstance(values, dict) or {n: type(v) for n, v in values.items()} != kinds:
        raise CheckpointError(
            f"{path} must have a builder with flavour, version and sm, got {shown(values)}; {AGAIN}"
        )
    return Builder(**values)


def _list(values: object, path: Path) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise CheckpointError(f"{path} must have graphs, got {shown(values)}; {AGAIN}")
    return values


def _graph(values: object, target: str, path: Path) -> Graph:
    try:
        fields = dict(cast(dict[str, Any], values))
        dims = {name: tuple(sizes) for name, sizes in fields.pop("dims").items()}
        graph = Graph(dims=cast(dict[str, Dims], dims), **fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: a graph is not as expected, {error!r}; {AGAIN}") from error
    if not isinstance(graph.kind, str) or not is_file_name(graph.onnx):
        raise CheckpointError(
            f"{path}: a graph must have a kind and the name of a file, got {shown(graph.kind)} and"
            f" {shown(graph.onnx)}; {AGAIN}"
        )
    for name, sizes in dims.items():
        if [type(size) for size in sizes] != [int] * 3 or not 0 < sizes[0] <= sizes[1] <= sizes[2]:
            raise CheckpointError(
                f"{path}: {name} of {graph.onnx} must be fewest, best and most, got"
                f" {shown(list(sizes))}; {AGAIN}"
            )
    if (graph.engine is None) != (target == "onnx"):
        raise CheckpointError(
            f"{path}: {graph.onnx} must have an engine where the target is tensorrt, and only"
            f" there, got {shown(graph.engine)} with {target!r}; {AGAIN}"
        )
    if graph.engine is not None and not is_file_name(graph.engine):
        raise CheckpointError(
            f"{path}: an engine must be the name of a file, got {shown(graph.engine)}; {AGAIN}"
        )
    return graph


def _check_kinds(graphs: tuple[Graph, ...], config: TurboVAEConfig, path: Path) -> None:
    """Each kind of window has to be there at every size, with the latents of that kind."""
    latents = {kind: window.latents for kind, window in window_kinds(config).items()}
    for graph in graphs:
        if set(graph.dims) != {"latents", "height", "width"}:
            raise CheckpointError(
                f"{path}: {graph.onnx} must have latents, height and width, got"
                f" {', '.join(graph.dims)}; {AGAIN}"
            )
        if graph.dims["latents"] != (latents.get(graph.kind),) * 3:
            raise CheckpointError(
                f"{path}: windows must be of the kinds {latents}, got {shown(graph.kind)} of"
                f" {list(graph.dims['latents'])} latents; {AGAIN}"
            )
    sizes = {(graph.dims["height"], graph.dims["width"]) for graph in graphs}
    windows = [(graph.kind, graph.dims["height"], graph.dims["width"]) for graph in graphs]
    if sorted(windows) != sorted((kind, *size) for kind in latents for size in sizes):
        raise CheckpointError(
            f"{path} must have each of {', '.join(latents)} once for every size, got"
            f" {', '.join(kind for kind, _, _ in windows)}; {AGAIN}"
        )


def _check_files(values: object, graphs: tuple[Graph, ...], path: Path) -> None:
    """Every file lies beside the manifest with the bytes it was written with."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must have files, names to bytes and SHA-256; {AGAIN}")
    needed = {name for graph in graphs for name in (graph.onnx, graph.engine) if name is not None}
    for name in sorted({*values, *needed}):
        file, facts = path.parent / name, values.get(name)
        if not is_file_name(name) or not isinstance(facts, dict):
            raise CheckpointError(
                f"{path}: files must be names in the same folder with bytes and SHA-256, got"
                f" {shown(name)}: {shown(facts)}; {AGAIN}"
            )
        if not is_file(file):
            raise CheckpointError(f"{file} is missing; copy the folder whole, or {AGAIN}")
        size = file.stat().st_size
        if size != facts.get("bytes"):
            raise CheckpointError(
                f"{file} must have {shown(facts.get('bytes'))} bytes, got {size}; copy the folder"
                f" whole, or {AGAIN}"
            )
        if hashed([file])[name] != facts:
            raise CheckpointError(
                f"{file} must have the SHA-256 {_digest(facts)}, but its bytes have changed; copy"
                f" the folder whole, or {AGAIN}"
            )
