"""Weights that rest in pinned memory and come for their stages, with the tiny checkpoint.

What stays is loaded once for each precision: most of the time goes into loading and compiling.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman import runtime
from magihuman.runtime.engine import blueprint
from magihuman.runtime.memory.estimate import free_bytes
from magihuman.runtime.memory.offload import Offloaded
from magihuman.runtime.memory.plan import AUDIO, BASE, GIB, IMAGE, SR, TEXT, MemoryPlan
from magihuman.runtime.memory.speeds import measured_bus

DEVICE = torch.device("cuda")
# One window of the decoder: where nothing is captured, windows are decoded one at a time, and a
# convolution over three may sum in another order.
JOB = {
    "seconds": 0.2, "width": 64, "height": 64, "sr_width": 96, "sr_height": 96, "steps": 3,
    "sr_steps": 3, "negative_prompt": "static",
}  # fmt: skip
SEEDS = 42, 1  # the default, and another
EVERY = dict.fromkeys((AUDIO, IMAGE, TEXT, BASE, SR), ())
SPLITS = {
    "whole": EVERY,
    "some layers": {**EVERY, TEXT: (0, 1), BASE: (1, 2, 3), SR: (0, 2, 4)},
    "all layers": {**EVERY, BASE: (0, 1, 2, 3, 4), SR: (0, 1, 2, 3, 4)},
    "a few parts": {TEXT: (), SR: (1, 2, 3)},
}
PRECISIONS = {
    "bf16": {},
    "fp8": {"precision": "fp8"},
    "int8": {"precision": "int8", "text_precision": "int8"},
    "plain": {"compile": False, "vae": "plain"},
}


@pytest.fixture(scope="module")
def load(tiny_dir: Path):
    @contextmanager
    def loaded(streamed: dict, **options) -> Iterator[runtime.Engine]:
        plan = MemoryPlan(0, streamed, not streamed, (), 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blueprint, "plan_placement", lambda *arguments: plan)
            engine = runtime.load(tiny_dir, sr="540p", device="cuda", **options)
        with engine:
            yield engine

    return loaded


@pytest.fixture(scope="module")
def clip_of(load):
    """The clip of a seed where nothing moves."""

    @functools.cache
    def both(precision: str) -> list[runtime.Video]:
        with load({}, **PRECISIONS[precision]) as stays:
            return [stays.generate("hello", seed=seed, **JOB) for seed in SEEDS]

    return lambda precision="bf16", seed=SEEDS[0]: both(precision)[SEEDS.index(seed)]


def same(a: runtime.Video, b: runtime.Video) -> bool:
    return np.array_equal(a.frames, b.frames) and np.array_equal(a.audio, b.audio)


@pytest.mark.parametrize(
    ("precision", "split"),
    [
        *(("bf16", split) for split in SPLITS),
        ("fp8", "some layers"),
        ("fp8", "all layers"),
        ("int8", "some layers"),
        ("int8", "all layers"),
        ("plain", "some layers"),
    ],
)
def test_clips_are_those_of_an_engine_where_nothing_moves(load, clip_of, precision, split) -> None:
    """Compiled and plain, kernels launched one by one in place of a replay: the same bits. The
    other splits of fp8 and of the plain model differ by no code from those of bf16.
    """
    with load(SPLITS[split], **PRECISIONS[precision]) as engine:
        for seed in (*SEEDS, SEEDS[0]):
            assert same(engine.generate("hello", seed=seed, **JOB), clip_of(precision, seed))
        guided = engine.generate("hello", sr_guidance=2.0, **JOB)
        assert same(guided, engine.generate("hello", sr_guidance=2.0, **JOB))


def test_nothing_of_it_stays_on_the_device(load) -> None:
    with load(EVERY) as engine:
        residency = engine._parts.residency
        groups = [
            group
            for part in residency._moving.values()
            for group in (part._outside, *part._layers)
            if group.size_bytes
        ]
        assert all(group.host.is_pinned() for group in groups)
        for name in ("dit", "sr_dit"):
            model = getattr(engine._parts, name)
            assert {p.device.type for p in model.parameters()} == {"cpu"}
        engine.generate("hello", **JOB)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            engine.generate("hello", **JOB)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + 2**20
        assert {p.device.type for p in engine._parts.dit.parameters()} == {"cpu"}


def test_a_cancelled_request_leaves_the_next_its_weights(load, clip_of) -> None:
    with load(SPLITS["some layers"]) as engine:
        for stage in ("denoise", "super_resolve", "decode_video"):
            cancel = threading.Event()

            def stop(now: runtime.Progress, stage=stage, cancel=cancel) -> None:
                if now.stage == stage and now.step >= 1:
                    cancel.set()

            with pytest.raises(runtime.Cancelled):
                engine.generate("hello", on_progress=stop, cancel=cancel, **JOB)
            assert same(engine.generate("hello", **JOB), clip_of())


def test_an_error_amid_a_forward_leaves_the_next_its_weights(
    load, clip_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While copies for layers behind it are under way."""
    before, layers = Offloaded.before_layer, []

    def fail(self, layer: int) -> None:
        before(self, layer)
        layers.append(layer)
        if len(layers) == 20:
            raise RuntimeError("amid a forward")

    monkeypatch.setattr(Offloaded, "before_layer", fail)
    with load(SPLITS["some layers"]) as engine:
        with pytest.raises(RuntimeError, match="amid a forward"):
            engine.generate("hello", **JOB)
        assert 0 < layers[-1] < 5
        assert same(engine.generate("hello", **JOB), clip_of())


def test_slow_copies_are_waited_for(load, clip_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy comes a few milliseconds late, long after the layer before it is done."""
    with load(SPLITS["all layers"]) as engine:
        from magihuman.runtime.memory.offload import Copies

        add = Copies.add

        def late(self, to, source):
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(5_000_000)
            return add(self, to, source)

        expected = clip_of()
        monkeypatch.setattr(Copies, "add", late)
        assert same(engine.generate("hello", **JOB), expected)


def test_slots_are_not_overwritten_early(load, clip_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is computed milliseconds late, long after the copy into its slot was issued."""
    expected = clip_of()
    before = Offloaded.before_layer

    def late(self, layer: int) -> None:
        before(self, layer)
        torch.cuda._sleep(5_000_000)

    monkeypatch.setattr(Offloaded, "before_layer", late)
    with load(SPLITS["all layers"]) as engine:
        assert same(engine.generate("hello", **JOB), expected)


def test_a_limit_is_planned_for_and_kept(tiny_dir: Path) -> None:
    """PyTorch is refused what passes it, for as long as the engine is there."""
    with runtime.load(tiny_dir, device="cuda", memory_limit_gb=8) as engine:
        plan = engine.memory_plan
        assert plan is not None and plan.peak_bytes <= 8 * GIB
        torch.cuda.reset_peak_memory_stats()
        engine.generate("hello", seconds=0.2, width=64, height=64, steps=1)
        assert torch.cuda.max_memory_reserved() < 8 * GIB
        assert free_bytes(DEVICE) < 8 * GIB
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(8 * GIB, dtype=torch.uint8, device=DEVICE)
    torch.empty(8 * GIB, dtype=torch.uint8, device=DEVICE)
    torch.cuda.empty_cache()
    with pytest.raises(runtime.DeviceError, match=r"no way to run in 0\.5 GiB was found"):
        runtime.load(tiny_dir, device="cuda", memory_limit_gb=0.5)


def test_the_bus_is_measured_and_planned_by(tiny_dir: Path) -> None:
    """PCIe 3.0 over four lanes to NVLink; a second look copies nothing."""
    rate = measured_bus(DEVICE)
    assert 1e9 < rate < 1e12 and measured_bus(DEVICE) is rate
    with runtime.load(tiny_dir, device="cuda", memory_limit_gb=8.0) as engine:
        assert engine.memory_plan is not None
        assert engine.memory_plan.copy_bytes_per_s == measured_bus(torch.device("cuda:0"))
