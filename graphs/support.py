"""Whether a model can be compiled on a device, and if not, why."""

from __future__ import annotations

from importlib import util
from typing import Any

import torch

from magihuman.kernels.jit import nvrtc
from magihuman.kernels.target import (
    E4M3_FROM,
    PORTABLE_FROM,
    Capability,
    Kernels,
    Target,
    name_of,
    target_of,
)

HEAD_DIMS = (32, 64, 128)


def why_not(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp8: bool = False,
    fp8_attention: bool = False,
    kernels: Kernels = "auto",
) -> str | None:
    """Why the fused kernels cannot serve this architecture here; None where they can.

    fp8: whether linears have fp8 weights; those left have weights in `dtype`. fp8_attention:
    whether attention is over fp8 q, k and v. kernels: of which set, as of `target_of`. Weights in
    int8 need nothing that those in bf16 do not.
    """
    reason = _why_no_kernels(device)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"the kernels compute in bf16, not {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in HEAD_DIMS:
        return f"the kernels take heads of 32, 64 or 128, not {config.head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if fp8_attention and capability < E4M3_FROM:
        return f"fp8 attention needs sm_89 or newer, this GPU is {name_of(capability)}"
    return _why_no_fp8_products(target_of(kernels, device), capability) if fp8 else None


def _why_no_fp8_products(target: Target, capability: Capability) -> str | None:
    """Why linears cannot have fp8 weights on a GPU of this capability."""
    if capability < E4M3_FROM:
        return f"the fp8 kernels need sm_89 or newer, this GPU is {name_of(capability)}"
    if not target.is_portable and not nvrtc.is_available():
        return (
            "the fp8 kernels need cuda-bindings: pip install 'magihuman[cuda]', or use"
            " kernels='portable'"
        )
    return None


def why_not_decode(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused kernels cannot decode video here; None where they can."""
    reason = _why_no_kernels(device)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"it is made for bf16, not {str(dtype).removeprefix('torch.')}"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch is built without cuDNN"
    return None


def _why_no_kernels(device: torch.device) -> str | None:
    """Why no fused kernel runs here, whatever it computes."""
    if device.type != "cuda":
        return "there is no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < PORTABLE_FROM:
        return f"the kernels need sm_80 or newer, this GPU is {name_of(capability)}"
    if util.find_spec("triton") is None:
        return "triton is not installed"
    return None
