"""The largest magnitude among a window's values, from the graph that makes its bytes.

Bytes cannot show NaN, so it is read off what they are made of, by one reduction.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from magihuman.graphs.rewrite import arguments
from magihuman.kernels.decoder import ops as decoder_ops  # noqa: F401 - registers torch.ops.magihuman


def with_magnitude(module: fx.GraphModule) -> fx.GraphModule:
    """The window decoder, changed in place to give a second result beside the pixels.

    module: as `compile_decoder` or `trim` makes it. The second result is a scalar, fp32: the sum of
    the largest magnitudes of the last convolution's result, as far as frames are kept, and of its
    bias. It is finite where all values are, and NaN or infinite where one is.
    """
    graph = module.graph
    join = torch.ops.magihuman.join_pixels.default
    (pixels,) = (node for node in graph.nodes if node.target is join)
    given = arguments(pixels)
    with graph.inserting_after(pixels):
        norm = torch.ops.aten.linalg_vector_norm.default
        values = graph.call_function(norm, (given["x"], math.inf))
    with graph.inserting_after(values):
        bias = graph.call_function(norm, (given["bias"], math.inf))
    with graph.inserting_after(bias):
        total = graph.call_function(torch.ops.aten.add.Tensor, (bias, values))
    (result,) = (node for node in graph.nodes if node.op == "output")
    result.args = ((pixels, total),)
    graph.lint()
    module.recompile()
    return module
