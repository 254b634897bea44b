"""The transformer and its text encoder, trained jointly by flow matching."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoders.video import CHANNELS
from diffusion import prompts
from diffusion.preview import preview
from diffusion.sampler import Task, draw_task, noise_like, noised
from diffusion.stock import Clips, Pair, Stock
from diffusion.transformer import CONFIG, BatchedDiT
from magihuman.runtime.config import VARIANTS
from magihuman.runtime.files import write_json
from magihuman.runtime.pipeline import schedulers
from magihuman.runtime.weights.checkpoint import ARCHITECTURE_NAME, SINGLE_NAME, load_dit
from training import Average, Run, autocast, compile_parts, load, save, step, trained, uncompiled

LEARNING_RATE = 1.5e-3
BATCH = 64
STOCK = 4096  # clips: 0.9 GB
REFRESH_STEPS = 16  # after each of which 16 of them are replaced
# Latents of sound in a batch, drawn from these. A clip of S seconds has 25 S + 1, one by a given
# voice 25 S, and positions stretch them over the latent frames: in 80 a sound lies up to three
# frames away from where it lies in 81. Windows of long clips are shorter, and have one more, too.
AUDIO = (81, 81, 81, 80, 65, 49, 37, 37)
SOUND_NOISE = 0.05  # as the runtime adds to a given voice
LINEARS = ("linear_qkv.weight", "linear_proj.weight", "up_gate_proj.weight", "down_proj.weight")


class Model(nn.Module):
    """Velocities of both streams: fp32, in the shapes of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.transformer = prompts.TextEncoder(), BatchedDiT()

    def forward(self, video: Tensor, sound: Tensor, clips: Clips) -> tuple[Tensor, Tensor]:
        text = self.text(clips.ids, clips.is_text)
        v_video, v_sound = self.transformer(video, sound, text, clips.is_text)
        return v_video.float(), v_sound.float()


class Trainer:
    """The model, its average, its optimizer, its clips: of this stage and of the next."""

    def __init__(self, run: Run, rate: float, batch: int, size_px: int, stock: int) -> None:
        self.run, self.learning_rate, self.batch = run, rate, batch
        self.path = run.out / f"{run.stage}.pt"
        self.model = Model()
        facts = load(self.path, self.model)
        if not facts and run.stage != "dit":
            facts = trained(run.out, "dit", self.model)
        self.done: int = facts.get("steps", 0)  # of both stages, so that no clip is drawn twice
        tokenizer = prompts.tokenizer_of(facts.get("tokenizer"))
        self.model.to(run.device)
        self.average = Average(self.model)
        self.optimizer = optimizer_of(self.model, rate)
        seed = 2 * self.done + 1
        self.rng = random.Random(seed)
        self.generator = torch.Generator(run.device).manual_seed(seed)
        self.stock = Stock(run.out, stock, size_px, tokenizer, seed, run.device)
        if facts.get("latents", self.stock.latents) != self.stock.latents:
            raise SystemExit(
                f"{self.path.name} was trained on latents of {facts['latents']}, which are now of"
                f" {self.stock.latents}: remove dit.pt and distill.pt, and train them anew"
            )
        self.stock.fill()
        print(f"{run.stage}: {self.stock.count} clips drawn", flush=True)

    def clips(self) -> tuple[Clips, Task]:
        """Of the next step."""
        if self.run.step % REFRESH_STEPS == REFRESH_STEPS - 1:
            self.stock.refresh()
        clips = self.stock.take(self.batch, self.rng.choice(AUDIO))
        task = draw_task(clips, self.generator)
        video, sound = clips.latents
        noise = torch.randn(sound.shape, device=sound.device, generator=self.generator)
        given = Pair(video, sound + SOUND_NOISE * noise * (1 - task.sound))
        return clips._replace(latents=given), task

    def flow_loss(
        self, model: Model, clean: Pair, clips: Clips, task: Task, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of a model's velocities at these levels, [B], on the way to `clean`."""
        noise = noise_like(clean, self.generator)
        with autocast(self.run.device):
            velocity = model(*noised(clean, noise, sigma, task), clips)
        pairs = zip(velocity, noise, clean, strict=True)
        return losses(Pair(*(v - (n - c) for v, n, c in pairs)), task)

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer."""
        step(self.model, self.optimizer, loss, self.learning_rate * self.run.rate)
        self.average.update()

    def save(self, averaged: bool = False) -> None:
        """The averaged weights, and what goes with them."""
        facts = {
            "steps": self.done + self.run.step,
            "tokenizer": self.stock.tokenizer.to_str(),
            "latents": self.stock.latents,
        }
        save(self.path, self.average, averaged, **facts)

    def finish(self) -> None:
        """Save, and show what the averaged weights make of prompts."""
        self.average.swap()
        self.save(averaged=True)
        with uncompiled():  # other shapes, once
            preview(self.run, self.model.eval(), self.stock)


def losses(errors: Pair, task: Task) -> tuple[Tensor, Tensor]:
    """Mean squares of what is to be made."""
    video = errors.video[:, :CHANNELS].square().mean((1, 3, 4)) * task.video[:, 0, :, 0, 0]
    sound = errors.sound.square().mean(2) * task.sound[:, :, 0]
    return video.mean(), sound.mean()


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Weights decay, vectors do not."""
    values = list(model.parameters())
    groups = [
        {"params": [value for value in values if value.ndim > 1], "weight_decay": 0.01},
        {"params": [value for value in values if value.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=values[0].is_cuda)


def compile_layers(model: Model) -> None:
    """Each layer by itself: there are three kinds, for each length, with gradients and without."""
    compile_parts(*model.transformer.dit.block.layers)


def draw_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [B]: half as the sampler has them, half uniform."""
    kind, level = torch.rand(2, count, device=generator.device, generator=generator).unbind()
    high = schedulers.SHIFT * level / (1 + (schedulers.SHIFT - 1) * level)
    return torch.where(kind < 0.5, high, level).clamp(0.002, 0.9999)


def train(run: Run, batch: int, size_px: int, compiled: bool, stock: int) -> None:
    """Until the time is over."""
    trainer = Trainer(run, LEARNING_RATE, batch, size_px, stock)
    if compiled:
        compile_layers(trainer.model)
    for _ in run.steps():
        clips, task = trainer.clips()
        sigma = draw_sigma(batch, trainer.generator)
        video, sound = trainer.flow_loss(trainer.model, clips.latents, clips, task, sigma)
        trainer.update(video + sound)
        run.log(video=video, sound=sound)
        if run.is_due():
            trainer.save()
    trainer.finish()


def read(model: Model, folder: Path) -> Any:
    """What `write` has written; the tokenizer is returned."""
    place, cpu = folder / "distill", torch.device("cpu")
    found = load_dit(place, VARIANTS["distill"], cpu, torch.float32)
    model.transformer.dit.load_state_dict(found.state_dict())
    return prompts.read(model.text, folder)


def write(out: Path, folder: Path) -> None:
    """Transformer and text encoder in the published layouts."""
    model = Model()
    facts = load(out / "distill.pt", model) or trained(out, "dit", model)
    prompts.write(copy.deepcopy(model.text), prompts.tokenizer_of(facts["tokenizer"]), folder)
    place = folder / "distill"
    place.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.to(torch.bfloat16 if key.endswith(LINEARS) else torch.float32).contiguous()
        for key, value in model.transformer.dit.state_dict().items()
    }
    save_file(state, place / SINGLE_NAME)
    names = [name for name in CONFIG.__dataclass_fields__ if name != "local_attention_layers"]
    write_json(place / ARCHITECTURE_NAME, {name: getattr(CONFIG, name) for name in names})
