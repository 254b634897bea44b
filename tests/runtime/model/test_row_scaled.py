"""Weights in 8 bits with a scale for each row, and the text encoder that holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from golden import error
from magihuman import runtime
from magihuman.kernels import reference as ref
from magihuman.runtime import InvalidRequestError
from magihuman.runtime.engine import assemble
from magihuman.runtime.memory import TEXT, placement
from magihuman.runtime.memory import parts as weighed
from magihuman.runtime.memory.offload import Offloaded
from magihuman.runtime.model import RowScaledEmbedding, RowScaledLinear, narrowed, with_tables
from magihuman.runtime.model.row_scaled import quantize_rows
from magihuman.runtime.weights import load_text_encoder, random_weights
from magihuman.runtime.weights.locate import AUDIO_FOLDER, TEXT_FOLDER, TURBO_FOLDER
from magihuman.runtime.weights.shipped import NANO_FOLDER

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
EIGHT = ["int8", "fp8"]
PROMPT = "A woman with long black hair in a yellow shirt says: ho ba hu bu"
# Rounding alone: half a step of 127, and of the three bits behind e4m3's first, over normally
# distributed rows. Errors of layers add up as roots of sums of squares.
ROUNDING = {"int8": 0.012, "fp8": 0.03}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# -- the arithmetic ---------------------------------------------------------------------------


def test_int8_rows_are_rounded_to_the_nearest_of_255_steps():
    weight = drawn(5000, 33)  # more rows than are rounded at a time
    weight[7] = 0
    values, scale = quantize_rows(weight, "int8")
    assert values.dtype == torch.int8 and scale.dtype == FP32 and scale.shape == (5000,)
    assert torch.allclose(scale[:7], weight[:7].abs().amax(1) / 127)
    assert int(values.abs().max()) == 127 and not values[7].any()
    off = (values.float() * scale[:, None] - weight).abs()
    assert bool((off <= scale[:, None] * (0.5 + 1e-5)).all())


def test_fp8_rows_are_those_of_the_transformers_weights():
    weight = drawn(5000, 33)
    values, scale = quantize_rows(weight, "fp8")
    wanted = ref.quantize_rows(weight)
    assert torch.equal(values.float(), wanted[0].float()) and torch.equal(scale, wanted[1])


@pytest.mark.parametrize("precision", EIGHT)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_the_product_of_its_rounded_weight(precision, bias):
    linear = nn.Linear(64, 48, bias=bias).requires_grad_(False)
    made = RowScaledLinear(linear, precision)
    made.hold(linear.weight)
    x = drawn(10, 64)
    meant = made.weight.float() * made.weight_scale[:, None]
    wanted = nn.functional.linear(x, meant, linear.bias)
    assert error(made(x), wanted) < 1e-6
    assert made(x.to(BF16)).dtype == BF16
    assert error(made(x.to(BF16)), wanted) < 2**-7  # activations rounded before and after
    assert 0 < error(wanted, linear(x)) < ROUNDING[precision] * 1.5


@pytest.mark.parametrize("precision", EIGHT)
def test_a_table_gives_its_rounded_rows(precision):
    table = nn.Embedding(20, 16).requires_grad_(False)
    made = RowScaledEmbedding(table, precision, FP32)
    made.hold(table.weight)
    ids = torch.tensor([[3, 0, 3, 19]])
    meant = made.weight.float() * made.weight_scale[:, None]
    assert torch.equal(made(ids), meant[ids])
    assert RowScaledEmbedding(table, precision, BF16)(ids).dtype == BF16


# -- the text encoder -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", EIGHT)
def test_embeddings_are_those_of_the_rounded_weights(precision):
    """Of a trained encoder, and within what rounding its weights explains."""
    folder = NANO_FOLDER / TEXT_FOLDER
    exact = load_text_encoder(folder, CPU, FP32)
    made = load_text_encoder(folder, CPU, FP32, precision)
    meant = load_text_encoder(folder, CPU, FP32)
    for name, module in made.model.named_modules():
        if hasattr(module, "weight_scale"):
            rounded = module.weight.float() * module.weight_scale[:, None]
            meant.model.get_submodule(name).weight.data = rounded
    ids, _ = exact.tokenize(PROMPT)
    texts = [encoder.encode(ids) for encoder in (made, meant, exact)]
    assert error(texts[0], texts[1]) < 1e-3  # one scales the product, the other the weight
    assert 0 < error(texts[0], texts[2]) < 4 * ROUNDING[precision]
    kinds = {type(module).__name__ for module in made.model.modules()}
    assert {"RowScaledLinear", "RowScaledEmbedding"} <= kinds
    assert not {"Linear", "Embedding"} & kinds
    assert made.model.dtype == FP32  # which is that of the masks


@pytest.mark.parametrize("precision", ["bf16", *EIGHT])
def test_the_plan_counts_the_bytes_that_are_held(precision):
    folder = NANO_FOLDER / TEXT_FOLDER
    model = load_text_encoder(folder, CPU, BF16, precision).model.encoder
    part = weighed.text_part(folder, precision)
    layers = [
        sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) for layer in model.layers
    ]
    assert list(part.layer_bytes) == layers
    tables = {id(t) for t in model.rotary_emb.buffers()}  # of rotations, which are no weights
    held = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in tables]
    assert part.total_bytes == sum(t.nbytes for t in held)
    assert part.widened_bytes == (0 if precision == "bf16" else 2 * 128 * 256)


def test_eight_bits_take_half_of_the_published_size():
    sizes = {}
    for precision in ("bf16", *EIGHT):
        (part,) = (p for p in weighed.synthetic_parts(BF16, precision) if p.name == TEXT)
        sizes[precision] = round(part.total_bytes / 2**30, 1)
    assert sizes == {"bf16": 17.2, "int8": 8.6, "fp8": 8.6}


def smallest() -> nn.Module:
    """An encoder of two layers."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 32)
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes["head_dim"] = 16
    return T5GemmaEncoderModel(
        T5GemmaConfig(encoder=sizes, decoder=dict(sizes), is_encoder_decoder=False)
    )


@pytest.mark.parametrize("precision", EIGHT)
def test_random_weights_are_rounded_as_they_are_drawn(precision):
    wide = random_weights.drawn_text_model(smallest, 5, CPU, BF16)
    made = random_weights.drawn_text_model(smallest, 5, CPU, BF16, precision)
    for key, value in wide.named_parameters():
        found = made.get_submodule(key.rpartition(".")[0]).weight
        wanted = quantize_rows(value, precision)[0] if value.ndim == 2 else value
        assert torch.equal(found.float(), wanted.float()), key
    with torch.device("meta"):
        sketch = narrowed(with_tables(smallest(), CPU), precision, BF16)
    assert made.state_dict().keys() == sketch.state_dict().keys()


@pytest.mark.parametrize("precision", ["bf16", *EIGHT])
def test_random_layers_are_drawn_when_they_are_asked_for(precision):
    """So that the first can be at rest before there is a second, which a small limit asks for."""
    given = smallest, 5, CPU, BF16, precision
    model, layers = random_weights.drawn_text_layers(*given)

    def missing() -> set[str]:
        held = (*model.named_parameters(), *model.named_buffers())
        return {key for key, value in held if value.is_meta}

    stem = random_weights.TEXT_LAYERS
    assert {name[: len(stem) + 2] for name in missing()} == {f"{stem}.0", f"{stem}.1"}
    assert next(layers) is model.encoder.layers[0]
    assert {name[: len(stem) + 2] for name in missing()} == {f"{stem}.1"}
    assert list(layers) == [model.encoder.layers[1]] and not missing()
    wanted = random_weights.drawn_text_model(*given).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("precision", EIGHT)
def test_it_may_rest_and_be_streamed(precision):
    """As with little memory: layer by layer, from runs of bytes."""
    folder = NANO_FOLDER / TEXT_FOLDER
    encoder = load_text_encoder(folder, CPU, BF16, precision)
    ids, _ = encoder.tokenize(PROMPT)
    wanted = encoder.encode(ids)
    layers = encoder.model.encoder.layers
    moved = Offloaded(encoder.model, layers, CPU, range(len(layers)))
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: moved.before_layer(index))
    encoder.model.encoder.register_forward_hook(lambda *_: moved.before_layer(len(layers)))
    with moved.present():
        assert torch.equal(encoder.encode(ids), wanted)


def test_masks_of_captured_graphs_have_the_type_of_activations(monkeypatch):
    from magihuman.graphs.text import replay

    monkeypatch.setattr(replay.Captures, "__init__", lambda *arguments: None)
    encoder = load_text_encoder(NANO_FOLDER / TEXT_FOLDER, CPU, BF16, "fp8")
    encoder.model.config.encoder.sliding_window = 4096
    assert assemble.replayed(encoder, placement.Placer(None, CPU)).replayed._dtype == BF16


# -- load -------------------------------------------------------------------------------------


def test_load_takes_it_for_files_and_refuses_others(tiny_dir: Path):
    request = {"seconds": 0.2, "width": 64, "height": 64, "steps": 1}
    frames = {}
    for precision in (None, "bf16", "int8"):
        with runtime.load(tiny_dir, device="cpu", text_precision=precision) as engine:
            frames[precision] = engine.generate("hi", **request).frames
            kinds = {type(m).__name__ for m in engine._parts.text_encoder.model.modules()}
            assert ("RowScaledLinear" in kinds) == (precision == "int8")
    assert (frames[None] == frames["bf16"]).all() and (frames["int8"] != frames[None]).any()
    with pytest.raises(InvalidRequestError, match="text_precision must be one of None, 'bf16', 'i"):
        runtime.load(tiny_dir, device="cpu", text_precision="int4")


def test_parts_of_a_folder_take_it(tiny_dir: Path):
    folders = (tiny_dir / name for name in (TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER))
    parts = weighed.folder_parts(*folders, None, 2, False, "int8")
    (text,) = (part for part in parts if part.name == TEXT)
    assert text == weighed.text_part(tiny_dir / TEXT_FOLDER, "int8")
