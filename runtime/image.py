"""A reference image to the latent of the first frame, through diffusers' Wan VAE encoder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from magihuman.runtime.checkpoint import check_keys, frozen, load_pickle, shapes
from magihuman.runtime.config import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD
from magihuman.runtime.errors import CheckpointError, InvalidRequestError
from magihuman.runtime.quiet import quiet_diffusers

WEIGHTS_NAME = "Wan2.2_VAE.pth"
MAX_PIXELS = 100_000_000
RES_BLOCKS = 2  # per level of the encoder; the level's downsampler has the next number


def open_image(
    source: str | os.PathLike[str] | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """An RGB image, turned upright by its EXIF tag, transparency laid over white. Decodes it whole.

    max_pixels: refused above, before it is decoded. formats: Pillow's names of those to read, by
    default all, some of which are left to other programs. Raises `InvalidRequestError` for what is
    missing, empty, damaged, too large or no image.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the one given", max_pixels)
    if not isinstance(source, (str, os.PathLike)):
        raise InvalidRequestError(
            f"image must be a path or a PIL image, got a {type(source).__name__}"
        )
    path = Path(source)
    if not os.path.isfile(path):
        state = "is not a file" if os.path.exists(path) else "does not exist"
        raise InvalidRequestError(f"image must be a readable file, got {path}, which {state}")
    try:
        if path.stat().st_size == 0:
            raise InvalidRequestError(f"image must not be empty, got {path} of 0 bytes")
        with open(path, "rb") as file, Image.open(file, formats=formats) as image:
            return _upright_rgb(image, str(path), max_pixels)
    except UnidentifiedImageError:
        kinds = "a format Pillow reads (PNG, JPEG, WebP, ...)"
        if formats is not None:
            kinds = f"one of the formats {', '.join(formats)}"
        raise InvalidRequestError(f"image must be in {kinds}, got {path}") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise InvalidRequestError(f"image {path} cannot be read: {error}") from error


def _upright_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if not 0 < image.width * image.height <= max_pixels:
        raise InvalidRequestError(
            f"image must have 1 to {max_pixels} pixels, got {image.width}x{image.height}; scale it"
        )
    if image.mode == "F":
        raise InvalidRequestError(
            f"image must have whole numbers as samples, but {name} has floats of no known"
            " range; save it as PNG"
        )
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequestError(
            f"image must be whole, but {name} cannot be decoded ({error}); save it again"
        ) from error


def fit(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    """Centre-crop to the target's aspect, then resize (Lanczos)."""
    if image.height / image.width > height_px / width_px:
        width, height = image.width, max(1, image.width * height_px // width_px)
    else:
        width, height = max(1, image.height * width_px // height_px), image.height
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (round(left), round(top), round(left) + width, round(top) + height)
    return image.crop(box).resize((width_px, height_px), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """[1, 3, 1, H, W] fp32 in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1).float()
    return (pixels / 255 * 2 - 1)[None, :, None]


class ImageVAE:
    """The encoder half of the Wan 2.2 VAE."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    @property
    def model(self) -> Any:
        """The module that holds the weights."""
        return self._vae

    @torch.inference_mode()
    def encode(self, image: Image.Image, width_px: int, height_px: int, frames: int = 1) -> Tensor:
        """Normalised latents at this size, fp32 [1, 48, T, H / 16, W / 16]; the mean, unsampled.

        frames: 4 T - 3, of a clip that shows the image all the time.
        """
        weight = self._vae.quant_conv.weight
        pixels = to_tensor(fit(image, width_px, height_px)).to(weight.device, weight.dtype)
        pixels = pixels.expand(-1, -1, frames, -1, -1)
        latent: Tensor = self._vae.encode(pixels).latent_dist.mode().float()
        mean, std = (
            torch.tensor(v, device=latent.device).view(1, -1, 1, 1, 1)
            for v in (LATENT_MEAN, LATENT_STD)
        )
        return (latent - mean) / std


def wan_vae(base_dim: int) -> Any:
    """Diffusers' Wan 2.2 VAE with an encoder of this width; its decoder is minimal and unused."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=4,
        z_dim=LATENT_CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=list(LATENT_MEAN),
        latents_std=list(LATENT_STD),
    )


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
    """The encoder from the published `Wan2.2_VAE.pth`."""
    path = folder / WEIGHTS_NAME if folder.is_dir() else folder
    named = ((diffusers_key(str(key)), value) for key, value in load_pickle(path).items())
    state = {key: value for key, value in named if key is not None}
    found = shapes(state, str(path))
    first = found.get("encoder.conv_in.weight")
    if not first:
        raise CheckpointError(f"{path} has no encoder.conv1.weight; it is not the Wan 2.2 VAE")
    with torch.device("meta"):
        vae = wan_vae(first[0])
        del vae.decoder, vae.post_quant_conv
    check_keys(found, vae, str(path))
    vae.load_state_dict(state, assign=True)
    with quiet_diffusers():
        return ImageVAE(frozen(vae.to(device=device, dtype=dtype)))
