"""Seeded random weights: the full-size model without files, and tiny checkpoints.

Every tensor is drawn from its own generator, seeded by the tensor's name, on the device that holds
it: the same seed and device kind give the same weights whatever else is built. Scales keep
activations finite through all layers. What comes out of such a model is noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from magihuman.graphs.quantization import quantize_linear
from magihuman.runtime.config import (
    BASE_VARIANTS,
    DiTConfig,
    TextPrecision,
    TurboVAEConfig,
    Variant,
)
from magihuman.runtime.errors import one_of
from magihuman.runtime.model import (
    DiT,
    ImageVAE,
    Norm,
    Oobleck,
    OobleckConfig,
    Rope,
    Snake,
    TextEncoder,
    TurboVAE,
    narrowed,
    put,
    uncapped,
    wan_vae,
    with_tables,
)
from magihuman.runtime.weights.checkpoint import frozen, undrawn
from magihuman.runtime.weights.quiet import quiet_diffusers

Module = TypeVar("Module", bound=nn.Module)

WAN_BASE_DIM = 160  # width of the published image encoder
TEXT_LAYERS = "encoder.layers"  # of T5Gemma
AUDIO_GAIN = 0.55  # snake adds up to 1 to every channel; keeps the waveform within about [-1, 1]


@dataclass(frozen=True)
class Synthetic:
    """Stands in for a model directory in `load`: full-size components, seeded random weights."""

    variant: str = "distill"
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("variant", self.variant, BASE_VARIANTS)


def randomize(module: Module, seed: int, name: str = "") -> Module:
    """Fill every parameter in place: by fan-in, norms near their neutral value."""
    depth = _depth(module)
    for key, parameter in module.named_parameters():
        owner = module.get_submodule(key.rpartition(".")[0])
        _fill(parameter, key, owner, depth, f"{seed}:{name}")
    return frozen(module)


def _depth(module: nn.Module) -> int:
    """The number of layers of a DiT, known by its norms; 1 for another model."""
    return max(1, sum(isinstance(owner, Norm) for owner in module.modules()) // 4)


@torch.no_grad()
def _fill(parameter: Tensor, key: str, owner: nn.Module, depth: int, seed: str) -> None:
    """Draw one tensor in place, from its generator."""
    generator = torch.Generator(parameter.device)
    generator.manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
    scale, centre = _distribution(key, parameter, owner, depth)
    parameter.normal_(0.0, scale, generator=generator).add_(centre)


def _distribution(key: str, parameter: Tensor, owner: nn.Module, depth: int) -> tuple[float, float]:
    """(standard deviation, mean) of one tensor."""
    if isinstance(owner, (Norm, Snake)):
        return 0.1, 0.0
    if key.endswith("gamma"):  # Wan's norms
        return 0.1, 1.0
    if parameter.ndim == 1:
        return 0.02, 0.0
    fan_in = parameter[0].numel()
    if isinstance(owner, nn.ConvTranspose1d):
        fan_in = parameter.shape[0] * parameter.shape[2] // owner.stride[0]
    scale = fan_in**-0.5
    if isinstance(owner, (nn.Conv1d, nn.ConvTranspose1d)):
        scale *= AUDIO_GAIN
    if key.endswith(("linear_proj.weight", "down_proj.weight")):
        scale *= (2 * depth) ** -0.5  # 2 depth terms are added to the residual stream
    return float(scale), 0.0


def dit(
    config: DiTConfig, seed: int, device: torch.device, linear_dtype: torch.dtype, name: str
) -> DiT:
    """A DiT of any size."""

    def build() -> DiT:
        model = DiT(config, linear_dtype)
        with torch.device(device):
            model.adapter.rope = Rope(config.rope_bands)
        return model

    return randomize(undrawn(build, device), seed, name)


def dit_by_layer(
    config: DiTConfig,
    seed: int,
    device: torch.device,
    linear_dtype: torch.dtype,
    name: str,
    quantized: Mapping[str, torch.dtype] | None = None,
) -> tuple[DiT, Iterator[nn.Module]]:
    """As `dit`, with some linears in 8 bits, of the dtypes given by name, and its layers, each of
    which gets its weights when it is asked for: so it can go elsewhere before the next is made.
    """
    with torch.device("meta"):
        model = DiT(config, linear_dtype)
    with torch.device(device):
        model.adapter.rope = Rope(config.rope_bands)
    depth = _depth(model)

    def make(prefix: str, module: nn.Module) -> None:
        for key in [key for key, parameter in module.named_parameters() if parameter.is_meta]:
            path, _, last = key.rpartition(".")
            owner = module.get_submodule(path)
            value = torch.empty_like(owner.get_parameter(last), device=device)
            _fill(value, prefix + key, owner, depth, f"{seed}:{name}")
            dtype = (quantized or {}).get((prefix + key).removesuffix(".weight"))
            if dtype is not None:
                quantize_linear(owner, value, dtype=dtype)
            else:
                setattr(owner, last, nn.Parameter(value, requires_grad=False))

    def layers() -> Iterator[nn.Module]:
        for index, layer in enumerate(model.block.layers):
            make(f"block.layers.{index}.", layer)
            yield layer

    for path, module in model.named_children():
        if module is not model.block:
            make(f"{path}.", module)
    return frozen(model), layers()


def full_dit(variant: Variant, seed: int, device: torch.device, linear_dtype: torch.dtype) -> DiT:
    """A DiT of the published size."""
    return dit(variant.architecture(DiTConfig()), seed, device, linear_dtype, variant.name)


def turbo_vae(
    config: TurboVAEConfig, seed: int, device: torch.device, dtype: torch.dtype
) -> TurboVAE:
    """A Turbo VAE decoder."""
    return randomize(undrawn(lambda: TurboVAE(config), device), seed, "turbo_vae").to(dtype)


def audio_vae(config: OobleckConfig, seed: int, device: torch.device) -> Oobleck:
    """An Oobleck autoencoder."""
    return randomize(undrawn(lambda: Oobleck(config), device), seed, "audio_vae")


def image_model() -> Any:
    """A Wan VAE encoder of the published size; its constructor draws its weights, if they are not
    on the device meta.
    """
    vae = wan_vae(WAN_BASE_DIM)
    del vae.decoder, vae.post_quant_conv
    return vae


def image_vae(seed: int, device: torch.device, dtype: torch.dtype) -> ImageVAE:
    """A Wan VAE encoder of the published size."""
    vae = undrawn(image_model, device, torch.float32)
    with quiet_diffusers():
        return ImageVAE(randomize(vae, seed, "image_vae").to(dtype))


def text_encoder(
    seed: int, device: torch.device, dtype: torch.dtype, precision: TextPrecision = "bf16"
) -> tuple[TextEncoder, Iterator[nn.Module]]:
    """A T5Gemma encoder of the size of t5gemma-9b-9b-ul2, with a tokenizer of one token a byte; and
    its layers, as those of `drawn_text_layers`.
    """
    model, layers = drawn_text_layers(text_model, seed, device, dtype, precision)
    return TextEncoder(byte_tokenizer(), model), layers


def drawn_text_model(
    build: Callable[[], Module],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    precision: TextPrecision = "bf16",
) -> Module:
    """The encoder that `build` makes, with random weights on the device."""
    model, layers = drawn_text_layers(build, seed, device, dtype, precision)
    for _ in layers:
        pass
    return model


def drawn_text_layers(
    build: Callable[[], Module],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    precision: TextPrecision = "bf16",
) -> tuple[Module, Iterator[nn.Module]]:
    """As `drawn_text_model`, and its layers, each of which gets its weights when it is asked for:
    so it can go elsewhere before the next is made. In 8 bits each weight is rounded before the next
    is drawn.
    """
    with torch.device("meta"):
        model = with_tables(build(), device)
    depth = _depth(model)
    drawn = [
        (key, parameter, model.get_submodule(key.rpartition(".")[0]))
        for key, parameter in model.named_parameters()
    ]
    if precision != "bf16":
        narrowed(model, precision, dtype)

    def make(some: Iterable[tuple[str, nn.Parameter, nn.Module]]) -> None:
        for key, parameter, owner in some:
            value = torch.empty_like(parameter, dtype=dtype, device=device)
            _fill(value, key, owner, depth, f"{seed}:text_encoder")
            put(model, key, value)

    def layers() -> Iterator[nn.Module]:
        for index, layer in enumerate(cast("nn.ModuleList", model.get_submodule(TEXT_LAYERS))):
            prefix = f"{TEXT_LAYERS}.{index}."
            make(each for each in drawn if each[0].startswith(prefix))
            yield layer

    make(each for each in drawn if not each[0].startswith(f"{TEXT_LAYERS}."))
    return frozen(model), layers()


def text_model() -> Any:
    """The encoder alone; its constructor draws its weights, if they are not on the device meta."""
    from transformers import T5GemmaEncoderModel

    return uncapped(T5GemmaEncoderModel(text_config()))


def text_config() -> Any:
    """Of the published encoder, and of a decoder like it, which transformers wants."""
    from transformers import T5GemmaConfig

    sizes = {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
    }
    return T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes), is_encoder_decoder=False)


def byte_tokenizer() -> Any:
    """A tokenizer that needs no files: one token a byte, special tokens as T5Gemma has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
