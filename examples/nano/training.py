"""What all stages of the training share: time limits, averaged weights, files to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magihuman.runtime.files import atomic_path, sync

LOG_S, SAVE_S = 5.0, 60.0
WARMUP_STEPS = 100
COUNTED_BATCHES = 40  # of which the statistics of finished latents are
DECAY = 0.3  # share of a run at whose end the learning rate falls to nearly nothing


class Run:
    """One run of one stage: how long it may take, what it logs, what it leaves."""

    def __init__(self, stage: str, out: Path, minutes: float, device: torch.device) -> None:
        self.stage, self.out, self.device = stage, out, device
        self.limit_s = minutes * 60
        self.start_s = self.logged_s = self.saved_s = time.perf_counter()
        self.step = self.logged_step = 0
        out.mkdir(parents=True, exist_ok=True)

    @property
    def progress(self) -> float:
        """How much of the time is over."""
        return (time.perf_counter() - self.start_s) / self.limit_s

    @property
    def rate(self) -> float:
        """Of the full learning rate."""
        decay = min(1.0, (1.0 - self.progress) / DECAY)
        return max(0.01, min((self.step + 1) / WARMUP_STEPS, decay))

    def steps(self) -> Iterator[int]:
        """Count steps until the time is over, one at least."""
        while self.step == 0 or self.progress < 1:
            yield self.step
            self.step += 1

    def log(self, **values: Tensor | float) -> None:
        """A line every few seconds. Reads tensors, and so waits for the device, only then."""
        now = time.perf_counter()
        if now - self.logged_s < LOG_S and self.step > 0:
            return
        figures = {
            name: value.detach().item() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        if not all(math.isfinite(value) for value in figures.values()):
            raise SystemExit(f"{self.stage}: step {self.step} is not finite: {figures}")
        speed = (self.step - self.logged_step) / max(now - self.logged_s, 1e-6)
        text = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        line = f"{self.stage} {now - self.start_s:6.1f} s step {self.step} ({speed:.1f}/s) {text}"
        print(line, flush=True)
        with open(self.out / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.logged_s, self.logged_step = now, self.step

    def is_due(self) -> bool:
        """Whether to save again."""
        now = time.perf_counter()
        if now - self.saved_s < SAVE_S:
            return False
        self.saved_s = now
        return True


class Average(nn.Module):
    """Exponential average of a module's parameters, in fp32; buffers are taken as they are."""

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        self.model, self.decay, self.count = model, decay, 0
        self.values = [p.detach().clone().float() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """After each step of the optimizer."""
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.model.parameters()], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged weights and the model's; a second call takes it back."""
        for parameter, value in zip(self.model.parameters(), self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def save(path: Path, average: Average, averaged: bool = False, **facts: Any) -> None:
    """Averaged weights in fp16, whole or not at all, to go on from and to write models from.

    averaged: whether they are the model's already. Ends the run if a weight is not finite: losses
    are looked at now and then only, and the file before is the last good one.
    """
    if not averaged:
        average.swap()
    state = {
        key: value.half() if value.numel() > 4096 else value.clone()
        for key, value in average.model.state_dict().items()
    }
    if not averaged:
        average.swap()
    lost = [key for key, value in state.items() if not value.isfinite().all()]
    if lost:
        raise SystemExit(f"{path.name} is kept as it was: {', '.join(lost)} are not finite")
    with atomic_path(path.absolute()) as part:
        torch.save({"model": {key: value.cpu() for key, value in state.items()}, **facts}, part)
        sync(part)


def load(path: Path, model: nn.Module) -> dict[str, Any]:
    """Go on from a file, if there is one; the facts that were saved with it, or nothing."""
    if not path.is_file():
        return {}
    facts = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(facts.pop("model"))
    return facts


def trained(folder: Path, stage: str, model: nn.Module) -> dict[str, Any]:
    """`load` of what a stage has left; ends the run where there is nothing."""
    path = folder / f"{stage}.pt"
    facts = load(path, model)
    if not facts:
        raise SystemExit(f"{path} is missing: train --stage {stage} first")
    return facts


def adamw(
    model: nn.Module, rate: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.Optimizer:
    """Of an autoencoder: all its parameters alike."""
    return torch.optim.AdamW(
        model.parameters(), lr=rate, betas=betas, weight_decay=1e-4, fused=device.type == "cuda"
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """Gradients of the loss, clipped, and the update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 products on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def channels_last(model: nn.Module) -> None:
    """Lay out the weights of convolutions as tensor cores take them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.to(memory_format=formats[parameter.ndim])


def compile_parts(*modules: nn.Module) -> None:
    """Each by itself, for every shape anew."""
    _prepare_compiler()
    for module in modules:
        module.compile(dynamic=False)


def compile_methods(module: nn.Module, *names: str) -> None:
    """Of this module alone, for every shape anew."""
    _prepare_compiler()
    for name in names:
        setattr(module, name, torch.compile(getattr(module, name), dynamic=False))


def _prepare_compiler() -> None:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs all the same


def uncompiled() -> AbstractContextManager[Any]:
    """Without compiling for what is computed once."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class Standardized(nn.Module):
    """Per channel (dim 1) to mean 0 and deviation 1, by averages over the last batches.

    They follow an encoder that grows its outputs to drown the noise added to them; gradients do
    not. One batch has too few clips to say what is the mean of all. No own weights: when the model
    is written, the layer before takes these in.
    """

    MOMENTUM = 0.02

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))
        self.register_buffer("count", torch.zeros(()))
        self.mean: Tensor
        self.square: Tensor
        self.count: Tensor

    @property
    def std(self) -> Tensor:
        """Deviation of each channel, [C]."""
        return (self.square - self.mean.square()).clamp(min=1e-6).sqrt()

    @torch.no_grad()
    def settle(self, mean: Tensor, std: Tensor) -> None:
        """Have these statistics, as if of many batches."""
        self.mean.copy_(mean)
        self.square.copy_(std.square() + mean.square())
        self.count.fill_(1 / self.MOMENTUM)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget all batches; the next ones count alike."""
        self.count.zero_()

    @torch.no_grad()
    def look(self, x: Tensor) -> None:
        """Take a batch [B, C, ...] into the averages."""
        dims = (0, *range(2, x.ndim))
        self.count += 1
        weight = (1 / self.count).clamp(min=self.MOMENTUM)
        self.mean.lerp_(x.mean(dims), weight)
        self.square.lerp_(x.square().mean(dims), weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training:
            self.look(x.detach())
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)


@torch.no_grad()
def finish(
    path: Path,
    average: Average,
    norm: Standardized,
    encode: Callable[[], Tensor],
    measure: Callable[[], float],
    **facts: Any,
) -> float:
    """Save the averaged weights, or the last ones where those are better; they stay in place.

    encode: latents of a new batch: averaged weights have statistics of their own. The last ones
    keep those that the decoder has learnt with, which lag behind while an encoder still changes: a
    sound learnt for 260 steps came back at 24 dB with these, and at 1 dB with its own. measure: how
    good the model is, in dB; the better figure is returned.
    """
    model = average.model
    kept = [value.clone() for value in norm.eval().buffers()]
    last = measure()
    average.swap()
    norm.train().restart()
    for _ in range(COUNTED_BATCHES):
        encode()
    norm.eval()
    averaged = measure()
    if averaged < last:
        average.swap()
        for value, before in zip(norm.buffers(), kept, strict=True):
            value.copy_(before)
    save(path, average, averaged=True, **facts)
    print(f"{path.stem}: {averaged:.2f} dB by averaged weights, {last:.2f} by the last", flush=True)
    model.eval()
    return max(averaged, last)
