"""Many requests on one GPU, with the tiny checkpoint."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman import runtime

SMALL = {"seconds": 0.36, "width": 64, "height": 96, "steps": 2, "negative_prompt": "static"}

STICKY = """
import sys
import torch
from magihuman import runtime

with runtime.load(sys.argv[1], compile=False, vae="plain", device="cuda") as engine:
    windows = engine._parts.turbo_vae.windows

    def broken(latent):
        torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]  # a device-side assertion
        yield from windows(latent)

    engine._parts.turbo_vae.windows = broken
    for _ in range(2):
        try:
            engine.generate("hi", seconds=0.2, width=32, height=32, steps=1)
        except runtime.EngineUnusable as error:
            print("unusable", engine.is_usable, "CUDA error" in str(error))
"""


@pytest.fixture(scope="module")
def engine(tiny_dir: Path):
    with runtime.load(tiny_dir, variant="base", device="cuda", hooks=[runtime.NvtxHooks()]) as made:
        yield made


def same(a: runtime.Video, b: runtime.Video) -> bool:
    return np.array_equal(a.frames, b.frames) and np.array_equal(a.audio, b.audio)


def test_clips_made_beside_others_are_those_made_alone(engine) -> None:
    """New sizes are captured while neighbours encode."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    face = Image.fromarray(pixels)
    sizes = [{}, {"image": face}, {"width": 96}, {"height": 64, "image": face}, {"seconds": 2.0}]
    jobs = [{**SMALL, "seed": seed, **size} for seed in (1, 2) for size in sizes]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: engine.generate("hi", **job), jobs))
    for job, video in zip(jobs, together, strict=True):
        assert same(engine.generate("hi", **job), video)


def test_a_stream_is_the_clip_in_pieces(engine) -> None:
    clip = engine.generate("hi", **{**SMALL, "seconds": 3.0})
    chunks = list(engine.generate_stream("hi", **{**SMALL, "seconds": 3.0}))
    assert len(chunks) > 1
    assert np.array_equal(np.concatenate([c.frames for c in chunks]), clip.frames)
    assert np.array_equal(np.concatenate([c.audio for c in chunks]), clip.audio)


def test_warming_up_leaves_nothing_to_capture(engine, caplog) -> None:
    size = {"width": 128, "height": 32, "seconds": 1.0}
    engine.warmup([tuple(size.values())], text_tokens=[2, 6])
    with caplog.at_level("INFO", logger="magihuman"):
        engine.generate("hi", **{**SMALL, **size})
    assert "compiled" not in caplog.text and "captured" not in caplog.text


def test_cancelled_neighbours_change_nothing(engine) -> None:
    expected = engine.generate("hi", **SMALL)

    def job(index: int) -> runtime.Video | None:
        cancel = threading.Event()
        if index % 2:
            threading.Timer(0.01 * index, cancel.set).start()
        try:
            return engine.generate("hi", **SMALL, cancel=cancel)
        except runtime.Cancelled:
            return None

    with ThreadPoolExecutor(8) as pool:
        videos = list(pool.map(job, range(16)))
    assert all(same(video, expected) for video in videos if video is not None)


def test_a_lack_of_memory_leaves_the_engine_usable(engine) -> None:
    expected = engine.generate("hi", **SMALL)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        with pytest.raises(runtime.DeviceError, match="ran out of memory: 5 s of 1920x1088"):
            engine.generate("hi", **{**SMALL, "width": 1920, "height": 1088, "seconds": 5.0})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.is_usable
    assert same(engine.generate("hi", **SMALL), expected)


def test_an_error_that_stays_makes_the_engine_unusable(tiny_dir: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", STICKY, str(tiny_dir)], capture_output=True, text=True
    )
    assert said.stdout.splitlines() == ["unusable False True"] * 2, said.stderr
