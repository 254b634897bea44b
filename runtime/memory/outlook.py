"""What would run on a card that is not here: precision, places of the weights, and seconds."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from magihuman.kernels.decoder.bands import bands_of, cost, longest_axis
from magihuman.kernels.target import HOPPER, Kernels
from magihuman.runtime import config
from magihuman.runtime.errors import DeviceError, one_of
from magihuman.runtime.memory.cards import Card
from magihuman.runtime.memory.parts import synthetic_parts
from magihuman.runtime.memory.placement import MARGIN_BYTES, Clips, plan_memory, stages_of
from magihuman.runtime.memory.plan import CONTEXT_BYTES, GIB, STARTED_BYTES, TEXT, MemoryPlan, Part
from magihuman.runtime.memory.speeds import Speeds
from magihuman.runtime.request import Request
from magihuman.runtime.weights import PrecisionPolicy, TransformerSpec, linears_in_8_bits

SIZES: dict[str, str | None] = {"256p": None, "540p": "540p", "1080p": "1080p"}
MEASURED_CARD, MEASURED_VARIANT = "h100", "distill"
# Seconds of denoising, super-resolution and decoding of 5 s with everything resident, each timed
# alone on an H100: those of benchmarks/results.
BASE_S = {"bf16": 1.426, "fp8": 0.926, "fp8-attn": 0.874}
SR_S = {
    ("540p", "bf16"): 3.847,
    ("540p", "fp8-attn"): 2.563,
    ("1080p", "bf16"): 29.697,
    ("1080p", "fp8"): 25.346,
    ("1080p", "fp8-attn"): 21.469,
}
DECODE_S = {"256p": 0.134, "540p": 0.428, "1080p": 2.042}
H100_FLOPS = 989e12 * 0.6  # that the decoder's seconds are scaled by
WORTH_S = 0.1  # that 8 bits in the text encoder must save where they leave as much to move


@dataclass(frozen=True)
class Outlook:
    """A clip of 5 s of one size on a card.

    Attributes:
        size: of `SIZES`.
        precision, text_precision: of the transformers and of the text encoder.
        plan: where weights are; None where there is no way.
        reason: why there is none.
        seconds: from noise to frames, and what moving weights adds; None without a plan.
        is_measured: whether they were measured, with everything resident, and are no estimate.
    """

    size: str
    precision: str
    text_precision: config.TextPrecision
    plan: MemoryPlan | None
    reason: str = ""
    seconds: float | None = None
    is_measured: bool = False

    @property
    def places(self) -> dict[str, list[str]]:
        """Names of the parts by where they are: resident, moved whole, or streamed."""
        if self.plan is None:
            return {}
        moved = self.plan.streamed
        every = dict.fromkeys(name for stage in self.plan.stages for name in stage.weights)
        return {
            "resident": [name for name in every if name not in moved],
            "moved": [name for name, layers in moved.items() if not layers],
            "streamed": [f"{name} ({len(layers)})" for name, layers in moved.items() if layers],
        }

    def as_dict(self) -> dict[str, Any]:
        """The outlook as JSON has it."""
        plan = {"error": self.reason} if self.plan is None else self.plan.as_dict()
        kept = ("size", "precision", "text_precision", "seconds", "is_measured")
        return {**{name: getattr(self, name) for name in kept}, **self.places, "memory_plan": plan}


def outlook(
    card: Card,
    size: str,
    precision: str | None = None,
    *,
    variant: str = "distill",
    text_precision: config.TextPrecision | None = None,
    limit_gb: float | None = None,
    kernels: Kernels = "auto",
) -> Outlook:
    """What a clip of a size would take on a card.

    Args:
        card: of `cards.CARDS`.
        size: of `SIZES`.
        precision: of those of the card; by default its first.
        variant: of the base transformer.
        text_precision: by default bf16, or int8 where then nothing moves, or not the text encoder,
            or by which time is saved.
        limit_gb: GiB to stay below, if less than the card has.
        kernels: "auto" or "portable", as of `load`.

    Raises:
        InvalidRequestError: the card has no such precision.
    """
    one_of("precision", precision, (None, *card.precisions))
    card = card.asked_for(kernels)
    chosen = precision or card.precisions[0]
    # As `limit_of` has it once the process uses the card.
    limit = card.memory_bytes - STARTED_BYTES + CONTEXT_BYTES - MARGIN_BYTES
    limit = limit if limit_gb is None else min(limit, int(limit_gb * GIB))
    specs = specs_of(variant, size, chosen)
    speeds = Speeds(card.bus, card.linear_flops(chosen), card.attention_flops)
    clips = Clips(is_compiled=True, speeds=speeds)

    def planned(text: config.TextPrecision) -> Outlook:
        try:
            plan = plan_memory(parts_of(text), specs[0], specs[1], limit, clips)
        except DeviceError as error:
            return Outlook(size, chosen, text, None, str(error))
        return _timed(Outlook(size, chosen, text, plan), card, specs, clips)

    first = planned(text_precision or "bf16")
    if text_precision is not None or (first.plan is not None and not first.plan.streamed):
        return first
    other = planned("int8")
    return other if _is_better(other, first) else first


def _is_better(narrow: Outlook, wide: Outlook) -> bool:
    """Whether 8 bits in the text encoder are worth it."""
    if narrow.plan is None or wide.plan is None:
        return narrow.plan is not None
    if not narrow.plan.streamed or (
        TEXT in wide.plan.streamed and TEXT not in narrow.plan.streamed
    ):
        return True
    return narrow.plan.cost_s + WORTH_S < wide.plan.cost_s


def _timed(
    made: Outlook,
    card: Card,
    specs: tuple[TransformerSpec, TransformerSpec | None],
    clips: Clips,
) -> Outlook:
    """The outlook with its seconds."""
    assert made.plan is not None
    measured = None
    of_card = card.name, card.kernels, specs[0].variant.name
    if of_card == (MEASURED_CARD, HOPPER, MEASURED_VARIANT):
        measured = measured_s(made.size, made.precision)
    if measured is not None and made.plan.bands == 1:
        seconds = measured + made.plan.extra_s
        return dataclasses.replace(made, seconds=seconds, is_measured=not made.plan.streamed)
    given = [spec for spec in specs if spec is not None]
    stages = stages_of(given, (), clips)
    forwards = sum(stage.forwards * stage.forward_s for stage in stages if stage.forward_s)
    decoding = DECODE_S[made.size] * H100_FLOPS / card.linear_flops("bf16")
    decoding *= _work_in_bands(made.size, made.plan.bands)
    return dataclasses.replace(made, seconds=forwards + decoding + made.plan.extra_s)


def _work_in_bands(size: str, count: int) -> float:
    """Work of all bands of a window, with what is decoded beside each, over that of the whole."""
    vae, plan = config.TurboVAEConfig(), Request("-").plan(config.VARIANTS["distill"], SIZES[size])
    latents = plan.sr_rows or plan.rows, plan.sr_columns or plan.columns
    length = longest_axis(*latents)[1]
    return sum(cost(band, length, vae) for band in bands_of(latents, count, vae))


def measured_s(size: str, precision: str) -> float | None:
    """Seconds on an H100 with everything resident, from noise to frames; None if not measured."""
    sr_s = 0.0 if SIZES[size] is None else SR_S.get((size, precision))
    if precision not in BASE_S or sr_s is None:
        return None
    return BASE_S[precision] + sr_s + DECODE_S[size]


def specs_of(
    variant: str, size: str, precision: str
) -> tuple[TransformerSpec, TransformerSpec | None]:
    """The transformers of the published sizes, as they would be held."""
    sr = SIZES[size]
    return _spec(variant, precision), None if sr is None else _spec(f"{sr}_sr", precision)


def _spec(name: str, precision: str) -> TransformerSpec:
    """A transformer of the published size."""
    variant = config.VARIANTS[name]
    held = variant.architecture(config.DiTConfig())
    policy = PrecisionPolicy(precision)
    names = () if policy.narrow is None else linears_in_8_bits(held, "none")
    return TransformerSpec(variant, held, None, None, policy, names)


@functools.lru_cache
def parts_of(text: config.TextPrecision) -> tuple[Part, ...]:
    """All parts but the transformers."""
    return tuple(synthetic_parts(torch.bfloat16, text))
