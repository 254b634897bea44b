"""The encoder half of the Wan 2.2 VAE, through diffusers: an image to the first frame's latent."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from magihuman.runtime.config import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD
from magihuman.runtime.media import fit


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a clip of one frame, [1, 3, 1, H, W] fp32 in [-1, 1] on the CPU."""
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
            torch.tensor(v, dtype=latent.dtype, device=latent.device).view(1, -1, 1, 1, 1)
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
