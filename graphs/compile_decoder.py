"""The window decoder of the Turbo VAE, captured and rewritten to fused operators."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from magihuman.graphs.capture import capture
from magihuman.graphs.compile import CompileError, Report
from magihuman.graphs.passes import joins
from magihuman.graphs.passes.decoder import DecoderContext, pad_before, passes_for

TRACE_SIZE = (3, 4, 6)  # any will do: nothing of it is left in the graph
# Channels out and in of convolutions that cuDNN computes 5 to 10 % faster over padded videos than
# where it pads by itself. Measured on H100; others lose by it.
FASTER_PADDED = {(64, 64), (64, 128), (128, 256)}


def is_faster_padded(weight: torch.Size) -> bool:
    """Whether zeros written before a convolution pay, by the shape of its weight."""
    return (weight[0], weight[1]) in FASTER_PADDED and weight[2:].numel() == 27


def compile_decoder(
    decoder: nn.Module,
    config: Any,
    first_window: bool,
    dtype: torch.dtype = torch.uint8,
    *,
    padded: Callable[[torch.Size], bool] = is_faster_padded,
) -> tuple[fx.GraphModule, Report]:
    """The decoder of one kind of window, for latents of any size, in fused operators.

    Args:
        decoder: with the signature of `magihuman.runtime.model.turbo_vae.Decoder.forward`. Its
            weights are copied, each into the layout in which it is read.
        config: its architecture.
        first_window: whether the graph is for a clip's first window.
        dtype: of the pixels: uint8, or a float dtype for values as the decoder's own.
        padded: whether a convolution, by the shape of its weight, is to find the zeros around each
            frame written by the operator before it.

    Returns:
        A module that takes latents [B, 48, T, H, W] in `channels_last_3d` and gives pixels [B,
        frames, 16 H, 16 W, 3], and the report.

    Raises:
        CaptureError: the forward is not one graph.
        CompileError: a pass found more or fewer places than the architecture has.
    """
    report = Report()
    start = time.perf_counter()
    parameter = next(decoder.parameters())
    context = DecoderContext(config, TRACE_SIZE, first_window, parameter.dtype, parameter.device)
    module = capture(decoder, {"x": context.latents}, first_window=first_window)
    report.seconds["capture"] = time.perf_counter() - start
    report.nodes_before = len(module.graph.nodes)
    for name, run, expected in passes_for(context):
        start = time.perf_counter()
        report.matches[name] = found = run(module, context, dtype)
        report.seconds[name] = time.perf_counter() - start
        if found != expected:
            raise CompileError(
                f"the pass {name} must find {expected} places in the video decoder, found {found};"
                " the model and kernels/reference.py have drifted apart"
            )
    report.matches["joins"] = joins.run(module)
    report.matches["padded before"] = pad_before(module, padded)
    module.graph.eliminate_dead_code()
    module.recompile()
    module.delete_all_unused_submodules()
    report.nodes_after = len(module.graph.nodes)
    return module, report
