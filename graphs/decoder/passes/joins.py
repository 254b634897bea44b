"""Biases of convolutions and residual additions move into the operator that reads their sum.

A sum that only one operator reads is never stored. One that a residual addition needs again, or of
which a shortcut needs another norm, replaces one of its terms in the operator that normalises it;
where it is a convolution's result and a bias, not even that: the addition takes the two again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from magihuman.graphs.rewrite import arguments, call, with_arguments
from magihuman.kernels.decoder import ops as decoder_ops  # noqa: F401 - registers torch.ops.magihuman

OPS = torch.ops.magihuman
ADD = torch.ops.aten.add.Tensor
VIDEOS = ("x", "delta")  # operands that are videos
Operands = dict[str, fx.Node | None]  # x, delta and bias of the operators that read a sum
PHASE_TAPS = 2  # along a row, of a convolution by phases; others have 3, or 1


class JoinError(RuntimeError):
    """The graph has an addition that is not one of a residual block."""


@dataclass(frozen=True)
class Sum:
    """Videos and biases whose sum a node of the graph stands for."""

    videos: tuple[fx.Node, ...]
    biases: tuple[str, ...] = ()


def run(module: fx.GraphModule) -> int:
    """Returns the number of additions, of biases and of residuals, that are gone."""
    return _Joins(module).run()


class _Joins:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.sums: dict[fx.Node, Sum] = {}
        self.biases: dict[tuple[str, ...], str] = {}
        self.normed: set[fx.Node] = set()  # norms already replaced

    def run(self) -> int:
        gone = [node for node in self.graph.nodes if node.target in (ADD, OPS.add_bias.default)]
        for node in list(self.graph.nodes):
            if node.target is OPS.add_bias.default:
                given = arguments(node)
                self.sums[node] = Sum((given["x"],), (str(given["bias"].target),))
            elif node.target is ADD:
                left, right = (self.sum_of(argument) for argument in node.args)
                self.sums[node] = Sum(left.videos + right.videos, left.biases + right.biases)
            elif node.target is OPS.join_norm.default and node not in self.normed:
                self.norms(node)
            elif node.target is OPS.join_frames.default:
                operands = self.in_place(self.operands(node, arguments(node)["x"]))
                with_arguments(node, **operands)
            elif node.target is OPS.join_pixels.default:
                operands = self.in_place(self.operands(node, arguments(node)["x"]))
                with_arguments(node, x=operands["x"], bias=operands["bias"])
        for node in reversed(gone):
            self.graph.erase_node(node)
        self.graph.lint()
        return len(gone)

    def sum_of(self, node: Any) -> Sum:
        return self.sums.get(node, Sum((node,)))

    def norms(self, node: fx.Node) -> None:
        """All norms of the sum that `node` reads become one operator."""
        x = arguments(node)["x"]
        readers = [user for user in x.users if user.target is OPS.join_norm.default]
        self.normed.update(readers)
        shortcuts = [user for user in readers if is_shortcut(user)]
        mains = [user for user in readers if user not in shortcuts]
        is_kept = len(self.sum_of(x).videos) > 1 and any(user.target is ADD for user in x.users)
        if len(mains) != 1 or len(shortcuts) + is_kept > 1:
            raise JoinError(f"{x} must be normed once, and once for a shortcut, got {readers}")
        (main,) = mains
        operands = self.operands(node, x)
        video = operands["x"]
        assert video is not None
        phases = [is_by_phases(self.module, operands[name]) for name in VIDEOS]
        if (is_kept or shortcuts) and (len(video.users) > 1 or phases[0]):
            raise JoinError(f"{video} must be read once and in place to be replaced")
        given = arguments(main)
        norm = {name: given[name] for name in ("eps", "activation", "before", "after")}
        with self.graph.inserting_before(node):
            if is_kept or shortcuts:
                other_eps = arguments(shortcuts[0])["eps"] if shortcuts else None
                target, norm = OPS.join_norm_.default, {**norm, "other_eps": other_eps}
            else:
                target = OPS.join_norm.default
            joined = call(self.graph, target, **operands, **norm, phases=phases)
        for old, new in ((main, joined), *((shortcut, video) for shortcut in shortcuts)):
            old.replace_all_uses_with(new)
            self.graph.erase_node(old)
        if is_kept:
            self.sums[x] = Sum((video,))

    def in_place(self, operands: Operands) -> Operands:
        """The operands of an operator that takes no videos by phases."""
        for name in VIDEOS:
            if is_by_phases(self.module, operands[name]):
                raise JoinError(
                    f"{operands[name]} must be read by a norm, since its pixels are by phases"
                )
        return operands

    def operands(self, node: fx.Node, x: Any) -> Operands:
        """The video, another to add to it and the bias of a sum, as arguments of `node`."""
        total = self.sum_of(x)
        if len(total.videos) > 2:
            raise JoinError(f"{x} must be a sum of two videos at most, got {total.videos}")
        delta = total.videos[1] if len(total.videos) > 1 else None
        with self.graph.inserting_before(node):
            bias = self.graph.get_attr(self.bias(total.biases)) if total.biases else None
        return {"x": total.videos[0], "delta": delta, "bias": bias}

    def bias(self, names: tuple[str, ...]) -> str:
        """The attribute that holds the sum of these biases, made now if need be."""
        if names not in self.biases:
            values: list[Tensor] = [self.module.get_buffer(name) for name in names]
            self.biases[names] = f"joined_bias_{len(self.biases)}"
            total = torch.stack(values).sum(0)
            self.module.register_buffer(self.biases[names], total, persistent=False)
        return self.biases[names]


def is_shortcut(norm: fx.Node) -> bool:
    """Whether a `join_norm` norms, and does nothing else."""
    given = arguments(norm)
    return given["activation"] == "none" and bool(given["eps"])


def is_by_phases(module: fx.GraphModule, video: fx.Node | None) -> bool:
    """Whether a video's pixels are as `decoder.reference.from_phases` takes them: those of a
    convolution of `decoder.reference.phase_weight`.
    """
    if video is None or video.target is not OPS.conv.default:
        return False
    weight = arguments(video)["weight"]
    return module.get_buffer(str(weight.target)).shape[-1] == PHASE_TAPS
