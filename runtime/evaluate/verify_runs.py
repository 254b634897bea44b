"""fp8 against bf16 on one's own weights and prompts, from the same seed and noise.

fp8 is simulated (`simulated_fp8.py`), so that it runs on any device and needs no kernels. Only the
base transformer is judged, in the plain model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from magihuman.graphs.quantization import KEEP_NONE, KeepBf16
from magihuman.kernels.reference import LocalAttention
from magihuman.runtime import config
from magihuman.runtime.device import pick_device
from magihuman.runtime.engine import Engine, OnLoad, loading
from magihuman.runtime.errors import InvalidRequestError, one_of
from magihuman.runtime.evaluate import clip_score
from magihuman.runtime.evaluate.simulated_fp8 import QKV, Mode, SimulatedFp8, relative_error
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
from magihuman.runtime.weights import (
    PrecisionPolicy,
    TransformerOptions,
    linears_in_fp8,
    locate,
    plan,
)

SHOWN_FRAMES = 3
Latents = tuple[Tensor, Tensor]


def verify(
    model: Engine | locate.PathLike,
    prompts: Sequence[str],
    *,
    precision: config.Precision = "fp8",
    keep_bf16: KeepBf16 = KEEP_NONE,
    seconds: float = 5.0,
    width: int = 480,
    height: int = 272,
    steps: int | None = None,
    seed: int = 42,
    thresholds: Thresholds | None = None,
    score: bool = False,
    variant: str = "distill",
    transformer: locate.PathLike | None = None,
    device: str | torch.device | None = None,
    on_load: OnLoad | None = None,
    on_progress: ProgressCallback | None = None,
) -> Report:
    """Compare fp8, simulated, with bf16: each linear, each layer, latents, frames and sound.

    Takes one run in bf16 and one in fp8 per prompt, in the plain model, and half the transformer's
    memory for its weights in 8 bits.

    Args:
        model: a loaded engine in bf16, or what `load` takes.
        prompts: one clip is made for each, twice.
        precision: to judge: "fp8", or "fp8-attn" with attention too.
        keep_bf16: as for `load`.
        seconds, width, height, steps, seed: as for `Request`.
        thresholds: for the verdict.
        score: also score the clips, as `magihuman score` does: for the nano model.
        variant, transformer, device, on_load: as for `load`; not used with an engine.
        on_progress: called after every step; the stage names precision and prompt.

    Raises:
        InvalidRequestError: an argument is not one of those above.
        CheckpointError, DeviceError: as `load`.
    """
    if isinstance(prompts, str) or not prompts:
        raise InvalidRequestError(f"prompts must be a list of one at least, got {prompts!r}")
    requests = [
        Request(p, seconds=seconds, width=width, height=height, steps=steps, seed=seed)
        for p in prompts
    ]
    policy = PrecisionPolicy.of(precision)
    if not policy.is_fp8:
        raise InvalidRequestError(
            f"precision must be 'fp8' or 'fp8-attn' to be compared with bf16, got {precision!r}"
        )
    limits = thresholds or Thresholds()
    if isinstance(model, Engine):
        return _verify(model, requests, policy, keep_bf16, limits, on_progress, score)
    _check_keep(model, variant, transformer, device, keep_bf16)
    with loading.load(
        model,
        variant=variant,
        precision="bf16",
        compile=False,
        device=device,
        transformer=transformer,
        on_load=on_load,
    ) as engine:
        return _verify(engine, requests, policy, keep_bf16, limits, on_progress, score)


def _check_keep(
    model: locate.PathLike,
    variant: str,
    folder: locate.PathLike | None,
    device: str | torch.device | None,
    keep_bf16: KeepBf16,
) -> None:
    """Refuse what names no linear before weights are read."""
    one_of("variant", variant, config.BASE_VARIANTS)
    chosen = config.VARIANTS[variant]
    paths = locate.find(model, chosen, None, {variant: folder})
    options = TransformerOptions(pick_device(device), PrecisionPolicy.BF16, None, compile=False)
    linears_in_fp8(plan(chosen, paths.dit, options).config, keep_bf16)


@torch.inference_mode()
def _verify(
    engine: Engine,
    requests: list[Request],
    precision: PrecisionPolicy,
    keep_bf16: KeepBf16,
    thresholds: Thresholds,
    on_progress: ProgressCallback | None,
    is_scored: bool,
) -> Report:
    if engine.precision != PrecisionPolicy.BF16:
        raise InvalidRequestError(
            f"the engine must be loaded with precision='bf16', got {engine.precision!r}"
        )
    if engine.memory_plan is not None and engine.memory_plan.streamed:
        raise InvalidRequestError(
            "the engine's weights must all stay on the GPU to be compared, and"
            f" {', '.join(engine.memory_plan.streamed)} rest in host memory between stages; use a"
            " larger GPU, device='cpu', or load without memory_limit_gb"
        )
    clips, measured = [], []
    with engine.hold(requests[0]) as pipeline:
        dit = pipeline.components.dit
    names = linears_in_fp8(dit.config, keep_bf16)
    with SimulatedFp8(dit, names, precision.is_fp8_attention) as simulation:
        for i, request in enumerate(requests, 1):
            probe = _Probe(dit, simulation, f"{i} of {len(requests)}", on_progress)
            with engine.hold(request, probe.on_step) as pipeline:
                clips.append(_clip(pipeline, probe, is_scored))
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
    request = requests[0]
    settings = {
        "variant": engine.variant,
        "device": str(engine.device),
        "seconds": request.seconds,
        "width": request.width,
        "height": request.height,
        "steps": len(clips[0].video_error),
        "seed": request.seed,
        "precision": precision.value,
        "keep_bf16": keep_bf16 if isinstance(keep_bf16, str) else list(keep_bf16),
    }
    keep: list[str] = []
    if failures:
        keep = suggested(dit.config, keep_bf16, thresholds, per_linear, per_attention)
    return Report(settings, thresholds, per_linear, per_attention, per_layer, clips, failures, keep)


class _Measured(NamedTuple):
    """Errors of one step."""

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
        simulation: SimulatedFp8,
        label: str,
        on_progress: ProgressCallback | None,
    ) -> None:
        """label: of the prompt, for `on_progress`."""
        self.latents: list[Latents] = []
        self.measured: list[_Measured] = []
        self._model, self._simulation = model, simulation
        self._label, self._on_progress = label, on_progress
        self._mode, self._at = Mode.BF16, (0, 1)
        self._is_new = False

    def start(self, mode: Mode) -> None:
        """A new clip: MEASURE at its first and last step, and bf16 between, or FP8 throughout."""
        self._mode, self.latents = mode, []

    def on_step(self, progress: Progress) -> None:
        """The sampler begins a step. Guidance calls the model twice in one."""
        self._at, self._is_new = (progress.step, progress.of), True
        if self._on_progress is not None:
            precision = "fp8" if self._mode is Mode.FP8 else "bf16"
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
        with self._simulation.running(mode):
            result = self._model(video, audio, text, rope, local)
        if mode is Mode.MEASURE:
            found = self._simulation
            self.measured.append(
                _Measured(found.linear_errors, found.attention_errors, found.layer_errors)
            )
        return result


def _clip(pipeline: Pipeline, probe: _Probe, is_scored: bool) -> Clip:
    """One request in bf16 and in fp8, from the same noise."""
    request, prepared = pipeline.request, pipeline.prepare()
    trails, frames, waves = [], [], []
    for mode in (Mode.MEASURE, Mode.FP8):
        probe.start(mode)
        video, audio = pipeline.run_base(pipeline.encode(prepared), probe)
        trails.append([*probe.latents, (video.cpu(), audio.cpu())])
        frames.append(decode_frames(pipeline.components.turbo_vae, video))
        waves.append(pipeline.audio_vae.decode(audio))
    bf16, fp8 = frames
    scores = None
    if is_scored:
        prompt, rate, fps = request.prompt, config.SAMPLE_RATE_HZ, config.FPS
        scores = (
            clip_score.score(bf16, waves[0], rate, fps, prompt),
            clip_score.score(fp8, waves[1], rate, fps, prompt),
        )
    steps = list(zip(*trails, strict=True))
    shown = np.linspace(0, len(bf16) - 1, SHOWN_FRAMES).round().astype(int)
    return Clip(
        prompt=request.prompt,
        video_error=[relative_error(theirs[0], ours[0]) for ours, theirs in steps],
        audio_error=[relative_error(theirs[1], ours[1]) for ours, theirs in steps],
        psnr_db=quality.psnr_db(fp8, bf16),
        ssim=quality.ssim(fp8, bf16),
        snr_db=quality.snr_db(waves[1], waves[0]),
        shown=(bf16[shown], fp8[shown]),
        scores=scores,
    )
