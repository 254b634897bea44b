"""Exported graphs and engines against the plain decoder, each on one input of every kind.

The measure is ||a - b|| / ||b||, b being the plain decoder in fp32 with the exported weights. A
graph passes within 1e-4 of it or, where it rounds to 16 bits, within 20 roundings of its dtype: the
plain decoder in fp16 and bf16 is about 10 off, with random weights.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from magihuman.export.onnx import Sound, Window
from magihuman.runtime.config import LATENT_MEAN, LATENT_STD
from magihuman.runtime.errors import MagiHumanError
from magihuman.runtime.exported import (
    AUDIO_VAE,
    DTYPES,
    MANIFEST_NAME,
    OUTPUT,
    Exported,
    Graph,
    TensorRTVAE,
    check_sources,
    device_sm,
    read_manifest,
)
from magihuman.runtime.files import atomic_path, write_json
from magihuman.runtime.model import window_kinds
from magihuman.runtime.weights import AUDIO_FOLDER, TURBO_FOLDER, checkpoint, model_folder

EXACT = 1e-4  # two libraries that sum in fp32, in different orders, through some forty layers
ROUNDINGS = 20
CPU = torch.device("cpu")

OnGraph = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Figure:
    """How far one graph, or its engine, is from the plain decoder."""

    file: str
    shape: tuple[int, ...]  # of the latents
    arithmetic: str
    error: float
    limit: float

    @property
    def is_ok(self) -> bool:
        """Whether it is within its limit."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Verdict:
    """All figures, and why there are none of the engines, where there are none."""

    figures: tuple[Figure, ...]
    engines_not_run: str | None

    @property
    def is_ok(self) -> bool:
        """Whether all that was run is within its limits."""
        return all(figure.is_ok for figure in self.figures)


def verify(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str],
    on_step: OnGraph = lambda stage, done, of: None,
) -> Verdict:
    """Compare a folder with the model it is of, and write the figures into its manifest.

    ONNX runs on the CPU, in onnxruntime; engines where their GPU is at hand. A dynamic graph is run
    at its fewest and at its best size.

    Raises:
        CheckpointError: the folder is damaged, or comes from other weights.
    """
    exported, model = read_manifest(Path(folder)), model_folder(model)
    modules = _modules(exported, model)
    engines, reason = _engines(exported)
    device = torch.device("cpu" if device_sm() is None else "cuda")
    figures: list[Figure] = []
    for done, graph in enumerate(exported.graphs, 1):
        module = modules[graph.kind].to(device)
        for latents in _inputs(graph, exported):
            exact = _run(module, latents.to(device, torch.float32))
            figures.append(_onnx_figure(exported, graph, latents, exact))
            if engines is not None:
                decoded = _decoded(engines, graph.kind, latents)
                error, limit = _error(decoded, exact), _limit(exported.dtype)
                shape = tuple(latents.shape)
                figures.append(
                    Figure(str(graph.engine), shape, _name(exported.dtype), error, limit)
                )
        on_step("verify", done, len(exported.graphs))
    verdict = Verdict(tuple(figures), reason)
    _record(exported.folder, verdict)
    return verdict


def _modules(exported: Exported, model: Path) -> dict[str, Window | Sound]:
    """Return the plain decoder of each kind, in fp32, with weights rounded as those exported."""
    if exported.decoder == AUDIO_VAE:
        place = model / AUDIO_FOLDER
        check_sources(exported, [place / "model_config.json", place / checkpoint.SINGLE_NAME])
        return {"sound": Sound(checkpoint.load_audio_vae(place, CPU))}
    place = model / TURBO_FOLDER
    check_sources(exported, list(checkpoint.turbo_vae_files(place)))
    decoder = checkpoint.load_turbo_vae(place, CPU, exported.dtype).float().decoder
    assert exported.config is not None
    return {k: Window(decoder, w.is_first) for k, w in window_kinds(exported.config).items()}


def _engines(exported: Exported) -> tuple[TensorRTVAE | None, str | None]:
    """Return the engines, loaded, or why they are not run here."""
    if exported.builder is None:
        return None, None
    try:
        return TensorRTVAE(exported, torch.device("cuda" if device_sm() else "cpu")), None
    except MagiHumanError as error:
        return None, str(error)


def _inputs(graph: Graph, exported: Exported) -> Iterator[Tensor]:
    """Yield latents as the decoder gets them, in the graph's dtype: fewest, then best if other."""
    generator = torch.Generator().manual_seed(0)
    sizes = {tuple(dims[i] for dims in graph.dims.values()) for i in (0, 1)}
    for size in sorted(sizes):
        if exported.decoder == AUDIO_VAE:
            channels = onnx.load(exported.folder / graph.onnx, load_external_data=False)
            width = channels.graph.input[0].type.tensor_type.shape.dim[1].dim_value
            yield torch.randn(1, width, *size, generator=generator)
            continue
        z = torch.randn(1, len(LATENT_MEAN), *size, generator=generator)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
        yield (z * std + mean).to(exported.dtype)


def _onnx_figure(exported: Exported, graph: Graph, latents: Tensor, exact: Tensor) -> Figure:
    """Run one graph in onnxruntime on the CPU, which has no bf16 convolution: such a graph is
    widened, so that its structure and weights are checked, and not its rounding.
    """
    model = onnx.load(exported.folder / graph.onnx)
    name, limit = _name(exported.dtype), _limit(exported.dtype)
    if exported.dtype == torch.bfloat16:
        widen(model)
        latents, limit, name = latents.float(), EXACT, "bf16 as fp32"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: latents.numpy()}
    decoded = torch.from_numpy(session.run([OUTPUT], feed)[0])
    return Figure(graph.onnx, tuple(latents.shape), name, _error(decoded, exact), limit)


def _decoded(engines: TensorRTVAE, kind: str, latents: Tensor) -> Tensor:
    window = window_kinds(engines.config)[kind]
    engine = engines.bound(window.is_first, tuple(latents.shape))
    engine.input.copy_(latents)
    engine.run()
    return engine.output


def _limit(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float32 else ROUNDINGS * torch.finfo(dtype).eps / 2


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def widen(model: onnx.ModelProto) -> None:
    """Make fp32 of all that is bf16 in a graph."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                is_bf16 = attribute.i == TensorProto.BFLOAT16
                attribute.i = TensorProto.FLOAT if is_bf16 else attribute.i
            if attribute.t.data_type == TensorProto.BFLOAT16:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values))


@torch.inference_mode()
def _run(module: Window | Sound, latents: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # 11 bits are not fp32
        out: Tensor = module(latents)
    return out


def _error(decoded: Tensor, exact: Tensor) -> float:
    exact = exact.cpu().double()
    return float((decoded.cpu().double() - exact).norm() / exact.norm())


def _record(folder: Path, verdict: Verdict) -> None:
    """Write the figures into the manifest, whose other fields stay."""
    path = folder / MANIFEST_NAME
    values = checkpoint.read_json(path)
    values["verified"] = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "onnxruntime": onnxruntime.__version__,
        "engines_not_run": verdict.engines_not_run,
        "figures": [{**dataclasses.asdict(f), "ok": f.is_ok} for f in verdict.figures],
    }
    with atomic_path(path) as temporary:
        write_json(temporary, values)
