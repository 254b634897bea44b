"""The figures of `verify`, and the verdict on them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from magihuman.graphs.quantization import KEEP_MODALITY, KeepBf16
from magihuman.runtime.config import DiTConfig
from magihuman.runtime.evaluate.clip_score import ClipScore
from magihuman.runtime.media import Frames


@dataclass(frozen=True)
class Thresholds:
    """What 8 bits may change. Relative errors are `||narrow - bf16|| / ||bf16||`; None: no verdict.

    Attributes:
        max_linear_error: of any linear's product. Rounding two normally distributed operands to
            e4m3 costs 0.037, to int8 0.013; twice the former says that the scales do not fit the
            values.
        max_attention_error: of any layer's, with its gates. Of random weights it is 0.058.
        max_video_error, max_audio_error: of the latents after the last step. Random weights at
            full size are 0.037 apart after 8 steps; four times that is not rounding alone.
        min_psnr_db, min_ssim: of the frames. min_snr_db: of the sound. None by default: clips that
            differ in detail can be equally good.
        max_synchrony_loss: of the correlation of mouth and sound, where clips are scored. Fewer
            colours right never pass then.
    """

    max_linear_error: float = 0.08
    max_attention_error: float = 0.12
    max_video_error: float = 0.15
    max_audio_error: float = 0.15
    min_psnr_db: float | None = None
    min_ssim: float | None = None
    min_snr_db: float | None = None
    max_synchrony_loss: float = 0.1


@dataclass(frozen=True)
class AtSteps:
    """A relative error at the first and the last step, the largest of all prompts."""

    first: float
    last: float

    @property
    def worst(self) -> float:
        """The larger of the two; NaN where one is."""
        return worst_of((self.first, self.last))


@dataclass(frozen=True)
class Clip:
    """One prompt in 8 bits against bf16.

    Attributes:
        video_error, audio_error: relative error of the latents after each step.
        psnr_db, ssim: of the frames. snr_db: of the sound.
        shown: some frames in bf16, and the same in 8 bits.
        scores: of the clip in bf16 and in 8 bits, where that was asked for.
    """

    prompt: str
    video_error: list[float]
    audio_error: list[float]
    psnr_db: float
    ssim: float
    snr_db: float
    shown: tuple[Frames, Frames] = field(repr=False)
    scores: tuple[ClipScore, ClipScore] | None = None


@dataclass(frozen=True)
class Report:
    """The figures of `verify`.

    Attributes:
        settings: of the run: variant, device, clip, steps, seed, what stayed bf16.
        per_linear: error of each linear's product, by name, from the input that it has in bf16.
        per_attention: error of each layer's attention over fp8 q, k and v, by the name of the
            projection to them; empty where attention is bf16.
        per_layer: error of the residual stream after each layer, all layers before it in 8 bits,
            from the latents of bf16.
        broken: the thresholds not met, a sentence each; empty for a pass.
        suggested_keep_bf16: where it fails, what to give `keep_bf16` next: what stayed bf16 here
            and every linear over its threshold, or whose attention is, or, with none over, the
            worst tenth.
    """

    settings: dict[str, Any]
    thresholds: Thresholds
    per_linear: dict[str, AtSteps]
    per_attention: dict[str, AtSteps]
    per_layer: list[AtSteps]
    clips: list[Clip]
    broken: list[str]
    suggested_keep_bf16: list[str]

    @property
    def verdict(self) -> str:
        """Either "pass" or "fail"."""
        return "fail" if self.broken else "pass"

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON; those that are not finite as "inf", "-inf" or "nan"."""
        clips = [{k: v for k, v in vars(clip).items() if k != "shown"} for clip in self.clips]
        for clip in clips:
            clip["scores"] = clip["scores"] and [asdict(score) for score in clip["scores"]]
        per_linear, per_attention = (
            {name: vars(error) for name, error in errors.items()}
            for errors in (self.per_linear, self.per_attention)
        )
        per_layer = [vars(error) for error in self.per_layer]
        figures = {"verdict": self.verdict, **vars(self), "thresholds": vars(self.thresholds)}
        figures |= {"clips": clips, "per_linear": per_linear, "per_layer": per_layer}
        figures["per_attention"] = per_attention
        return _finite(figures)


def broken(
    thresholds: Thresholds,
    per_linear: dict[str, AtSteps],
    per_attention: dict[str, AtSteps],
    clips: list[Clip],
) -> list[str]:
    """A sentence for each threshold that is not met; NaN meets none.

    per_linear, per_attention: errors by the name of the linear.
    """
    sentences = [
        f"{name}{what}: error {error.worst:.3g}, at most {limit:g} allowed"
        for what, errors, limit in (
            ("", per_linear, thresholds.max_linear_error),
            (", attention after it", per_attention, thresholds.max_attention_error),
        )
        for name, error in errors.items()
        if not error.worst <= limit
    ]
    for clip in clips:
        most = {
            "video latents' error": (clip.video_error[-1], thresholds.max_video_error),
            "audio latents' error": (clip.audio_error[-1], thresholds.max_audio_error),
        }
        least = {
            "PSNR in dB": (clip.psnr_db, thresholds.min_psnr_db),
            "SSIM": (clip.ssim, thresholds.min_ssim),
            "SNR in dB": (clip.snr_db, thresholds.min_snr_db),
        }
        said = [
            f"{what} {value:.3g}, at most {limit:g} allowed"
            for what, (value, limit) in most.items()
            if not value <= limit
        ]
        said += [
            f"{what} {value:.3g}, at least {limit:g} wanted"
            for what, (value, limit) in least.items()
            if limit is not None and not value >= limit
        ]
        said += _score_lost(clip, thresholds)
        sentences += [f"{clip.prompt!r}: {sentence}" for sentence in said]
    return sentences


def _score_lost(clip: Clip, thresholds: Thresholds) -> list[str]:
    if clip.scores is None:
        return []
    bf16, narrow = clip.scores
    sentences = []
    if narrow.right < bf16.right:
        sentences.append(f"colours right {narrow.right}, at least {bf16.right} wanted, as in bf16")
    lost = bf16.synchrony.correlation - narrow.synchrony.correlation
    if not lost <= thresholds.max_synchrony_loss:
        limit = thresholds.max_synchrony_loss
        sentences.append(
            f"correlation of mouth and sound lost {lost:.3g}, at most {limit:g} allowed"
        )
    return sentences


def suggested(
    architecture: DiTConfig,
    keep_bf16: KeepBf16,
    thresholds: Thresholds,
    per_linear: dict[str, AtSteps],
    per_attention: dict[str, AtSteps],
) -> list[str]:
    """Names and patterns to give `keep_bf16` next, as `Report.suggested_keep_bf16` has them."""
    kept = [] if isinstance(keep_bf16, str) else list(keep_bf16)
    if keep_bf16 == KEEP_MODALITY:
        kept = [f"block.layers.{layer}.*" for layer in architecture.modality_layers]
    most = thresholds.max_linear_error, thresholds.max_attention_error
    worst = [n for n, e in per_linear.items() if not e.worst <= most[0]]
    worst += [n for n, e in per_attention.items() if not e.worst <= most[1] and n not in worst]
    if not worst:
        ranked = sorted(per_linear, key=lambda name: per_linear[name].worst, reverse=True)
        worst = ranked[: math.ceil(len(ranked) / 10)]
    return kept + worst


def worst_of(errors: Iterable[float]) -> float:
    """The largest error; NaN where one is."""
    values = list(errors)
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
