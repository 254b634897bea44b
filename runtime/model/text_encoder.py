"""Prompts to embeddings, through transformers' T5Gemma encoder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from magihuman.runtime.config import MAX_TEXT_TOKENS
from magihuman.runtime.errors import CheckpointError

log = logging.getLogger("magihuman")

ENCODER_LIMIT_TOKENS = 8192  # positions the encoder was built for


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizer and encoder of t5gemma-9b-9b-ul2, or of anything with its layout."""

    tokenizer: Any
    model: Any
    replayed: Callable[[Tensor], Tensor] | None = None  # the model's stand-in for short prompts
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def channels(self) -> int:
        """Width of the embeddings."""
        return int(self.model.config.encoder.hidden_size)

    def tokenize(self, prompt: str) -> tuple[Tensor, str | None]:
        """Token ids [1, L], and a note where the prompt is longer than the model reads.

        They are cut at the encoder's limit alone: it reads beyond what the model takes.

        Raises:
            CheckpointError: the tokenizer does not take the prompt, or has tokens that the encoder
                has not.
        """
        try:
            with self._tokenizing:  # a tokenizer refuses to be borrowed twice
                ids: Tensor = self.tokenizer([prompt], return_tensors="pt")["input_ids"]
        except BaseException as error:
            if not is_panic(error):
                raise
            raise CheckpointError(
                f"the tokenizer must take every prompt, and gave up on one: {error}; download it"
                " again"
            ) from error
        rows = self.model.config.encoder.vocab_size
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise CheckpointError(
                f"the tokenizer must give tokens below {rows}, the rows of the encoder's table, got"
                f" {int(ids.max())}; download it again"
            )
        excess = ids.shape[1] - MAX_TEXT_TOKENS
        if excess <= 0:
            return ids, None
        note = (
            f"prompts are read up to {MAX_TEXT_TOKENS} tokens: this one has {ids.shape[1]},"
            f" the last {excess} are cut"
        )
        return ids[:, :ENCODER_LIMIT_TOKENS], note

    @torch.inference_mode()
    def encode(self, ids: Tensor) -> Tensor:
        """Embeddings fp32 [min(L, 640), C] of tokens [1, L], rounded to fp16 in between.

        All tokens are encoded together before the first 640 are taken.
        """
        ids = ids.to(self.model.device)
        hidden = None
        if self.replayed is not None and ids.shape[1] <= MAX_TEXT_TOKENS:
            try:
                hidden = self.replayed(ids)
            except torch.OutOfMemoryError as error:
                log.info("encoding without a captured graph: %s", error)
        if hidden is None:
            mask = torch.ones_like(ids)
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        return hidden[:MAX_TEXT_TOKENS].half().float()

    def masked(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [1, L, C] with a mask [1, 1, L, L] to add to all scores of attention.

        ids: [1, L], at most as many as the sliding window of half of the layers.
        """
        masks = {"full_attention": mask, "sliding_attention": mask}
        hidden: Tensor = self.model.encoder(input_ids=ids, attention_mask=masks).last_hidden_state
        return hidden


def is_panic(error: BaseException) -> bool:
    """Whether this is how a library in Rust gives up, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def with_tables(model: Any, device: torch.device) -> Any:
    """T5Gemma's encoder, its tables of rotations, which are no weights, made anew on a device."""
    with torch.device(device):
        for owner in list(model.modules()):
            for name, child in owner.named_children():
                if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                    setattr(owner, name, type(child)(child.config))
    return model


def uncapped(model: Any) -> Any:
    """T5Gemma's encoder, changed to attend as in the published pipeline.

    The model's definition caps attention scores by a tanh at 50. The published code leaves the kind
    of attention to transformers 4.56.0, which takes PyTorch's scaled dot product, without the cap;
    the newest releases take another attention and keep it.
    """
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    # Asked for by name, the newest refuse it, for the sake of the cap.
    model.config._attn_implementation = "sdpa"
    return model
