"""What a band of the picture does not need is not computed.

`kernels/decoder/bands.py` says what that is: far pixels are cut off before each upsample, and those
beside the band before the pixels are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from magihuman.graphs.rewrite import arguments, with_arguments
from magihuman.kernels.decoder import ops as decoder_ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels.decoder.bands import Range

OPS = torch.ops.magihuman


def crop(module: fx.GraphModule, axis: int, kept: Sequence[Range]) -> fx.GraphModule:
    """The window decoder, changed in place to go on with those parts of the picture alone.

    Args:
        module: as `trim` makes it, for the latents of a band.
        axis: of a video [B, C, T, H, W].
        kept: as `bands.cuts` has them: for each upsample in order, and for the pixels.

    Raises:
        ValueError: there are more or fewer parts than places.
    """
    places = [
        node
        for node in module.graph.nodes
        if node.target in (OPS.join_frames.default, OPS.join_pixels.default)
    ]
    for node, part in zip(places, kept, strict=True):
        for name in ("x", "delta"):
            video = arguments(node).get(name)
            if video is not None:
                with_arguments(node, **{name: _cut(module.graph, node, video, axis, part)})
    module.graph.lint()
    module.recompile()
    return module


def _cut(graph: fx.Graph, before: fx.Node, video: fx.Node, axis: int, part: Range) -> fx.Node:
    """Part of a video, in the layout that operators take."""
    aten = torch.ops.aten
    with graph.inserting_before(before):
        piece = graph.call_function(aten.slice.Tensor, (video, axis, part.begin, part.end))
        return graph.call_function(
            aten.clone.default, (piece,), {"memory_format": torch.channels_last_3d}
        )
