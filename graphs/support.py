"""Whether a model can be compiled on a device, and if not, why."""

from __future__ import annotations

from importlib import util
from typing import Any

import torch

from magihuman.kernels.jit import nvrtc
from magihuman.kernels.target import (
    HOPPER_CAPABILITY,
    Capability,
    Kernels,
    Target,
    name_of,
    target_of,
)

MIN_CAPABILITY = (9, 0)  # the fused kernels are written and measured for Hopper
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
    whether attention is over fp8 q, k and v. kernels: of which set, as of `target_of`.
    """
    reason = _why_no_kernels(device)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"the kernels compute in bf16, not {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in HEAD_DIMS:
        return f"the kernels take heads of 32, 64 or 128, not {config.head_dim}"
    target = target_of(kernels, device)
    if fp8:
        reason = _why_no_fp8_products(target, torch.cuda.get_device_capability(device))
    if reason is None and (fp8_attention or config.local_attention_layers):
        from magihuman.kernels.attention import backends

        what = "fp8" if fp8_attention else "frame-local"
        reason = backends.why_not(backends.local_for(target), config.head_dim, device)
        return None if reason is None else f"{what} attention has one kernel, and {reason}"
    return reason


def _why_no_fp8_products(target: Target, capability: Capability) -> str | None:
    """Why linears cannot have fp8 weights on a GPU of this capability."""
    if capability != HOPPER_CAPABILITY:
        return f"the fp8 kernels need sm_90, this GPU is {name_of(capability)}"
    if target.is_portable:
        return "there is no portable product of e4m3"
    if not nvrtc.is_available():
        return "the fp8 kernels need cuda-bindings: pip install 'magihuman[cuda]'"
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
    if capability < MIN_CAPABILITY:
        return f"the kernels need sm_90 or newer, this GPU is {name_of(capability)}"
    if util.find_spec("triton") is None:
        return "triton is not installed"
    return None
