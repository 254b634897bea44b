"""Captions to tokens to embeddings: a small T5Gemma encoder with a tokenizer of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magihuman.runtime.model.text_encoder import uncapped
from magihuman.runtime.weights.locate import TEXT_FOLDER
from magihuman.runtime.weights.quiet import quiet_transformers
from magihuman.runtime.weights.t5gemma import load_text_encoder
from world.captions import caption, draw

VOCABULARY = 768
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # in the order of T5Gemma
PAD, BEGIN = 0, 2
MAX_TOKENS = 64  # of 7,500 captions the longest has 46
CHANNELS = 128
LAYERS = 3


def train_tokenizer() -> Any:
    """Byte pairs, learnt from captions; any text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rng = random.Random(11)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((caption(draw(rng), rng) for _ in range(20000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BEGIN)]
    )
    return tokenizer


def tokenizer_of(text: str | None) -> Any:
    """The tokenizer that was saved as JSON, or a new one."""
    from tokenizers import Tokenizer

    return train_tokenizer() if text is None else Tokenizer.from_str(text)


def tokenize(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids [B, MAX_TOKENS], `PAD` after each text's own, and how many those are, [B]."""
    rows = [found.ids[:MAX_TOKENS] for found in tokenizer.encode_batch(texts)]
    ids = torch.tensor([row + [PAD] * (MAX_TOKENS - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


class TextEncoder(nn.Module):
    """T5Gemma's encoder. Ids [B, L] and which of them are text, [B, L], to [B, L, CHANNELS]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5GemmaConfig, T5GemmaEncoderModel

        sizes = {
            "hidden_size": CHANNELS,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "vocab_size": VOCABULARY,
        }
        config = T5GemmaConfig(
            encoder=dict(sizes),
            decoder=dict(sizes),
            vocab_size=VOCABULARY,
            is_encoder_decoder=False,
        )
        self.model: Any = uncapped(T5GemmaEncoderModel(config))

    def forward(self, ids: Tensor, is_text: Tensor) -> Tensor:
        # Made here, since transformers would look at the values, and so wait for the device.
        mask = (~is_text[:, None, None, :]).float() * -1e9
        masks = {"full_attention": mask, "sliding_attention": mask}
        hidden: Tensor = self.model(input_ids=ids, attention_mask=masks).last_hidden_state
        return hidden.float()


def write(model: TextEncoder, tokenizer: Any, folder: Path) -> None:
    """As transformers writes it, bf16, the encoder alone."""
    from transformers import PreTrainedTokenizerFast

    place = folder / TEXT_FOLDER
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    with quiet_transformers():
        model.model.to(torch.bfloat16).save_pretrained(place)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(place)


def read(model: TextEncoder, folder: Path) -> Any:
    """What `write` has written; the tokenizer is returned."""
    found = load_text_encoder(folder / TEXT_FOLDER, torch.device("cpu"), torch.float32)
    model.model.load_state_dict(found.model.state_dict())
    return found.tokenizer.backend_tokenizer
