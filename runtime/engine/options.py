"""What a caller asks of `load`, and the checks that need neither files nor a device."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, get_args

import torch

from magihuman.graphs.quantization import KEEP_NONE, KeepBf16
from magihuman.kernels.target import Kernels
from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError, one_of
from magihuman.runtime.hooks import Hooks
from magihuman.runtime.memory import check_limit
from magihuman.runtime.weights import (
    AUDIO_FOLDER,
    IMAGE_FOLDER,
    TEXT_FOLDER,
    TURBO_FOLDER,
    PathLike,
    PrecisionPolicy,
    Synthetic,
    TransformerOptions,
)

OnLoad = Callable[[str, int, int], None]  # (component, bytes done, bytes in all)


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of `load`, whose docstring describes each.

    Other processes of a team are sent them by pickle, see `for_others`.
    """

    model: PathLike | Synthetic
    variant: str | None = None
    sr: str | None = None
    precision: config.Precision | None = None
    keep_bf16: KeepBf16 | None = None
    compile: bool = True
    kernels: Kernels = "auto"
    vae: config.Vae | None = None
    device: str | torch.device | None = None
    revision: str | None = None
    transformer: PathLike | None = None
    sr_transformer: PathLike | None = None
    turbo_vae: PathLike | None = None
    text_encoder: PathLike | None = None
    audio_vae: PathLike | None = None
    image_vae: PathLike | None = None
    memory_limit_gb: float | None = None
    on_load: OnLoad | None = None
    queue_limit: int = 64
    hooks: Sequence[Hooks] = ()
    debug: bool = False
    context_parallel: int = 1
    text_precision: config.TextPrecision | None = None

    def for_others(self) -> Self:
        """The options for the processes that follow rank 0: without its device and callbacks."""
        return dataclasses.replace(self, device=None, on_load=None, hooks=())

    @property
    def name(self) -> str:
        """The model's name: a hub id as it is, of a path the last part."""
        if isinstance(self.model, Synthetic):
            return "synthetic"
        model = os.fspath(self.model)
        return os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model

    @property
    def base(self) -> config.Variant:
        """The variant of the base transformer."""
        return config.VARIANTS[self._variant]

    @property
    def upscaler(self) -> config.Variant | None:
        """The variant of the super-resolution transformer, if one is asked for."""
        return None if self.sr is None else config.upscaler(self.sr)

    @property
    def overrides(self) -> dict[str, PathLike | None]:
        """The path that was given for each component, by the component's published folder."""
        paths = {
            self.base.name: self.transformer,
            TURBO_FOLDER: self.turbo_vae,
            TEXT_FOLDER: self.text_encoder,
            AUDIO_FOLDER: self.audio_vae,
            IMAGE_FOLDER: self.image_vae,
        }
        if self.upscaler is not None:
            paths[self.upscaler.name] = self.sr_transformer
        return paths

    def for_transformers(self, device: torch.device) -> TransformerOptions:
        """What is asked of both transformers, on this device."""
        ranks = self.context_parallel
        return TransformerOptions(
            device, self._policy, self.keep_bf16, self.compile, ranks, self.kernels
        )

    @property
    def held_text(self) -> config.TextPrecision:
        """The precision of the text encoder."""
        return self.text_precision or "bf16"

    def vae_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of the autoencoders for images, on this device."""
        return (self._policy or PrecisionPolicy.BF16).vae_dtype(device)

    def check(self) -> None:
        """Raise `InvalidRequestError` for a value that is not allowed, or not beside another."""
        one_of("variant", self._variant, config.BASE_VARIANTS)
        if type(self.queue_limit) is not int or self.queue_limit < 0:
            raise InvalidRequestError(
                f"queue_limit must be a whole number from 0 up, got {self.queue_limit!r}"
            )
        one_of("sr", self.sr, (None, *config.SR_SIZES))
        one_of("kernels", self.kernels, get_args(Kernels))
        if self.sr is None and self.sr_transformer is not None:
            raise InvalidRequestError(
                f"sr_transformer must go with sr, got {os.fspath(self.sr_transformer)!r} without"
            )
        one_of("text_precision", self.text_precision, (None, *get_args(config.TextPrecision)))
        self._check_vae()
        self._check_precision()
        if isinstance(self.model, Synthetic) and self._variant != self.model.variant:
            raise InvalidRequestError(
                f"variant must be {self.model.variant!r}, as the synthetic model's, got"
                f" {self._variant!r}"
            )
        check_limit(self.memory_limit_gb)

    def check_together(self) -> None:
        """Raise `InvalidRequestError` for what GPUs that work together cannot have."""
        ranks = self.context_parallel
        if type(ranks) is not int or ranks < 1:
            raise InvalidRequestError(
                f"context_parallel must be a whole number from 1 up, got {ranks!r}"
            )
        if self.memory_limit_gb is not None:
            raise InvalidRequestError(
                "memory_limit_gb must go with context_parallel=1, got"
                f" {self.memory_limit_gb!r} with {ranks}: GPUs that work together hold all"
                " weights; leave one of the two out"
            )
        if self.vae == "tensorrt":
            raise InvalidRequestError(
                f"vae='tensorrt' must go with context_parallel=1, got {ranks}; use vae='fast' or"
                " 'plain'"
            )

    @property
    def _variant(self) -> str:
        if self.variant is not None:
            return self.variant
        return self.model.variant if isinstance(self.model, Synthetic) else "distill"

    @property
    def _policy(self) -> PrecisionPolicy | None:
        return None if self.precision is None else PrecisionPolicy.of(self.precision)

    def _check_vae(self) -> None:
        if self.vae is not None:
            one_of("vae", self.vae, get_args(config.Vae))
        is_synthetic = isinstance(self.model, Synthetic)
        if self.vae == "tensorrt" and (self.turbo_vae is None or is_synthetic):
            raise InvalidRequestError(
                "vae='tensorrt' must go with a model directory and turbo_vae, a folder of engines,"
                f" got {self.model!r} and {self.turbo_vae!r}; magihuman export writes one"
            )

    def _check_precision(self) -> None:
        is_narrow = self._policy is not None and self._policy.narrow is not None
        if not is_narrow and self.keep_bf16 not in (None, KEEP_NONE):
            raise InvalidRequestError(
                f"keep_bf16 must go with precision='fp8', 'fp8-attn' or 'int8', got"
                f" {self.keep_bf16!r} with {self.precision!r}"
            )
