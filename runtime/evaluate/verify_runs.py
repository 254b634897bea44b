"""8 bits against bf16 on one's own weights and prompts, from the same seed and noise.

They are simulated (`simulated.py`), so that it runs on any device and needs no kernels. Only the
base transformer is judged, in the plain model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from magihuman.graphs.quantization import KEEP_NONE, KeepBf16
from magihuman.kernels.reference import LocalAttention
from magihuman.runtime import config
from magihuman.runtime.device import pick_device
from magihuman.runtime.engine import Engine, OnLoad, loading
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.evaluate import clip_score
from magihuman.runtime.evaluate.precisions import check_resident, transformer_config
from magihuman.runtime.evaluate.simulated import QKV, Mode, Simulated, relative_error
from magihuman.runtime.evaluate.verify_report import (
    AtSteps,
    Clip,
    Report,
    Thresholds,
    broken,
    suggested,
    worst_of,
)
from magihuman.runtime.media import quality
from magihuman.runtime.model import DiT
from magihuman.runtime.pipeline import Pipeline, decode_frames
from magihuman.runtime.request import Progress, ProgressCallback, Request
from magihuman.runtime.weights import PrecisionPolicy, linears_in_8_bits, locate

SHOWN_FRAMES = 3
Latents = tuple[Tensor, Tensor]


class VerifyOptions(TypedDict, total=False):
    """What `verify` takes as keywords; each may be left out.

    Attributes:
        precision: to judge: "fp8" by default, "fp8-attn" with attention too, or "int8".
        keep_bf16: as for `load`.
        seconds, width, height, steps, seed: as for `Request`.
        thresholds: for the verdict, by default those of `Thresholds()`.
        score: whether to score the clips too, as `magihuman score` does: for the nano model.
        variant: as for `load`, "distill" by default; not used with an engine.
        transformer, device, on_load: as for `load`; not used with an engine.
        on_progress: called after every step; the stage names precision and prompt.
    """

    precision: config.Precision
    keep_bf16: KeepBf16
    seconds: float
    width: int
    height: int
    steps: int | None
    seed: int
    thresholds: Thresholds | None
    score: bool
    variant: str
    transformer: locate.PathLike | None
    device: str | torch.device | None
    on_load: OnLoad | None
    on_progress: ProgressCallback | None


@dataclass(frozen=True)
class _Settings:
    """`VerifyOptions`, with what stands for those left out."""

    precision: config.Precision = "fp8"
    keep_bf16: KeepBf16 = KEEP_NONE
    seconds: float = 5.0
    width: int = 480
    height: int = 256
    steps: int | None = None
    seed: int = 42
    thresholds: Thresholds | None = None
    score: bool = False
    variant: str = "distill"
    transformer: locate.PathLike | None = None
    device: str | torch.device | None = None
    on_load: OnLoad | None = None
    on_progress: ProgressCallback | None = None

    def request(self, prompt: str) -> Request:
        """One clip to make."""
        return Request(
            prompt,
            seconds=self.seconds,
            width=self.width,
            height=self.height,
            steps=self.steps,
            seed=self.seed,
        )


def verify(
    model: Engine | locate.PathLike, prompts: Sequence[str], **options: Unpack[VerifyOptions]
) -> Report:
    """Compare 8 bits, simulated, with bf16: each linear, each layer, latents, frames and sound.

    Takes one run in bf16 and one in 8 bits per prompt, in the plain model, and half the memory of
    the transformer for its weights in 8 bits.

    Args:
        model: a loaded engine in bf16, or what `load` takes.
        prompts: one clip is made for each, twice.
        options: see `VerifyOptions`.

    Raises:
        InvalidRequestError: an argument is not one of those above.
        CheckpointError, DeviceError: as `load`.
    """
    settings = _Settings(**options)
    if isinstance(prompts, str) or not prompts:
        raise InvalidRequestError(f"prompts must be a list of one at least, got {prompts!r}")
    requests = [settings.request(prompt) for prompt in prompts]
    policy = PrecisionPolicy.of(settings.precision)
    if policy.narrow is None:
        raise InvalidRequestError(
            "precision must be 'fp8', 'fp8-attn' or 'int8' to be compared with bf16, got"
            f" {settings.precision!r}"
        )
    if isinstance(model, Engine):
        return _verify(model, requests, settings)
    _check_keep(model, settings)
    with loading.load(
        model,
        variant=settings.variant,
        precision="bf16",
        compile=False,
        device=settings.device,
        transformer=settings.transformer,
        on_load=settings.on_load,
    ) as engine:
        return _verify(engine, requests, settings)


def _check_keep(model: locate.PathLike, settings: _Settings) -> None:
    """Refuse a `keep_bf16` that names no linear before weights are read."""
    architecture = transformer_config(
        model, settings.variant, settings.transformer, pick_device(settings.device)
    )
    linears_in_8_bits(architecture, settings.keep_bf16)


@torch.inference_mode()
def _verify(engine: Engine, requests: list[Request], settings: _Settings) -> Report:
    """`verify` on a loaded engine."""
    if engine.precision != PrecisionPolicy.BF16:
        raise InvalidRequestError(
            f"the engine must be loaded with precision='bf16', got {engine.precision!r}"
        )
    check_resident(engine)
    keep_bf16, thresholds = settings.keep_bf16, settings.thresholds or Thresholds()
    clips, measured = [], []
    with engine.hold(requests[0]) as pipeline:
        dit = pipeline.components.dit
    names = linears_in_8_bits(dit.config, keep_bf16)
    with _simulated(dit, names, settings.precision) as simulation:
        for i, request in enumerate(requests, 1):
            label = f"{i} of {len(requests)}"
            probe = _Probe(dit, simulation, settings.precision, label, settings.on_progress)
            with engine.hold(request, probe.on_step) as pipeline:
                clips.append(_clip(pipeline, probe, settings.score))
            measured.append(probe.measured)

    def at_steps(part: str, key: str | int) -> AtSteps:
        errors = ([getattr(at[step], part)[key] for at in measured] for step in (0, -1))
        return AtSteps(*map(worst_of, errors))

    per_linear = {name: at_steps("linears", name) for name in names}
    per_attention = {
        f"block.layers.{i}.{QKV}": at_steps("attentions", i) for i in measured[0][0].attentions
    }
    per_layer = [at_steps("layers", i) for i in range(dit.config.num_layers)]
    failures = broken(thresholds, per_linear, per_attention, clips)
    shown = {
        "variant": engine.variant,
        "device": str(engine.device),
        "seconds": settings.seconds,
        "width": settings.width,
        "height": settings.height,
        "steps": len(clips[0].video_error),
        "seed": settings.seed,
        "precision": settings.precision,
        "keep_bf16": keep_bf16 if isinstance(keep_bf16, str) else list(keep_bf16),
    }
    keep: list[str] = []
    if failures:
        keep = suggested(dit.config, keep_bf16, thresholds, per_linear, per_attention)
    return Report(shown, thresholds, per_linear, per_attention, per_layer, clips, failures, keep)


def _simulated(dit: DiT, names: Sequence[str], precision: str) -> Simulated:
    """What a precision computes in these linears."""
    policy = PrecisionPolicy.of(precision)
    assert policy.narrow is not None  # `verify` refuses others
    return Simulated(dit, names, policy.is_fp8_attention, policy.narrow)


class _Measured(NamedTuple):
    """Relative errors of one step: by linear, by layer of attention, and of each layer in order."""

    linears: dict[str, float]
    attentions: dict[int, float]
    layers: list[float]


class _Probe:
    """Stands in for the transformer: tells it what to compute, and keeps what comes by.

    Attributes:
        latents: that entered each step after the first, [Nv, 192] and [Na, 64], on the host.
        measured: errors at the first and the last step.
    """

    def __init__(
        self,
        model: DiT,
        simulation: Simulated,
        precision: str,
        label: str,
        on_progress: ProgressCallback | None,
    ) -> None:
        """precision, label: of the prompt, both for `on_progress`."""
        self.latents: list[Latents] = []
        self.measured: list[_Measured] = []
        self._model, self._simulation = model, simulation
        self._precision, self._label, self._on_progress = precision, label, on_progress
        self._mode, self._at = Mode.BF16, (0, 1)
        self._is_new = False

    def start(self, mode: Mode) -> None:
        """A new clip: MEASURE at its first and last step and bf16 between, or NARROW throughout."""
        self._mode, self.latents = mode, []

    def on_step(self, progress: Progress) -> None:
        """The sampler begins a step. Guidance calls the model twice in one."""
        self._at, self._is_new = (progress.step, progress.of), True
        if self._on_progress is not None:
            precision = self._precision if self._mode is Mode.NARROW else "bf16"
            self._on_progress(dataclasses.replace(progress, stage=f"{precision} {self._label}"))

    def __call__(
        self, video: Tensor, audio: Tensor, text: Tensor, rope: Tensor, local: LocalAttention | None
    ) -> Latents:
        is_new, self._is_new = self._is_new, False
        step, of = self._at
        if is_new and step > 0:
            self.latents.append((video.cpu(), audio.cpu()))
        mode = self._mode
        if mode is Mode.MEASURE and not (is_new and step in (0, of - 1)):
            mode = Mode.BF16
        simulation = self._simulation
        with simulation.running(mode):
            result = self._model(video, audio, text, rope, local)
        if mode is Mode.MEASURE:
            self.measured.append(
                _Measured(
                    simulation.linear_errors, simulation.attention_errors, simulation.layer_errors
                )
            )
        return result


def _clip(pipeline: Pipeline, probe: _Probe, is_scored: bool) -> Clip:
    """One request in bf16 and in 8 bits, from the same noise."""
    request, prepared = pipeline.request, pipeline.prepare()
    trails, frames, waves = [], [], []
    for mode in (Mode.MEASURE, Mode.NARROW):
        probe.start(mode)
        encoded = pipeline.encode(prepared)
        with pipeline.stage("denoise"):
            video, audio = pipeline.run_base(encoded, probe)
        trails.append([*probe.latents, (video.cpu(), audio.cpu())])
        frames.append(decode_frames(pipeline.components.turbo_vae, video))
        waves.append(pipeline.audio_vae.decode(audio))
    bf16, narrow = frames
    scores = None
    if is_scored:
        prompt, rate, fps = request.prompt, config.SAMPLE_RATE_HZ, config.FPS
        scores = (
            clip_score.score(bf16, waves[0], rate, fps, prompt),
            clip_score.score(narrow, waves[1], rate, fps, prompt),
        )
    steps = list(zip(*trails, strict=True))
    shown = np.linspace(0, len(bf16) - 1, SHOWN_FRAMES).round().astype(int)
    return Clip(
        prompt=request.prompt,
        video_error=[relative_error(theirs[0], ours[0]) for ours, theirs in steps],
        audio_error=[relative_error(theirs[1], ours[1]) for ours, theirs in steps],
        psnr_db=quality.psnr_db(narrow, bf16),
        ssim=quality.ssim(narrow, bf16),
        snr_db=quality.snr_db(waves[1], waves[0]),
        shown=(bf16[shown], narrow[shown]),
        scores=scores,
    )
