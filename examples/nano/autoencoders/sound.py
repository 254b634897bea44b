"""The sound autoencoder: a small Oobleck, its latents normalised."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from magihuman.runtime.config import LATENT_AUDIO_RATE_HZ
from magihuman.runtime.evaluate.model_score import spectral_snr_db
from magihuman.runtime.files import write_json
from magihuman.runtime.model.oobleck import Oobleck, OobleckConfig, ResidualUnit
from magihuman.runtime.weights.checkpoint import AUDIO_VAE_PREFIX, SINGLE_NAME, load_audio_vae
from magihuman.runtime.weights.locate import AUDIO_FOLDER
from magihuman.runtime.weights.tiny import unfold_weight_norm
from training import (
    Average,
    Run,
    Standardized,
    adamw,
    compile_parts,
    finish,
    load,
    save,
    step,
    uncompiled,
)
from world import scene
from world.captions import MAX_SYLLABLES, SYLLABLES, attributes, draw
from world.voice import FRAME

CONFIG = OobleckConfig(channels=8, multiples=(1, 2, 4, 8, 8))
FRAMES = 32  # of a training clip
NOISE = 0.08
ENCODER_STD = 0.05  # of the noise that the bottleneck adds to a given voice
# At three times as much the encoder's outputs grow a hundredfold and nothing leaves silence.
LEARNING_RATE = 6e-4
BATCH = 16
LONG = 0.8  # of the clips speak to their end, so that batches are alike
FLOOR = 1e-6  # added to the squares of magnitudes: in all empty bands they would hold at silence
WINDOWS = (128, 512, 2048, 4096)


class SoundAutoencoder(nn.Module):
    """Waveforms [B, 2, 2048 A] to normalised latents [B, 64, A] and back."""

    def __init__(self) -> None:
        super().__init__()
        self.oobleck = Oobleck(CONFIG)
        self._initialize()
        self.norm = Standardized(CONFIG.latent_channels)
        for window in WINDOWS:
            self.register_buffer(f"window{window}", torch.hann_window(window), persistent=False)

    @torch.no_grad()
    def _initialize(self) -> None:
        """As loud after a convolution as before, and faint at the end.

        By default each makes its input fainter, ten of them by thousands, and beside the biases of
        the last ones nothing is left of a latent. A clip overfitted for 120 steps came back at
        12 dB with this, and at 8 without.
        """
        for module in self.oobleck.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                taps = module.kernel_size[0]
                if isinstance(module, nn.ConvTranspose1d):
                    taps //= module.stride[0]
                module.weight.normal_(0, (module.in_channels * taps) ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()
        for module in self.oobleck.modules():
            if isinstance(module, ResidualUnit):
                module.layers[-1].weight.mul_(0.5)
        self.oobleck.decoder.layers[-1].weight.mul_(0.01)

    def encode(self, wave: Tensor) -> Tensor:
        """The mean, normalised."""
        return self.norm(self.oobleck.encoder(wave).chunk(2, dim=1)[0])

    def forward(self, wave: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, the error of the spectra in dB, and the decoded waveform."""
        latents = self.encode(wave)
        made = self.oobleck.decode(latents + NOISE * torch.randn_like(latents))
        # Batches of silence must not weigh more than speech.
        loss = F.mse_loss(made, wave) / wave.square().mean().clamp(min=1e-4)
        distance = torch.zeros((), device=wave.device)
        for window in WINDOWS:
            a, b = (self._spectrum(x, window) for x in (made, wave))
            log_error = (a.log() - b.log()).abs().mean()
            error = (a - b).abs().mean() / b.mean()
            loss = loss + (error + 0.5 * log_error) / len(WINDOWS)
            distance = distance + log_error.detach() * 8.686 / len(WINDOWS)
        return loss, distance, made.detach()

    def _spectrum(self, wave: Tensor, window: int) -> Tensor:
        """Magnitudes of the first channel; those of white noise are its RMS."""
        shape = getattr(self, f"window{window}")
        z = torch.stft(wave[:, 0].float(), window, window // 4, window=shape, return_complex=True)
        return ((z.real.square() + z.imag.square()) / shape.square().sum() + FLOOR).sqrt()


def train(run: Run, batch: int, compiled: bool) -> None:
    """Until the time is over."""
    path = run.out / "sound.pt"
    model = SoundAutoencoder()
    done = load(path, model).get("steps", 0)
    model.to(run.device)
    average = Average(model)
    optimizer = adamw(model, LEARNING_RATE, (0.8, 0.99), run.device)
    rng, generator = random.Random(done), torch.Generator(run.device).manual_seed(done)
    if compiled:
        compile_parts(model.oobleck.encoder, model.oobleck.decoder)
    for _ in run.steps():
        wave = voices(batch, rng, generator)
        loss, distance, made = model(wave)
        step(model, optimizer, loss, LEARNING_RATE * run.rate)
        average.update()
        run.log(loss=loss, spectrum_db=distance, snr_db=_snr_db(wave, made))
        if run.is_due():
            save(path, average, steps=done + run.step + 1)

    wave = voices(batch, rng, generator)

    def measure() -> float:
        made = model(wave)[2]
        found, expected = (x.mean(1).flatten().cpu().numpy() for x in (made, wave))
        return spectral_snr_db(found, expected)

    with uncompiled(), torch.no_grad():
        finish(
            path, average, model.norm, lambda: model.encode(voices(batch, rng, generator)), measure,
            steps=done + run.step,
        )  # fmt: skip
        made = model(wave)[2]
    listen(run.out / "sound.wav", wave, made)


def _snr_db(wave: Tensor, made: Tensor) -> Tensor:
    error = (made - wave).square().mean()
    return 10 * ((wave.square().mean() + 1e-9) / (error + 1e-9)).log10()


@torch.no_grad()
def voices(batch: int, rng: random.Random, generator: torch.Generator) -> Tensor:
    """[B, 2, 2048 FRAMES], from anywhere in a clip: a fifth of it at no pitch of a caption."""
    clips = [draw(rng) for _ in range(batch)]
    for i in range(round(LONG * batch)):
        said = tuple(rng.randrange(len(SYLLABLES)) for _ in range(MAX_SYLLABLES))
        clips[i] = dataclasses.replace(clips[i], syllables=said)
    rng.shuffle(clips)
    wave = scene.voices(attributes(clips, generator.device), scene.CUT_AUDIO, generator, 0.4).wave
    first = [rng.randrange(scene.CUT_AUDIO - FRAMES) * FRAME for _ in clips]
    parts = [row[start : start + FRAMES * FRAME] for row, start in zip(wave, first, strict=True)]
    return torch.stack(parts)[:, None].expand(-1, 2, -1)


def listen(path: Path, *waves: Tensor) -> None:
    """Up to four clips of each waveform [B, 2, n], one after another, as 16 bits at 51.2 kHz."""
    from scipy.io import wavfile

    count = min(4, *(len(wave) for wave in waves))
    parts = [wave[clip, 0].float() for clip in range(count) for wave in waves]
    samples = (torch.cat(parts).clamp(-1, 1) * 32767).short().cpu()
    wavfile.write(path, LATENT_AUDIO_RATE_HZ, samples.numpy())


def write(model: SoundAutoencoder, folder: Path) -> None:
    """In stable-audio-open's layout, fp16; the loader widens it."""
    place = folder / AUDIO_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    oobleck, channels = model.oobleck, CONFIG.latent_channels
    last = oobleck.encoder.layers[-1]
    with torch.no_grad():
        gain = 1 / model.norm.std
        weight, bias = last.weight.clone(), last.bias.clone()
        weight[:channels] *= gain[:, None, None]
        bias[:channels] = (bias[:channels] - model.norm.mean) * gain
        weight[channels:] = 1e-4  # not 0: the norm of each row is stored, and divided by
        bias[channels:] = torch.tensor(ENCODER_STD).expm1().log()  # softplus makes it ENCODER_STD
    state = unfold_weight_norm(oobleck)
    last_key = f"encoder.layers.{len(oobleck.encoder.layers) - 1}"
    norm = weight.flatten(1).norm(dim=1).view(-1, 1, 1)
    state |= {
        f"{last_key}.weight_g": norm,
        f"{last_key}.weight_v": weight / norm,
        f"{last_key}.bias": bias,
    }
    save_file(
        {AUDIO_VAE_PREFIX + k: v.detach().half().contiguous().cpu() for k, v in state.items()},
        place / SINGLE_NAME,
    )
    shared = {
        "channels": CONFIG.channels,
        "c_mults": CONFIG.multiples,
        "strides": CONFIG.strides,
        "use_snake": True,
    }
    encoder = {**shared, "in_channels": 2, "latent_dim": 2 * channels}
    decoder = {**shared, "out_channels": 2, "latent_dim": channels, "final_tanh": False}
    config = {
        "encoder": {"type": "oobleck", "config": encoder},
        "decoder": {"type": "oobleck", "config": decoder},
        "bottleneck": {"type": "vae"},
    }
    write_json(
        place / "model_config.json",
        {
            "model_type": "diffusion_cond",
            "sample_rate": 44100,
            "model": {"pretransform": {"type": "autoencoder", "config": config}},
        },
    )


def read(model: SoundAutoencoder, folder: Path) -> None:
    """What `write` has written; the statistics stay in the encoder's last convolution."""
    oobleck = load_audio_vae(folder / AUDIO_FOLDER, torch.device("cpu"))
    model.oobleck.load_state_dict(oobleck.state_dict())
    model.norm.settle(torch.zeros(()), torch.ones(()))
