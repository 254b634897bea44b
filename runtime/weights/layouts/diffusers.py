"""The `config.json` beside a transformer in the layout of Diffusers, as an architecture."""

from __future__ import annotations

from pathlib import Path

from magihuman.runtime.config import DiTConfig, Variant
from magihuman.runtime.errors import CheckpointError, shown
from magihuman.runtime.weights.reading import is_file, read_json

CONFIG_NAME = "config.json"
CLASS = "MagiHumanDiT"
# Its fields that shape the model, and ours.
SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "head_dim": "head_dim",
    "num_query_groups": "kv_heads",
    "video_in_channels": "video_channels",
    "audio_in_channels": "audio_channels",
    "text_in_channels": "text_channels",
    "mm_layers": "modality_layers",
    "gelu7_layers": "gelu7_layers",
}
# Its fields that have one value in every published model.
FIXED: dict[str, object] = {
    "post_norm_layers": [],
    "enable_attn_gating": True,
    "activation_type": "swiglu7",
    "patch_size": [1, 2, 2],
}


def is_config(folder: Path) -> bool:
    """Whether a folder has such a file, which says what class it belongs to."""
    path = folder / CONFIG_NAME
    return is_file(path) and read_json(path).get("_class_name") is not None


def read_config(folder: Path, variant: Variant) -> DiTConfig:
    """The architecture that a folder's `config.json` has.

    Raises:
        CheckpointError: it is of another model, or of another variant's kind of attention.
    """
    path = folder / CONFIG_NAME
    values = read_json(path)
    if values.get("_class_name") != CLASS:
        raise CheckpointError(
            f"{path} must have the _class_name {CLASS!r}, got {shown(values.get('_class_name'))};"
            " it belongs to another model"
        )
    for name, value in FIXED.items():
        if values.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name} must be {value!r}, as published, got {shown(values[name])}"
            )
    sizes = {ours: values[theirs] for theirs, ours in SIZES.items() if theirs in values}
    config = variant.architecture(DiTConfig.from_dict(sizes, str(path)))
    local = values.get("local_attn_layers") or list(config.local_attention_layers)
    if local != list(config.local_attention_layers):
        raise CheckpointError(
            f"{path}: local_attn_layers must be those of {variant.name},"
            f" {list(config.local_attention_layers)}, got {shown(local)}; it is another variant's"
        )
    return config
