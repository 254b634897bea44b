"""One transformer: where its weights come from, and the precision in which they are held here."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from magihuman.graphs.quantization import KEEP_NONE, KeepBf16, dequantize_model, quantized_linears
from magihuman.graphs.support import why_not
from magihuman.kernels.target import Kernels
from magihuman.runtime.config import DiTConfig, Variant
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.model import DiT
from magihuman.runtime.weights import artifacts, checkpoint, layouts
from magihuman.runtime.weights.artifacts import Artifact
from magihuman.runtime.weights.precision import PrecisionPolicy
from magihuman.runtime.weights.reading import exists

log = logging.getLogger("magihuman")


@dataclass(frozen=True)
class TransformerOptions:
    """What the caller asks of every transformer.

    Attributes:
        device: that it runs on.
        precision: None for that of its files.
        keep_bf16: the linears that stay bf16 beside 8 bits; None for those of its files, else none.
        compile: whether it runs as captured graphs of fused kernels, where the device can.
        ranks: processes that share its heads.
        kernels: "auto" or "portable", as of `load`.
    """

    device: torch.device
    precision: PrecisionPolicy | None = None
    keep_bf16: KeepBf16 | None = None
    compile: bool = True
    ranks: int = 1
    kernels: Kernels = "auto"


@dataclass(frozen=True)
class TransformerSpec:
    """How one transformer will be held on the device.

    Attributes:
        variant: that it is.
        config: its architecture.
        folder: its files; None for random weights.
        artifact: what the folder holds where that is no published checkpoint.
        precision: that it runs in.
        quantized: the linears in 8 bits, by name.
        why_bf16: why the 8-bit weights of its files cannot be used as they are.
    """

    variant: Variant
    config: DiTConfig
    folder: Path | None
    artifact: Artifact | None
    precision: PrecisionPolicy
    quantized: tuple[str, ...] = ()
    why_bf16: str | None = None

    @property
    def linear(self) -> torch.dtype:
        """Dtype of the block linears that are not in 8 bits."""
        return self.precision.linear_dtype

    @property
    def quantized_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each linear in 8 bits, by name."""
        narrow = self.precision.narrow
        return {} if narrow is None else dict.fromkeys(self.quantized, narrow)

    @property
    def stored(self) -> PrecisionPolicy:
        """The precision of its files: what they were converted to, "fp8" with scales, or "bf16"."""
        if self.artifact is not None:
            return self.artifact.precision
        return PrecisionPolicy.FP8 if self.stored_quantized else PrecisionPolicy.BF16

    @property
    def stored_quantized(self) -> tuple[str, ...]:
        """The linears that its files have in 8 bits as they are used here, by name."""
        if self.artifact is not None:
            return self.artifact.quantized
        return () if self.folder is None else _held_in_fp8(self.folder)

    @property
    def device_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return dit_bytes(self.config, self.linear, self.quantized)

    def scan(self) -> dict[str, checkpoint.TensorInfo]:
        """Every tensor on disk, from file headers; raises where names or shapes do not fit."""
        if self.artifact is not None:
            return artifacts.scan(self.artifact)
        assert self.folder is not None
        tensors, source = checkpoint.scan(self.folder), str(self.folder)
        checkpoint.sketched(self.config, layouts.split(tensors, source).weights, source)
        return tensors

    @property
    def layout(self) -> str:
        """In which layout its files are, for people; empty for random weights."""
        if self.artifact is not None:
            return f"converted, {self.artifact.precision}"
        if self.folder is None:
            return ""
        name = layouts.find(self.folder).name
        return f"{name}, fp8 with scales" if self.stored_quantized else name

    def read(
        self,
        device: torch.device,
        on_read: checkpoint.OnRead = lambda done, total: None,
        rest: torch.device | None = None,
    ) -> DiT:
        """The model on the device, or, with its weights at rest, elsewhere."""
        if self.artifact is None:
            assert self.folder is not None
            model = checkpoint.load_dit(
                self.folder,
                self.variant,
                device,
                self.linear,
                on_read,
                self.quantized_dtypes,
                rest,
            )
        else:
            model = artifacts.load(self.artifact, rest or device, on_read)
        if self.why_bf16 is not None:
            log.warning(
                "the %s weights of %s run as bf16, rounded as they are: %s",
                self.stored,
                self.variant.name,
                self.why_bf16,
            )
            dequantize_model(model)
        return model


def plan(variant: Variant, folder: Path | None, options: TransformerOptions) -> TransformerSpec:
    """How a transformer will be held, before any of its weights is read.

    Raises:
        InvalidRequestError: it cannot be held as asked, on this device or from these files.
        CheckpointError: an artifact is stale, partial or another's.
    """
    artifact, config, held = None, variant.architecture(DiTConfig()), tuple[str, ...]()
    folder = None if folder is None else layouts.nested(folder, variant)
    if folder is not None and artifacts.is_artifact(folder):
        artifact = artifacts.read_manifest(folder, variant.name)
        config = artifact.config
    elif folder is not None:
        config, held = checkpoint.dit_config(folder, variant), _held_in_fp8(folder)
    if config.kv_heads % options.ranks:
        heads = config.kv_heads
        fitting = [str(count) for count in range(1, heads + 1) if heads % count == 0]
        raise InvalidRequestError(
            f"context_parallel must divide the transformer's key/value heads, {heads}, got"
            f" {options.ranks}; use {' or '.join(fitting)}"
        )
    stored = PrecisionPolicy.FP8 if held else PrecisionPolicy.BF16
    stored = stored if artifact is None else artifact.precision
    precision = options.precision or stored
    if artifact is not None and precision.weights is not stored:
        raise InvalidRequestError(
            f"precision must be {stored!r}, as the artifact's {artifact.folder}, got {precision!r};"
            " leave it out, or convert the published files to another"
        )
    if not precision.needs_kernels:
        return TransformerSpec(variant, config, folder, artifact, precision)

    as_held = held if precision.weights is stored else ()  # others are converted, all of them
    quantized = _quantized(config, options.keep_bf16, artifact, as_held)
    reason: str | None = "compile=False asks for the plain one"
    if options.compile:
        reason = why_not(
            config,
            precision.linear_dtype,
            options.device,
            fp8=precision.is_fp8,
            fp8_attention=precision.is_fp8_attention,
            kernels=options.kernels,
        )
    if reason is None:
        return TransformerSpec(variant, config, folder, artifact, precision, quantized)
    if artifact is None and (options.precision is not None or not held):
        raise InvalidRequestError(
            f"precision={precision!r} needs the compiled transformer, and for {variant.name}"
            f" {reason}; use precision='bf16'"
        )
    return TransformerSpec(variant, config, folder, artifact, PrecisionPolicy.BF16, why_bf16=reason)


def _held_in_fp8(folder: Path) -> tuple[str, ...]:
    """The linears that published names have in fp8 with scales, as it is used here."""
    tensors = checkpoint.scan(folder) if exists(folder) else {}
    return layouts.fp8_linears(tensors, str(folder))


def _quantized(
    config: DiTConfig,
    keep_bf16: KeepBf16 | None,
    artifact: Artifact | None,
    held: tuple[str, ...] = (),
) -> tuple[str, ...]:
    if artifact is not None and keep_bf16 is None:
        return artifact.quantized
    if held and keep_bf16 is None:
        return held
    names = linears_in_8_bits(config, KEEP_NONE if keep_bf16 is None else keep_bf16)
    if artifact is not None and set(names) != set(artifact.quantized):
        raise InvalidRequestError(
            f"keep_bf16 must be that of the artifact {artifact.folder}, got {keep_bf16!r}; leave it"
            " out, or convert the published files again"
        )
    return names


def linears_in_8_bits(config: DiTConfig, keep_bf16: KeepBf16) -> tuple[str, ...]:
    """The linears that are in 8 bits; `InvalidRequestError` where `keep_bf16` names none."""
    try:
        return tuple(quantized_linears(config, keep_bf16))
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error


def dit_bytes(config: DiTConfig, linear: torch.dtype, quantized: Collection[str] = ()) -> int:
    """Bytes of a DiT: block linears in `linear` or, with their scales, in 8 bits, the rest fp32."""
    outside, layers = layered_bytes(config, linear, quantized)
    return outside + sum(layers)


def layered_bytes(
    config: DiTConfig, linear: torch.dtype, quantized: Collection[str] = ()
) -> tuple[int, tuple[int, ...]]:
    """The bytes of `dit_bytes` split: those in no layer, and those of each layer."""
    return _layered_bytes(config, linear, tuple(quantized))


@functools.lru_cache(maxsize=16)
def _layered_bytes(
    config: DiTConfig, linear: torch.dtype, quantized: tuple[str, ...]
) -> tuple[int, tuple[int, ...]]:
    with torch.device("meta"):
        state = DiT(config, linear).state_dict()
    sizes = {key: value.nbytes for key, value in state.items()}
    stored = artifacts.layout(config, quantized)
    for name in quantized:
        sizes[f"{name}.weight"] = stored[f"{name}.weight"].size_bytes
        sizes[name + artifacts.SCALE] = stored[name + artifacts.SCALE].size_bytes
    layers = tuple(
        sum(size for key, size in sizes.items() if key.startswith(f"block.layers.{layer}."))
        for layer in range(config.num_layers)
    )
    return sum(sizes.values()) - sum(layers), layers
