"""Make the transformer fit for the 8 steps of the re-noising sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.dit import Model, Trainer, compile_layers, draw_sigma, losses, optimizer_of
from diffusion.sampler import STEPS, Task, cleaned, noise_like, noised, sample
from diffusion.stock import Clips, Pair
from magihuman.runtime.pipeline import schedulers
from training import Run, step, trained

LEARNING_RATE = 3e-4
CRITIC_ALONE = 200  # steps in which the critic learns before anybody listens to it


def train(run: Run, batch: int, size_px: int, compiled: bool, stock: int, matching: float) -> None:
    """Flow matching on the sampler's levels alone, and `matching` times distribution matching.

    Until the time is over.
    """
    trainer = Trainer(run, LEARNING_RATE, batch, size_px, stock)
    matcher = Matcher(trainer, compiled) if matching else None
    if compiled:
        compile_layers(trainer.model)
    levels = schedulers.sigmas(STEPS).to(run.device)
    for number in run.steps():
        clips, task = trainer.clips()
        index = torch.randint(STEPS, (batch,), device=run.device, generator=trainer.generator)
        video, sound = trainer.flow_loss(trainer.model, clips.latents, clips, task, levels[index])
        loss, figures = video + sound, {"video": video, "sound": sound}
        if matcher is not None:
            made = matcher.make(clips, task)
            if number >= CRITIC_ALONE:
                figures["moved"] = matcher.distance(made, clips, task)
                loss = loss + matching * figures["moved"]
        trainer.update(loss)
        if matcher is not None:
            figures["critic"] = matcher.learn(made, clips, task)
        run.log(**figures)
        if run.is_due():
            trainer.save()
    trainer.finish()


class Matcher:
    """Distribution matching (arXiv 2311.18828, 2405.14867).

    What the sampler makes of noise, at any of its steps, is moved to where the model of stage `dit`
    finds it more likely than a critic does, which learns to denoise what the sampler makes.
    """

    def __init__(self, trainer: Trainer, compiled: bool) -> None:
        self.trainer = trainer
        self.teacher, self.critic = Model(), Model()
        for model in (self.teacher, self.critic):
            trained(trainer.run.out, "dit", model)
            model.to(trainer.run.device)
            if compiled:
                compile_layers(model)
        self.teacher.eval().requires_grad_(False)
        self.optimizer = optimizer_of(self.critic, LEARNING_RATE)
        self.levels = schedulers.sigmas(STEPS).tolist()

    def make(self, clips: Clips, task: Task) -> Pair:
        """Clean clips of one of the sampler's steps; gradients of the last forward alone."""
        trainer = self.trainer
        steps = trainer.rng.randrange(STEPS)
        x = sample(trainer.model, clips, task, trainer.generator, steps)
        return cleaned(trainer.model, x, self.levels[steps], clips, task)

    def distance(self, made: Pair, clips: Clips, task: Task) -> Tensor:
        """Its gradient is the way from where the teacher sees `made` to where the critic does."""
        generator = self.trainer.generator
        with torch.no_grad():
            sigma = draw_sigma(len(clips.ids), generator).clamp(0.05, 0.98)
            x = noised(made, noise_like(made, generator), sigma, task)
            given = clips._replace(latents=made)
            real = cleaned(self.teacher, x, sigma, given, task)
            fake = cleaned(self.critic, x, sigma, given, task)
            targets = [m - _way(m, r, f) for m, r, f in zip(made, real, fake, strict=True)]
        video, sound = losses(Pair(*(m - t for m, t in zip(made, targets, strict=True))), task)
        return video + sound

    def learn(self, made: Pair, clips: Clips, task: Task) -> Tensor:
        """One step of the critic."""
        trainer = self.trainer
        fixed = Pair(*(value.detach() for value in made))
        sigma = draw_sigma(len(clips.ids), trainer.generator)
        video, sound = trainer.flow_loss(self.critic, fixed, clips, task, sigma)
        step(self.critic, self.optimizer, video + sound, LEARNING_RATE * trainer.run.rate)
        return video + sound


def _way(made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Normalised by how far each clip is from where the teacher sees it."""
    size = (made - real).abs().flatten(1).mean(1).clamp(min=1e-3)
    return (fake - real) / size.view(-1, *[1] * (made.ndim - 1))
