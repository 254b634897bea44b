"""What a clip needs of a device's memory beside the weights, as an estimate, and what would fit."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
from pathlib import Path

import torch

from magihuman.graphs.cuda_graphs import pool
from magihuman.kernels.decoder.bands import LARGE_PIXELS
from magihuman.runtime import config
from magihuman.runtime.config import VIDEO_STRIDE
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.model import Layout
from magihuman.runtime.request import MIN_SECONDS, Request

# From peaks on an H100 at full size, rounded up: 6.5 GiB for 14762 tokens of the transformer, for
# each of them and each row of its widest linear; 7.6 GiB for decoding frames of 896x512, 34.6 GiB
# for those of 1920x1088. Compiled: 1.3 and, for 65706 tokens, 6.8 GiB; 4.5 and 19.7 GiB.
BYTES_PER_TOKEN_ROW = 18
BYTES_PER_TOKEN_ROW_COMPILED = 4.5
# Of inputs and velocities of the whole sequence, which every process of a team has: 192 channels of
# video and of its velocities, and a rotary table of 128, in fp32, as sent and where they are read.
BYTES_PER_SHARED_TOKEN = 2 * 4 * (192 + 192 + 128)
# Of the room that exchanges have, for each token of a process: 7208 columns of heads, 5120 of rows.
BYTES_PER_EXCHANGED_TOKEN = 2 * (7208 + 5120)
BYTES_PER_PIXEL = 35 * 2**9
BYTES_PER_DECODED_PIXEL = 28 * 3  # of the frames of a window
BESIDE_BAND = 8
# In how many bands a process decodes a window. More would read the same weights for ever less.
BANDS = (1, 2, 3, 4)
BYTES_PER_PIXEL_COMPILED = 10 * 2**10
# Estimates from the shapes: of an image's encoder at its widest; of the sound's decoder, whose last
# blocks hold 128 channels of 51,200 samples a second in fp32, about eight times over; of the text
# encoder over the longest prompt.
BYTES_PER_IMAGE_PIXEL = 4 * 2**10
BYTES_PER_SECOND_OF_SOUND = 51200 * 128 * 4 * 8
TEXT_BYTES = 2**29
# An estimate, too, of what the encoder's graphs keep, in bf16, once every bucket is captured. They
# share a pool: of the longest prompt it holds a layer at its widest (gate, up, their product, and
# the stream before and after two norms), and about as much again in blocks of shorter prompts that
# were captured before, too small for it. Each graph has an output of its own.
TEXT_CHANNELS, TEXT_MLP_CHANNELS = 3584, 14336  # of T5Gemma 9B
TEXT_LAYER_BYTES = 2 * (3 * TEXT_MLP_CHANNELS + 4 * TEXT_CHANNELS)  # for each token
TEXT_BUCKETS = range(pool.TEXT_BUCKET, config.MAX_TEXT_TOKENS + 1, pool.TEXT_BUCKET)
TEXT_GRAPHS_BYTES = 2 * config.MAX_TEXT_TOKENS * TEXT_LAYER_BYTES + 2 * TEXT_CHANNELS * sum(
    TEXT_BUCKETS
)
MEMINFO = Path("/proc/meminfo")
SMALLER = tuple(step / 10 for step in range(9, 0, -1))


def working_bytes(request: Request, variant: config.Variant, sr: str | None, rows: int) -> int:
    """Bytes of activations in the stage that needs most of them.

    rows: output rows of the transformer's widest linear, for one modality.
    """
    plan = request.plan(variant, sr)
    sides = [(plan.rows, plan.columns)]
    if plan.sr_rows is not None and plan.sr_columns is not None:
        sides.append((plan.sr_rows, plan.sr_columns))
    tokens = max(
        Layout(plan.frames, *side, plan.audio, config.MAX_TEXT_TOKENS).tokens for side in sides
    )
    return max(denoising_bytes(tokens, rows), decoding_bytes(*plan.size_px))


def denoising_bytes(tokens: int, rows: int, is_compiled: bool = False, ranks: int = 1) -> int:
    """Bytes of activations in one forward of the transformer.

    rows: as for `working_bytes`. ranks: processes that share it, of which one's bytes are meant: it
    has its own tokens in every layer, and as many rows of the heads that it attends with.
    """
    per_row = BYTES_PER_TOKEN_ROW_COMPILED if is_compiled else BYTES_PER_TOKEN_ROW
    own = -(-tokens // ranks)
    shared = tokens * BYTES_PER_SHARED_TOKEN + own * BYTES_PER_EXCHANGED_TOKEN
    return int(own * rows * per_row) + (shared if ranks > 1 else 0)


def decoding_bytes(
    width: int, height: int, is_compiled: bool = False, ranks: int = 1, bands: int = 1
) -> int:
    """Bytes that decoding one window of frames of this many pixels takes.

    ranks: processes that share it, of which the first's bytes are meant. Each decodes a window, or
    where that is large a band, and the first holds what all have made. bands: of the window, that
    one process decodes one after another, and holds all that they have made.
    """
    whole = width * height * (BYTES_PER_PIXEL_COMPILED if is_compiled else BYTES_PER_PIXEL)
    frames = width * height * BYTES_PER_DECODED_PIXEL
    if ranks > 1 and width * height <= LARGE_PIXELS:
        return whole + (ranks + 1) * frames
    if max(ranks, bands) == 1:
        return whole
    # What is beside a band, of latents, where the most memory is taken.
    part = 1 / max(ranks, bands) + BESIDE_BAND * VIDEO_STRIDE[1] / max(width, height)
    return int(min(1.0, part) * whole) + 3 * frames


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return pool.free_bytes(device)
    try:  # pages of files that can be let go of count as free
        available = re.search(
            r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(encoding="ascii"), re.MULTILINE
        )
    except OSError:  # not on Linux
        available = None
    if available is not None:
        return 1024 * int(available[1])
    return host_bytes()[1]


class _WindowsMemory(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = [
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        *(
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "files", "files_free", "space", "space_free", "extended")
        ),
    ]


def host_bytes() -> tuple[int, int]:
    """Bytes of this machine's memory, and of those that are free, as the system tells."""
    if hasattr(os, "sysconf"):
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        # macOS tells of no free pages.
        has_free = "SC_AVPHYS_PAGES" in os.sysconf_names
        return total, page * os.sysconf("SC_AVPHYS_PAGES") if has_free else total
    status = _WindowsMemory(length=ctypes.sizeof(_WindowsMemory))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.total), int(status.free)


def advice(request: Request, variant: config.Variant, sr: str | None, rows: int, free: int) -> str:
    """What was asked, what is free, and the largest clips that fit it, by the estimate."""

    def fits(other: Request) -> bool:
        try:
            return working_bytes(other, variant, sr, rows) <= free
        except InvalidRequestError:  # smaller than is made
            return False

    needed = working_bytes(request, variant, sr, rows)
    said = (
        f"{_text(request, variant, sr)} takes about {_size(needed)} beside the weights, and"
        f" {_size(free)} are free now"
    )
    if needed <= free:
        return f"{said}, so that it may fit once whatever else held memory has let go; try again"
    shorter = (
        dataclasses.replace(request, seconds=max(MIN_SECONDS, round(request.seconds * share, 1)))
        for share in SMALLER
    )
    smaller = (_scaled(request, variant, sr, share) for share in SMALLER)
    fitting = [next(filter(fits, others), None) for others in (shorter, filter(None, smaller))]
    options = [_text(other, variant, sr) for other in fitting if other is not None]
    if not options:
        return f"{said}; by this estimate no clip fits: free memory, or use a larger device"
    return f"{said}; by this estimate {' or '.join(options)} would fit"


def _scaled(
    request: Request, variant: config.Variant, sr: str | None, share: float
) -> Request | None:
    """The request with both sides of every size so much shorter."""
    width, height = int(request.width * share), int(request.height * share)
    try:
        if sr is None:
            return dataclasses.replace(request, width=width, height=height)
        sr_width, sr_height = (int(side * share) for side in request.plan(variant, sr).size_px)
        return dataclasses.replace(
            request, width=width, height=height, sr_width=sr_width, sr_height=sr_height
        )
    except InvalidRequestError:  # a side below the least
        return None


def _text(request: Request, variant: config.Variant, sr: str | None) -> str:
    width, height = request.plan(variant, sr).size_px
    return f"{request.seconds:g} s of {width}x{height}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
