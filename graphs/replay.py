"""CUDA graphs of the compiled forward, one per shape, replayed for prompts of any length that fits.

Text is last in the sequence, so a prompt is padded to a bucket and the kernels read the number of
valid tokens from device memory: padded rows are computed and never read by valid ones.

Only one graph runs at a time, so all share one memory pool. Before a new size would pass the budget
(`budget.py`), the least recently used graphs go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from magihuman.graphs.addresses import addresses, check_addresses
from magihuman.graphs.budget import Budget
from magihuman.graphs.compile import Report, compile_forward, example_inputs, pad_weights
from magihuman.graphs.passes.context import Context
from magihuman.graphs.recorded import Recorded, recorded
from magihuman.kernels.reference import Counts, LocalAttention

log = logging.getLogger("magihuman")

TEXT_BUCKET = 64  # text is padded to a multiple of this
FREE_SHARE = 0.25  # of the memory that is free beside the weights, for the graphs of one model
DRIVER_BYTES = 16 * 2**20  # assumed of each graph, since the driver does not say what it keeps


class Size(NamedTuple):
    """What a graph is captured for: tokens of each modality, text with the padding of its bucket,
    and the shape of frame-local attention, where there are such layers.
    """

    counts: Counts
    local: LocalAttention | None


@dataclass
class _Captured:
    """A graph with its fixed inputs and outputs."""

    graph: torch.cuda.CUDAGraph
    module: fx.GraphModule  # holds the constants that the graph reads
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, Tensor]
    report: Report
    addresses: dict[str, int] = field(default_factory=dict)  # only where they are checked


class CompiledForward:
    """Stands in for `DiT.forward` on a GPU: compiles and captures a shape when it is first seen.

    The outputs are the caller's to keep. Not safe to call from several threads at once.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8_attention: bool = False,
        budget_bytes: int | None = None,
        debug: bool = False,
    ) -> None:
        """Model: a DiT, whose weights are laid out anew in place.

        fp8_attention: in the layers whose projection to q, k and v is quantised.
        budget_bytes: of all captured graphs; by default a quarter of the memory free now. One graph
        is kept even where it passes the budget alone. debug: check before every replay that no
        tensor has moved, and keep what was captured for `recorded`.
        """
        pad_weights(model, config)
        self._model, self._config = model, config
        self._dtype, self._device = dtype, device
        self._fp8_attention, self._debug = fp8_attention, debug
        self._captured: dict[Size, _Captured] = {}
        if budget_bytes is None:
            budget_bytes = int(FREE_SHARE * free_bytes(device))
        self._budget = Budget[Size](budget_bytes)
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
        """Arguments and results are those of `DiT.forward`.

        Raises:
            torch.OutOfMemoryError: a new size has no room, even with every other graph given up.
            MovedError: in debug, a weight, input or output is not where it was when captured.
        """
        captured = self.prepare(video.shape[0], audio.shape[0], text.shape[0], local)
        if self._debug:
            check_addresses(captured.addresses, self._tensors(captured.inputs, captured.outputs))
        fixed = captured.inputs
        fixed["video"].copy_(video)
        fixed["audio"].copy_(audio)
        fixed["text"][: text.shape[0]].copy_(text)
        fixed["rope"][: rope.shape[0]].copy_(rope)
        fixed["length"].fill_(rope.shape[0])
        captured.graph.replay()
        v_video, v_audio = captured.outputs
        return v_video.clone(), v_audio.clone()

    def prepare(
        self, video: int, audio: int, text: int, local: LocalAttention | None = None
    ) -> _Captured:
        """The graph for so many tokens of each modality, made now if need be."""
        size = Size((video, audio, -(-text // TEXT_BUCKET) * TEXT_BUCKET), local)
        if size not in self._captured:
            self._add(size)
        self._budget.use(size)
        return self._captured[size]

    def reports(self) -> dict[Size, Report]:
        """What compiling did, for each shape kept."""
        return {size: captured.report for size, captured in self._captured.items()}

    def recorded(self, video: int, audio: int, text: int) -> Recorded:
        """The nodes of the graph for so many tokens of each modality, in debug only."""
        if not self._debug:
            raise ValueError("what was captured is kept in debug only; give debug=True")
        return recorded(self.prepare(video, audio, text).graph)

    def _add(self, size: Size) -> None:
        """Capture a size, giving up others where it has no room beside them."""
        context = Context(self._config, size.counts, self._dtype, torch.device("meta"))
        inputs = example_inputs(context).values()
        own_bytes = DRIVER_BYTES + sum(tensor.nbytes for tensor in inputs)
        self._give_up(self._budget.make_room(context.tokens, own_bytes))
        captured = None
        while captured is None:
            try:
                captured = self._capture(size)
            except torch.OutOfMemoryError as error:
                if not self._captured:
                    raise torch.OutOfMemoryError(
                        f"{self._device} has no room to capture {context.tokens} tokens, with no"
                        f" other size captured; ask for fewer, or free memory: {error}"
                    ) from error
            if captured is None:  # outside the handler, whose error holds what was allocated
                self._give_up(self._budget.clear())
        self._captured[size] = captured
        self._budget.keep(size, context.tokens, own_bytes, pool_bytes(self._pool))

    def _give_up(self, sizes: Iterable[Size]) -> None:
        for size in sizes:
            log.info("gave up the graph of %s tokens to save memory", size.counts)
            del self._captured[size]
        if not self._captured:
            self._pool = None  # PyTorch refuses a pool whose last graph is gone
            torch.cuda.empty_cache()

    def _capture(self, size: Size) -> _Captured:
        counts = size.counts
        module, report = compile_forward(
            self._model,
            self._config,
            counts,
            self._dtype,
            self._device,
            fp8_attention=self._fp8_attention,
            local=size.local,
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
            graph = torch.cuda.CUDAGraph(keep_graph=self._debug)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                outputs = module(*inputs.values())
        self._pool = graph.pool()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        report.seconds["graph"] = time.perf_counter() - start
        log.info("compiled %s tokens in %.1f s", counts, sum(report.seconds.values()))
        captured = _Captured(graph, module, inputs, (outputs[0], outputs[1]), report)
        if self._debug:
            captured.addresses = addresses(self._tensors(inputs, captured.outputs))
        return captured

    def _tensors(
        self, inputs: dict[str, Tensor], outputs: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Everything whose address a graph holds and somebody else could change, by name."""
        return {
            **{f"input {name}": tensor for name, tensor in inputs.items()},
            **{f"output {i}": tensor for i, tensor in enumerate(outputs)},
            **{f"weight {name}": tensor for name, tensor in self._model.named_parameters()},
            **{f"buffer {name}": tensor for name, tensor in self._model.named_buffers()},
        }


def free_bytes(device: torch.device) -> int:
    """What can still be allocated: the device's free memory and PyTorch's unused blocks."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def pool_bytes(pool: Any) -> int:
    """What a memory pool holds of the device, free blocks included."""
    segments = torch.cuda.memory_snapshot()
    return sum(part["total_size"] for part in segments if part["segment_pool_id"] == pool)
