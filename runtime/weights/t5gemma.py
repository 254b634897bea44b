"""T5Gemma's tokenizer and encoder from a folder in the published layout.

transformers would take anything that a `config.json` names: classes, kernels from the hub, code in
the folder. So numbers alone are read from there, and the encoder is made and filled here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from magihuman.runtime.config import MOST_CHANNELS, MOST_LAYERS, TextPrecision
from magihuman.runtime.errors import CheckpointError, shown
from magihuman.runtime.model import TextEncoder, is_panic, narrowed, put, uncapped, with_tables
from magihuman.runtime.weights.checkpoint import frozen, read_all, scan
from magihuman.runtime.weights.locate import TEXT_FOLDER
from magihuman.runtime.weights.quiet import quiet_transformers
from magihuman.runtime.weights.reading import TensorInfo, exists, is_file, names, read_json
from magihuman.runtime.weights.shipped import model_folder

CONFIG_NAME, MODEL_TYPE = "config.json", "t5gemma"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
MOST_TOKENIZER_BYTES = 2**26  # the published have 34 and 4 million
TOKENIZER_CLASSES = (
    None,
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
PROBE = "A woman smiles, and says: héllo, 1 😀!\n"
MOST_VOCABULARY = 2**20
# Sizes of the encoder that shape it or its maths, and the most that each may be.
WHOLE = {
    "vocab_size": MOST_VOCABULARY,
    "hidden_size": MOST_CHANNELS,
    "intermediate_size": MOST_VOCABULARY,
    "num_hidden_layers": MOST_LAYERS,
    "num_attention_heads": MOST_LAYERS,
    "num_key_value_heads": MOST_LAYERS,
    "head_dim": MOST_CHANNELS,
    "query_pre_attn_scalar": MOST_CHANNELS,
    "sliding_window": 2**31 - 1,
    "max_position_embeddings": 2**31 - 1,
}
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu", "relu")
LAYER_TYPES = ("sliding_attention", "full_attention")


def load_text_encoder(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    precision: TextPrecision = "bf16",
    rounding: torch.device | None = None,
) -> TextEncoder:
    """The tokenizer and the encoder of a local folder; the decoder's weights are not loaded.

    No code of the folder runs, and nothing is asked. dtype: of all that `precision` does not hold
    in 8 bits, and of the activations. rounding: the device that rounds weights to 8 bits, if not
    that where they are to be.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, or of another shape.
    """
    # Where one of these is missing, transformers makes up a default in silence.
    for wanted in ((CONFIG_NAME,), TOKENIZER_NAMES):
        if not any(is_file(path / name) for name in wanted):
            raise CheckpointError(f"the text encoder at {path} lacks {' or '.join(wanted)}")
    with _refused(path), quiet_transformers():
        tensors = _encoder_tensors(path)
        config = text_config(path / CONFIG_NAME, len(tensors))
        tokenizer = _tokenizer(path, config)
        model = _sketch(config)
    _check(path, tensors, model)
    with _refused(path):
        used = _used(model, tensors)
        if precision != "bf16":
            narrowed(model, precision, dtype)
        for key, value in read_all(used):
            at = device if rounding is None else rounding
            put(model, _own(key), value.to(device=at, dtype=dtype, copy=True), device)
        encoder = TextEncoder(tokenizer, frozen(uncapped(with_tables(model, device))))
        if not encoder.tokenize(PROBE)[0].numel():
            raise CheckpointError("its tokenizer finds no tokens in a text")
        return encoder


def token_counter(model: str | os.PathLike[str]) -> Callable[[str], int]:
    """A function that counts the tokens of a text, as the tokenizer of a model has them.

    model: a directory in the published layout, or that of its text encoder, or "nano". No weights
    are read. Raises `CheckpointError` where there is no tokenizer.
    """
    folder = model_folder(model)
    path = folder / TEXT_FOLDER if exists(folder / TEXT_FOLDER) else folder
    for wanted in ((CONFIG_NAME,), TOKENIZER_NAMES):
        if not any(is_file(path / name) for name in wanted):
            raise CheckpointError(
                f"to count tokens, {path} must be a folder of a model with its text encoder, and"
                f" lacks {' or '.join(wanted)}; without a model they are estimated"
            )
    with _refused(path), quiet_transformers():
        tokenizer = _tokenizer(path, text_config(path / CONFIG_NAME, MOST_LAYERS))

    def count(text: str) -> int:
        with _refused(path):
            return len(tokenizer([text])["input_ids"][0])

    return count


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Whatever these files make a library raise, they cannot be loaded."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise CheckpointError(
            f"the text encoder at {path} cannot be loaded: {str(error)[:1000]}"
        ) from error


def _encoder_tensors(path: Path) -> dict[str, TensorInfo]:
    """Those of the encoder, from file headers, by their names in the files."""
    return {key: info for key, info in scan(path).items() if _own(key).startswith("encoder.")}


def _own(key: str) -> str:
    """The encoder's name of a tensor, which a file of encoder and decoder has below "model."."""
    return key.removeprefix("model.")


def text_config(path: Path, tensors: int) -> Any:
    """Transformers' configuration of an encoder, of the numbers of a `config.json`.

    tensors: how many the encoder's files have; it has at least as many as layers.

    Raises:
        CheckpointError: it is another model's, or a number is not what an encoder can have.
    """
    from transformers import T5GemmaConfig

    values = read_json(path)
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path} must have the model_type {MODEL_TYPE!r}, got {shown(values.get('model_type'))}"
        )
    encoder = values.get("encoder")
    if not isinstance(encoder, dict):
        raise CheckpointError(f"{path} must have an encoder with its sizes, got {shown(encoder)}")
    sizes = _sizes(encoder, f"{path}, encoder")
    if sizes["num_hidden_layers"] > tensors:
        raise CheckpointError(
            f"{path}: num_hidden_layers is {sizes['num_hidden_layers']}, and the files hold"
            f" {tensors} tensors of an encoder"
        )
    return T5GemmaConfig(
        encoder=dict(sizes),
        decoder=dict(sizes),  # transformers wants one
        vocab_size=sizes["vocab_size"],
        is_encoder_decoder=False,
    )


def _sizes(values: Mapping[str, object], source: str) -> dict[str, Any]:
    """The fields of an encoder that are used, each of its type and within bounds."""
    from transformers import T5GemmaConfig

    usual = T5GemmaConfig().encoder  # where a file leaves out what is as usual
    sizes: dict[str, Any] = {}
    for name, most in WHOLE.items():
        value = values.get(name, getattr(usual, name))
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                f"{source}: {name} must be a whole number from 1 to {most}, got {shown(value)}"
            )
        sizes[name] = value
    layers, heads, kv_heads = (
        sizes[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    if heads % kv_heads or sizes["head_dim"] % 2:
        raise CheckpointError(
            f"{source}: num_attention_heads must be a multiple of num_key_value_heads, and head_dim"
            f" even, got {heads}, {kv_heads} and {sizes['head_dim']}"
        )
    kinds: Any = values.get("layer_types") or [LAYER_TYPES[i % 2] for i in range(layers)]
    is_each = isinstance(kinds, list) and len(kinds) == layers
    if not is_each or any(kind not in LAYER_TYPES for kind in kinds):
        raise CheckpointError(
            f"{source}: layer_types must be {layers} of {' and '.join(LAYER_TYPES)}, got"
            f" {shown(kinds)}"
        )
    padding, bias = values.get("pad_token_id", 0), values.get("attention_bias", False)
    is_token = type(padding) is int and 0 <= padding < sizes["vocab_size"]
    if not (padding is None or is_token) or type(bias) is not bool:
        raise CheckpointError(
            f"{source}: pad_token_id must be a token and attention_bias true or false, got"
            f" {shown(padding)} and {shown(bias)}"
        )
    activation = values.get("hidden_activation", ACTIVATIONS[0])
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{source}: hidden_activation must be one of {', '.join(ACTIVATIONS)}, got"
            f" {shown(activation)}"
        )
    eps = _positive(values.get("rms_norm_eps", 1e-6), "rms_norm_eps", source)
    rope = {"rope_type": "default", "rope_theta": _theta(values, source)}
    return {
        **sizes,
        "layer_types": kinds,
        "pad_token_id": padding,
        "attention_bias": bias,
        "hidden_activation": activation,
        "rms_norm_eps": eps,
        "rope_parameters": rope,
    }


def _theta(values: Mapping[str, object], source: str) -> float:
    """The base of rotations, from where transformers writes it now, or wrote it before."""
    rope: Any = values.get("rope_parameters")
    if rope is None:
        rope = {"rope_theta": values.get("rope_theta", 10000.0)}
    is_plain = isinstance(rope, dict) and rope.get("rope_type", "default") == "default"
    if not is_plain or values.get("rope_scaling") is not None:
        raise CheckpointError(
            f"{source}: rotations must be of the type default, got {shown(rope)} and"
            f" {shown(values.get('rope_scaling'))}"
        )
    return _positive(rope.get("rope_theta"), "rope_theta", source)


def _positive(value: object, name: str, source: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise CheckpointError(f"{source}: {name} must be a number above 0, got {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def _tokenizer(path: Path, config: Any) -> Any:
    """The tokenizer, of transformers' own classes."""
    from transformers import AutoTokenizer

    _check_tokenizer_files(path)
    # With the configuration given, that of the folder is not looked at.
    return AutoTokenizer.from_pretrained(
        str(path), config=config, trust_remote_code=False, local_files_only=True
    )


def _check_tokenizer_files(path: Path) -> None:
    """Refuse what would be read at any size, and what names other code or other files."""
    for file in [*path.glob("*.json"), *path.glob("*.jinja"), path / "tokenizer.model"]:
        if exists(file) and (not is_file(file) or file.stat().st_size > MOST_TOKENIZER_BYTES):
            raise CheckpointError(f"{file} must be a file of at most {MOST_TOKENIZER_BYTES} bytes")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        values = read_json(path / name) if exists(path / name) else {}
        if values.get("tokenizer_class") not in TOKENIZER_CLASSES:
            raise CheckpointError(
                f"{path / name} must have a tokenizer_class of"
                f" {', '.join(filter(None, TOKENIZER_CLASSES))}, got"
                f" {shown(values['tokenizer_class'])}"
            )
        elsewhere = [key for key, value in values.items() if key.endswith("_file") and value]
        if elsewhere:
            raise CheckpointError(f"{path / name} must name no other files, got {names(elsewhere)}")


def _sketch(config: Any) -> Any:
    """The encoder, without weights."""
    from transformers import T5GemmaEncoderModel

    with torch.device("meta"):
        return T5GemmaEncoderModel(config)


def _check(path: Path, tensors: Mapping[str, TensorInfo], model: nn.Module) -> None:
    """Raise `CheckpointError` unless the files have every tensor, of the model's shape."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {_own(key): info.shape for key, info in tensors.items()}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"the text encoder at {path} lacks {len(missing)} tensors: {names(missing)}"
        )
    misshapen = sorted(key for key, shape in wanted.items() if found[key] != shape)
    if misshapen:
        raise CheckpointError(
            f"the text encoder at {path} has {len(misshapen)} misshapen tensors: {names(misshapen)}"
        )


def _used(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that the encoder has a place for, by their names in the files."""
    wanted = model.state_dict().keys()
    return {key: info for key, info in tensors.items() if _own(key) in wanted}
