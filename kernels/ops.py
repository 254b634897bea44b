"""Fused kernels as PyTorch operators, `torch.ops.magihuman.*`.

A kernel that is added now declares its operator in its own file, as `head_norm.py` does. Those
over int8 operands are in `int8.py`.

On a GPU an operator launches its kernel; on the CPU it computes the reference, so that a rewritten
graph runs, and can be tested, anywhere.

`modality_rows` are the rows of video, audio and text among those given, or empty for one set of
weights; `attended_rows` are the same for what is computed between two exchanges, where several
processes share a sequence and these are rows of all of it. Rewritten graphs are made for other
lengths by these names.

`route` and `backend` say which of several kernels a GPU is to launch. Passes leave both `UNSET`,
since the shape is not known then: the CPU computes the reference all the same, a GPU refuses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magihuman.kernels import reference as ref
from magihuman.kernels.jit import UNSET
from magihuman.kernels.linear import scaled
from magihuman.kernels.linear.scaled import runs_of as _runs


def _local(local: list[int]) -> ref.LocalAttention | None:
    return ref.LocalAttention(*local) if local else None


@torch.library.custom_op("magihuman::add_norm", mutates_args=())
def add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, modality_rows: list[int]
) -> tuple[Tensor, Tensor]:
    """Compute `reference.add_norm`, with the norm in delta's dtype.

    x: [N, C] fp32; delta: [N, C]; weight: [C] or [3 C] fp32. Returns the new stream and the norm.
    """
    if x.is_cuda:
        from magihuman.kernels.add_rms_norm import add_rms_norm

        return add_rms_norm(x, delta, weight, _runs(modality_rows), delta.dtype)
    return ref.add_norm(x, delta, weight, _runs(modality_rows), delta.dtype)


@add_norm.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, modality_rows: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(delta)


@torch.library.custom_op("magihuman::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, modality_rows: list[int], dtype: torch.dtype) -> Tensor:
    """Compute `reference.rms_norm` of x [N, C] fp32, rounded to `dtype`."""
    if x.is_cuda:
        from magihuman.kernels.add_rms_norm import add_rms_norm

        return add_rms_norm(x, None, weight, _runs(modality_rows), dtype)[1]
    return ref.rms_norm(x, weight, _runs(modality_rows)).to(dtype)


@norm.register_fake
def _(x: Tensor, weight: Tensor, modality_rows: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("magihuman::quantize_fp8", mutates_args=())
def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantize_rows` of x [N, C].

    Rows of values start at multiples of 16 bytes, with zeros between them.
    """
    return scaled.quantize(x, ref.FP8)


@quantize_fp8.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return scaled.empty_rows(x, ref.FP8)


@torch.library.custom_op("magihuman::norm_fp8", mutates_args=())
def norm_fp8(x: Tensor, weight: Tensor, modality_rows: list[int]) -> tuple[Tensor, Tensor]:
    """Compute `quantize_fp8` of `reference.rms_norm` of x [N, C] fp32, not rounded between."""
    return scaled.norm(x, weight, modality_rows, ref.FP8)


@norm_fp8.register_fake
def _(x: Tensor, weight: Tensor, modality_rows: list[int]) -> tuple[Tensor, Tensor]:
    return scaled.empty_rows(x, ref.FP8)


@torch.library.custom_op("magihuman::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    attended_rows: list[int],
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute q, k and v of `reference.split_qkv`, all contiguous."""
    if qkv.is_cuda:
        from magihuman.kernels.attention import qk_norm_rope as kernel

        return kernel.qk_norm_rope(
            qkv, q_weight, k_weight, rope, _runs(attended_rows), heads, kv_heads
        )
    parts = ref.split_qkv(qkv, q_weight, k_weight, rope, _runs(attended_rows), heads, kv_heads)
    q, k, v = (part.clone(memory_format=torch.contiguous_format) for part in parts[:3])
    return q, k, v


@qk_norm_rope.register_fake
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    attended_rows: list[int],
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dim = (qkv.shape[1] - heads) // (heads + 2 * kv_heads)
    q, k, v = (qkv.new_empty(qkv.shape[0], count, dim) for count in (heads, kv_heads, kv_heads))
    return q, k, v


@torch.library.custom_op("magihuman::qkv_fp8", mutates_args=())
def qkv_fp8(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    length: Tensor,
    attended_rows: list[int],
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `reference.qkv_fp8`: q, k and v in e4m3, and their scales."""
    arguments = (qkv, q_weight, k_weight, rope, length, _runs(attended_rows), heads, kv_heads)
    if qkv.is_cuda:
        from magihuman.kernels.attention import qkv_fp8 as kernel

        return kernel.qkv_fp8(*arguments)
    return ref.qkv_fp8(*arguments)


@qkv_fp8.register_fake
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    length: Tensor,
    attended_rows: list[int],
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = qkv.shape[0]
    dim = (qkv.shape[1] - heads) // (heads + 2 * kv_heads)
    blocks = -(-rows // ref.FP8_KEYS)
    shapes = (rows, heads, dim), (rows, kv_heads, dim), (kv_heads, dim, blocks * ref.FP8_KEYS)
    q, k, v = (qkv.new_empty(shape, dtype=ref.FP8) for shape in shapes)
    scale = qkv.new_empty(1, dtype=torch.float32)
    return q, k, v, scale, qkv.new_empty((kv_heads, blocks), dtype=torch.float32)


@torch.library.custom_op("magihuman::gated_attention_fp8", mutates_args=())
def gated_attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: Tensor,
    v_scale: Tensor,
    gate: Tensor,
    length: Tensor,
    local: list[int],
    backend: str = UNSET,
) -> Tensor:
    """Compute `reference.attention_fp8` over the first `length` keys, contiguous, by this backend.

    local: the fields of `reference.LocalAttention`, or empty.
    """
    if q.is_cuda:
        from magihuman.kernels.attention import backends

        scales = qk_scale, v_scale
        return backends.run_fp8(backend, q, k, v, scales, gate, length, _local(local))
    out = ref.attention_fp8(q, k, v, qk_scale, v_scale, gate, length, _local(local))
    return out.contiguous()


@gated_attention_fp8.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: Tensor,
    v_scale: Tensor,
    gate: Tensor,
    length: Tensor,
    local: list[int],
    backend: str = UNSET,
) -> Tensor:
    return torch.empty_like(q, dtype=gate.dtype)


@torch.library.custom_op("magihuman::gated_attention", mutates_args=())
def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    length: Tensor,
    local: list[int],
    backend: str = UNSET,
) -> Tensor:
    """Compute `reference.gated_attention` over the first `length` keys, by this backend.

    local: the fields of `reference.LocalAttention`, or empty.
    """
    if q.is_cuda:
        from magihuman.kernels.attention import backends

        return backends.run(backend, q, k, v, gate, length, _local(local))
    return ref.gated_attention(q, k, v, gate, _local(local), length).contiguous()


@gated_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    length: Tensor,
    local: list[int],
    backend: str = UNSET,
) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("magihuman::activation", mutates_args=())
def activation(x: Tensor, kind: str, padded: int) -> Tensor:
    """Compute `reference.swiglu7` or `gelu7`, by `kind`, in rows that zeros pad to `padded`
    columns.
    """
    if x.is_cuda:
        from magihuman.kernels.linear import activations as kernels

        return {"swiglu7": kernels.swiglu7, "gelu7": kernels.gelu7}[kind](x, padded)
    out = {"swiglu7": ref.swiglu7, "gelu7": ref.gelu7}[kind](x)
    return torch.nn.functional.pad(out, (0, padded - out.shape[1]))


@activation.register_fake
def _(x: Tensor, kind: str, padded: int) -> Tensor:
    return x.new_empty(x.shape[0], padded)


@torch.library.custom_op("magihuman::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, modality_rows: list[int], route: str = UNSET) -> Tensor:
    """Compute `reference.linear` by this route; x may have more columns than the weight, zeros.

    x: [N, K'], K' at least K; weight: [out, K] or [3 out, K], of row stride K' where K' is not K.
    """
    if x.is_cuda:
        from magihuman.kernels.linear import routes

        return routes.linear(x, weight, _runs(modality_rows), route)
    return ref.linear(x[:, : weight.shape[1]], weight, _runs(modality_rows))


@linear.register_fake
def _(x: Tensor, weight: Tensor, modality_rows: list[int], route: str = UNSET) -> Tensor:
    return x.new_empty(x.shape[0], scaled.columns_of(weight, modality_rows))


@torch.library.custom_op("magihuman::linear_activation", mutates_args=())
def linear_activation(
    x: Tensor, weight: Tensor, modality_rows: list[int], kind: str, padded: int, route: str = UNSET
) -> Tensor:
    """Compute `activation` of `linear`, rounded between the two as the plain model does."""
    if x.is_cuda:
        from magihuman.kernels.linear import routes

        return routes.linear_activation(x, weight, _runs(modality_rows), kind, padded, route)
    return activation(ref.linear(x, weight, _runs(modality_rows)), kind, padded)


@linear_activation.register_fake
def _(
    x: Tensor, weight: Tensor, modality_rows: list[int], kind: str, padded: int, route: str = UNSET
) -> Tensor:
    return x.new_empty(x.shape[0], padded)


# Returns the stream that it changes, so that a graph's edges alone give the order; the decorator
# above forbids that, a declaration does not.
torch.library.define(
    "magihuman::linear_add_",
    "(Tensor(a!) stream, Tensor x, Tensor weight, int[] modality_rows,"
    f' str route="{UNSET}") -> Tensor(a!)',
)


@scaled.kernel_of("magihuman::linear_add_")
def linear_add_(
    stream: Tensor, x: Tensor, weight: Tensor, modality_rows: list[int], route: str = UNSET
) -> Tensor:
    """Add `linear` to the fp32 stream [N, out] in place, and return the stream itself.

    PyTorch's product on a GPU is not rounded before that.
    """
    if x.is_cuda:
        from magihuman.kernels.linear import routes

        routes.linear_add(stream, x, weight, _runs(modality_rows), route)
        return stream
    return stream.add_(ref.linear(x[:, : weight.shape[1]], weight, _runs(modality_rows)))


@torch.library.register_fake("magihuman::linear_add_")
def _(
    stream: Tensor, x: Tensor, weight: Tensor, modality_rows: list[int], route: str = UNSET
) -> Tensor:
    return stream


@torch.library.custom_op("magihuman::linear_fp8", mutates_args=())
def linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str = UNSET,
) -> Tensor:
    """Compute `reference.scaled_linear` by this route, in bf16 rows that start at multiples of 16
    bytes.
    """
    return scaled.linear(x, x_scale, weight, weight_scale, modality_rows, route)


@linear_fp8.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str = UNSET,
) -> Tensor:
    return scaled.empty_product(x, scaled.columns_of(weight, modality_rows))


@torch.library.custom_op("magihuman::linear_activation_fp8", mutates_args=())
def linear_activation_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    kind: str,
    padded: int,
    out_dtype: torch.dtype,
    route: str = UNSET,
) -> Tensor:
    """Compute `activation` of `linear_fp8`, in bf16, or in e4m3 over `reference.STATIC_SCALES`."""
    return scaled.linear_activation(
        x, x_scale, weight, weight_scale, modality_rows, kind, padded, out_dtype, route
    )


@linear_activation_fp8.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    kind: str,
    padded: int,
    out_dtype: torch.dtype,
    route: str = UNSET,
) -> Tensor:
    return x.new_empty(x.shape[0], padded, dtype=out_dtype)


torch.library.define(
    "magihuman::linear_add_fp8_",
    "(Tensor(a!) stream, Tensor x, Tensor? x_scale, float scale_of_all, Tensor weight,"
    f' Tensor weight_scale, int[] modality_rows, str route="{UNSET}") -> Tensor(a!)',
)


@scaled.kernel_of("magihuman::linear_add_fp8_")
def linear_add_fp8_(
    stream: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    scale_of_all: float,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str = UNSET,
) -> Tensor:
    """Add `linear_fp8` to the fp32 stream [N, out] in place, and return the stream itself.

    Without x_scale all rows of x have one scale, `scale_of_all`.
    """
    scale = scale_of_all if x_scale is None else x_scale
    scaled.linear_add_(stream, x, scale, weight, weight_scale, modality_rows, route)
    return stream


@torch.library.register_fake("magihuman::linear_add_fp8_")
def _(
    stream: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    scale_of_all: float,
    weight: Tensor,
    weight_scale: Tensor,
    modality_rows: list[int],
    route: str = UNSET,
) -> Tensor:
    return stream
