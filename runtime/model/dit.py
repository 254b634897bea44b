"""The single-stream transformer (arXiv 2603.21986, section 3), readable as its specification.

One class serves all four published variants; module names spell the 331 published keys. Nothing
here is written for speed: fast paths replace the functions of `kernels/reference.py` in a captured
graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from magihuman.kernels import reference as ref
from magihuman.kernels.parallel import exchange
from magihuman.runtime.config import DiTConfig

MODALITIES = (
    3  # video, audio, text; the order of rows in a sequence and of weights in modality layers
)


class Norm(nn.Module):
    """A zero-centred fp32 weight, stacked three times in modality layers."""

    def __init__(self, dim: int, experts: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim * experts, dtype=torch.float32))


class Linear(nn.Module):
    """A bias-free weight in the compute dtype, stacked three times in modality layers."""

    def __init__(self, fan_in: int, fan_out: int, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out * experts, fan_in, dtype=dtype))

    def forward(self, x: Tensor, counts: ref.Counts | None) -> Tensor:  # x: [N, in]
        return ref.linear(x, self.weight, counts)


class Attention(nn.Module):
    """[Q | K | V | gate] projection, per-head norm and rotation, gated attention, projection."""

    def __init__(self, config: DiTConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        experts = MODALITIES if layer in config.modality_layers else 1
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.is_local = layer in config.local_attention_layers
        self.pre_norm = Norm(config.hidden_size, experts)
        self.linear_qkv = Linear(config.hidden_size, config.qkv_rows, experts, dtype)
        self.q_norm = Norm(config.head_dim, experts)
        self.k_norm = Norm(config.head_dim, experts)
        self.linear_proj = Linear(
            config.heads * config.head_dim, config.hidden_size, experts, dtype
        )

    def forward(
        self,
        x: Tensor,  # [N, C], normed
        rope: Tensor,
        counts: ref.Counts | None,
        local: ref.LocalAttention | None,
        length: Tensor | None,
        sharding: ref.Sharding | None,
    ) -> Tensor:
        qkv = self.linear_qkv(x, counts)
        if sharding is None:
            out = self.attend(qkv, rope, counts, local, length).flatten(1)
        else:
            whole = sharding.counts if counts else None
            heads, kv_heads = self.heads, self.kv_heads
            qkv = exchange.rows_to_heads(qkv, heads, kv_heads, sharding.ranks)
            out = self.attend(qkv, rope, whole, local, length, sharding.ranks).flatten(1)
            out = exchange.heads_to_rows(out, sharding.ranks)
        return self.linear_proj(out, counts)

    def attend(
        self,
        qkv: Tensor,  # [N, qkv_rows / ranks]
        rope: Tensor,
        counts: ref.Counts | None,
        local: ref.LocalAttention | None,
        length: Tensor | None,
        ranks: int = 1,
    ) -> Tensor:
        """What lies between the two projections: [N, heads / ranks, head_dim]."""
        heads, kv_heads = self.heads // ranks, self.kv_heads // ranks
        q, k, v, gate = ref.split_qkv(
            qkv, self.q_norm.weight, self.k_norm.weight, rope, counts, heads, kv_heads
        )
        return ref.gated_attention(q, k, v, gate, local if self.is_local else None, length)


class MLP(nn.Module):
    """Up projection, clamped activation, down projection."""

    def __init__(self, config: DiTConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        experts = MODALITIES if layer in config.modality_layers else 1
        up, down = config.mlp_widths(layer)
        self.activation = ref.gelu7 if layer in config.gelu7_layers else ref.swiglu7
        self.pre_norm = Norm(config.hidden_size, experts)
        self.up_gate_proj = Linear(config.hidden_size, up, experts, dtype)
        self.down_proj = Linear(down, config.hidden_size, experts, dtype)

    def forward(self, x: Tensor, counts: ref.Counts | None) -> Tensor:  # x: [N, C], normed
        hidden = self.activation(self.up_gate_proj(x, counts))
        return self.down_proj(hidden, counts)


class Layer(nn.Module):
    """Attention and MLP between sandwich norms, over the fp32 residual stream x.

    Each takes what the one before made, `delta`, adds it to the stream and norms the sum.
    """

    def __init__(self, config: DiTConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.has_modality_weights = layer in config.modality_layers
        self.dtype = dtype
        self.attention = Attention(config, layer, dtype)
        self.mlp = MLP(config, layer, dtype)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rope: Tensor,
        counts: ref.Counts,
        local: ref.LocalAttention | None,
        length: Tensor | None,
        sharding: ref.Sharding | None = None,
    ) -> tuple[Tensor, Tensor]:
        per_weight = counts if self.has_modality_weights else None
        x, h = ref.add_norm(x, delta, self.attention.pre_norm.weight, per_weight, self.dtype)
        delta = self.attention(h, rope, per_weight, local, length, sharding)
        x, h = ref.add_norm(x, delta, self.mlp.pre_norm.weight, per_weight, self.dtype)
        return x, self.mlp(h, per_weight)


class Rope(nn.Module):
    """Holder of the rotary bands, `10000^(-k / B)`, under their published key."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        values = torch.empty(bands, dtype=torch.float32)
        if not values.is_meta:  # arithmetic on no values would import PyTorch's compiler
            exponent = torch.arange(bands, dtype=torch.float32) / bands
            values = 1.0 / 10000.0**exponent
        self.register_buffer("bands", values)
        self.bands: Tensor

    def forward(self, coords: Tensor) -> Tensor:
        return ref.rope_table(coords, self.bands)


class Adapter(nn.Module):
    """fp32 embeddings of the three modalities into one stream."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        f32 = torch.float32
        self.video_embedder = nn.Linear(config.video_channels, config.hidden_size, dtype=f32)
        self.audio_embedder = nn.Linear(config.audio_channels, config.hidden_size, dtype=f32)
        self.text_embedder = nn.Linear(config.text_channels, config.hidden_size, dtype=f32)
        self.rope = Rope(config.rope_bands)

    def forward(self, video: Tensor, audio: Tensor, text: Tensor) -> Tensor:
        return torch.cat(
            (self.video_embedder(video), self.audio_embedder(audio), self.text_embedder(text))
        )


class Block(nn.Module):
    """The stack of layers."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i, dtype) for i in range(config.num_layers))

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        counts: ref.Counts,
        local: ref.LocalAttention | None,
        length: Tensor | None,
        sharding: ref.Sharding | None,
    ) -> Tensor:
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, rope, counts, local, length, sharding)
        return x if delta is None else x + delta


def _head(channels: int, out: int) -> nn.Linear:
    return nn.Linear(channels, out, bias=False, dtype=torch.float32)


class DiT(nn.Module):
    """Velocity of every video and audio token, given all tokens. There is no timestep input.

    Args:
        config: architecture.
        linear_dtype: dtype of the linears inside the blocks, and so their compute dtype: bfloat16
            as published, or float32. Norms, embedders, bands and the two heads are always fp32.
    """

    def __init__(self, config: DiTConfig, linear_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.adapter = Adapter(config)
        self.block = Block(config, linear_dtype)
        self.final_norm_video = Norm(config.hidden_size)
        self.final_norm_audio = Norm(config.hidden_size)
        self.final_linear_video = _head(config.hidden_size, config.video_channels)
        self.final_linear_audio = _head(config.hidden_size, config.audio_channels)

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        rope: Tensor,
        local: ref.LocalAttention | None = None,
        length: Tensor | None = None,
        sharding: ref.Sharding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocities of the video and audio tokens.

        Args:
            video: [Nv, 192] fp32, patches in input order.
            audio: [Na, 64] fp32.
            text: [Nt, 3584] fp32.
            rope: [Nv + Na + Nt, 6 bands] fp32, from `adapter.rope(coords)`.
            local: needed where the architecture has local layers.
            length: number of tokens, an int scalar tensor, where text ends in padding.
            sharding: where other processes run this forward too, each over its own rows of the
                three modalities; `rope`, `local` and `length` are then of the whole sequence.

        Returns:
            video [Nv, 192], patches in output order, and audio [Na, 64], fp32.
        """
        counts = (video.shape[0], audio.shape[0], text.shape[0])
        x = self.block(self.adapter(video, audio, text), rope, counts, local, length, sharding)
        x_video, x_audio, _ = x.split(counts)
        return (
            self.final_linear_video(ref.rms_norm(x_video, self.final_norm_video.weight)),
            self.final_linear_audio(ref.rms_norm(x_audio, self.final_norm_audio.weight)),
        )
