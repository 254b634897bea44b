"""Frames of a window that nobody asked for are not computed.

A window is decoded with a latent of context on each side, and a clip's last one with repeats of its
last latent; the frames of both are thrown away. Convolutions reach one frame to each side, so what
is kept needs more frames the further one goes back, and the latents whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

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
    made = fx.GraphModule(module, graph)
    _Trim(made, latents).run(Range(skip, skip + frames))
    made.graph.lint()
    made.recompile()
    return made


@dataclass
class _Trim:
    module: fx.GraphModule
    latents: int
    full: dict[fx.Node, int] = field(default_factory=dict)  # frames without trimming
    needed: dict[fx.Node, Range] = field(default_factory=dict)
    made: dict[fx.Node, Range] = field(default_factory=dict)
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
                x: Any = node.args[0]
                if x in self.needed:
                    self.replaced[node] = self.needed[x]
            if node in self.needed:
                self.require(node, self.needed[node])
        for node in nodes:
            if node in self.needed:
                self.rewrite(node)

    def count(self, node: fx.Node) -> None:
        """How many frames the node has without trimming."""
        if node.op == "placeholder":
            self.full[node] = self.latents
        elif node.op == "call_function":
            x: Any = node.args[0]
            if node.target is OPS.conv.default:
                self.full[node] = self.full[x] - self.reach(node)
            elif node.target is OPS.join_frames.default:
                self.full[node] = parts(node) * self.full[x] - int(node.args[4])  # type: ignore[arg-type]
            elif node.target in NORMS:
                self.full[node] = self.full[x] + sum(pads(node))
            else:
                self.full[node] = self.full[x]

    def reach(self, conv: fx.Node) -> int:
        """Frames of its input that a convolution's result is shorter by."""
        weight: Any = conv.args[1]
        return int(self.module.get_buffer(str(weight.target)).shape[TIME]) - 1

    def require(self, node: fx.Node, out: Range) -> None:
        """What `out` of the node needs of its inputs."""
        if node.op != "call_function":
            return
        x: Any = node.args[0]
        sources = [x]
        if node.target is OPS.conv.default:
            out = Range(out.begin, out.end + self.reach(node))
        elif node.target is OPS.join_frames.default:
            drop: Any = node.args[4]
            out = Range((out.begin + drop) // parts(node), -(-(out.end + drop) // parts(node)))
            sources.append(node.args[1])
        elif node.target in NORMS:
            out = self.read(node)
            sources.append(node.args[1])
        for source in sources:
            if source is not None:
                self.needed[source] = out.join(self.needed.get(source))

    def read(self, norm: fx.Node) -> Range:
        """What a norm reads of its input: what is needed of its result, and of what replaces x."""
        x: Any = norm.args[0]
        before, _ = pads(norm)
        last, out = self.full[x], self.needed[norm]
        begin = min(max(out.begin - before, 0), last - 1)
        read = Range(begin, max(min(out.end - before, last), begin + 1))
        return read.join(self.replaced.get(norm))

    def rewrite(self, node: fx.Node) -> None:
        """Let the node read what it needs, and note which frames it makes of that."""
        needed = self.needed[node]
        if node.op == "placeholder":
            self.made[node] = Range(0, self.latents)
        elif node.target is OPS.conv.default:  # over all there is: a part would have to be copied
            x: Any = node.args[0]
            self.made[node] = Range(self.made[x].begin, self.made[x].end - self.reach(node))
        elif node.target is OPS.join_pixels.default:
            self.cut(node, 0, needed)
            self.made[node] = needed
        elif node.target in NORMS:
            read = self.read(node)
            x = node.args[0]
            before, after = pads(node)
            self.cut(node, 0, read)
            self.cut(node, 1, read)
            begin = 0 if read.begin == 0 else read.begin + before
            before, after = before * (read.begin == 0), after * (read.end == self.full[x])
            node.update_arg(5, before)
            node.update_arg(6, after)
            self.made[node] = Range(begin, begin + before + read.end - read.begin + after)
        elif node.target is OPS.join_frames.default:
            drop: Any = node.args[4]
            begin, end = needed.begin + drop, needed.end + drop  # before frames are dropped
            read = Range(begin // parts(node), -(-end // parts(node)))
            self.cut(node, 0, read)
            self.cut(node, 1, read)
            if read.begin:
                node.update_arg(4, 0)
            self.made[node] = Range(
                max(parts(node) * read.begin - drop, 0), parts(node) * read.end - drop
            )

    def cut(self, node: fx.Node, index: int, read: Range) -> None:
        """Let an argument be those frames alone."""
        x: Any = node.args[index]
        if x is None or self.made[x] == read:
            return
        begin = read.begin - self.made[x].begin
        with self.module.graph.inserting_before(node):
            part = self.module.graph.call_function(
                torch.ops.aten.slice.Tensor, (x, TIME, begin, begin + read.end - read.begin)
            )
        node.update_arg(index, part)


def pads(norm: fx.Node) -> tuple[int, int]:
    """Frames that `join_norm` repeats at the start and at the end."""
    before, after = norm.args[5:7]
    assert isinstance(before, int) and isinstance(after, int)
    return before, after


def parts(upsample: fx.Node) -> int:
    """Frames that `join_frames` makes of one."""
    return 2 if upsample.args[3] else 1
