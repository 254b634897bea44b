"""A model's parts as a memory plan counts them: their bytes, from headers and configurations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from magihuman.runtime import config
from magihuman.runtime.memory.plan import AUDIO, IMAGE, TEXT, VIDEO, Part
from magihuman.runtime.model import Oobleck, OobleckConfig, TurboVAE, held_bytes
from magihuman.runtime.weights import (
    TransformerSpec,
    checkpoint,
    encoder_state,
    file_of,
    layered_bytes,
    random_weights,
)

TEXT_LAYER = re.compile(r"layers\.(\d{1,4})\.", re.ASCII)


def dit_part(name: str, spec: TransformerSpec) -> Part:
    """The part that a transformer is, under a name of the plan."""
    outside, layers = layered_bytes(spec.config, spec.linear, spec.quantized)
    return Part(name, outside, layers)


def reading_bytes(spec: TransformerSpec) -> int:
    """Bytes that reading a transformer takes of the device beside its weights: its largest tensor
    as it is on disk, in fp32 at most, in bf16 and in 8 bits.
    """
    rows, columns = max(
        (spec.config.mlp_widths(layer) for layer in range(spec.config.num_layers)),
        key=lambda widths: widths[0],
    )
    experts = 3 if spec.config.modality_layers else 1
    return experts * max(rows, columns) * spec.config.hidden_size * (4 + 2 + 1)


def text_part(folder: Path, precision: config.TextPrecision = "bf16") -> Part:
    """The text encoder of a folder, from file headers."""
    shapes = {
        key.removeprefix("model."): info.shape for key, info in checkpoint.scan(folder).items()
    }
    return text_part_of(
        {
            key.removeprefix("encoder."): shape
            for key, shape in shapes.items()
            if key.startswith("encoder.")
        },
        precision,
    )


def text_part_of(
    shapes: Mapping[str, tuple[int, ...]], precision: config.TextPrecision = "bf16"
) -> Part:
    """The text encoder, from the shapes of its tensors by their names."""
    outside, layers, widest = 0, dict[int, int](), 0
    for name, shape in shapes.items():
        size = held_bytes(shape, precision)
        inside = TEXT_LAYER.match(name)
        if inside:
            layer = int(inside[1])
            layers[layer] = layers.get(layer, 0) + size
            widest = max(widest, 2 * math.prod(shape))
        else:
            outside += size
    each = tuple(layers[i] for i in sorted(layers))
    widened = 0 if precision == "bf16" else widest
    return Part(TEXT, outside, each, widened_bytes=widened)


def part_of(
    name: str, model: nn.Module, width: int, layers: Sequence[nn.Module] = (), **options: bool
) -> Part:
    """A model whose elements take `width` bytes each; its weights need not be there."""
    inside = tuple(width * sum(t.numel() for t in layer.parameters()) for layer in layers)
    whole = width * sum(t.numel() for t in model.parameters())
    return Part(name, whole - sum(inside), inside, **options)


def small_parts(
    turbo_vae: TurboVAE | int, audio_vae: Oobleck, image_vae: nn.Module | int | None, width: int
) -> list[Part]:
    """The parts that the autoencoders are.

    An int stands for a model of that many bytes. width: bytes of an element, of all but that for
    sound, which is in fp32.

    The compiled decoder has its weights a second time, in another layout, and so stays.
    """
    if isinstance(turbo_vae, TurboVAE):
        turbo_vae = 2 * part_of(VIDEO, turbo_vae, width).total_bytes
    parts = [Part(VIDEO, turbo_vae, can_move=False), part_of(AUDIO, audio_vae, 4)]
    if isinstance(image_vae, nn.Module):
        parts.append(part_of(IMAGE, image_vae, width))
    elif image_vae is not None:
        parts.append(Part(IMAGE, image_vae))
    return parts


def folder_parts(
    turbo_vae: Path,
    text: Path,
    audio: Path,
    image: Path | None,
    width: int,
    is_engine: bool,
    text_precision: config.TextPrecision = "bf16",
) -> list[Part]:
    """All parts but the transformers, from headers and configurations."""
    with torch.device("meta"):
        oobleck = Oobleck(checkpoint.oobleck_config(audio / "model_config.json"))
        decoder: TurboVAE | int
        if is_engine:
            decoder = sum(f.stat().st_size for f in turbo_vae.iterdir() if f.is_file())
        else:
            decoder = TurboVAE(checkpoint.turbo_vae_config(turbo_vae))
    picture = None
    if image is not None:
        picture = sum(width * tensor.numel() for tensor in encoder_state(file_of(image)).values())
    return [*small_parts(decoder, oobleck, picture, width), text_part(text, text_precision)]


def synthetic_parts(
    dtype: torch.dtype, text_precision: config.TextPrecision = "bf16"
) -> list[Part]:
    """All parts but the transformers, of random weights in the published sizes. dtype: of the
    autoencoders for images.
    """
    with torch.device("meta"):
        named = random_weights.text_model().encoder.named_parameters()
        shapes = {key: tuple(parameter.shape) for key, parameter in named}
        text = text_part_of(shapes, text_precision)
        small = small_parts(
            TurboVAE(config.TurboVAEConfig()),
            Oobleck(OobleckConfig()),
            random_weights.image_model(),
            dtype.itemsize,
        )
    return [*small, text]
