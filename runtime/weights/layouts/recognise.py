"""What a file seems to be that is no transformer in a layout that is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.weights.layouts.scaled import SCALE
from magihuman.runtime.weights.reading import TensorInfo, names

OWN = re.compile(r"adapter\.|block\.layers\.|final_(norm|linear)_")  # how published names begin
READ = (
    "published or Diffusers files, one safetensors file with the published names in bf16 or fp32,"
    f" or one in fp8 with {SCALE} beside each weight"
)
# What keys look like, what that is, and what to do. The first that fits a key of the file is told.
KINDS = (
    (r"lora_(A|B|up|down)\b|\.lora\.", "a LoRA, of differences alone", "give the whole weights"),
    (
        r"\.(qweight|qzeros|g_idx)$|\.(absmax|quant_map|quant_state)\b",
        "weights in 4 bits",
        "take the model in bf16 or fp8",
    ),
    (
        r"\.weight\._(data|scale)$",
        "8-bit weights of optimum-quanto",
        "take the model in bf16 or fp8",
    ),
    (
        r"(^|\.)scaled_fp8$|\.scale_weight$",
        "an fp8 file of ComfyUI",
        f"take the model in bf16, or in fp8 with {SCALE} beside each weight",
    ),
    (
        r"^block\..*\.weight_scale$",
        "a converted transformer without its manifest.json",
        "copy its folder whole",
    ),
    (
        r"^(model\.diffusion_model|diffusion_model)\.",
        "one file of ComfyUI, whose names have a prefix",
        "take the prefix off the names",
    ),
    (r"^(module|model|transformer|_orig_mod|dit)\.(adapter|block)\.", "the transformer, with a"
     " prefix before each name", "take the prefix off the names"),
    (
        r"^(model\.)?(encoder|decoder)\.layers\.\d|^shared\.",
        "a text encoder",
        "give it as text_encoder=",
    ),
    (
        r"^(encoder|decoder|first_stage_model|vae)\.|^(post_)?quant_conv\.",
        "an autoencoder",
        "give it as image_vae=, audio_vae= or turbo_vae=",
    ),
    (
        r"^(transformer_blocks|double_blocks|single_blocks|blocks)\.\d",
        "the transformer of another model",
        "take daVinci-MagiHuman's",
    ),
)  # fmt: skip


def refuse_foreign(
    tensors: Mapping[str, TensorInfo], wanted: Collection[str] | None, source: str
) -> None:
    """Raise `CheckpointError` where less than half of a file's tensors have the model's names, or
    where some are those of a layout that is known and not read.

    wanted: the names of the model's tensors; None where these are too many to be made.
    """
    matching = [key for key in tensors if _is_own(key, wanted)]
    others = [key for key in tensors if not _is_own(key, wanted)]
    kind = _kind(tensors if wanted is None else others)
    if kind is None and 2 * len(matching) >= len(tensors):
        return
    what, remedy = kind or ("nothing that is known", "give " + READ)
    lacking = ""
    if wanted is not None:
        missing = len(wanted) - len(matching)
        lacking = f"; {missing} of the transformer's {len(wanted)} are lacking"
    raise CheckpointError(
        f"{source} does not fit the model: it is in no layout that is read, and looks like {what}."
        f" Of its {len(tensors)} tensors {len(matching)} have names of the"
        f" transformer{_listed(matching)}, and {len(others)} have not{_listed(others)}{lacking}."
        f" {remedy[0].upper()}{remedy[1:]}"
    )


def _is_own(key: str, wanted: Collection[str] | None) -> bool:
    return OWN.match(key) is not None if wanted is None else key in wanted


def _kind(keys: Collection[str]) -> tuple[str, str] | None:
    for pattern, what, remedy in KINDS:
        if any(re.search(pattern, key) for key in keys):
            return what, remedy
    return None


def _listed(keys: list[str]) -> str:
    return f" ({names(keys[:3])})" if keys else ""
