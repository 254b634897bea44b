"""What a precision means: which dtypes it has, what of it is in 8 bits, and what it needs."""

from __future__ import annotations

from enum import StrEnum

import torch

from magihuman.kernels.reference import FP8, INT8
from magihuman.runtime.errors import one_of


class PrecisionPolicy(StrEnum):
    """The precision of a transformer, under the name that callers, manifests and reports have.

    A member equals its name and is written to JSON as it, so that only this class says what a name
    means.
    """

    BF16 = "bf16"
    FP32 = "fp32"
    FP8 = "fp8"
    FP8_ATTENTION = "fp8-attn"
    INT8 = "int8"

    @classmethod
    def of(cls, name: str) -> PrecisionPolicy:
        """The policy of a name that a caller gave.

        Raises:
            InvalidRequestError: there is none of that name.
        """
        one_of("precision", name, tuple(cls))
        return cls(name)

    @property
    def narrow(self) -> torch.dtype | None:
        """Dtype of the block linears in 8 bits, with an fp32 scale for each output row; None where
        there are none.
        """
        if self is PrecisionPolicy.INT8:
            return INT8
        return FP8 if self.is_fp8 else None

    @property
    def is_fp8(self) -> bool:
        """Whether block linears have e4m3 weights."""
        return self in (PrecisionPolicy.FP8, PrecisionPolicy.FP8_ATTENTION)

    @property
    def is_fp8_attention(self) -> bool:
        """Whether attention takes e4m3 queries, keys and values."""
        return self is PrecisionPolicy.FP8_ATTENTION

    @property
    def linear_dtype(self) -> torch.dtype:
        """Dtype of the block linears that are not in 8 bits."""
        return torch.float32 if self is PrecisionPolicy.FP32 else torch.bfloat16

    @property
    def needs_kernels(self) -> bool:
        """Whether it runs by fused kernels alone, not by the plain model."""
        return self.narrow is not None

    @property
    def weights(self) -> PrecisionPolicy:
        """The precision whose converted weights it runs on: fp8 attention takes those of fp8."""
        return PrecisionPolicy.FP8 if self.is_fp8 else self

    @property
    def flops(self) -> float:
        """Operations a second of large products on an H100, roughly, for estimates of time."""
        if self.narrow is not None:
            return 1e15
        return 5e13 if self is PrecisionPolicy.FP32 else 6e14

    def vae_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of the autoencoders for images.

        The published pipeline runs them in bf16. On a CPU fp32 is both exact and faster.
        """
        is_bf16 = device.type == "cuda" and self is not PrecisionPolicy.FP32
        return torch.bfloat16 if is_bf16 else torch.float32

    def __repr__(self) -> str:
        return repr(self.value)
