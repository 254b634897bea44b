"""The window decoder of the Turbo VAE, captured and rewritten to fused operators."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import fx, nn

from magihuman.graphs.decoder.passes import joins
from magihuman.graphs.decoder.passes.blocks import DecoderContext, passes_for
from magihuman.graphs.rewrite import CompileError, CompileReport
from magihuman.graphs.trace import capture

TRACE_SIZE = (3, 4, 6)  # any will do: nothing of it is left in the graph


def compile_decoder(
    decoder: nn.Module,
    config: Any,
    first_window: bool,
    dtype: torch.dtype = torch.uint8,
) -> tuple[fx.GraphModule, CompileReport]:
    """The decoder of one kind of window, for latents of any size, in fused operators.

    Args:
        decoder: with the signature of `magihuman.runtime.model.turbo_vae.Decoder.forward`. Its
            weights are copied, each into the layout in which it is read.
        config: its architecture.
        first_window: whether the graph is for a clip's first window.
        dtype: of the pixels: uint8, or a float dtype for values as the decoder's own.

    Returns:
        A module that takes latents [B, 48, T, H, W] in `channels_last_3d` and gives a tuple of one,
        pixels [B, frames, 16 H, 16 W, 3], and the report.

    Raises:
        CaptureError: the forward is not one graph.
        CompileError: a pass found more or fewer places than the architecture has.
        JoinError: an addition is not one of a residual block.
    """
    report = CompileReport()
    start = time.perf_counter()
    parameter = next(decoder.parameters())
    context = DecoderContext(config, TRACE_SIZE, first_window, parameter.dtype, parameter.device)
    module = capture(decoder, {"x": context.latents}, first_window=first_window)
    report.seconds["capture"] = time.perf_counter() - start
    report.nodes_before = len(module.graph.nodes)
    for name, run, expected in passes_for(context):
        start = time.perf_counter()
        report.matches[name] = matches = run(module, context, dtype)
        report.seconds[name] = time.perf_counter() - start
        if matches != expected:
            raise CompileError(
                f"the pass {name} must find {expected} places in the video decoder, found"
                f" {matches}; the model and kernels/decoder/reference.py have drifted apart"
            )
    report.matches["joins"] = joins.run(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    module.delete_all_unused_submodules()
    report.nodes_after = len(module.graph.nodes)
    return module, report
