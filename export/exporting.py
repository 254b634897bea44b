"""Published decoder in, folder of graphs or engines out: whole, or nothing at all."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from magihuman.export.onnx import OPSET, SharedWeights, Sound, Window, write_onnx
from magihuman.export.sizes import Size
from magihuman.export.tensorrt import build_engine, builder_for
from magihuman.runtime.config import LATENT_MEAN, LATENT_STD
from magihuman.runtime.errors import InvalidRequestError, OutputError, one_of
from magihuman.runtime.exported import (
    AUDIO_VAE,
    DTYPES,
    MANIFEST_NAME,
    TURBO_VAE,
    Builder,
    Dims,
    Graph,
)
from magihuman.runtime.exported import manifest as exported
from magihuman.runtime.files import (
    OnBytes,
    atomic_folder,
    check_new_folder,
    hashed,
    sync,
    version,
    write_json,
)
from magihuman.runtime.model import TurboVAE, window_kinds
from magihuman.runtime.weights import AUDIO_FOLDER, TURBO_FOLDER, checkpoint, model_folder

SIZES = ("480x256",)
CPU = torch.device("cpu")
SOUND_LATENTS = (1, 126, 1501)  # up to 60 s; 5 s best
WORKSPACE_BYTES = 8 * 2**30
PACKAGES = ("torch", "onnx", "onnxscript")

OnGraph = Callable[[str, int, int], None]  # (stage, steps done, of how many)
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class VaeExport:
    """What the Turbo VAE decoder is written as.

    Attributes:
        target: "onnx" or "tensorrt".
        sizes: of the clips, in pixels, as "480x256", or a range as "256x256:480x256:896x512".
        sm: compute capability the engines are for, as 89; by default that of the GPU at hand.
        dtype: of weights and activations: "bf16", "fp16" or "fp32".
        workspace_bytes: of GPU memory a layer of an engine may use beside its activations.

    Raises:
        InvalidRequestError: a value is not one of those above.
    """

    target: str = "onnx"
    sizes: Sequence[str] = SIZES
    sm: int | None = None
    dtype: str = "bf16"
    workspace_bytes: int = WORKSPACE_BYTES

    def __post_init__(self) -> None:
        one_of("target", self.target, exported.TARGETS)
        one_of("dtype", self.dtype, tuple(DTYPES))
        if self.sm is not None and self.target != "tensorrt":
            raise InvalidRequestError(
                f"sm must go with target='tensorrt', got {self.sm} with {self.target!r}"
            )
        sizes = self.parsed_sizes()
        if not sizes or len(set(sizes)) < len(sizes):
            raise InvalidRequestError(
                f"sizes must be named, each once, got {', '.join(self.sizes) or 'none'}"
            )

    def parsed_sizes(self) -> list[Size]:
        """The sizes in latent rows and columns."""
        return [Size.parse(size) for size in self.sizes]


def export_vae(
    model: PathLike,
    folder: PathLike,
    options: VaeExport | None = None,
    *,
    on_step: OnGraph = lambda stage, done, of: None,
    on_hash: OnBytes = lambda stage, done, of: None,
) -> Path:
    """Write the Turbo VAE decoder of a model as graphs, or engines beside them.

    Args:
        model: a directory with the published folders, or "nano".
        folder: to make; must not exist. It appears whole or not at all.
        options: what to write; by default ONNX in bf16 for clips of 480x256.
        on_step, on_hash: called with (stage, done, of).

    Raises:
        CheckpointError: a published file is missing, damaged, or does not fit.
        DeviceError: no TensorRT here makes such engines.
        BuildError: TensorRT refused a graph.
        OutputError: the folder cannot be written; nothing is left of it.
    """
    options = options or VaeExport()
    builder = builder_for(options.sm) if options.target == "tensorrt" else None
    place = model_folder(model) / TURBO_FOLDER
    files = checkpoint.turbo_vae_files(place)
    out = Path(folder).absolute()
    check_new_folder(out, files[1].stat().st_size)
    with _written(out) as temporary:
        sources = hashed(files, on_hash)
        vae = checkpoint.load_turbo_vae(place, CPU, DTYPES[options.dtype])
        sizes = options.parsed_sizes()
        graphs = _windows(vae, sizes, temporary, lambda done, of: on_step("onnx", done, of))
        if builder is not None:
            channels, batch = (vae.config.latent_channels,) * 3, (1, 1, 1)
            workspace = options.workspace_bytes
            graphs = [
                _with_engine(graph, (batch, channels), builder, workspace, temporary, on_step)
                for graph in graphs
            ]
        facts = _vae_facts(vae, options.dtype, builder)
        _write_manifest(temporary, TURBO_VAE, options.target, facts, graphs, sources)
    return out


def _vae_facts(vae: TurboVAE, dtype: str, builder: Builder | None) -> dict[str, object]:
    """Return what the manifest says of the decoder, and of what has built its engines."""
    facts: dict[str, object] = {"dtype": dtype, "architecture": dataclasses.asdict(vae.config)}
    if builder is not None:
        facts["builder"] = dataclasses.asdict(builder)
    for name, values in (("latent_mean", LATENT_MEAN), ("latent_std", LATENT_STD)):
        facts[name] = torch.tensor(values, dtype=DTYPES[dtype]).tolist()
    return facts


def export_audio(
    model: PathLike,
    folder: PathLike,
    *,
    on_step: OnGraph = lambda stage, done, of: None,
    on_hash: OnBytes = lambda stage, done, of: None,
) -> Path:
    """Write the audio decoder of a model as one ONNX graph in fp32, for clips of up to 60 s.

    Its input is [1, 64, A], its output [1, 2, 2048 A] at 51.2 kHz. Arguments and errors are those
    of `export_vae`.
    """
    place = model_folder(model) / AUDIO_FOLDER
    files = [place / "model_config.json", place / checkpoint.SINGLE_NAME]
    out = Path(folder).absolute()
    config = checkpoint.oobleck_config(files[0])
    check_new_folder(out, 0)
    with _written(out) as temporary:
        decoder = checkpoint.load_audio_vae(place, CPU)
        sources = hashed(files, on_hash)
        dims = {"latents": SOUND_LATENTS}
        example = torch.zeros(1, config.latent_channels, SOUND_LATENTS[1])
        write_onnx(
            Sound(decoder), example, dims, temporary / "sound.onnx", SharedWeights(temporary)
        )
        on_step("onnx", 1, 1)
        facts: dict[str, object] = {"dtype": "fp32", "architecture": dataclasses.asdict(config)}
        graphs = [Graph("sound", dims, "sound.onnx")]
        _write_manifest(temporary, AUDIO_VAE, "onnx", facts, graphs, sources)
    return out


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """Do as `atomic_folder` does, and raise `OutputError` where the disk fails."""
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{folder} could not be written: {error}; nothing is left of it"
        ) from error


def _windows(
    vae: TurboVAE, sizes: list[Size], folder: Path, on_step: Callable[[int, int], None]
) -> list[Graph]:
    """Write every kind of window at every size as ONNX."""
    weights, graphs = SharedWeights(folder), list[Graph]()
    kinds = window_kinds(vae.config)
    dtype = next(vae.parameters()).dtype
    for size in sizes:
        for kind, window in kinds.items():
            dims = {
                "latents": (window.latents,) * 3,
                "height": size.height,
                "width": size.width,
            }
            shape = (1, vae.config.latent_channels, *(best for _, best, _ in dims.values()))
            name = f"{kind}-{str(size).replace(':', '-')}.onnx"
            module = Window(vae.decoder, window.is_first)
            write_onnx(module, torch.zeros(shape, dtype=dtype), dims, folder / name, weights)
            graphs.append(Graph(kind, dims, name))
            on_step(len(graphs), len(sizes) * len(kinds))
    return graphs


def _with_engine(
    graph: Graph,
    leading: tuple[Dims, ...],
    builder: Builder,
    workspace_bytes: int,
    folder: Path,
    on_step: OnGraph,
) -> Graph:
    """Write the engine of a graph beside it, and return the graph with the engine's name."""
    name = Path(graph.onnx).stem
    shape = (*leading, *graph.dims.values())
    report = partial(on_step, f"engine {name}")
    content = build_engine(folder / graph.onnx, shape, builder, workspace_bytes, report)
    (folder / f"{name}.engine").write_bytes(content)
    return dataclasses.replace(graph, engine=f"{name}.engine")


def _write_manifest(
    folder: Path,
    decoder: str,
    target: str,
    facts: dict[str, object],
    graphs: list[Graph],
    sources: dict[str, dict[str, object]],
) -> None:
    """Write the manifest, once all other files are on disk, with their hashes."""
    files = sorted(folder.iterdir())
    for file in files:
        sync(file)
    manifest = {
        "format": exported.FORMAT,
        "format_version": exported.FORMAT_VERSION,
        "decoder": decoder,
        "target": target,
        **facts,
        "opset": OPSET,
        "graphs": [dataclasses.asdict(graph) for graph in graphs],
        "files": hashed(files),
        "sources": sources,
        "magihuman": version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / MANIFEST_NAME, manifest)
