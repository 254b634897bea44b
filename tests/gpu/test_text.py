"""Captured graphs of the text encoder on a GPU, against the encoder as it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import golden

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman.graphs.text.replay import ReplayedEncoder
from magihuman.runtime.config import MAX_TEXT_TOKENS
from magihuman.runtime.model import narrowed, put, with_tables
from magihuman.runtime.model.text_encoder import TextEncoder, uncapped
from magihuman.runtime.weights.random_weights import byte_tokenizer

DEVICE = torch.device("cuda")
FP32, BF16 = 1e-5, 2**-7


def encoder_of(dtype: torch.dtype, precision: str = "bf16") -> TextEncoder:
    """Four layers of a quarter of the published width."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    sizes = {
        "hidden_size": 896,
        "intermediate_size": 3584,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
    }

    def build() -> T5GemmaEncoderModel:  # a configuration serves one model
        both = {"encoder": dict(sizes), "decoder": dict(sizes)}
        return uncapped(T5GemmaEncoderModel(T5GemmaConfig(**both, is_encoder_decoder=False)))

    torch.manual_seed(0)
    model = build().to(DEVICE, dtype).eval()
    if precision == "bf16":
        return TextEncoder(byte_tokenizer(), model)
    with torch.device("meta"):
        narrow = narrowed(with_tables(build(), DEVICE), precision, dtype)
    for key, value in model.named_parameters():
        put(narrow, key, value)
    return TextEncoder(byte_tokenizer(), narrow.eval())


def ids_of(tokens: int) -> Tensor:
    return torch.randint(5, 200, (1, tokens))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_replayed_prompts_are_those_encoded_as_they_are(dtype, bound):
    torch.backends.cuda.matmul.allow_tf32 = False
    plain = encoder_of(dtype)
    graphs = ReplayedEncoder(plain.masked, dtype, DEVICE)
    replayed = dataclasses.replace(plain, replayed=graphs)
    careful = dataclasses.replace(plain, model=encoder_of(torch.float32).model)
    # Longer ones first: what they leave in the padding must not be seen. 37 and 64 share a graph.
    for length in (MAX_TEXT_TOKENS, 300, 64, 37, 1, 301, MAX_TEXT_TOKENS + 1, 65):
        ids = ids_of(length)
        text = replayed.encode(ids)
        assert text.shape == (min(length, MAX_TEXT_TOKENS), plain.channels)
        if dtype == torch.float32:
            assert golden.error(text, plain.encode(ids)) <= bound + 2**-11  # rounded to fp16
        else:
            exact = careful.encode(ids)
            assert golden.error(text, exact) <= 1.1 * golden.error(plain.encode(ids), exact) + 1e-4
    assert set(graphs._captures.kept) == {64, 128, 320, MAX_TEXT_TOKENS}


def test_other_streams_and_threads_change_nothing():
    """As neighbours encode: on a stream of its own, while the device denoises for another."""
    plain = encoder_of(torch.bfloat16)
    replayed = dataclasses.replace(
        plain, replayed=ReplayedEncoder(plain.masked, torch.bfloat16, DEVICE)
    )
    stream, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    all_ids = [ids_of(length) for length in (100, 20, 128, 90)]
    expected = [plain.encode(ids) for ids in all_ids]
    for ids, text in zip(all_ids, expected, strict=True):
        for _ in range(20):
            busy @ busy
        with torch.cuda.stream(stream):
            made = replayed.encode(ids)
            stream.synchronize()
        assert golden.error(made, text) <= BF16


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.06), ("fp8", 0.16)])
def test_weights_in_eight_bits_are_captured(precision, bound):
    """Each product widens its weight within the graph; what is held is half."""
    wide, narrow = encoder_of(torch.bfloat16), encoder_of(torch.bfloat16, precision)
    held = [
        sum(t.nbytes for t in (*each.model.parameters(), *each.model.buffers()))
        for each in (wide, narrow)
    ]
    assert held[1] < 0.51 * held[0]
    graphs = ReplayedEncoder(narrow.masked, narrow.model.dtype, DEVICE)
    assert narrow.model.dtype == torch.bfloat16
    replayed = dataclasses.replace(narrow, replayed=graphs)
    for length in (MAX_TEXT_TOKENS, 300, 37, 1):
        ids = ids_of(length)
        text = replayed.encode(ids)
        assert golden.error(text, narrow.encode(ids)) <= BF16
        assert golden.error(text, wide.encode(ids)) <= bound
    assert set(graphs._captures.kept) == {64, 320, MAX_TEXT_TOKENS}
