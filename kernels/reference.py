"""Every fusable block of the transformer, once, as a small plain-torch function; those of the video
decoder are in `decoder/reference.py`.

The models call these functions; a graph rewrite traces them to obtain its pattern; the test of a
fused kernel compares against them. Source of the maths: daVinci-MagiHuman, arXiv 2603.21986,
section 3, and its published weights.

Rows are tokens. The sequence holds all video tokens, then audio, then text, so each modality is
one run of rows; `counts` = (video, audio, text) gives the runs. `counts=None` means one set of
weights for all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Counts = tuple[int, int, int]

NORM_EPS = 1e-6
ACTIVATION_LIMIT = 7.0
ACTIVATION_ALPHA = 1.702
QUERY_BLOCK = 512  # queries at a time in the CPU's attention
FP8 = torch.float8_e4m3fn
FP8_LIMIT = 448.0  # largest magnitude of e4m3: OCP 8-bit floating point specification, table 1
INT8 = torch.int8
INT8_LIMIT = 127.0  # -128 is not used, so that both signs have the same range
LIMITS = {FP8: FP8_LIMIT, INT8: INT8_LIMIT}  # of the dtypes that operands in 8 bits have
STATIC_SCALES = {"swiglu7": 1 / 8, "gelu7": 1 / 64}  # their ends, 56 and 7, become the limit
# Kernels start rows of 8-bit values at multiples of it, as tensor maps and libraries want.
ROW_BYTES = 16
ROW_MULTIPLE = 128  # columns; products over rows that are not whole tiles run at a third the rate
FP8_KEYS = 128  # keys whose values share a scale in e4m3 attention
SMALLEST_VALUE = 2.0**-40  # what all values of such a block count as at least
PACKED_COLUMNS = 8  # rows that change processes start at multiples of so many values
# Of each 16 keys: a thread has these scores, two and two, where it has to have weights in a row.
VALUE_ORDER = [8 * pair + 2 * lane + i for lane in range(4) for pair in range(2) for i in range(2)]


class LocalAttention(NamedTuple):
    """Shape of frame-local attention."""

    frames: int  # latent frames
    frame_tokens: int  # video tokens of each
    reach: int  # frames seen each way


class Sharding(NamedTuple):
    """How several processes share a sequence: equal runs of its rows, one a process, and while they
    attend, all rows of an equal part of the heads.
    """

    counts: Counts  # of the whole sequence, text with the padding that makes runs equal
    ranks: int  # processes, in the order of their runs

    @classmethod
    def of(cls, counts: Counts, ranks: int) -> Sharding:
        """How `ranks` processes share a sequence of any length."""
        video, audio, text = counts
        return cls((video, audio, text + -sum(counts) % ranks), ranks)

    @property
    def rows(self) -> int:
        """Rows of each process."""
        return sum(self.counts) // self.ranks

    def own(self, rank: int) -> tuple[slice, slice, slice]:
        """Which of the video, audio and text rows one process has; some may be empty."""
        first, slices = rank * self.rows, []
        for count in self.counts:
            begin, end = (min(max(row, 0), count) for row in (first, first + self.rows))
            slices.append(slice(begin, end))
            first -= count
        return slices[0], slices[1], slices[2]

    def own_counts(self, rank: int) -> Counts:
        """How many rows of each modality one process has."""
        video, audio, text = (rows.stop - rows.start for rows in self.own(rank))
        return video, audio, text


def padded_width(width: int) -> int:
    """Columns of rows that are padded to whole tiles, `width` of them with values and then zeros:
    `width`, rounded up to a multiple of `ROW_MULTIPLE`.
    """
    return -(-width // ROW_MULTIPLE) * ROW_MULTIPLE


def run_starts(counts: Counts | None, rows: int) -> tuple[int, int]:
    """First row of audio and of text; without counts, past the end: all rows are of one run."""
    return (rows, rows) if counts is None else (counts[0], counts[0] + counts[1])


def per_modality(
    fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, counts: Counts | None
) -> Tensor:
    """`fn(rows, weight)` of each modality's rows with its third of `weight`, stacked on dim 0."""
    if counts is None:
        return fn(x, weight)
    parts = zip(x.split(counts), weight.chunk(3), strict=True)
    return torch.cat([fn(rows, third) for rows, third in parts])


def rms_norm(x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
    """`x * rsqrt(mean(x^2) + 1e-6) * (weight + 1)` over the last dim, in fp32.

    x: [N, ..., C] any float dtype; weight: [C], or [3 C] with `counts`, fp32, zero-centred.
    Returns fp32 of x's shape.
    """
    if x.dtype != torch.float32:
        x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)
    return per_modality(lambda rows, gain: rows * (gain + 1), x, weight, counts)


def linear(x: Tensor, weight: Tensor, counts: Counts | None = None) -> Tensor:
    """Matrix product over operands in the weight's dtype, no bias, rounded to that dtype once.

    x: [N, in]; weight: [out, in], or [3 out, in] with `counts`. Sums are fp32: tensor cores do so
    by themselves; on the CPU the rounded operands are widened first, since its bf16 products differ
    from one instruction set to the next.
    """
    return per_modality(_matmul, x.to(weight.dtype), weight, counts)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight^T` in the weight's dtype, from sums in fp32."""
    if weight.device.type == "cpu":
        return F.linear(x.float(), weight.float()).to(weight.dtype)
    return F.linear(x, weight)


def quantize_rows(x: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits with a scale each: `scale = max |x| / limit`, `values = round(x / scale)`.

    The limit is that of the dtype in `LIMITS`: 448 of e4m3, 127 of int8.

    x: [N, C] any float dtype, finite. Returns values [N, C] of the dtype, float8_e4m3fn or int8,
    rounded to nearest even and never NaN, and scale [N] fp32, positive and normal: a row below
    limit * 2^-126 shares that of zeros. Of a row that is not finite int8 tells by its scale alone,
    which then is not finite either. e4m3: OCP 8-bit floating point specification, section 5.
    """
    x = x.float()
    # Products with reciprocals: a GPU's division by a number is one too, a CPU's is not.
    scale = (x.abs().amax(-1) * (1 / LIMITS[dtype])).clamp(min=torch.finfo(torch.float32).tiny)
    # Beyond the limit by a rounding of the factor at most, of which some conversions make NaN.
    return _narrow(x * scale.reciprocal()[:, None], dtype), scale


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of any shape in 8 bits; what is beyond the limit becomes the limit."""
    x = x.clamp(-LIMITS[dtype], LIMITS[dtype])
    return x.round().nan_to_num(0.0).to(dtype) if dtype == INT8 else x.to(dtype)


def dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    """`values * scale` of each row. values: [N, C] e4m3 or int8; scale: [N]. Returns fp32."""
    return values.float() * scale[:, None]


def scaled_linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Counts | None
) -> Tensor:
    """`values @ weight^T * scale * weight_scale`: `linear` of two operands from `quantize_rows`.

    values: [N, K] and weight: [M, K], or [3 M, K] with `counts`, both float8_e4m3fn or both int8;
    scale: [N] and weight_scale: [M] or [3 M], fp32. Returns [N, M] bf16, rounded once from sums in
    fp32. Of integers those are exact up to 2^24; a kernel's, in int32, always are.
    """
    product = per_modality(lambda x, third: x @ third.T, values.float(), weight.float(), counts)
    product = product * scale[:, None]
    return per_modality(lambda x, third: x * third, product, weight_scale, counts).bfloat16()


def rope_table(coords: Tensor, bands: Tensor) -> Tensor:
    """Rotary angles as `[sin | cos]`.

    coords: [N, 9] fp32, (t, h, w), sizes (T, H, W), reference sizes (Tr, Hr, Wr); bands: [B] fp32.
    Per axis the scale is (ref - 1) / (size - 1), or 1 where the size is 1, which leaves nothing to
    scale; h and w are centred, t is not. Returns [N, 6 B] fp32: sines of all bands of t, then h,
    then w; then as many cosines.
    """
    position, size, reference = coords.split(3, dim=-1)
    scale = torch.where(size == 1, 1.0, (reference - 1) / (size - 1))
    is_centred = torch.tensor([0.0, 1.0, 1.0], dtype=coords.dtype, device=coords.device)
    centre = (size - 1) / 2 * is_centred
    angle = ((position - centre) * scale)[..., None] * bands  # [N, 3, B]
    return torch.cat((angle.sin(), angle.cos()), dim=1).flatten(1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Half-split rotation of the first `rope.shape[1]` dims of each head; the rest passes through.

    x: [N, heads, D] fp32; rope: [N, R], `[sin | cos]` of R / 2 angles. Angle k turns dims k and
    k + R / 2.
    """
    rotated = rope.shape[-1]
    sin, cos = rope[:, None].chunk(2, dim=-1)  # [N, 1, R / 2]
    first, second = x[..., :rotated].chunk(2, dim=-1)
    return torch.cat(
        (first * cos - second * sin, second * cos + first * sin, x[..., rotated:]), dim=-1
    )


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, counts: Counts | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sandwich: `delta` joins the fp32 residual stream x, which is then normed to `dtype`.

    x: [N, C] fp32; delta: [N, C] or None; weight: [C] or [3 C]. Returns the stream and the norm.
    """
    if delta is not None:
        x = x + delta
    return x, rms_norm(x, weight, counts).to(dtype)


def head_norm(
    x: Tensor, video_weight: Tensor, audio_weight: Tensor, counts: Counts
) -> tuple[Tensor, Tensor]:
    """What the two heads read: the stream's rows of video and of audio, normed by weights of their
    own; rows of text end here.

    x: [N, C] fp32; weights: [C] fp32, zero-centred. Returns fp32 [video, C] and [audio, C].
    """
    video, audio, _ = x.split(counts)
    return rms_norm(video, video_weight), rms_norm(audio, audio_weight)


def split_qkv(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    counts: Counts | None,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts of the fused projection: q and k, normed per head and rotated, v, head gates.

    qkv: [N, (heads + 2 kv_heads) D + heads], rows [Q | K | V | gate]; weights: [D] or [3 D]; rope:
    [N, R]. Returns q [N, heads, D], k and v [N, kv_heads, D], gate [N, heads], in qkv's dtype.
    """
    dim = (qkv.shape[1] - heads) // (heads + 2 * kv_heads)
    q, k, v, gate = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim, heads], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in (q, k, v))
    q = qk_norm_rotary(q, q_weight, rope, counts, qkv.dtype)
    k = qk_norm_rotary(k, k_weight, rope, counts, qkv.dtype)
    # A copy of v: library attention on a GPU gives wrong numbers, and no error, for rows that do
    # not start at multiples of 16 bytes, as those of a narrow projection need not.
    return q, k, v.contiguous(), gate


def packed_width(columns: int, ranks: int) -> int:
    """Values in a row of a projection of so many columns that one of the processes gets."""
    return -(-columns // ranks // PACKED_COLUMNS) * PACKED_COLUMNS


def pack_heads(qkv: Tensor, heads: int, kv_heads: int, ranks: int) -> Tensor:
    """A projection's columns by the process that attends with them.

    qkv: [S, (heads + 2 kv_heads) D + heads], rows [Q | K | V | gate]. Returns [ranks, S, W]: of
    each part an equal run of heads, in the same order, then zeros up to a multiple of
    `PACKED_COLUMNS`.
    """
    dim = (qkv.shape[1] - heads) // (heads + 2 * kv_heads)
    parts = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim, heads], dim=-1)
    packed = torch.cat([part.unflatten(1, (ranks, -1)) for part in parts], dim=2)
    width = packed_width(qkv.shape[1], ranks)
    return F.pad(packed, (0, width - packed.shape[2])).transpose(0, 1).contiguous()


def unpack_heads(x: Tensor) -> Tensor:
    """Columns of several processes side by side: [ranks, S, C] -> [S, ranks C]."""
    return x.transpose(0, 1).flatten(1)


def qk_norm_rotary(
    x: Tensor, weight: Tensor, rope: Tensor, counts: Counts | None, dtype: torch.dtype
) -> Tensor:
    """Per-head norm, then rotation, both in fp32. x: [N, heads, D]; weight: [D] or [3 D]."""
    return rotate(rms_norm(x, weight, counts), rope).to(dtype)


def qkv_fp8(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    length: Tensor,
    counts: Counts | None,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of `split_qkv` in e4m3, as tensor cores take them.

    Scales of q and k are static, from what bounds them: a normed head's dims are at most
    sqrt(D) max |weight + 1|, rotated or not. Values have a scale for each head and block of
    `FP8_KEYS` keys, `max |v| / 448`; those from `length` on are zeros.

    Returns:
        q [N, heads, D]; k [N, kv_heads, D]; v [kv_heads, D, keys], keys whole blocks, each 16 of
        them in the order of `VALUE_ORDER`; scale [1] of q times k; scales [kv_heads, blocks] of v.
    """
    q, k, v, _ = split_qkv(qkv.float(), q_weight, k_weight, rope, counts, heads, kv_heads)
    root = q.shape[-1] ** 0.5
    scales = [
        ((weight + 1).abs().max() * (root / FP8_LIMIT)).clamp(min=SMALLEST_VALUE)
        for weight in (q_weight, k_weight)
    ]
    q, k = (_narrow(x * scale.reciprocal(), FP8) for x, scale in zip((q, k), scales, strict=True))
    rows = len(v)
    v = torch.where(torch.arange(rows, device=v.device)[:, None, None] < length, v, 0)
    v = F.pad(v, (0, 0, 0, 0, 0, -rows % FP8_KEYS)).permute(1, 2, 0)
    blocks = v.unflatten(2, (-1, FP8_KEYS))  # [kv_heads, D, blocks, keys]
    v_scale = blocks.abs().amax((1, 3)).clamp(min=SMALLEST_VALUE) * (1 / FP8_LIMIT)
    v = _narrow(blocks * v_scale.reciprocal()[:, None, :, None], FP8).flatten(2)
    v = _reordered(v, torch.tensor(VALUE_ORDER, device=v.device))
    return q, k, v, (scales[0] * scales[1]).view(1), v_scale


def _reordered(values: Tensor, order: Tensor) -> Tensor:
    """e4m3 values [kv_heads, D, keys] with each 16 keys in this order."""
    codes = values.view(torch.uint8).unflatten(2, (-1, 16))  # which index as e4m3 does not
    return codes[..., order].flatten(2).view(values.dtype)


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: Tensor,
    v_scale: Tensor,
    gate: Tensor,
    length: Tensor,
    local: LocalAttention | None = None,
) -> Tensor:
    """`gated_attention` of what `qkv_fp8` returns, weights of the softmax in e4m3 too.

    Of each row's weights the largest is 2^8 when they are rounded; their sum is that before.
    Arguments as `qkv_fp8` returns them; gate: [N, heads]; length and local as for `attention`.
    Returns [N, heads, D] in gate's dtype.
    """
    rows = len(k)
    values = _reordered(v, torch.tensor(VALUE_ORDER, device=v.device).argsort())
    values = values.float().unflatten(2, (-1, FP8_KEYS)) * v_scale[:, None, :, None]
    values = values.flatten(2)[..., :rows].permute(2, 0, 1)  # [N, kv_heads, D]
    q, k, v = (x.transpose(0, 1) for x in (q.float() * qk_scale, k.float(), values))
    valid = torch.arange(rows, device=k.device) < length
    attend = functools.partial(_blockwise_attention, weights_of=_weights_in_e4m3)
    return head_gate(_ranges(q, k, v, local, valid, attend), gate).to(gate.dtype)


def _weights_in_e4m3(scores: Tensor) -> Tensor:
    """Softmax of scores [heads, queries, keys] fp32 over weights rounded to e4m3."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return _narrow(weights * 256, FP8).float() / (256 * weights.sum(-1, keepdim=True))


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    local: LocalAttention | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """`attention`, each head scaled by its gate [N, heads]. Returns [N, heads, D] in q's dtype."""
    return head_gate(attention(q, k, v, local, length), gate)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: LocalAttention | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped key/value heads, scale D^-0.5, no mask.

    With `local`, video tokens of frame f see the video tokens of frames f - reach .. f + reach
    (clipped) and every audio and text token, under one softmax; audio and text tokens see
    everything. With `length`, tokens from there on are padding: nothing sees them, and their own
    rows mean nothing.

    Args:
        q: [N, heads, D].
        k: [N, kv_heads, D]; query head h reads key head h // (heads / kv_heads).
        v: like k.
        local: shape of frame-local attention, or None for all tokens.
        length: int scalar tensor, or None for N.

    Returns:
        [N, heads, D] in q's dtype; sums are fp32 over the inputs as given.
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, N, D]
    valid = None if length is None else torch.arange(k.shape[1], device=k.device) < length
    is_wide = local is not None and q.device.type == "cpu"
    return _ranges(q, k, v, local, valid, _blockwise_attention if is_wide else _fused_attention)


def _ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: LocalAttention | None,
    valid: Tensor | None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """`attend` for each frame with the keys that it sees; [heads, N, D] to [N, heads, D]."""
    if local is None:
        return attend(q, k, v, valid).transpose(0, 1)
    frames, frame_tokens, reach = local
    video = frames * frame_tokens
    parts = []
    for frame in range(frames):
        rows = slice(frame * frame_tokens, (frame + 1) * frame_tokens)
        first, last = max(frame - reach, 0), min(frame + reach + 1, frames)
        near = slice(first * frame_tokens, last * frame_tokens)
        keys, values = (torch.cat((x[:, near], x[:, video:]), dim=1) for x in (k, v))
        seen = None if valid is None else torch.cat((valid[near], valid[video:]))
        parts.append(attend(q[:, rows], keys, values, seen))
    parts.append(attend(q[:, video:], k, v, valid))
    return torch.cat(parts, dim=1).transpose(0, 1)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Attention by PyTorch's kernels, in fp32 on the CPU, where that of bf16 rounds the weights.

    q: [heads, N, D]; k, v: [kv_heads, keys, D]; valid: [keys] bool, or None for all keys. Returns
    [heads, N, D] in q's dtype.
    """
    dtype = q.dtype
    if q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()
    mask = None if valid is None else valid.expand(1, 1, q.shape[1], -1)
    out: Tensor = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
    )
    return out[0].to(dtype)


def _softmax(scores: Tensor) -> Tensor:
    """Weights of scores [heads, queries, keys]; each row of keys adds up to 1."""
    return scores.softmax(-1)


def _blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    weights_of: Callable[[Tensor], Tensor] = _softmax,
) -> Tensor:
    """The definition in fp32, a block of queries at a time so that memory stays linear in N.

    Arguments and result as those of `_fused_attention`; weights_of: scores to weights.
    """
    group = q.shape[0] // k.shape[0]
    keys, values = (x.float().repeat_interleave(group, dim=0) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    parts = []
    for rows in range(0, q.shape[1], QUERY_BLOCK):
        scores = q[:, rows : rows + QUERY_BLOCK].float() @ keys.transpose(1, 2) * scale
        if valid is not None:
            scores = scores.masked_fill(~valid, float("-inf"))
        parts.append((weights_of(scores) @ values).to(q.dtype))
    return torch.cat(parts, dim=1) if parts else torch.empty_like(q)


def head_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Each head times the sigmoid of its gate, in fp32, in x's dtype.

    x: [N, heads, D]; gate: [N, heads].
    """
    return (x.float() * gate.float().sigmoid()[..., None]).to(x.dtype)


def swiglu7(x: Tensor) -> Tensor:
    """Clamped SwiGLU in fp32: g = min(glu, 7), l = clamp(lin, -7, 7), `g sigmoid(1.702 g) (l + 1)`.

    x: [N, 2 M], glu in the even columns and lin in the odd ones. Returns [N, M] in x's dtype, of
    magnitude 56 at most.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    glu = pairs[..., 0].clamp(max=ACTIVATION_LIMIT)
    lin = pairs[..., 1].clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    return (glu * torch.sigmoid(ACTIVATION_ALPHA * glu) * (lin + 1)).to(x.dtype)


def gelu7(x: Tensor) -> Tensor:
    """Clamped sigmoid GELU in fp32: y = min(x, 7), `y sigmoid(1.702 y)`.

    Returns shape and dtype of x, of magnitude 7 at most.
    """
    y = x.float().clamp(max=ACTIVATION_LIMIT)
    return (y * torch.sigmoid(ACTIVATION_ALPHA * y)).to(x.dtype)
