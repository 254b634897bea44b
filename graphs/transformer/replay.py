"""CUDA graphs of the compiled forward, one per shape, replayed for prompts of any length that fits.

Text is last in the sequence, so a prompt is padded to a bucket and the kernels read the number of
valid tokens from device memory: padded rows are computed and never read by valid ones.

`cuda_graphs` says which are kept. Where memory is short nothing is captured: a captured graph keeps
its activations and wants its weights where they were.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from magihuman.graphs.cuda_graphs import (
    Captures,
    Recorded,
    addresses,
    bucket_of,
    check_addresses,
    recorded,
)
from magihuman.graphs.rewrite import CompileError, CompileReport
from magihuman.graphs.transformer.compile import compile_forward, example_inputs, pad_weights
from magihuman.graphs.transformer.layer_hooks import call_before_layers
from magihuman.graphs.transformer.options import ReplayOptions
from magihuman.graphs.transformer.passes import embedded_text
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels.parallel import exchange
from magihuman.kernels.reference import Counts, LocalAttention, Sharding

log = logging.getLogger("magihuman")

UNCAPTURED = 16  # sizes of which the rewritten graph is kept where none is captured
# Tokens from which a forward without a graph takes seconds, against which it costs nothing to get
# memory anew, and gigabytes for a tensor.
LARGE = 2**15


class Size(NamedTuple):
    """What a graph is captured for: tokens of each modality, text with the padding of its bucket
    and of equal shares, and the shape of frame-local attention, where there are such layers.
    """

    modality_rows: Counts
    local: LocalAttention | None


@dataclass
class _Captured:
    """A graph with its fixed inputs and outputs."""

    graph: torch.cuda.CUDAGraph
    module: fx.GraphModule  # holds the constants that the graph reads
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, Tensor]
    report: CompileReport
    shares: tuple[slice, slice, slice]  # rows of each modality that this process computes
    addresses: dict[str, int] = field(default_factory=dict)  # only where they are checked


class CompiledForward:
    """Stands in for `DiT.forward` on a GPU: compiles and captures a shape when it is first seen.

    `embed_text` and `from_embedded` are its two steps, for those who run many steps of one prompt.

    The outputs are the caller's to keep. Not safe to call from several threads at once.

    Where several processes share a sequence, all call it with the same arguments, in the same
    order, and each gets the velocities of its own rows. `prepare` waits for none of the others.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        options: ReplayOptions | None = None,
    ) -> None:
        """Nothing is compiled or captured yet.

        Args:
            model: a DiT on the device, whose weights are laid out anew in place.
            config: its architecture.
            dtype: of the linears inside its blocks.
            device: that it is on.
            options: by default those of `ReplayOptions`.
        """
        pad_weights(model, config)
        self._model, self._config = model, config
        self._dtype, self._device = dtype, device
        self._options = options = options or ReplayOptions()
        self._captures = Captures[Size, _Captured](device, options.budget_bytes, options.capturing)
        self._capturing = options.capturing or nullcontext()
        self._uncaptured: dict[Size, tuple[fx.GraphModule, CompileReport]] = {}

    def __call__(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        rope: Tensor,
        local: LocalAttention | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results are those of `DiT.forward`.

        Raises as `from_embedded` does.
        """
        return self.from_embedded(video, audio, self.embed_text(text), rope, local)

    @torch.inference_mode()
    def embed_text(self, text: Tensor) -> Tensor:
        """What `from_embedded` takes for text [Nt, C] fp32: [Nt, hidden] fp32."""
        return embedded_text.embed(self._model, text)

    def from_embedded(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        rope: Tensor,
        local: LocalAttention | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The forward behind the embedder of text.

        Arguments and results are those of `DiT.forward`, but text is what `embed_text` returns.

        Raises:
            torch.OutOfMemoryError: a new size has no room, even with every other graph given up.
            MovedError: in debug, a weight, input or output is not where it was when captured.
        """
        if not self._options.replays:
            return self._launch(video, audio, text, rope, local)
        captured = self._kept(self._size(video.shape[0], audio.shape[0], text.shape[0], local))
        if self._options.debug:
            check_addresses(captured.addresses, self._tensors(captured.inputs, captured.outputs))
        fixed = captured.inputs
        streams = {"video": video, "audio": audio, "text": text}
        for (name, stream), share in zip(streams.items(), captured.shares, strict=True):
            rows = stream[share]  # of text fewer than there is room for
            fixed[name][: rows.shape[0]].copy_(rows)
        fixed["rope"][: rope.shape[0]].copy_(rope)
        fixed["length"].fill_(rope.shape[0])
        captured.graph.replay()
        v_video, v_audio = captured.outputs
        return v_video.clone(), v_audio.clone()

    def prepare(
        self, video: int, audio: int, text: int, local: LocalAttention | None = None
    ) -> None:
        """Make the graph for so many tokens of each modality, if need be."""
        size = self._size(video, audio, text, local)
        if self._options.replays:
            self._kept(size)
        else:
            self._rewritten(size)

    def _kept(self, size: Size) -> _Captured:
        """The captured graph of a size, made now if need be."""
        if size not in self._captures.kept:
            context = self._context(size, torch.device("meta"))
            own_bytes = sum(tensor.nbytes for tensor in _inputs(context).values())
            self._captures.add(
                size,
                context.tokens,
                own_bytes,
                lambda: self._capture(size),
                f"{context.tokens} tokens",
            )
        return self._captures.use(size)

    def _size(self, video: int, audio: int, text: int, local: LocalAttention | None = None) -> Size:
        return Size(self.sharding(video, audio, text).counts, local)

    def sharding(self, video: int, audio: int, text: int) -> Sharding:
        """How so many tokens of each modality are padded and shared."""
        padded = (video, audio, bucket_of(text))
        return Sharding.of(padded, self._options.ranks)

    def reports(self) -> dict[Size, CompileReport]:
        """What compiling did, for each shape kept."""
        if not self._options.replays:
            return {size: report for size, (_, report) in self._uncaptured.items()}
        return {size: captured.report for size, captured in self._captures.kept.items()}

    def recorded(self, video: int, audio: int, text: int) -> Recorded:
        """The nodes of the graph for so many tokens of each modality, in debug only."""
        if not self._options.debug:
            raise ValueError("what was captured is kept in debug only; give debug=True")
        return recorded(self._kept(self._size(video, audio, text)).graph)

    def release(self) -> None:
        """Give every graph up; sizes are captured again when they are asked for."""
        self._captures.release()

    def _launch(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        rope: Tensor,
        local: LocalAttention | None,
    ) -> tuple[Tensor, Tensor]:
        """The rewritten graph without capturing it: its activations are freed as it goes."""
        size = self._size(video.shape[0], audio.shape[0], text.shape[0], local)
        module = self._rewritten(size)
        padding = (0, 0, 0, size.modality_rows[2] - text.shape[0])
        shares = Sharding(size.modality_rows, self._options.ranks).own(self._options.rank)
        streams = (video, audio, F.pad(text, padding))
        length = torch.tensor(rope.shape[0], dtype=torch.int32, device=self._device)
        with torch.inference_mode():
            v_video, v_audio = module(
                *(stream[rows].contiguous() for stream, rows in zip(streams, shares, strict=True)),
                F.pad(rope, padding),
                length,
            )
        if sum(size.modality_rows) >= LARGE and self._device.type == "cuda":
            # Or small tensors that live on would be cut from the blocks of the large ones.
            torch.cuda.empty_cache()
        return v_video, v_audio

    def _rewritten(self, size: Size) -> fx.GraphModule:
        """The graph of a size that is not captured, made now if need be."""
        if size not in self._uncaptured:
            with self._capturing:
                if self._device.type == "cuda":  # weights that still come would disturb timings
                    torch.cuda.synchronize(self._device)
                module, report = self._compile(size)
            if self._options.before_layer is not None:
                call_before_layers(module, self._config.num_layers, self._options.before_layer)
            if self._options.ranks > 1:
                # Kernels compile, and memory is found, before others are waited for.
                with torch.inference_mode(), exchange.apart():
                    module(*self._zeros(size).values())
            while len(self._uncaptured) >= UNCAPTURED:
                del self._uncaptured[next(iter(self._uncaptured))]
            self._uncaptured[size] = module, report
        return self._uncaptured[size][0]

    def _zeros(self, size: Size) -> dict[str, Tensor]:
        """Inputs of the graph of a size, all tokens of it valid."""
        context = self._context(size, self._device)
        inputs = {name: torch.zeros_like(tensor) for name, tensor in _inputs(context).items()}
        inputs["length"].fill_(sum(context.attended_rows))
        return inputs

    def _compile(self, size: Size) -> tuple[fx.GraphModule, CompileReport]:
        context = self._context(size, self._device)
        module, report = compile_forward(self._model, context, self._options)
        if embedded_text.run(module) != 1:
            raise CompileError(
                f"text must go into {embedded_text.EMBEDDER} and nowhere else, for its embedding"
                " to be computed once a prompt; mend passes/embedded_text.py"
            )
        return module, report

    def _capture(self, size: Size) -> _Captured:
        module, report = self._compile(size)
        start = time.perf_counter()
        inputs = self._zeros(size)

        def warm_up() -> None:
            with exchange.apart():
                for _ in range(2):
                    module(*inputs.values())

        graph, outputs = self._captures.record(
            warm_up, lambda: module(*inputs.values()), keep_graph=self._options.debug
        )
        report.seconds["graph"] = time.perf_counter() - start
        log.info("compiled %s tokens in %.1f s", size.modality_rows, sum(report.seconds.values()))
        shares = Sharding(size.modality_rows, self._options.ranks).own(self._options.rank)
        captured = _Captured(graph, module, inputs, (outputs[0], outputs[1]), report, shares)
        if self._options.debug:
            captured.addresses = addresses(self._tensors(inputs, captured.outputs))
        return captured

    def _context(self, size: Size, device: torch.device) -> Context:
        ranks = self._options.ranks
        sharding = Sharding(size.modality_rows, ranks)
        return Context(
            self._config,
            sharding.own_counts(self._options.rank),
            self._dtype,
            device,
            size.local,
            sharding if ranks > 1 else None,
        )

    def _tensors(
        self, inputs: dict[str, Tensor], outputs: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """By name, all tensors whose address a graph holds and somebody else could change."""
        return {
            **{f"input {name}": tensor for name, tensor in inputs.items()},
            **{f"output {i}": tensor for i, tensor in enumerate(outputs)},
            **{f"weight {name}": tensor for name, tensor in self._model.named_parameters()},
            **{f"buffer {name}": tensor for name, tensor in self._model.named_buffers()},
        }


def _inputs(context: Context) -> dict[str, Tensor]:
    """Tensors of the shapes that a graph takes, once the embedder of text has left it."""
    return example_inputs(context) | {
        "text": context.example(context.modality_rows[2], context.hidden)
    }
