"""The transformer over many clips at once, for training."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoders.video import CHANNELS
from diffusion.prompts import CHANNELS as TEXT_CHANNELS
from magihuman.kernels import reference as ref
from magihuman.runtime.config import LATENT_CHANNELS, PATCH, DiTConfig
from magihuman.runtime.model.dit import Attention, DiT, Norm
from magihuman.runtime.model.tokens import Layout, coordinates

CONFIG = DiTConfig(
    num_layers=8,
    hidden_size=192,
    head_dim=64,
    kv_heads=1,
    text_channels=TEXT_CHANNELS,
    modality_layers=(0, 7),
    gelu7_layers=(0,),
)


class Sizes(NamedTuple):
    """Of a batch: clips, and tokens of each modality in a clip."""

    clips: int
    video: int
    audio: int
    text: int


class BatchedAttention(Attention):
    """Rows are those of all clips, modality by modality; each clip attends to itself.

    Layers hand `local` and `length` on as they are: here these are the batch's `Sizes`, and which
    keys each clip has, [B, 1, 1, N] bool.
    """

    def attend(self, qkv, rope, counts, local, length):
        q, k, v, gate = ref.split_qkv(
            qkv, self.q_norm.weight, self.k_norm.weight, rope, counts, self.heads, self.kv_heads
        )
        q, k, v = (_by_clip(x, local).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, D]
        # Spelt out: the kernel that takes a mask takes no grouped heads.
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=length)
        return ref.head_gate(_by_modality(out.transpose(1, 2), local), gate)


def _by_clip(x: Tensor, sizes: Sizes) -> Tensor:
    """[rows, ...] to [B, N, ...]."""
    parts = x.split([sizes.clips * count for count in sizes[1:]])
    return torch.cat([part.unflatten(0, (sizes.clips, -1)) for part in parts], dim=1)


def _by_modality(x: Tensor, sizes: Sizes) -> Tensor:
    """[B, N, ...] to [rows, ...]."""
    return torch.cat([part.flatten(0, 1) for part in x.split(list(sizes[1:]), dim=1)])


class BatchedDiT(nn.Module):
    """Velocities of latents [B, 48, T, H, W] and [B, A, 64], given text [B, L, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiT(CONFIG, torch.float32)
        for i, layer in enumerate(self.dit.block.layers):
            layer.attention = BatchedAttention(CONFIG, i, torch.float32)
        self._initialize()
        self._ropes: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def _initialize(self) -> None:
        owners = {id(p): m for m in self.dit.modules() for p in m.parameters(recurse=False)}
        for name, value in self.dit.named_parameters():
            if isinstance(owners[id(value)], Norm) or value.ndim == 1:
                value.zero_()
            else:
                value.normal_(0, value.shape[1] ** -0.5)
            if name.endswith(("linear_proj.weight", "down_proj.weight")):
                value.mul_((2 * CONFIG.num_layers) ** -0.5)
        # Channels that say nothing are not read, and never learnt to be.
        self.dit.adapter.video_embedder.weight[:, CHANNELS * PATCH**2 :] = 0
        for head in (self.dit.final_linear_video, self.dit.final_linear_audio):
            head.weight.zero_()

    def forward(
        self, video: Tensor, audio: Tensor, text: Tensor, is_text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """is_text: [B, L], which rows of the text are any."""
        clips, _, frames, rows, columns = video.shape
        layout = Layout(frames, rows, columns, audio.shape[1], text.shape[1])
        sizes = Sizes(clips, *layout.counts)
        rope = self._rope(layout, clips, video.device)
        is_key = is_text.new_ones(clips, layout.counts[0] + layout.audio)
        mask = torch.cat((is_key, is_text), dim=1)[:, None, None]
        dit = self.dit
        # Outside of the blocks the model computes in fp32.
        with torch.autocast(video.device.type, enabled=False):
            x = dit.adapter(
                patchify(video).flatten(0, 1).float(), audio.flatten(0, 1).float(),
                text.flatten(0, 1).float(),
            )  # fmt: skip
        counts = tuple(clips * count for count in layout.counts)
        delta = None
        for layer in dit.block.layers:
            x, delta = layer(x, delta, rope, counts, sizes, mask)
        with torch.autocast(video.device.type, enabled=False):
            x_video, x_audio, _ = (x + delta).split(counts)
            v_video = dit.final_linear_video(ref.rms_norm(x_video, dit.final_norm_video.weight))
            v_audio = dit.final_linear_audio(ref.rms_norm(x_audio, dit.final_norm_audio.weight))
        return unpatchify(v_video, video.shape), v_audio.view(audio.shape)

    def _rope(self, layout: Layout, clips: int, device: torch.device) -> Tensor:
        key = (*layout.counts, clips)
        if key not in self._ropes:
            table = self.dit.adapter.rope(coordinates(layout, "v2", device))
            parts = [part.repeat(clips, 1) for part in table.split(layout.counts)]
            self._ropes[key] = torch.cat(parts)
        return self._ropes[key]


def patchify(latents: Tensor) -> Tensor:
    """`tokens.patchify` of many clips: [B, C, T, H, W] to [B, N, 4 C]."""
    x = latents.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, C, T, H', ph, W', pw]
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, shape: torch.Size) -> Tensor:
    """`tokens.unpatchify` of many clips: [B N, 4 C], (row, column, C), to [B, C, T, H, W]."""
    clips, _, frames, rows, columns = shape
    x = tokens.view(clips, frames, rows // PATCH, columns // PATCH, PATCH, PATCH, LATENT_CHANNELS)
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
