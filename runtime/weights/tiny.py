"""Write a tiny random checkpoint of every component, in the published layouts."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from magihuman.runtime.config import VARIANTS, DiTConfig, TurboVAEConfig
from magihuman.runtime.device import neutral
from magihuman.runtime.errors import OutputError
from magihuman.runtime.files import staged_folder, write_json
from magihuman.runtime.model import OobleckConfig, wan_vae
from magihuman.runtime.weights import random_weights
from magihuman.runtime.weights.checkpoint import (
    ARCHITECTURE_NAME,
    AUDIO_VAE_PREFIX,
    INDEX_NAME,
    SINGLE_NAME,
    TURBO_VAE_CONFIG,
    TURBO_VAE_WEIGHTS,
    undrawn,
)
from magihuman.runtime.weights.locate import AUDIO_FOLDER, IMAGE_FOLDER, TEXT_FOLDER, TURBO_FOLDER
from magihuman.runtime.weights.quiet import quiet_transformers
from magihuman.runtime.weights.wan_vae import RES_BLOCKS, WEIGHTS_NAME

TEXT_CHANNELS = 64
DIT = DiTConfig(
    num_layers=5,
    hidden_size=128,
    head_dim=32,
    kv_heads=2,
    text_channels=TEXT_CHANNELS,
    modality_layers=(0, 4),
    gelu7_layers=(0,),
    frame_reach=2,
)
TURBO_VAE = TurboVAEConfig(decoder_block_out_channels=(4, 8, 16, 32))
AUDIO_VAE = OobleckConfig(channels=8)
WAN_BASE_DIM = 8
CPU = torch.device("cpu")


def write_tiny(folder: str | os.PathLike[str], seed: int = 0) -> list[Path]:
    """Write all components below `folder` and return their folders. Existing files are replaced,
    once all are written.

    The DiTs have 5 layers of 128 channels; weights are random, so the clips are noise.

    Raises:
        OutputError: they cannot be written; nothing has changed.
    """
    folder = Path(folder)
    try:
        with neutral(), staged_folder(folder) as place:
            written = [_write_dit(place / name, name, seed) for name in VARIANTS]
            written.append(_write_turbo_vae(place / TURBO_FOLDER, seed))
            written.append(_write_audio_vae(place / AUDIO_FOLDER, seed))
            written.append(_write_image_vae(place / IMAGE_FOLDER, seed))
            written.append(_write_text_encoder(place / TEXT_FOLDER, seed))
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, in torch.save the last
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0]
        raise OutputError(f"the checkpoint cannot be written to {folder}: {reason}") from error
    return [folder / each.name for each in written]


def _write_dit(folder: Path, name: str, seed: int) -> Path:
    """`base` in two shards with bf16 linears, the others in one fp32 file."""
    folder.mkdir(exist_ok=True)
    model = random_weights.dit(DIT, seed, CPU, torch.bfloat16, name)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if name != "base":
        save_file({key: value.float() for key, value in state.items()}, folder / SINGLE_NAME)
    else:
        keys = sorted(state)
        shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
        weight_map = {}
        for i, part in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            save_file({key: state[key] for key in part}, folder / file)
            weight_map.update(dict.fromkeys(part, file))
        total = sum(value.numel() * value.element_size() for value in state.values())
        write_json(
            folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    fields = dataclasses.asdict(DIT)
    del fields["local_attention_layers"]  # the variant says
    write_json(folder / ARCHITECTURE_NAME, fields)
    return folder


def _write_turbo_vae(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    model = random_weights.turbo_vae(TURBO_VAE, seed, CPU, torch.float32)
    write_json(folder / TURBO_VAE_CONFIG, dataclasses.asdict(TURBO_VAE))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state["module.aligned_feature_projection_heads.0.weight"] = torch.zeros(
        4, 4, dtype=torch.float32
    )
    torch.save({"ema_state_dict": state}, folder / TURBO_VAE_WEIGHTS)
    return folder


def _write_audio_vae(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    model = random_weights.audio_vae(AUDIO_VAE, seed, CPU)
    shared = {
        "channels": AUDIO_VAE.channels,
        "c_mults": AUDIO_VAE.multiples,
        "strides": AUDIO_VAE.strides,
        "use_snake": True,
    }
    sides = {
        "encoder": {"in_channels": 2, "latent_dim": 2 * AUDIO_VAE.latent_channels},
        "decoder": {
            "out_channels": 2,
            "latent_dim": AUDIO_VAE.latent_channels,
            "final_tanh": False,
        },
    }
    config: dict[str, object] = {
        side: {"type": "oobleck", "config": {**shared, **own}} for side, own in sides.items()
    }
    config["bottleneck"] = {"type": "vae"}
    pretransform = {"type": "autoencoder", "config": config}
    write_json(
        folder / "model_config.json",
        {
            "model_type": "diffusion_cond",
            "sample_rate": 44100,
            "model": {"pretransform": pretransform},
        },
    )
    save_file(
        {AUDIO_VAE_PREFIX + key: value for key, value in unfold_weight_norm(model).items()},
        folder / SINGLE_NAME,
    )
    return folder


def unfold_weight_norm(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each convolution's weight as `weight_g` (its norms) and `weight_v`."""
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith(".weight"):
            norm = value.flatten(1).norm(dim=1).view(-1, *[1] * (value.ndim - 1))
            state[f"{key}_g"], state[f"{key}_v"] = norm, value.contiguous()
        else:
            state[key] = value.contiguous()
    return state


def _write_image_vae(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)

    def build() -> Any:
        vae = wan_vae(WAN_BASE_DIM)
        del vae.decoder, vae.post_quant_conv
        return vae

    vae = random_weights.randomize(undrawn(build, CPU, torch.float32), seed, "image_vae")
    state = {published_wan_key(key): value for key, value in vae.state_dict().items()}
    torch.save(state, folder / WEIGHTS_NAME)
    return folder


def published_wan_key(key: str) -> str:
    """The published name of a tensor of diffusers' Wan 2.2 encoder."""
    for pattern, name in (
        (r"quant_conv\.", "conv1."),
        (r"encoder\.conv_in\.", "encoder.conv1."),
        (r"encoder\.norm_out\.", "encoder.head.0."),
        (r"encoder\.conv_out\.", "encoder.head.2."),
        (r"encoder\.mid_block\.attentions\.0\.", "encoder.middle.1."),
        (r"encoder\.mid_block\.resnets\.0\.", "encoder.middle.0."),
        (r"encoder\.mid_block\.resnets\.1\.", "encoder.middle.2."),
        (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.downsamples.\1.downsamples.\2."),
        (
            r"encoder\.down_blocks\.(\d)\.downsampler\.",
            rf"encoder.downsamples.\1.downsamples.{RES_BLOCKS}.",
        ),
    ):
        key = re.sub(f"^{pattern}", name, key)
    for ours, published in (
        ("norm1", "residual.0"),
        ("conv1", "residual.2"),
        ("norm2", "residual.3"),
        ("conv2", "residual.6"),
        ("conv_shortcut", "shortcut"),
    ):
        key = re.sub(rf"(?<=\d\.){ours}(?=\.\w+$)", published, key)
    return key


def _write_text_encoder(folder: Path, seed: int) -> Path:
    """Encoder and decoder, as published; only the encoder is read back."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    tokenizer = random_weights.byte_tokenizer()
    sizes = {
        "hidden_size": TEXT_CHANNELS,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "vocab_size": len(tokenizer),
    }
    config = T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes), vocab_size=len(tokenizer))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = T5GemmaForConditionalGeneration(config)
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
