"""Access to the golden data: inputs and outputs of the published maths at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from magihuman.runtime.config import DiTConfig
from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import DiT

FOLDER = Path(__file__).parents[1] / "data" / "golden"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text())
FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "head_dim": "head_dim",
    "kv_heads": "num_query_groups",
    "text_channels": "text_in_channels",
    "modality_layers": "mm_layers",
    "gelu7_layers": "gelu7_layers",
    "local_attention_layers": "local_attn_layers",
}


def load(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def error(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||; NaN and a wrong shape never pass."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert not difference.isnan()
    return float(difference)


def dit(*, local: bool) -> DiT:
    """The golden DiT; `local`: with frame-local layers, reach 1."""
    published = META["sr_arch"] if local else META["dit_weights"]["arch"]
    values = {name: published[theirs] for name, theirs in FIELDS.items()}
    config = DiTConfig.from_dict({**values, "frame_reach": 1}, "golden")
    model = DiT(config)
    model.load_state_dict(load("dit_weights"), strict=True)
    return model.eval().requires_grad_(False)


def inputs_of(model: DiT, layout: tokens.Layout) -> dict[str, Tensor]:
    """Random tokens of a forward in the base model's coordinates."""
    video, audio, text = layout.counts
    return {
        "video": torch.randn(video, 192),
        "audio": torch.randn(audio, 64),
        "text": torch.randn(text, model.config.text_channels),
        "rope": model.adapter.rope(tokens.coordinates(layout, "v2")),
    }
