"""A convolution of a video as the own product over rows that are pixels.

A video with zeros around each frame is a matrix of pixels by channels in which a tap of the
convolution is a distance of rows. So the product for all pixels at once, those of the border
included, whose results mean nothing, is a sum over the taps of products of shifted rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from magihuman.kernels import nvrtc
from magihuman.kernels.matmul_sm90 import ARCH, Tile, matmul, source

DEPTH = 64  # channels in come in multiples of it
TILES = {
    "256x64 rows": Tile(columns=64, blocks=2),
    "256x64 rows in pairs": Tile(columns=64, blocks=2, cluster_rows=2),
    "256x128 rows": Tile(columns=128, blocks=2),
    "256x128 rows in pairs": Tile(columns=128, blocks=2, cluster_rows=2),
    "128x256 rows": Tile(columns=256, blocks=1),
    "128x256 rows in pairs": Tile(columns=256, blocks=1, cluster_rows=2),
    "128x16 rows": Tile(columns=16, blocks=1),
    "256x16 rows": Tile(columns=16, blocks=2),
}


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Why this convolution cannot be a product of rows; None where it can."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] != 9:
        return "it is written for sm_90"
    if not nvrtc.is_available():
        return "cuda-bindings, or the compiler that it loads, is not installed"
    if x.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {x.dtype}"
    if weight.shape[1] % DEPTH or weight.shape[0] % 8:
        return f"channels must be multiples of {DEPTH} in and 8 out, not {tuple(weight.shape[:2])}"
    return None


def tiles_for(channels: int) -> list[str]:
    """Routes that suit so many channels out."""
    return [
        name
        for name, tile in TILES.items()
        if channels % tile.columns == 0 and (tile.columns >= min(channels, 128))
    ]


def compile_tiles(tiles: Iterable[tuple[str, int]]) -> None:
    """Compile (route, number of taps) side by side, and keep the code on disk."""
    sources = [source(TILES[name], "store", False, torch.bfloat16, taps) for name, taps in tiles]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda text: nvrtc.compile_cubin(text, ARCH), sources))


def conv(x: Tensor, weight: Tensor, route: str) -> Tensor:
    """The convolution of x without padding.

    Args:
        x: [B, C, T, H, W] bf16 in `channels_last_3d`, what pads it included.
        weight: [out, C, kt, kh, kw] bf16 in `channels_last_3d`.
        route: one of `TILES`.

    Returns:
        [B, out, T - kt + 1, H - kh + 1, W - kw + 1] bf16, pixels of a line one after another.
    """
    batch, channels, frames, height, width = x.shape
    out_channels, _, *kernel = weight.shape
    rows = x.permute(0, 2, 3, 4, 1).view(-1, channels)
    taps = weight.permute(0, 2, 3, 4, 1).reshape(out_channels, -1)
    shifts = tuple(
        (t * height + y) * width + z
        for t in range(kernel[0])
        for y in range(kernel[1])
        for z in range(kernel[2])
    )
    # The last pixel's rows end where x ends; rows beyond would be of no pixel.
    out = torch.empty((len(rows), out_channels), dtype=x.dtype, device=x.device)
    matmul(rows, taps, out[: len(rows) - shifts[-1]], None, "store", TILES[route], shifts=shifts)
    video = out.view(batch, frames, height, width, out_channels).permute(0, 4, 1, 2, 3)
    sizes = (n - k + 1 for n, k in zip((frames, height, width), kernel, strict=True))
    t, y, z = sizes
    return video[:, :, :t, :y, :z]
