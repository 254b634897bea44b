"""The norms before the two heads: rows of video and of audio, each under its own weight, in one
launch.

Bytes per element of those rows: 4 read and 4 written; rows of text are neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magihuman.kernels import reference as ref
from magihuman.kernels.jit.language import tl, triton

MAX_CHANNELS = 16384  # a row is held in registers


@torch.library.custom_op("magihuman::head_norm", mutates_args=())
def head_norm(
    x: Tensor, video_weight: Tensor, audio_weight: Tensor, modality_rows: list[int]
) -> tuple[Tensor, Tensor]:
    """Compute `reference.head_norm` of x [N, C] fp32: rows of video and of audio, fp32."""
    if x.is_cuda:
        return norm_rows(x, video_weight, audio_weight, modality_rows)
    video, audio, text = modality_rows
    return ref.head_norm(x, video_weight, audio_weight, (video, audio, text))


@head_norm.register_fake
def _(
    x: Tensor, video_weight: Tensor, audio_weight: Tensor, modality_rows: list[int]
) -> tuple[Tensor, Tensor]:
    return x.new_empty(modality_rows[0], x.shape[1]), x.new_empty(modality_rows[1], x.shape[1])


@triton.jit
def _store_piece(value, scale, weight, out, columns, channels):
    mask = columns < channels
    gain = tl.load(weight + columns, mask=mask, other=0.0) + 1.0
    tl.store(out + columns, value * scale * gain, mask=mask)


@triton.jit
def _head_norm(
    x,
    video_weight,
    audio_weight,
    video_out,
    audio_out,
    video_rows,
    channels,
    eps,
    HEAD: tl.constexpr,  # largest power of two not above channels
    TAIL: tl.constexpr,  # power of two that covers the rest, or 0
):
    """A row; programs are [rows of video and audio]."""
    row = tl.program_id(0).to(tl.int64)
    x += row * channels
    if row < video_rows:
        weight = video_weight
        out = video_out + row * channels
    else:
        weight = audio_weight
        out = audio_out + (row - video_rows) * channels
    head = tl.arange(0, HEAD)
    first = tl.load(x + head, mask=head < channels, other=0.0)
    total = tl.sum(first * first)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        second = tl.load(x + tail, mask=tail < channels, other=0.0)
        total += tl.sum(second * second)
    scale = tl.rsqrt(total / channels + eps)
    _store_piece(first, scale, weight, out, head, channels)
    if TAIL > 0:
        _store_piece(second, scale, weight, out, tail, channels)


def norm_rows(
    x: Tensor, video_weight: Tensor, audio_weight: Tensor, modality_rows: list[int]
) -> tuple[Tensor, Tensor]:
    """`reference.head_norm`, by the kernel.

    Args:
        x: [N, C] fp32 contiguous, the residual stream, C at most 16384.
        video_weight, audio_weight: [C] fp32, zero-centred.
        modality_rows: rows of video, audio and text; any may be 0.

    Returns:
        The normed rows of video and of audio, fp32, of which each has memory of its own.

    Raises `ValueError` where C is larger, or N is not the sum of the rows. Written for H100 at
    C = 5120.
    """
    rows, channels = x.shape
    if channels > MAX_CHANNELS:
        raise ValueError(f"channels must be at most {MAX_CHANNELS}, got {channels}")
    if sum(modality_rows) != rows:
        raise ValueError(f"rows by modality must add up to {rows}, got {modality_rows}")
    video, audio, _ = modality_rows
    outs = x.new_empty(video, channels), x.new_empty(audio, channels)
    if video + audio:
        head = 1 << (channels.bit_length() - 1)
        rest = channels - head
        _head_norm[(video + audio,)](
            x, video_weight, audio_weight, *outs, video, channels, ref.NORM_EPS,
            HEAD=head,
            TAIL=triton.next_power_of_2(rest) if rest else 0,
            num_warps=8 if head >= 4096 else 4,
        )  # fmt: skip
    return outs
