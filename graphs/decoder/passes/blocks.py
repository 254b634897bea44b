"""The blocks of the video decoder become operators over videos in `channels_last_3d`.

Each pattern is traced from the reference functions that the model calls. What stands between two
convolutions is one operator then; `joins` moves biases and additions into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from magihuman.graphs.rewrite import Build, call, replace
from magihuman.kernels.decoder import ops as decoder_ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels.decoder import reference as ref

OPS = torch.ops.magihuman
ALIGNMENT = 8  # channels of a convolution that runs on the tensor cores come in such multiples
IN_PLACE = [False, False]  # pixels of a video and of what is added: none are by phases
NORM_EPS, SHORTCUT_NORM_EPS = 1e-8, 1e-6


@dataclass(frozen=True)
class Stage:
    """One up block: what goes into its upsample, if it has one, at the example's size."""

    channels: int
    layers: int
    widens: bool  # whether it opens with a residual block of another width
    upsample: bool
    in_time: bool
    size: tuple[int, int, int]  # frames, rows, columns before


@dataclass(frozen=True)
class DecoderContext:
    """What the passes know of the decoder.

    Attributes:
        config: anything with the fields of `magihuman.runtime`'s `TurboVAEConfig`.
        size: latent frames, rows and columns of the example that is traced.
        first_window: whether the graph is for a clip's first window.
        dtype: of weights and activations.
        device: of the weights.
    """

    config: Any
    size: tuple[int, int, int]
    first_window: bool
    dtype: torch.dtype
    device: torch.device

    def example(self, *shape: int) -> Tensor:
        """A tensor to trace with."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    @property
    def latents(self) -> Tensor:
        """The decoder's input."""
        return self.example(1, self.config.latent_channels, *self.size)

    def stages(self) -> Iterator[Stage]:
        """The up blocks from the latents outwards."""
        config = self.config
        widths = config.decoder_block_out_channels[::-1]
        size = self.size
        for i, width in enumerate(widths):
            upsample = config.decoder_spatio_temporal_scaling[::-1][i]
            in_time = upsample and not config.decoder_spatio_only[::-1][i]
            layers = config.decoder_layers_per_block[::-1][i + 1]
            yield Stage(width, layers, width != widths[max(i - 1, 0)], upsample, in_time, size)
            frames, rows, columns = size
            if upsample:
                frames = 2 * frames - self.first_window if in_time else frames
                size = (frames, 2 * rows, 2 * columns)

    @property
    def out_size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the last convolution."""
        last = list(self.stages())[-1]
        return last.size


def passes_for(
    context: DecoderContext,
) -> list[tuple[str, Callable[[fx.GraphModule, DecoderContext, torch.dtype], int], int]]:
    """Every pass with the number of matches that the architecture implies."""
    stages = list(context.stages())
    widening = sum(stage.widens for stage in stages)
    upsampled = sum(stage.layers for stage in stages if stage.upsample)
    blocks = context.config.decoder_layers_per_block[-1] + widening + sum(s.layers for s in stages)
    return [
        ("norm, SiLU, pad", _norm_silu, 2 * blocks - upsampled + 1),
        ("norm, ReLU, pad", _norm_relu, upsampled),
        ("norm of shortcuts", _shortcut_norm, widening),
        ("pad", _pad, 1 + sum(stage.in_time for stage in stages)),
        ("upsample", _upsample, sum(stage.upsample for stage in stages)),
        ("pixels", _pixels, 1),
        (
            "convolution",
            _conv,
            2 * blocks + widening + 2 + sum(s.upsample + s.in_time for s in stages),
        ),
    ]


def _norm_silu(module: fx.GraphModule, context: DecoderContext, _: torch.dtype) -> int:
    return _norm_pad(module, context, F.silu, "silu")


def _norm_relu(module: fx.GraphModule, context: DecoderContext, _: torch.dtype) -> int:
    return _norm_pad(module, context, F.relu, "relu")


def _norm_pad(
    module: fx.GraphModule, context: DecoderContext, act: Callable[[Tensor], Tensor], name: str
) -> int:
    return replace(
        module,
        lambda x: ref.pad_time(act(ref.channel_norm(x, NORM_EPS)), 1),
        (context.example(1, 8, *context.size),),
        _join_norm(NORM_EPS, name, 1),
    )


def _shortcut_norm(module: fx.GraphModule, context: DecoderContext, _: torch.dtype) -> int:
    return replace(
        module,
        lambda x: ref.channel_norm(x, SHORTCUT_NORM_EPS),
        (context.example(1, 8, *context.size),),
        _join_norm(SHORTCUT_NORM_EPS, "none", 0),
    )


def _pad(module: fx.GraphModule, context: DecoderContext, _: torch.dtype) -> int:
    return replace(
        module,
        lambda x: ref.pad_time(x, 1),
        (context.example(1, 8, *context.size),),
        _join_norm(None, "none", 1),
    )


def _join_norm(eps: float | None, activation: str, pad: int) -> Build:
    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        return [
            call(
                graph,
                OPS.join_norm.default,
                x=inputs[0],
                delta=None,
                bias=None,
                eps=eps,
                activation=activation,
                before=pad,
                after=pad,
                phases=IN_PLACE,
            )
        ]

    return build


def _upsample(module: fx.GraphModule, context: DecoderContext, _: torch.dtype) -> int:
    """Frames between the movement and the way back are a video too; the way back goes, and so do
    repeated pixels, which the convolution behind them makes up for.
    """
    matches = 0
    shapes = set()
    for stage in context.stages():
        if not stage.upsample:
            continue
        drop = int(stage.in_time and context.first_window)
        parts = 2 if stage.in_time else 1
        matches += replace(
            module,
            _movement(stage.in_time, drop),
            (context.example(1, parts * stage.channels, *stage.size),),
            _join_frames(stage.in_time, drop),
        )
        frames, rows, columns = stage.size
        shapes.add((parts * frames - drop, stage.channels, 2 * rows, 2 * columns))
    for shape in sorted(shapes):
        replace(
            module,
            lambda x: ref.to_video(x, 1),
            (context.example(*shape),),
            lambda graph, inputs: inputs,
        )
    return matches


def _movement(in_time: bool, drop: int) -> Callable[[Tensor], Tensor]:
    def movement(x: Tensor) -> Tensor:
        if in_time:
            x = ref.interleave_time(x)
            if drop:
                x = x[:, :, drop:]
        return ref.upsample_frames(x)

    return movement


def _join_frames(in_time: bool, drop: int) -> Build:
    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        operands = {"x": inputs[0], "delta": None, "bias": None}
        return [call(graph, OPS.join_frames.default, **operands, in_time=in_time, drop=drop)]

    return build


def _pixels(module: fx.GraphModule, context: DecoderContext, dtype: torch.dtype) -> int:
    """Last comes what the caller wants: bytes, or frames as the decoder's own."""
    config = context.config
    colors, patch = config.out_channels, config.patch_size

    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        format_ = {"colors": colors, "patch": patch, "dtype": dtype}
        return [call(graph, OPS.join_pixels.default, x=inputs[0], bias=None, **format_)]

    return replace(
        module,
        lambda x: ref.unpatchify(x, patch),
        (context.example(1, colors * patch**2, *context.out_size),),
        build,
    )


def _conv(module: fx.GraphModule, context: DecoderContext, _: torch.dtype) -> int:
    """Convolutions give up their bias to an addition behind them.

    Weights are laid out for `channels_last_3d`, once; those over repeated pixels become those of
    `decoder.reference.phase_weight`, of 4/9 of the work. Pixels come out of channels filled up with
    zeros to a multiple of `ALIGNMENT`.
    """
    graph = module.graph
    aten = torch.ops.aten
    convolutions = 0
    for node in list(graph.nodes):
        if node.target not in (aten.conv3d.default, aten.conv2d.default):
            continue
        convolutions += 1
        x, weight, bias = node.args[:3]
        padding = list(node.args[4]) if len(node.args) > 4 else [0, 0, 0]
        is_last = any(user.target is OPS.join_pixels.default for user in node.users)
        by_phases = x.target is OPS.join_frames.default
        names = str(weight.target), str(bias.target)
        lay_out(module, *names, ALIGNMENT if is_last else 1, by_phases)
        with graph.inserting_before(node):
            padding = [0] * (3 - len(padding)) + padding
            product = call(graph, OPS.conv.default, x=x, weight=weight, padding=padding)
            total = call(graph, OPS.add_bias.default, x=product, bias=bias)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    graph.lint()
    return convolutions


def lay_out(
    module: fx.GraphModule, weight: str, bias: str, alignment: int, by_phases: bool
) -> None:
    """Give the module a copy of a convolution's tensors, in the layout that its operators take,
    channels out filled up with zeros to a multiple of `alignment`.
    """
    values = module.get_parameter(weight).detach()
    if values.ndim == 4:
        values = values[:, :, None]
    missing = -values.shape[0] % alignment
    if by_phases:
        values = ref.phase_weight(values)
    values = F.pad(values, (0,) * 9 + (missing,))
    values = values.contiguous(memory_format=torch.channels_last_3d)
    wide = F.pad(module.get_parameter(bias).detach().float(), (0, missing))
    for name, value in ((weight, values), (bias, wide)):
        *path, last = name.split(".")
        owner = module.get_submodule(".".join(path))
        delattr(owner, last)
        owner.register_buffer(last, value, persistent=False)
