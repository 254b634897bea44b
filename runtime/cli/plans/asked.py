"""The memory plans that `inspect` and `doctor` are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from magihuman.graphs.support import why_not
from magihuman.kernels.target import Kernels
from magihuman.runtime.cli.inspect import Component, place_of
from magihuman.runtime.config import BASE_VARIANTS, SR_SIZES, VARIANTS, TextPrecision, upscaler
from magihuman.runtime.device import pick_device
from magihuman.runtime.errors import DeviceError, one_of
from magihuman.runtime.memory import (
    GIB,
    VIDEO,
    Clips,
    MemoryPlan,
    Part,
    check_limit,
    folder_parts,
    held_by_others,
    limit_of,
    plan_memory,
    speeds_of,
    synthetic_parts,
)
from magihuman.runtime.weights import (
    AUDIO_FOLDER,
    IMAGE_FOLDER,
    TEXT_FOLDER,
    TURBO_FOLDER,
    PrecisionPolicy,
    TransformerOptions,
    TransformerSpec,
    image_folder,
    linears_in_8_bits,
    plan,
)

Answer = tuple[MemoryPlan | None, str]  # a plan, or why there is none
WIDTH = 2  # bytes of an element of the autoencoders for images, bf16


@dataclass(frozen=True)
class PlanAsked:
    """What a memory plan is asked for. Each answer is a plan, or None and why there is none.

    ranks: GPUs that work on each request. follows: whether the plan is that of one but the first.
    captures: whether graphs may be captured.
    """

    variant: str
    sr: str | None
    precision: str | None
    memory_limit_gb: float | None
    kernels: Kernels = "auto"
    ranks: int = 1
    follows: bool = False
    captures: bool = True
    text_precision: TextPrecision = "bf16"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, BASE_VARIANTS)
        one_of("sr", self.sr, (None, *SR_SIZES))
        one_of("precision", self.precision, (None, *PrecisionPolicy))
        one_of("kernels", self.kernels, get_args(Kernels))
        one_of("text_precision", self.text_precision, get_args(TextPrecision))
        check_limit(self.memory_limit_gb)

    def of_ranks(self, answer: Callable[[PlanAsked], Answer]) -> list[Answer]:
        """The answer for the first GPU and, where several work together, for each of the others."""
        if self.ranks == 1:
            return [answer(self)]
        sides = [dataclasses.replace(self, follows=follows) for follows in (False, True)]
        found = [answer(side) for side in sides]
        if len({plan.replays for plan, _ in found if plan is not None}) > 1:  # all do or none
            found = [answer(dataclasses.replace(side, captures=False)) for side in sides]
        return found

    @property
    def _names(self) -> list[str]:
        return [self.variant, *([upscaler(self.sr).name] if self.sr else [])]

    def of_folder(self, root: Path, components: Sequence[Component]) -> Answer:
        """Plan for the components of a model directory."""
        state = {component.name: component.state for component in components}
        for name in (*self._names, TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER):
            if state[name] != "ok":
                reason = "is missing" if state[name] == "missing" else "cannot be read"
                return None, f"{name} {reason}"
        image = image_folder(root) if state[IMAGE_FOLDER] == "ok" else None

        def others() -> list[Part]:
            decoder, text, audio = (root / n for n in (TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER))
            return folder_parts(decoder, text, audio, image, WIDTH, False, self.text_precision)

        return self._plan([self._spec(name, place_of(root, name)) for name in self._names], others)

    def of_published(self) -> Answer:
        """Plan for the published sizes."""
        specs = [self._spec(name, None) for name in self._names]
        return self._plan(specs, lambda: synthetic_parts(torch.bfloat16, self.text_precision))

    def _spec(self, name: str, folder: Path | None) -> TransformerSpec:
        """Return how a transformer is held where that is possible, whatever this machine can."""
        options = TransformerOptions(torch.device("cpu"), compile=False, ranks=self.ranks)
        spec = plan(VARIANTS[name], folder, options)
        precision = spec.stored if self.precision is None else PrecisionPolicy(self.precision)
        names: tuple[str, ...] = ()
        if precision.narrow is not None:
            of_files = precision.weights is spec.stored and spec.stored_quantized
            names = of_files or linears_in_8_bits(spec.config, "none")
        return dataclasses.replace(spec, precision=precision, quantized=names)

    def _plan(self, specs: list[TransformerSpec], others: Callable[[], list[Part]]) -> Answer:
        device = pick_device(None)
        if device.type == "cuda":
            limit = limit_of(self.memory_limit_gb, device)
            spec, kernels = specs[0], self.kernels
            is_compiled = why_not(spec.config, spec.linear, device, kernels=kernels) is None
        else:  # as on a GPU that compiles
            limit = None if self.memory_limit_gb is None else int(self.memory_limit_gb * GIB)
            is_compiled = True
        already = [] if self.memory_limit_gb is None else held_by_others(device)
        if limit is None:
            return None, "there is no GPU; --memory-limit-gb plans for one of so much memory"
        sr = specs[1] if len(specs) > 1 else None
        try:
            parts = [part for part in others() if not self.follows or part.name == VIDEO]
            clips = Clips(is_compiled, 1.0, self.ranks, self.captures, speeds_of(device))
            return plan_memory([*parts, *already], specs[0], sr, limit, clips), ""
        except DeviceError as error:
            return None, str(error)
