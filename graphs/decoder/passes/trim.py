"""Frames of a window that nobody asked for are not computed.

A window is decoded with a latent of context on each side, and a clip's last one with repeats of its
last latent; the frames of both are thrown away. Convolutions reach one frame to each side, so what
is kept needs more frames the further one goes back, and the latents whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from magihuman.graphs.rewrite import arguments, with_arguments
from magihuman.kernels.decoder import ops as decoder_ops  # noqa: F401 - registers torch.ops.magihuman

OPS = torch.ops.magihuman
NORMS = OPS.join_norm.default, OPS.join_norm_.default
TIME = 2  # dimension of a video's frames


@dataclass(frozen=True)
class Range:
    """Frames begin .. end of all that a node would have."""

    begin: int
    end: int

    def join(self, other: Range | None) -> Range:
        """The least range with both."""
        if other is None:
            return self
        return Range(min(self.begin, other.begin), max(self.end, other.end))


def trim(module: fx.GraphModule, latents: int, skip: int, frames: int) -> fx.GraphModule:
    """The window decoder for so many latents that gives `frames` frames after the first `skip`.

    Args:
        module: as `compile_decoder` makes it, for any size; shares its weights with the result.
        latents: frames of its input.
        skip, frames: what is kept of the frames that it would give.

    Raises:
        ValueError: it does not give so many frames.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copied)
    graph.output(result)
    trimmed = fx.GraphModule(module, graph)
    _Trim(trimmed, latents).run(Range(skip, skip + frames))
    trimmed.graph.lint()
    trimmed.recompile()
    return trimmed


@dataclass
class _Trim:
    """What is known of the nodes of one graph while it is trimmed, in place."""

    module: fx.GraphModule
    latents: int
    full: dict[fx.Node, int] = field(default_factory=dict)  # frames without trimming
    needed: dict[fx.Node, Range] = field(default_factory=dict)
    computed: dict[fx.Node, Range] = field(default_factory=dict)
    replaced: dict[fx.Node, Range] = field(default_factory=dict)  # by a norm, and read afterwards

    def run(self, kept: Range) -> None:
        nodes = list(self.module.graph.nodes)
        for node in nodes:
            self.count(node)
        (pixels,) = (node for node in nodes if node.target is OPS.join_pixels.default)
        if not 0 <= kept.begin < kept.end <= self.full[pixels]:
            raise ValueError(
                f"frames kept must lie in the {self.full[pixels]} of {self.latents} latents, got"
                f" {kept.begin} .. {kept.end}"
            )
        self.needed[pixels] = kept
        for node in reversed(nodes):
            if node.target is OPS.join_norm_.default:
                x = arguments(node)["x"]
                if x in self.needed:
                    self.replaced[node] = self.needed[x]
            if node in self.needed:
                self.require(node, self.needed[node])
        for node in nodes:
            if node in self.needed:
                self.rewrite(node)

    def count(self, node: fx.Node) -> None:
        """Note how many frames the node has without trimming."""
        if node.op == "placeholder":
            self.full[node] = self.latents
        elif node.op == "call_function":
            x = arguments(node)["x"]
            if node.target is OPS.conv.default:
                self.full[node] = self.full[x] - self.reach(node)
            elif node.target is OPS.join_frames.default:
                self.full[node] = parts(node) * self.full[x] - arguments(node)["drop"]
            elif node.target in NORMS:
                self.full[node] = self.full[x] + sum(pads(node))
            else:
                self.full[node] = self.full[x]

    def reach(self, conv: fx.Node) -> int:
        """Frames of its input that a convolution's result is shorter by."""
        weight = arguments(conv)["weight"]
        return int(self.module.get_buffer(str(weight.target)).shape[TIME]) - 1

    def require(self, node: fx.Node, out: Range) -> None:
        """Note what `out` of the node needs of its inputs."""
        if node.op != "call_function":
            return
        given = arguments(node)
        sources = [given["x"]]
        if node.target is OPS.conv.default:
            out = Range(out.begin, out.end + self.reach(node))
        elif node.target is OPS.join_frames.default:
            drop = given["drop"]
            out = Range((out.begin + drop) // parts(node), -(-(out.end + drop) // parts(node)))
            sources.append(given["delta"])
        elif node.target in NORMS:
            out = self.read(node)
            sources.append(given["delta"])
        for source in sources:
            if source is not None:
                self.needed[source] = out.join(self.needed.get(source))

    def read(self, norm: fx.Node) -> Range:
        """What a norm reads of its input: what is needed of its result, and of what replaces x."""
        x = arguments(norm)["x"]
        before, _ = pads(norm)
        last, out = self.full[x], self.needed[norm]
        begin = min(max(out.begin - before, 0), last - 1)
        read = Range(begin, max(min(out.end - before, last), begin + 1))
        return read.join(self.replaced.get(norm))

    def rewrite(self, node: fx.Node) -> None:
        """Let the node read what it needs, and note which frames it computes of that."""
        needed = self.needed[node]
        if node.op == "placeholder":
            self.computed[node] = Range(0, self.latents)
        elif node.target is OPS.conv.default:  # over all there is: a part would have to be copied
            x = arguments(node)["x"]
            self.computed[node] = Range(
                self.computed[x].begin, self.computed[x].end - self.reach(node)
            )
        elif node.target is OPS.join_pixels.default:
            self.cut(node, "x", needed)
            self.computed[node] = needed
        elif node.target in NORMS:
            read = self.read(node)
            x = arguments(node)["x"]
            before, after = pads(node)
            self.cut(node, "x", read)
            self.cut(node, "delta", read)
            begin = 0 if read.begin == 0 else read.begin + before
            before, after = before * (read.begin == 0), after * (read.end == self.full[x])
            with_arguments(node, before=before, after=after)
            self.computed[node] = Range(begin, begin + before + read.end - read.begin + after)
        elif node.target is OPS.join_frames.default:
            drop = arguments(node)["drop"]
            begin, end = needed.begin + drop, needed.end + drop  # before frames are dropped
            read = Range(begin // parts(node), -(-end // parts(node)))
            self.cut(node, "x", read)
            self.cut(node, "delta", read)
            if read.begin:
                with_arguments(node, drop=0)
            self.computed[node] = Range(
                max(parts(node) * read.begin - drop, 0), parts(node) * read.end - drop
            )

    def cut(self, node: fx.Node, name: str, read: Range) -> None:
        """Let the argument of this name be those frames alone."""
        x = arguments(node)[name]
        if x is None or self.computed[x] == read:
            return
        begin = read.begin - self.computed[x].begin
        with self.module.graph.inserting_before(node):
            part = self.module.graph.call_function(
                torch.ops.aten.slice.Tensor, (x, TIME, begin, begin + read.end - read.begin)
            )
        with_arguments(node, **{name: part})


def pads(norm: fx.Node) -> tuple[int, int]:
    """Frames that `join_norm` repeats at the start and at the end."""
    given = arguments(norm)
    return given["before"], given["after"]


def parts(upsample: fx.Node) -> int:
    """Frames that `join_frames` makes of one."""
    return 2 if arguments(upsample)["in_time"] else 1
