"""Whether a model can be compiled on a device, and if not, why."""

from __future__ import annotations

from importlib import util
from typing import Any

import torch

MIN_CAPABILITY = (9, 0)  # the fused kernels are written and measured for Hopper
HEAD_DIMS = (32, 64, 128)


def why_not(config: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fused kernels cannot serve this architecture here; None where they can."""
    if device.type != "cuda":
        return "there is no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the kernels need sm_90 or newer, this GPU is sm_{capability[0]}{capability[1]}"
    if util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype != torch.bfloat16:
        return f"the kernels compute in bf16, not {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in HEAD_DIMS:
        return f"the kernels take heads of 32, 64 or 128, not {config.head_dim}"
    if config.local_attention_layers:
        return "frame-local attention has no fused kernel yet"
    return None
