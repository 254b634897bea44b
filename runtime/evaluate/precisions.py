"""A model in a precision: by its kernels where they can run, else simulated in the plain model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from magihuman.graphs import quantization
from magihuman.graphs.support import why_not
from magihuman.runtime import config
from magihuman.runtime.device import pick_device
from magihuman.runtime.engine import Engine, OnLoad, loading
from magihuman.runtime.errors import InvalidRequestError, one_of
from magihuman.runtime.evaluate.simulated import Mode, Simulated
from magihuman.runtime.request import Request
from magihuman.runtime.weights import PrecisionPolicy, TransformerOptions, find, plan

PathLike = str | os.PathLike[str]


@contextmanager
def loaded(
    model: PathLike,
    precision: PrecisionPolicy,
    *,
    variant: str = "distill",
    transformer: PathLike | None = None,
    device: str | torch.device | None = None,
    on_load: OnLoad | None = None,
) -> Iterator[tuple[Engine, bool]]:
    """An engine in a precision, and whether that is simulated, for as long as the context lasts.

    Simulated, the weights in 8 bits take half of the transformer's memory more.

    Raises:
        CheckpointError, DeviceError: as `load`.
        InvalidRequestError: as `load`; or weights move, and the precision must be simulated.
    """
    is_simulated = must_simulate(model, precision, variant, transformer, device)
    with loading.load(
        model,
        variant=variant,
        precision="bf16" if is_simulated else precision.value,
        compile=not is_simulated,
        transformer=transformer,
        device=device,
        on_load=on_load,
    ) as engine:
        if not is_simulated:
            yield engine, False
            return
        check_resident(engine)
        with simulated(engine, precision):
            yield engine, True


@contextmanager
def simulated(engine: Engine, precision: PrecisionPolicy) -> Iterator[None]:
    """Have an engine in bf16, of plain models, compute what a precision in 8 bits would."""
    narrow = precision.narrow
    assert narrow is not None
    with engine.hold(Request("-")) as pipeline:
        dit = pipeline.components.dit
    names = quantization.quantized_linears(dit.config)
    with (
        Simulated(dit, names, precision.is_fp8_attention, narrow) as simulation,
        simulation.running(Mode.NARROW),
    ):
        yield


def must_simulate(
    model: PathLike,
    precision: PrecisionPolicy,
    variant: str = "distill",
    transformer: PathLike | None = None,
    device: str | torch.device | None = None,
) -> bool:
    """Whether the kernels of a precision cannot run here; no weights are read for that.

    Raises `CheckpointError` and `InvalidRequestError` as `load` does.
    """
    chosen = pick_device(device)
    architecture = transformer_config(model, variant, transformer, chosen)
    return precision.narrow is not None and bool(
        why_not(
            architecture,
            precision.linear_dtype,
            chosen,
            fp8=precision.is_fp8,
            fp8_attention=precision.is_fp8_attention,
        )
    )


def transformer_config(
    model: PathLike, variant: str, transformer: PathLike | None, device: torch.device
) -> config.DiTConfig:
    """The architecture of a model's transformer in bf16, from the heads of its files.

    Raises `CheckpointError` and `InvalidRequestError` as `load` does.
    """
    one_of("variant", variant, config.BASE_VARIANTS)
    chosen = config.VARIANTS[variant]
    paths = find(model, chosen, None, {variant: transformer})
    options = TransformerOptions(device, PrecisionPolicy.BF16, None, compile=False)
    return plan(chosen, paths.dit, options).config


def check_resident(engine: Engine) -> None:
    """Raise `InvalidRequestError` where an engine's weights move between stages."""
    if engine.memory_plan is not None and engine.memory_plan.streamed:
        raise InvalidRequestError(
            "the engine's weights must all stay on the GPU to be compared, and"
            f" {', '.join(engine.memory_plan.streamed)} rest in host memory between stages; use a"
            " larger GPU, device='cpu', or load without memory_limit_gb"
        )
