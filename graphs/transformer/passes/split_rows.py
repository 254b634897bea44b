"""The split of the last rows by modality, before the heads, becomes an operator of its own.

It gives views, as before; but the rows of each modality are then an argument with a name, which
`compile.specialize` knows them by.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from magihuman.graphs.rewrite import call, replace
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman


def run(module: fx.GraphModule, context: Context) -> int:
    """Replace the one split that is left once the operators of the blocks have taken in the others.

    The heads read its video and audio; text ends here.
    """

    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        (x,) = inputs
        rows = list(context.modality_rows)
        parts = call(graph, torch.ops.magihuman.split_rows.default, x=x, modality_rows=rows)
        return [graph.call_function(operator.getitem, (parts, i)) for i in range(2)]

    module.graph.eliminate_dead_code()  # or the rows of text would be a result that is missed
    return replace(
        module,
        lambda x: x.split(context.modality_rows)[:2],
        (context.example(context.tokens, context.hidden),),
        build,
    )
