"""The models in plain PyTorch, under the published key names.

`dit`, `turbo_vae` and `oobleck` read as their specifications and are right on any device; nothing
here is written for speed. `text_encoder` and `image_encoder` wrap models of transformers and
diffusers, and `row_scaled` holds weights of such models in 8 bits. `tokens` makes tokens of
latents, and places them in time and space.
"""

from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import DiT, Layer, Norm, Rope
from magihuman.runtime.model.image_encoder import ImageVAE, wan_vae
from magihuman.runtime.model.oobleck import Oobleck, OobleckConfig, Snake
from magihuman.runtime.model.row_scaled import (
    RowScaled,
    RowScaledEmbedding,
    RowScaledLinear,
    held_bytes,
    narrowed,
    put,
)
from magihuman.runtime.model.text_encoder import TextEncoder, is_panic, uncapped, with_tables
from magihuman.runtime.model.tokens import Layout
from magihuman.runtime.model.turbo_vae import (
    Decoder,
    TurboVAE,
    Window,
    decode_band,
    decode_windows,
    window_kinds,
)

__all__ = [
    "Decoder",
    "DiT",
    "ImageVAE",
    "Layer",
    "Layout",
    "Norm",
    "Oobleck",
    "OobleckConfig",
    "Rope",
    "RowScaled",
    "RowScaledEmbedding",
    "RowScaledLinear",
    "Snake",
    "TextEncoder",
    "TurboVAE",
    "Window",
    "decode_band",
    "decode_windows",
    "held_bytes",
    "is_panic",
    "narrowed",
    "put",
    "tokens",
    "uncapped",
    "wan_vae",
    "window_kinds",
    "with_tables",
]
