"""The file of the Wan 2.2 VAE, as published or in diffusers' layout: its key names as diffusers has
them, and its encoder.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from magihuman.runtime.config import LATENT_CHANNELS
from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.model import ImageVAE, wan_vae
from magihuman.runtime.weights.checkpoint import check_shapes, frozen
from magihuman.runtime.weights.layouts import weight_files
from magihuman.runtime.weights.quiet import quiet_diffusers
from magihuman.runtime.weights.reading import exists, load_pickle, names, open_shard, shapes

MOST_CHANNELS = 2**12  # of the encoder's first level; the published has 160
WEIGHTS_NAME = "Wan2.2_VAE.pth"
VAE_PART, SUFFIX = "vae", ".safetensors"  # in diffusers' layout: a folder of a pipeline, its files
DIFFUSERS_KEYS = re.compile(
    r"encoder\.(conv_in|conv_out|norm_out|down_blocks|mid_block)\.|quant_conv\."
)
RES_BLOCKS = 2  # per level of the encoder; the level's downsampler has the next number
WIDTHS = (1, 2, 4, 4)  # of the levels, in widths of the first
IN_TIME = (1, 2)  # levels at whose end frames are halved too
_WAN_KEYS = (
    (r"conv1\.(\w+)", r"quant_conv.\1"),
    (r"encoder\.conv1\.(\w+)", r"encoder.conv_in.\1"),
    (r"encoder\.head\.0\.gamma", r"encoder.norm_out.gamma"),
    (r"encoder\.head\.2\.(\w+)", r"encoder.conv_out.\1"),
    (r"encoder\.middle\.1\.(.+)", r"encoder.mid_block.attentions.0.\1"),
)
_WAN_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def diffusers_key(key: str) -> str | None:
    """Diffusers' name of a tensor of the published encoder; None for the decoder's."""
    for pattern, name in _WAN_KEYS:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, name, key)
    middle = re.fullmatch(r"encoder\.middle\.([02])\.(residual\.\d|shortcut)\.(\w+)", key)
    if middle:
        block, part, kind = middle.groups()
        return f"encoder.mid_block.resnets.{int(block) // 2}.{_WAN_RESIDUAL[part]}.{kind}"
    down = re.fullmatch(r"encoder\.downsamples\.(\d)\.downsamples\.(\d)\.(.+)\.(\w+)", key)
    if down:
        level, block, part, kind = down.groups()
        stem = f"encoder.down_blocks.{level}"
        if int(block) < RES_BLOCKS:
            return f"{stem}.resnets.{block}.{_WAN_RESIDUAL.get(part, part)}.{kind}"
        return f"{stem}.downsampler.{part}.{kind}"
    return None


def load_image_vae(place: Path, device: torch.device, dtype: torch.dtype) -> ImageVAE:
    """The encoder of reference images, of the published file or of one in diffusers' layout.

    place: a folder that `file_of` knows, or the file.

    Raises:
        CheckpointError: the file is missing, damaged, or another model's.
    """
    state = checked_state(place)
    with torch.device("meta"):
        vae = wan_vae(len(state["encoder.conv_in.weight"]))
        del vae.decoder, vae.post_quant_conv
    vae.load_state_dict(state, assign=True)
    with quiet_diffusers():
        return ImageVAE(frozen(vae.to(device=device, dtype=dtype)))


def checked_state(place: Path) -> dict[str, Tensor]:
    """The encoder's tensors, as diffusers names them, mapped, once names and shapes are the
    encoder's; without diffusers, which takes seconds to import. `CheckpointError` as from
    `load_image_vae`.
    """
    path = file_of(place)
    state = encoder_state(path)
    sizes = shapes(state, str(path))
    first = sizes.get("encoder.conv_in.weight")
    if not first:
        raise CheckpointError(
            f"{path} has no encoder.conv1.weight; it is not the Wan 2.2 VAE: of its tensors"
            f" {len(state)} have names of that encoder. Give {WEIGHTS_NAME}, or the folder vae of"
            f" Wan2.2-TI2V-5B-Diffusers"
        )
    if not 1 <= first[0] <= MOST_CHANNELS:
        raise CheckpointError(
            f"{path}: encoder.conv1.weight must have 1 to {MOST_CHANNELS} rows, got {first[0]}"
        )
    check_shapes(sizes, encoder_shapes(first[0]), f"{path} ({layout_of(path)})")
    return state


def encoder_shapes(base_dim: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the encoder by its name; base_dim: width of the first level."""
    moments = 2 * LATENT_CHANNELS
    found = _layer("encoder.conv_in", base_dim, 12, 3, 3, 3)
    inner = base_dim
    for level, times in enumerate(WIDTHS):
        stem, outer = f"encoder.down_blocks.{level}", times * base_dim
        for block in range(RES_BLOCKS):
            found |= _resnet(f"{stem}.resnets.{block}", inner if block == 0 else outer, outer)
        inner = outer
        if level < len(WIDTHS) - 1:
            found |= _layer(f"{stem}.downsampler.resample.1", outer, outer, 3, 3)
        if level in IN_TIME:
            found |= _layer(f"{stem}.downsampler.time_conv", outer, outer, 3, 1, 1)
    middle = "encoder.mid_block"
    found |= {f"{middle}.attentions.0.norm.gamma": (inner, 1, 1)}
    found |= _layer(f"{middle}.attentions.0.to_qkv", 3 * inner, inner, 1, 1)
    found |= _layer(f"{middle}.attentions.0.proj", inner, inner, 1, 1)
    for block in range(2):
        found |= _resnet(f"{middle}.resnets.{block}", inner, inner)
    found |= {"encoder.norm_out.gamma": (inner, 1, 1, 1)}
    found |= _layer("encoder.conv_out", moments, inner, 3, 3, 3)
    return found | _layer("quant_conv", moments, moments, 1, 1, 1)


def _resnet(stem: str, inner: int, outer: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{stem}.norm1.gamma": (inner, 1, 1, 1)}
    found |= _layer(f"{stem}.conv1", outer, inner, 3, 3, 3)
    found |= {f"{stem}.norm2.gamma": (outer, 1, 1, 1)}
    found |= _layer(f"{stem}.conv2", outer, outer, 3, 3, 3)
    return found | (
        _layer(f"{stem}.conv_shortcut", outer, inner, 1, 1, 1) if inner != outer else {}
    )


def _layer(stem: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.weight": shape, f"{stem}.bias": shape[:1]}


def file_of(place: Path) -> Path:
    """The file of the Wan 2.2 VAE: the one given, or a folder's, published or in diffusers' layout,
    in which it may lie below `vae`.

    Raises:
        CheckpointError: there is more than one.
    """
    if not place.is_dir():
        return place
    if exists(place / WEIGHTS_NAME):
        return place / WEIGHTS_NAME
    for folder in (place / VAE_PART, place):
        files = weight_files(folder)
        if len(files) > 1:
            raise CheckpointError(
                f"{folder} must hold one file of the Wan 2.2 VAE, got"
                f" {names([file.name for file in files])}; give the one file"
            )
        if files:
            return files[0]
    return place / WEIGHTS_NAME


def encoder_state(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors of a file, as diffusers names them, mapped; `CheckpointError` as from
    `stored_encoder`.
    """
    named = ((_encoder_key(key), value) for key, value in stored_encoder(path).items())
    return {key: value for key, value in named if key is not None}


def stored_encoder(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors of a file, by their names there, mapped.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if path.suffix != SUFFIX:
        stored: dict[str, Tensor] = load_pickle(path)
    else:
        with open_shard(path) as shard:
            stored = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    named = {str(key): value for key, value in stored.items()}
    return {key: value for key, value in named.items() if _encoder_key(key) is not None}


def layout_of(path: Path) -> str:
    """In which layout a file of the VAE is, for people."""
    return "Wan, as published" if path.suffix != SUFFIX else f"safetensors, {path.name}"


def _encoder_key(key: str) -> str | None:
    """Diffusers' name of a tensor that has it already or the published one; None of another."""
    if DIFFUSERS_KEYS.match(key):
        return key
    return diffusers_key(key)
