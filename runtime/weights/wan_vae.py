"""The published file of the Wan 2.2 VAE: its key names as diffusers has them, and its encoder."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.model import ImageVAE, wan_vae
from magihuman.runtime.weights.checkpoint import check_keys, frozen
from magihuman.runtime.weights.quiet import quiet_diffusers
from magihuman.runtime.weights.reading import load_pickle, shapes

MOST_CHANNELS = 2**12  # of the encoder's first level; the published has 160
WEIGHTS_NAME = "Wan2.2_VAE.pth"
RES_BLOCKS = 2  # per level of the encoder; the level's downsampler has the next number
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


def load_image_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> ImageVAE:
    """The encoder of reference images from the published `Wan2.2_VAE.pth`.

    folder: that holds the file, or the file.

    Raises:
        CheckpointError: the file is missing, damaged, or another model's.
    """
    path = folder / WEIGHTS_NAME if folder.is_dir() else folder
    named = ((diffusers_key(str(key)), value) for key, value in load_pickle(path).items())
    state = {key: value for key, value in named if key is not None}
    sizes = shapes(state, str(path))
    first = sizes.get("encoder.conv_in.weight")
    if not first:
        raise CheckpointError(f"{path} has no encoder.conv1.weight; it is not the Wan 2.2 VAE")
    if not 1 <= first[0] <= MOST_CHANNELS:
        raise CheckpointError(
            f"{path}: encoder.conv1.weight must have 1 to {MOST_CHANNELS} rows, got {first[0]}"
        )
    with torch.device("meta"):
        vae = wan_vae(first[0])
        del vae.decoder, vae.post_quant_conv
    check_keys(sizes, vae, str(path))
    vae.load_state_dict(state, assign=True)
    with quiet_diffusers():
        return ImageVAE(frozen(vae.to(device=device, dtype=dtype)))
