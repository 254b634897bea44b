"""Whether a model can be compiled on a device, and if not, why."""

from __future__ import annotations

from importlib import util
from typing import Any

import torch

from magihuman.kernels.jit import nvrtc

MIN_CAPABILITY = (9, 0)  # the fused kernels are written and measured for Hopper
FP8_CAPABILITY = (9, 0)  # the fp8 product is written in instructions that only Hopper has
HEAD_DIMS = (32, 64, 128)


def why_not(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp8: bool = False,
    fp8_attention: bool = False,
) -> str | None:
    """Why the fused kernels cannot serve this architecture here; None where they can.

    fp8: whether linears have fp8 weights; those left have weights in `dtype`. fp8_attention:
    whether attention is over fp8 q, k and v.
    """
    reason = _why_no_kernels(device)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"the kernels compute in bf16, not {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in HEAD_DIMS:
        return f"the kernels take heads of 32, 64 or 128, not {config.head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if fp8 and capability != FP8_CAPABILITY:
        return f"the fp8 kernels need sm_90, this GPU is sm_{capability[0]}{capability[1]}"
    if fp8 and not nvrtc.is_available():
        return "the fp8 kernels need cuda-bindings: pip install 'magihuman[cuda]'"
    if fp8_attention or config.local_attention_layers:
        from magihuman.kernels.attention import backends

        what = "fp8" if fp8_attention else "frame-local"
        reason = backends.why_not(backends.LOCAL, config.head_dim, device)
        return None if reason is None else f"{what} attention has one kernel, and {reason}"
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
        return f"the kernels need sm_90 or newer, this GPU is sm_{capability[0]}{capability[1]}"
    if util.find_spec("triton") is None:
        return "triton is not installed"
    return None
