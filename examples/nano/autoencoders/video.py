"""The image autoencoder: a small encoder in Wan 2.2's layout with a small Turbo VAE decoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from magihuman.runtime.config import (
    LATENT_CHANNELS,
    LATENT_MEAN,
    LATENT_STD,
    TurboVAEConfig,
    video_frames,
)
from magihuman.runtime.files import write_json
from magihuman.runtime.model.image_encoder import wan_vae
from magihuman.runtime.model.turbo_vae import Decoder
from magihuman.runtime.weights.checkpoint import (
    TURBO_VAE_CONFIG,
    TURBO_VAE_WEIGHTS,
    load_turbo_vae,
)
from magihuman.runtime.weights.locate import IMAGE_FOLDER, TURBO_FOLDER
from magihuman.runtime.weights.tiny import published_wan_key
from magihuman.runtime.weights.wan_vae import WEIGHTS_NAME, load_image_vae
from training import (
    Average,
    Run,
    Standardized,
    adamw,
    autocast,
    channels_last,
    compile_methods,
    finish,
    load,
    save,
    step,
    uncompiled,
)
from world import scene

WAN_BASE_DIM = 8  # tensor cores take channels by eights
TURBO = TurboVAEConfig(
    decoder_block_out_channels=(16, 24, 48, 64), decoder_layers_per_block=(2, 2, 1, 1, 1)
)
# The rest of the 48 is neither written nor read. A token of the transformer is four latents; to
# predict a velocity it has to hand on the noise of every channel, and at 192 of 192 dims of its
# stream nothing else would have room (arXiv 2511.13720 has the effect).
CHANNELS = 24
LATENTS = 8  # of a training clip: a first window of 7, or a later one of 7 with context
NOISE = 0.12  # added to latents in training, so that the decoder bears a denoiser's errors
LEARNING_RATE = 1e-3
BATCH = 6
DRAWN = 5  # batches drawn at a time: drawing is some thousand launches, however many clips


class VideoAutoencoder(nn.Module):
    """Frames [B, 3, T, H, W] in [-1, 1] to normalised latents [B, 48, (T - 1) / 4 + 1, h, w].

    Channels from `CHANNELS` on are 0.
    """

    def __init__(self) -> None:
        super().__init__()
        vae: Any = wan_vae(WAN_BASE_DIM)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.norm = Standardized(LATENT_CHANNELS)
        self.decoder = Decoder(TURBO)
        for name, values in (("latent_mean", LATENT_MEAN), ("latent_std", LATENT_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1, 1), persistent=False)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        used = (torch.arange(LATENT_CHANNELS) < CHANNELS).float().view(1, -1, 1, 1, 1)
        self.register_buffer("used", used, persistent=False)
        self.used: Tensor

    def encode(self, frames: Tensor) -> Tensor:
        """All frames at once. Diffusers' encoder takes one and then four at a time, and keeps what
        convolutions look back on; values are the same.
        """
        x = frames.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # [B, C, T, h, row, w, column]
        x = x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)  # channels (C, column, row)
        encoder = self.encoder
        x = encoder.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
        for block in encoder.down_blocks:
            shortcut = block.avg_shortcut(x)
            for resnet in block.resnets:
                x = resnet(x)
            if block.downsampler is not None:
                x = block.downsampler(x)
                if block.downsampler.mode == "downsample3d":
                    x = torch.cat((x[:, :, :1], block.downsampler.time_conv(x)), dim=2)
            x = x + shortcut
        x = encoder.conv_out(F.silu(encoder.norm_out(encoder.mid_block(x))))
        return self.norm(self.quant_conv(x).chunk(2, dim=1)[0]) * self.used

    def decode(self, latents: Tensor, first_window: bool) -> Tensor:
        """One window of normalised latents; 4 T - 3 frames of a first one, else 4 T."""
        x = (latents * self.latent_std + self.latent_mean) * self.used
        x = x.contiguous(memory_format=torch.channels_last_3d)
        frames: Tensor = self.decoder(x, first_window)
        return frames

    def rebuild(
        self, latents: Tensor, frames: Tensor, matters: Tensor, is_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one window: loss, squared error and its frames, without those of context."""
        if is_first:
            made, cut = self.decode(latents[:, :, :-1], True), slice(0, -4)
        else:
            made, cut = self.decode(latents[:, :, 1:], False)[:, :, 4:], slice(5, None)
        made = made.float()
        error = made - frames[:, :, cut]
        return _loss(error, matters[:, :, cut]), error.detach().square().mean(), made.detach()

    def forward(
        self, frames: Tensor, matters: Tensor, is_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`rebuild` of noisy latents.

        frames: [B, 3, 4 LATENTS - 3, H, W] in [-1, 1]; matters: [B, 1, T, H, W], weights; is_first:
        of the two windows of a clip, which.
        """
        latents = self.encode(frames)
        latents = latents + NOISE * torch.randn_like(latents)
        return self.rebuild(latents, frames, matters, is_first)


def _loss(error: Tensor, weight: Tensor) -> Tensor:
    """Of the frames and of their edges at three scales, and of changes between frames."""
    error = error * (weight / weight.mean())
    loss = error.abs().mean() + 0.5 * error.square().mean()
    loss = loss + 0.5 * error.diff(dim=2).abs().mean()
    x = error.transpose(1, 2).flatten(0, 1)
    for _ in range(3):
        loss = loss + 0.5 * (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean())
        x = F.avg_pool2d(x, 2)
    return loss


def train(run: Run, batch: int, size_px: int, compiled: bool) -> None:
    """Both halves together, until the time is over."""
    path = run.out / "vae.pt"
    model = VideoAutoencoder()
    done = load(path, model).get("steps", 0)
    model.to(run.device)
    channels_last(model)
    average = Average(model)
    optimizer = adamw(model, LEARNING_RATE, (0.9, 0.98), run.device)
    rng, generator = random.Random(done), torch.Generator(run.device).manual_seed(done)
    if compiled:
        compile_methods(model, "encode", "rebuild")

    @torch.no_grad()
    def draw(count: int) -> tuple[Tensor, Tensor]:
        frames = video_frames(LATENTS)
        last = (scene.CUT_AUDIO - frames) // 4
        shown = (rng.choice((0, 4 * rng.randrange(last))), frames)
        data = scene.make(
            count, scene.CUT_AUDIO, rng, generator, free_voice=0.25, shown=shown, size_px=size_px
        )
        return data.frames * 2 - 1, data.matters

    drawn: list[tuple[Tensor, Tensor]] = []
    for number in run.steps():
        if not drawn:
            drawn = list(zip(*(x.split(batch) for x in draw(DRAWN * batch)), strict=True))
        with autocast(run.device):
            loss, square, _ = model(*drawn.pop(), number % 2 == 0)
        step(model, optimizer, loss, LEARNING_RATE * run.rate)
        average.update()
        run.log(loss=loss, psnr_db=-10 * (square / 4).log10(), latents_std=model.norm.std.mean())
        if run.is_due():
            save(path, average, steps=done + run.step + 1)

    clips = draw(batch)

    # Autocast anew each time: it keeps what it has made of weights, which are exchanged between.
    @torch.no_grad()
    def encode() -> Tensor:
        with autocast(run.device):
            return model.encode(draw(batch)[0])

    @torch.no_grad()
    def decode(is_first: bool) -> tuple[Tensor, Tensor]:
        with autocast(run.device):
            return model(*clips, is_first)[1:]

    def measure() -> float:
        squares = torch.stack([decode(is_first)[0] for is_first in (True, False)])
        return -10 * (squares.mean() / 4).log10().item()

    with uncompiled():
        finish(path, average, model.norm, encode, measure, steps=done + run.step)
        made = decode(True)[1]
    picture(run.out / "vae.png", (clips[0] + 1) / 2, (made + 1) / 2)


def picture(path: Path, *videos: Tensor) -> None:
    """Every fourth frame of up to eight clips of each video [B, 3, T, H, W] in 0 .. 1, by rows."""
    from PIL import Image

    rows = []
    count = min(len(video) for video in videos)
    length = min(video.shape[2] for video in videos)
    for clip in range(min(8, count)):
        for video in videos:
            frames = video[clip, :, :length:4].float().clamp(0, 1).cpu() * 255
            rows.append(frames.byte().permute(2, 1, 3, 0).flatten(1, 2))  # [H, T W, 3]
    Image.fromarray(torch.cat(rows).numpy()).save(path)


def write(model: VideoAutoencoder, folder: Path) -> None:
    """Encoder and decoder in the published layouts, fp16; the loader widens them."""
    place = folder / IMAGE_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    state = {f"encoder.{key}": value for key, value in model.encoder.state_dict().items()}
    weight, bias = (
        value.clone() for value in (model.quant_conv.weight.data, model.quant_conv.bias.data)
    )
    # Normalised latents have the statistics of Wan 2.2's: they move into the last convolution.
    gain = model.latent_std.flatten() / model.norm.std
    shift = model.latent_mean.flatten() - model.norm.mean * gain
    weight[:LATENT_CHANNELS] *= gain.view(-1, 1, 1, 1, 1)
    bias[:LATENT_CHANNELS] = bias[:LATENT_CHANNELS] * gain + shift
    weight[CHANNELS:] = 0  # and of the deviations, which nobody reads
    bias[CHANNELS:LATENT_CHANNELS] = model.latent_mean.flatten()[CHANNELS:]
    state["quant_conv.weight"], state["quant_conv.bias"] = weight, bias
    torch.save(
        {published_wan_key(key): _half(value) for key, value in state.items()},
        place / WEIGHTS_NAME,
    )
    place = folder / TURBO_FOLDER
    place.mkdir(exist_ok=True)
    fields = {name: getattr(TURBO, name) for name in TURBO.__dataclass_fields__}
    write_json(place / TURBO_VAE_CONFIG, fields)
    state = {f"module.decoder.{key}": _half(v) for key, v in model.decoder.state_dict().items()}
    state["module.decoder.conv_in.conv.weight"][:, CHANNELS:] = 0
    torch.save({"ema_state_dict": state}, place / TURBO_VAE_WEIGHTS)


def read(model: VideoAutoencoder, folder: Path) -> None:
    """What `write` has written; the statistics stay in the last convolution."""
    cpu, dtype = torch.device("cpu"), torch.float32
    vae = load_image_vae(folder / IMAGE_FOLDER, cpu, dtype).model
    model.encoder.load_state_dict(vae.encoder.state_dict())
    model.quant_conv.load_state_dict(vae.quant_conv.state_dict())
    turbo = load_turbo_vae(folder / TURBO_FOLDER, cpu, dtype)
    model.decoder.load_state_dict(turbo.decoder.state_dict())
    model.norm.settle(model.latent_mean.flatten(), model.latent_std.flatten())


def _half(value: Tensor) -> Tensor:
    return value.detach().half().contiguous().cpu()
