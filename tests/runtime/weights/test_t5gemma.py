"""The text encoder: padded as a captured graph has it, and with one in its place."""

from __future__ import annotations

import dataclasses
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import golden
from magihuman.graphs.text.replay import key_mask
from magihuman.runtime.config import MAX_TEXT_TOKENS
from magihuman.runtime.model.text_encoder import TextEncoder
from magihuman.runtime.weights.locate import TEXT_FOLDER
from magihuman.runtime.weights.t5gemma import load_text_encoder

VOCABULARY = 200
FP32 = 1e-5  # sums of other lengths, in another order


@pytest.fixture(scope="module")
def encoder(tiny_dir) -> TextEncoder:
    return load_text_encoder(tiny_dir / TEXT_FOLDER, torch.device("cpu"), torch.float32)


def ids_of(tokens: int) -> Tensor:
    return torch.randint(5, VOCABULARY, (1, tokens))


def test_a_host_may_have_closed_its_output(tiny_dir, monkeypatch):
    """transformers asks it whether it is a terminal, where a file has more than the model."""
    for name in ("stdin", "stdout", "stderr"):
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, name, closed)
    loaded = load_text_encoder(tiny_dir / TEXT_FOLDER, torch.device("cpu"), torch.float32)
    assert loaded.encode(ids_of(3)).isfinite().all()


@pytest.mark.parametrize("length", [1, 7, 63, 64])
@torch.inference_mode()
def test_padding_changes_nothing(encoder, length):
    ids = ids_of(length)
    expected = encoder.model(input_ids=ids).last_hidden_state
    for _ in range(2):  # whatever the padding holds
        padded = torch.cat((ids, ids_of(64 - length)), dim=1)
        mask = key_mask(64, torch.tensor(length), torch.float32)
        hidden = encoder.masked(padded, mask)
        assert golden.error(hidden[:, :length], expected) <= FP32
        assert hidden.isfinite().all()


@torch.inference_mode()
def test_without_a_mask_padding_is_seen(encoder):
    ids = ids_of(7)
    padded = torch.cat((ids, ids_of(57)), dim=1)
    seen = encoder.masked(padded, key_mask(64, torch.tensor(64), torch.float32))
    assert golden.error(seen[:, :7], encoder.model(input_ids=ids).last_hidden_state) > 0.01


@torch.inference_mode()
def test_scores_are_not_capped(tiny_dir):
    """As PyTorch's attention had it in the published pipeline, against the model's definition."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    folder = tiny_dir / TEXT_FOLDER

    def defined(cap: float | None) -> Any:
        config = T5GemmaConfig.from_pretrained(folder)
        config.encoder.attn_logit_softcapping, config.is_encoder_decoder = cap, False
        options = {"config": config, "dtype": torch.float32, "attn_implementation": "eager"}
        return T5GemmaEncoderModel.from_pretrained(folder, **options).eval()

    ours = load_text_encoder(folder, torch.device("cpu"), torch.float32).model
    without, capped = defined(None), defined(50.0)
    for model in (ours, without, capped):
        for layer in model.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(100)  # for scores beyond 50
    ids = ids_of(30)
    text, plain, other = (m(input_ids=ids).last_hidden_state for m in (ours, without, capped))
    assert golden.error(text, plain) <= FP32
    assert golden.error(text, other) > 100 * FP32


def test_short_prompts_are_replayed_and_others_encoded_whole(encoder):
    asked = []

    def replayed(ids: Tensor) -> Tensor:
        asked.append(ids.shape[1])
        return torch.full((ids.shape[1], encoder.channels), 0.1)

    stands_in = dataclasses.replace(encoder, replayed=replayed)
    for length in (3, MAX_TEXT_TOKENS):
        text = stands_in.encode(ids_of(length))
        assert text.shape == (length, encoder.channels)
        assert (text == torch.tensor(0.1).half().float()).all()  # rounded as any other
    long = ids_of(MAX_TEXT_TOKENS + 1)
    assert torch.equal(stands_in.encode(long), encoder.encode(long))
    assert asked == [3, MAX_TEXT_TOKENS]


def test_without_room_for_a_graph_prompts_are_encoded_all_the_same(encoder):
    def replayed(ids: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    ids = ids_of(9)
    stands_in = dataclasses.replace(encoder, replayed=replayed)
    assert torch.equal(stands_in.encode(ids), encoder.encode(ids))
