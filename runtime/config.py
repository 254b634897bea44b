"""Variants, sizes and constants of the published model, as frozen data. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from magihuman.runtime.errors import CheckpointError, shown

NANO = "nano"  # the model that comes with this package
FPS = 25
SAMPLE_RATE_HZ = 44100  # what decoded audio is called, after resampling
LATENT_AUDIO_RATE_HZ = (
    51200  # what the audio autoencoder is fed: 2048 samples a latent, 25 latents a second
)
VIDEO_STRIDE = (4, 16, 16)  # pixels per latent along time, height, width
LATENT_CHANNELS = 48
AUDIO_CHANNELS = 64
PATCH = 2  # latents per token along height and width
MAX_TEXT_TOKENS = 640
FRAME_REACH = 11  # frames seen each way by frame-local attention
# A picture that speaks live, as `Engine.live` and the server's route take it.
LIVE_PROMPT = "A person looks into the camera and speaks. The camera is static."
LIVE_WINDOW_S = 1.44  # two of the decoder's windows, with what it sees of the one before
MIN_LIVE_WINDOW_S, MAX_LIVE_WINDOW_S = 0.64, 4.0
MIN_LIVE_RATE_HZ, MAX_LIVE_RATE_HZ = 8_000, 192_000

Precision = Literal["bf16", "fp32", "fp8", "fp8-attn", "int8"]
TextPrecision = Literal["bf16", "int8", "fp8"]
Vae = Literal["fast", "plain", "tensorrt"]
CoordinateStyle = Literal["v1", "v2"]


# What a file may say of a model; the published ones have about a thirtieth of it.
MOST_LAYERS = 1000
MOST_CHANNELS = 2**17
MOST_BLOCKS, MOST_BLOCK_LAYERS = 16, 100  # of the video decoder
MOST_WINDOW = 210  # latents that it takes at once


@dataclass(frozen=True)
class DiTConfig:
    """Architecture of one DiT; the defaults are the published one (15.3 B parameters)."""

    num_layers: int = 40
    hidden_size: int = 5120
    head_dim: int = 128
    kv_heads: int = 8
    video_channels: int = LATENT_CHANNELS * PATCH * PATCH
    audio_channels: int = AUDIO_CHANNELS
    text_channels: int = 3584
    modality_layers: tuple[int, ...] = (0, 1, 2, 3, 36, 37, 38, 39)
    gelu7_layers: tuple[int, ...] = (0, 1, 2, 3)
    local_attention_layers: tuple[int, ...] = ()
    frame_reach: int = FRAME_REACH

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.hidden_size // self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Output rows of the fused projection, per modality: [Q | K | V | gate]."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim + self.heads

    @property
    def rope_bands(self) -> int:
        """The number of rotary frequencies for each axis."""
        return self.head_dim // 8

    def mlp_widths(self, layer: int) -> tuple[int, int]:
        """(rows of up_gate_proj, columns of down_proj) of one layer, per modality."""
        if layer in self.gelu7_layers:
            return 4 * self.hidden_size, 4 * self.hidden_size
        width = int(self.hidden_size * 8 / 3) // 4 * 4
        return 2 * width, width

    @classmethod
    def from_dict(cls, values: dict[str, object], source: str) -> DiTConfig:
        """Build from a JSON object; unknown names and impossible values raise `CheckpointError`."""
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            named = ", ".join(shown(name).strip("'") for name in unknown[:8])
            raise CheckpointError(
                f"{source}: unknown field(s) {named}; known are {', '.join(known)}"
            )
        kwargs: dict[str, object] = {}
        for name, value in values.items():
            if known[name] == "int":
                most = MOST_LAYERS if name == "num_layers" else MOST_CHANNELS
                kwargs[name] = _whole(value, most, f"{source}: {name}")
            elif isinstance(value, list) and all(type(item) is int for item in value):
                if len(value) > MOST_LAYERS:
                    raise CheckpointError(
                        f"{source}: {name} must have at most {MOST_LAYERS} entries, got"
                        f" {len(value)}"
                    )
                kwargs[name] = tuple(value)
            else:
                raise CheckpointError(
                    f"{source}: {name} must be a list of whole numbers, got {shown(value)}"
                )
        config = cls(**kwargs)  # type: ignore[arg-type]
        if config.hidden_size % config.head_dim or config.heads % config.kv_heads:
            raise CheckpointError(
                f"{source}: hidden_size must be a multiple of head_dim and heads of kv_heads, got"
                f" {config.hidden_size}, {config.head_dim} and {config.kv_heads}"
            )
        if config.head_dim % 8:
            raise CheckpointError(
                f"{source}: head_dim must be a multiple of 8, got {config.head_dim}"
            )
        layers = config.modality_layers + config.gelu7_layers + config.local_attention_layers
        if any(layer not in range(config.num_layers) for layer in layers):
            raise CheckpointError(
                f"{source}: layer lists must stay below num_layers = {config.num_layers}, got"
                f" {shown(layers)}"
            )
        return config


@dataclass(frozen=True)
class Variant:
    """One published set of DiT weights and how it is sampled."""

    name: str
    steps: int
    coordinates: CoordinateStyle
    guidance: float | None  # default video guidance; None: runs without guidance
    sr: str | None = None  # the size of `SR_SIZES` that it super-resolves to; None: a base variant
    local_attention: bool = False

    def architecture(self, base: DiTConfig) -> DiTConfig:
        """`base` with the layers of this variant that attend frame-locally."""
        if not self.local_attention:
            return base
        dense = range(3, min(32, base.num_layers), 4)
        local = tuple(layer for layer in range(base.num_layers) if layer not in dense)
        return dataclasses.replace(base, local_attention_layers=local)


VARIANTS = {
    "base": Variant("base", steps=32, coordinates="v2", guidance=5.0),
    "distill": Variant("distill", steps=8, coordinates="v2", guidance=None),
    "540p_sr": Variant("540p_sr", steps=5, coordinates="v1", guidance=None, sr="540p"),
    "1080p_sr": Variant(
        "1080p_sr", steps=5, coordinates="v1", guidance=None, sr="1080p", local_attention=True
    ),
}
BASE_VARIANTS = ("base", "distill")
SR_SIZES = {"540p": (896, 512), "1080p": (1920, 1088)}  # width, height in pixels, landscape


def upscaler(sr: str) -> Variant:
    """The variant that super-resolves to a size of `SR_SIZES`."""
    return next(variant for variant in VARIANTS.values() if variant.sr == sr)


BASE_LOW_NOISE_GUIDANCE = 2.0  # video guidance of the base model once timestep <= 500
BASE_AUDIO_GUIDANCE = 5.0
SR_GUIDANCE = 3.5  # the published value where SR guidance is on
SR_EARLY_GUIDANCE = 2.0  # at most this for the first SR_EARLY_FRAMES latent frames
SR_EARLY_FRAMES = 13
SR_NOISE_INDEX = 220  # entry of the zero-SNR table at which super-resolution starts
SR_AUDIO_NOISE = 0.7  # share of fresh noise in the audio stream shown to the SR model


@dataclass(frozen=True)
class TurboVAEConfig:
    """The published `TurboV3-Wan22-TinyShallow_7_7.json`; lists go from the output inwards."""

    latent_channels: int = LATENT_CHANNELS
    out_channels: int = 3
    decoder_block_out_channels: tuple[int, ...] = (64, 128, 256, 512)
    decoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3)
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (False, True, True, True)
    decoder_spatio_only: tuple[bool, ...] = (False, True, False, False)
    decoder_is_dw_conv: tuple[bool, ...] = (False,) * 5
    patch_size: int = 2
    patch_size_t: int = 1
    first_chunk_size: int = 7
    step_size: int = 7
    use_unpatchify: bool = True
    spatial_compression_ratio: int = 16
    temporal_compression_ratio: int = 4

    @classmethod
    def from_dict(cls, values: dict[str, object], source: str) -> TurboVAEConfig:
        """Take the fields the decoder needs; other published keys belong to training and are
        ignored.
        """
        fixed = cls()
        kwargs: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            if field.name not in values:
                raise CheckpointError(f"{source}: the field {field.name} is missing")
            value = values[field.name]
            value = tuple(value) if isinstance(value, list) else value
            if not _is_like(value, getattr(fixed, field.name)):
                raise CheckpointError(
                    f"{source}: {field.name} must be of the kind of"
                    f" {getattr(fixed, field.name)!r}, got {shown(value)}"
                )
            kwargs[field.name] = value
        config = cls(**kwargs)  # type: ignore[arg-type]
        for name in (
            "latent_channels", "out_channels", "decoder_is_dw_conv", "patch_size", "patch_size_t",
            "use_unpatchify", "spatial_compression_ratio", "temporal_compression_ratio",
        ):  # fmt: skip
            if getattr(config, name) != getattr(fixed, name):
                raise CheckpointError(
                    f"{source}: {name} must be {getattr(fixed, name)!r}, the only structure that"
                    f" was published, got {shown(getattr(config, name))}"
                )
        config.check_bounds(source)
        blocks = len(config.decoder_block_out_channels)
        lengths = {
            "decoder_layers_per_block": blocks + 1,
            "decoder_spatio_temporal_scaling": blocks,
            "decoder_spatio_only": blocks,
        }
        for name, length in lengths.items():
            if len(getattr(config, name)) != length:
                raise CheckpointError(
                    f"{source}: {name} must have {length} entries for {blocks} blocks, got"
                    f" {shown(getattr(config, name))}"
                )
        return config

    def check_bounds(self, source: str) -> None:
        """Raise `CheckpointError` for what no decoder of this structure has, before one is made."""
        if not 1 <= len(self.decoder_block_out_channels) <= MOST_BLOCKS:
            raise CheckpointError(
                f"{source}: decoder_block_out_channels must have 1 to {MOST_BLOCKS} entries, got"
                f" {len(self.decoder_block_out_channels)}"
            )
        for name, most in (
            ("decoder_block_out_channels", MOST_CHANNELS),
            ("decoder_layers_per_block", MOST_BLOCK_LAYERS),
            ("first_chunk_size", MOST_WINDOW),
            ("step_size", MOST_WINDOW),
        ):
            value = getattr(self, name)
            if max(value if isinstance(value, tuple) else (value,), default=0) > most:
                raise CheckpointError(
                    f"{source}: {name} must be at most {most}, got {shown(value)}"
                )


def _whole(value: object, most: int, name: str) -> int:
    """A whole number from 1 to `most`; `CheckpointError`, with `name`, for anything else."""
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{name} must be a positive whole number, got {shown(value)}")
    if value > most:
        raise CheckpointError(f"{name} must be at most {most}, got {shown(value)}")
    return value


def _is_like(value: object, example: object) -> bool:
    """Whether the value has the example's type, item by item, and is positive if it is an int."""
    if isinstance(example, tuple):
        return isinstance(value, tuple) and all(_is_like(item, example[0]) for item in value)
    return type(value) is type(example) and (type(value) is not int or value > 0)


# Statistics of the Wan 2.2 latents (48 channels), by which latents are normalised.
# Source: the `latents_mean` and `latents_std` of Wan2.2-TI2V-5B's VAE configuration.
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


def audio_latents(duration_s: float) -> int:
    """Audio latents of a clip: 25 a second, plus one."""
    return int(round(duration_s * FPS, 6)) + 1  # rounded: 4.64 * 25 is 115.99999999999999


def latent_frames(audio: int) -> int:
    """Latent video frames that go with `audio` audio latents."""
    return (audio - 1) // VIDEO_STRIDE[0] + 1


def latent_side(pixels: int) -> int:
    """Latent rows (or columns) made for so many pixels: whole tokens only."""
    return pixels // VIDEO_STRIDE[1] // PATCH * PATCH


def video_frames(frames: int) -> int:
    """Video frames decoded from so many latent frames."""
    return VIDEO_STRIDE[0] * (frames - 1) + 1
