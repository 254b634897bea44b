"""Video latents to frames, window by window."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from magihuman.kernels import reference as ref
from magihuman.runtime.config import video_frames
from magihuman.runtime.model.turbo_vae import TurboVAE


@torch.inference_mode()
def decode_frames(
    vae: TurboVAE, latent: Tensor, on_frames: Callable[[int, int], None] = lambda done, of: None
) -> npt.NDArray[np.uint8]:
    """[1, 48, T, H, W] normalised latents to uint8 [4 (T - 1) + 1, 16 H, 16 W, 3].

    One window is on the device at a time. `on_frames(done, of)` may raise to stop.
    """
    total = video_frames(latent.shape[2])
    parts: list[npt.NDArray[np.uint8]] = []
    done = 0
    on_frames(done, total)
    for window in vae.windows(latent):
        parts.append(ref.to_uint8(window)[0].cpu().numpy())
        done += len(parts[-1])
        on_frames(done, total)
    return np.concatenate(parts)
