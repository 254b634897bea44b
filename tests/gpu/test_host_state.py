"""On a GPU too, a clip does not depend on what the host has set, and nothing of it changes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman import runtime

SMALL = {"seconds": 0.36, "width": 64, "height": 96, "steps": 2}


@contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(name: str):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def precision(name: str):
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def cudnn(**flags: bool):
    before = {name: getattr(torch.backends.cudnn, name) for name in flags}
    for name, value in flags.items():
        setattr(torch.backends.cudnn, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)


STATES = {
    "dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "dtype float64": lambda: default_dtype(torch.float64),
    "device cuda": lambda: default_device("cuda"),
    "device meta": lambda: default_device("meta"),
    "autocast of cuda": lambda: torch.autocast("cuda", torch.float16),
    "autocast of cpu": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "tf32": lambda: precision("high"),
    "benchmark": lambda: cudnn(benchmark=True),
    "no tf32 in cudnn": lambda: cudnn(allow_tf32=False),
    "a stream": lambda: torch.cuda.stream(torch.cuda.Stream()),
}


def facts() -> dict[str, object]:
    return {
        "cuda": torch.cuda.get_rng_state().tolist(),
        "cpu": torch.get_rng_state().tolist(),
        "device": torch.cuda.current_device(),
        "stream": torch.cuda.current_stream(),
        "dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "autocast": (torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


@pytest.fixture(scope="module")
def loaded(tiny_dir: Path):
    with runtime.load(tiny_dir, sr="540p", device="cuda") as engine:
        yield engine, engine.generate("hi", sr_width=96, sr_height=96, sr_steps=2, **SMALL)


@pytest.mark.parametrize("state", STATES)
def test_a_clip_is_that_of_a_plain_host(loaded, tiny_dir: Path, state: str) -> None:
    """Of an engine that was loaded before, and of one that is loaded and captures in the state."""
    engine, plain = loaded
    options = {"sr_width": 96, "sr_height": 96, "sr_steps": 2, **SMALL}
    with STATES[state]():
        before = facts()
        clips = [engine.generate("hi", **options)]
        with runtime.load(tiny_dir, sr="540p", device="cuda") as other:
            clips.append(other.generate("hi", **options))
        after = facts()
    assert [name for name in before if before[name] != after[name]] == []
    for clip in clips:
        assert np.array_equal(clip.frames, plain.frames)
        assert np.array_equal(clip.audio, plain.audio)
