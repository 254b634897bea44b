"""CUDA graphs of the compiled forward, one per shape, replayed for prompts of any length that fits.

Text is last in the sequence, so a prompt is padded to a bucket and the kernels read the number of
valid tokens from device memory: padded rows are computed and never read by valid ones.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from magihuman.graphs.compile import Report, compile_forward, example_inputs, pad_weights
from magihuman.graphs.passes.context import Context
from magihuman.kernels.reference import Counts, LocalAttention

log = logging.getLogger("magihuman")

TEXT_BUCKET = 64  # text is padded to a multiple of this
MAX_GRAPHS = 8  # shapes kept; the least recently used goes first


@dataclass
class _Captured:
    """A graph with its fixed inputs and outputs."""

    graph: torch.cuda.CUDAGraph
    module: fx.GraphModule
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, Tensor]
    report: Report


class CompiledForward:
    """Stands in for `DiT.forward` on a GPU: compiles and captures a shape when it is first seen.

    The outputs are the caller's to keep. Not safe to call from several threads at once.
    """

    def __init__(
        self, model: nn.Module, config: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Model: a DiT without frame-local layers, whose weights are laid out anew in place."""
        pad_weights(model, config)
        self._model, self._config = model, config
        self._dtype, self._device = dtype, device
        self._captured: OrderedDict[Counts, _Captured] = OrderedDict()
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)

    def __call__(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        rope: Tensor,
        local: LocalAttention | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results are those of `DiT.forward`."""
        if local is not None:
            raise ValueError("frame-local attention is not compiled; call the model itself")
        captured = self.prepare(video.shape[0], audio.shape[0], text.shape[0])
        fixed = captured.inputs
        fixed["video"].copy_(video)
        fixed["audio"].copy_(audio)
        fixed["text"][: text.shape[0]].copy_(text)
        fixed["rope"][: rope.shape[0]].copy_(rope)
        fixed["length"].fill_(rope.shape[0])
        captured.graph.replay()
        v_video, v_audio = captured.outputs
        return v_video.clone(), v_audio.clone()

    def prepare(self, video: int, audio: int, text: int) -> _Captured:
        """The graph for so many tokens of each modality, made now if need be."""
        counts = (video, audio, -(-text // TEXT_BUCKET) * TEXT_BUCKET)
        found = self._captured.get(counts)
        if found is None:
            while len(self._captured) >= MAX_GRAPHS:
                self._captured.popitem(last=False)
            found = self._captured[counts] = self._capture(counts)
        self._captured.move_to_end(counts)
        return found

    def reports(self) -> dict[Counts, Report]:
        """What compiling did, for each shape kept."""
        return {counts: captured.report for counts, captured in self._captured.items()}

    def _capture(self, counts: Counts) -> _Captured:
        module, report = compile_forward(
            self._model, self._config, counts, self._dtype, self._device
        )
        start = time.perf_counter()
        context = Context(self._config, counts, self._dtype, self._device)
        inputs = {name: torch.zeros_like(t) for name, t in example_inputs(context).items()}
        inputs["length"].fill_(context.tokens)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels compile and libraries choose before anything is recorded
                module(*inputs.values())
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                outputs = module(*inputs.values())
        self._pool = graph.pool()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        report.seconds["graph"] = time.perf_counter() - start
        log.info("compiled %s tokens in %.1f s", counts, sum(report.seconds.values()))
        return _Captured(graph, module, inputs, (outputs[0], outputs[1]), report)
