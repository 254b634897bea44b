"""The split of the last rows by modality and the norms before the heads become one kernel.

The rows of each modality are then an argument with a name, which `compile.specialize` knows them
by.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from magihuman.graphs.rewrite import call, replace
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import head_norm  # noqa: F401 - registers torch.ops.magihuman.head_norm
from magihuman.kernels import reference as ref


def run(module: fx.GraphModule, context: Context) -> int:
    """Replace the one split that is left once the operators of the blocks have taken in the others,
    and the two norms of its rows. Text ends here.
    """

    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        x, video_weight, audio_weight = inputs
        pair = call(
            graph,
            torch.ops.magihuman.head_norm.default,
            x=x,
            video_weight=video_weight,
            audio_weight=audio_weight,
            modality_rows=list(context.modality_rows),
        )
        return [graph.call_function(operator.getitem, (pair, i)) for i in range(2)]

    module.graph.eliminate_dead_code()  # or the rows of text would be a result that is missed
    return replace(
        module,
        lambda x, video, audio: ref.head_norm(x, video, audio, context.modality_rows),
        (
            context.example(context.tokens, context.hidden),
            context.example(context.hidden),
            context.example(context.hidden),
        ),
        build,
    )
