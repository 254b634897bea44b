"""Decoders to ONNX: one graph a kind of window, its weights in a file that all graphs share.

A graph has its dtype inside: weights, activations, input and output are of one, and only the mean
in each norm is fp32. So a strongly typed TensorRT network takes it as it is.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import set_external_data
from onnxscript import opset20 as op
from onnxscript import optimizer
from torch import Tensor, nn

from magihuman.runtime.exported import INPUT, OUTPUT, Dims
from magihuman.runtime.model import Decoder, Oobleck

OPSET = 20
WEIGHTS_NAME = "weights.bin"
INLINE_BYTES = 1024  # smaller constants stay in the graph
PAGE = 4096  # tensors start on one, so that readers can map the file


class Window(nn.Module):
    """The decoder over one kind of window: [1, 48, t, H, W] -> [1, 3, frames, 16 H, 16 W]."""

    axes = {"height": 3, "width": 4}

    def __init__(self, decoder: Decoder, is_first: bool) -> None:
        super().__init__()
        self.decoder, self.is_first = decoder, is_first

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.decoder(latents, self.is_first)
        return out


class Sound(nn.Module):
    """The audio decoder: [1, 64, A] -> [1, 2, 2048 A], at 51.2 kHz."""

    axes = {"latents": 2}

    def __init__(self, model: Oobleck) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.decoder(latents)
        return out


class SharedWeights:
    """The one file that holds the large tensors of several graphs, each once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / WEIGHTS_NAME
        self._places: dict[str, int] = {}

    def move(self, model: onnx.ModelProto) -> None:
        """Take the large tensors out of a graph, and leave their places in the file there."""
        with self._path.open("ab") as file:
            for tensor in model.graph.initializer:
                content = tensor.raw_data
                if len(content) < INLINE_BYTES:
                    continue
                digest = hashlib.sha256(content).hexdigest()
                if digest not in self._places:
                    file.write(bytes(-file.tell() % PAGE))
                    self._places[digest] = file.tell()
                    file.write(content)
                set_external_data(tensor, WEIGHTS_NAME, self._places[digest], len(content))
                tensor.ClearField("raw_data")


def write_onnx(
    module: Window | Sound, example: Tensor, dims: Mapping[str, Dims], path: Path, to: SharedWeights
) -> None:
    """Write one graph beside its weights, and have ONNX check it.

    example: an input of the best size. dims: fewest, best and most of each axis by name; one whose
    fewest and most differ is dynamic, under that name.
    """
    dynamic = {
        axis: torch.export.Dim(name, min=dims[name][0], max=dims[name][2])
        for name, axis in module.axes.items()
        if dims[name][0] != dims[name][2]
    }
    with quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=(dynamic,) if dynamic else None,
            custom_translation_table={torch.ops.aten._upsample_nearest_exact2d.vec: _twice},
            optimize=False,  # its pattern rules take as long as all else and find nothing here
            verbose=False,
        )
    assert program is not None
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    model = program.model_proto
    for item in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        item.ClearField("metadata_props")  # traces of the machine it was made on
    to.move(model)
    onnx.save(model, path)
    onnx.checker.check_model(path)


def _twice(x: Any, size: Any, scales: Any) -> Any:
    """Write nearest-exact at a factor of two in rows and columns, the decoder's only use, as plain
    repetition, which all readers of ONNX agree on.
    """
    factors = op.Constant(value_floats=[1.0, 1.0, *scales])
    return op.Resize(
        x,
        None,
        factors,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence torch.onnx's remarks on packages that are not there and on its internals."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
