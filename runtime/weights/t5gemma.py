"""T5Gemma's tokenizer and encoder from a folder in the published layout."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError

from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.model import TextEncoder, uncapped
from magihuman.runtime.weights.checkpoint import frozen
from magihuman.runtime.weights.quiet import quiet_transformers

log = logging.getLogger("magihuman")


def load_text_encoder(path: Path, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The tokenizer and the encoder of a local folder; the decoder's weights are not loaded.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, or of another shape.
    """
    from transformers import AutoTokenizer, T5GemmaEncoderModel

    # Where one of these is missing, transformers makes up a default in silence.
    for names in (("config.json",), ("tokenizer.json", "tokenizer.model")):
        if not any((path / name).is_file() for name in names):
            raise CheckpointError(f"the text encoder at {path} lacks {' or '.join(names)}")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(path))
            model, info = T5GemmaEncoderModel.from_pretrained(
                str(path),
                is_encoder_decoder=False,
                dtype=dtype,
                device_map={"": str(device)},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below; transformers only says that some are
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the text encoder at {path} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the text encoder at {path} lacks {len(missing)} tensors: {', '.join(missing[:8])}"
        )
    misshapen = sorted(str(key) for key, *_ in info["mismatched_keys"])
    if misshapen:
        raise CheckpointError(
            f"the text encoder at {path} has {len(misshapen)} misshapen tensors:"
            f" {', '.join(misshapen[:8])}"
        )
    return TextEncoder(tokenizer, frozen(uncapped(model)))
