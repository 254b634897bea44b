"""Files of weights, in and out.

`locate` finds the components of a model, and `transformer` says in which precision a transformer
will be held. `checkpoint`, `t5gemma` and `wan_vae` read the published layouts, checked by name and
shape, `layouts` has those of others, and `artifacts` reads what `converting` writes.
`random_weights` and `tiny` stand in for files, and `shipped` is the model in this package.
"""

from magihuman.runtime.weights import checkpoint, locate, random_weights
from magihuman.runtime.weights.checkpoint import turbo_vae_files
from magihuman.runtime.weights.converting import convert
from magihuman.runtime.weights.layouts import in_model
from magihuman.runtime.weights.locate import (
    AUDIO_FOLDER,
    IMAGE_FOLDER,
    TEXT_FOLDER,
    TURBO_FOLDER,
    PathLike,
    Paths,
    find,
    image_folder,
)
from magihuman.runtime.weights.precision import PrecisionPolicy
from magihuman.runtime.weights.random_weights import Synthetic
from magihuman.runtime.weights.reading import exists, is_file, is_file_name
from magihuman.runtime.weights.shipped import (
    largest,
    learnt,
    model_folder,
    prompts,
    sized,
    suited,
)
from magihuman.runtime.weights.t5gemma import load_text_encoder, token_counter
from magihuman.runtime.weights.tiny import write_tiny
from magihuman.runtime.weights.transformer import (
    TransformerOptions,
    TransformerSpec,
    layered_bytes,
    linears_in_8_bits,
    plan,
)
from magihuman.runtime.weights.wan_vae import (
    WEIGHTS_NAME,
    checked_state,
    diffusers_key,
    encoder_state,
    file_of,
    layout_of,
    load_image_vae,
    stored_encoder,
)

__all__ = [
    "AUDIO_FOLDER",
    "IMAGE_FOLDER",
    "TEXT_FOLDER",
    "TURBO_FOLDER",
    "WEIGHTS_NAME",
    "PathLike",
    "Paths",
    "PrecisionPolicy",
    "Synthetic",
    "TransformerOptions",
    "TransformerSpec",
    "checked_state",
    "checkpoint",
    "convert",
    "diffusers_key",
    "encoder_state",
    "exists",
    "file_of",
    "find",
    "image_folder",
    "in_model",
    "is_file",
    "is_file_name",
    "largest",
    "layered_bytes",
    "layout_of",
    "learnt",
    "linears_in_8_bits",
    "load_image_vae",
    "load_text_encoder",
    "locate",
    "model_folder",
    "plan",
    "prompts",
    "random_weights",
    "sized",
    "stored_encoder",
    "suited",
    "token_counter",
    "turbo_vae_files",
    "write_tiny",
]
