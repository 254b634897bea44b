"""Engines of several processes, over gloo: clips are those of one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import sounds
import torch
from PIL import Image

from magihuman import runtime
from magihuman.runtime.parallel import Team
from magihuman.runtime.weights import AUDIO_FOLDER

OPTIONS = {"seconds": 1.2, "width": 32, "height": 32, "steps": 2, "seed": 3}  # two windows
MODEL = {"variant": "base", "sr": "1080p", "precision": "fp32", "device": "cpu"}
SR = {"sr_width": 64, "sr_height": 64, "sr_steps": 1}

UNDER_TORCHRUN = """
import sys, torch
from magihuman import runtime
torch.set_num_threads(1)
with runtime.load(sys.argv[1], device="cpu", context_parallel=2) as engine:
    if engine.rank == 0:
        engine.generate("a man nods", seconds=0.2, width=64, height=64, steps=1, save=sys.argv[2])
        engine.follow()  # returns at once
    else:
        parts = engine._parts
        assert parts.text_encoder is parts.audio_vae is parts.image_vae is None
        try:
            engine.generate("a man nods")
        except runtime.InvalidRequestError as error:
            assert "rank 0" in str(error)
        engine.follow()
print("done", engine.rank)
"""


def assert_alike(ours: runtime.Video, theirs: runtime.Video) -> None:
    """In fp32, where sums in another order move few pixels across a rounding; a row of the sequence
    or a window in the wrong place would move all of them by tens.
    """
    assert ours.frames.shape == theirs.frames.shape
    difference = np.abs(ours.frames.astype(int) - theirs.frames.astype(int))
    assert difference.max() <= 1 and difference.mean() < 0.02
    assert np.abs(ours.audio - theirs.audio).max() < 1e-3


@pytest.fixture(scope="module")
def driven(tmp_path_factory) -> dict[str, object]:
    """An image and a voice."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.effect_noise((80, 80), 60).convert("RGB").save(folder / "face.png")
    voice = sounds.write_sine(folder / "voice.wav", seconds=1.2)
    return {"image": folder / "face.png", "audio": voice}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In each process: the threads of two would fight for the cores of a small machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tiny_dir):
    with runtime.load(tiny_dir, **MODEL) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared(tiny_dir):
    with runtime.load(tiny_dir, context_parallel=2, **MODEL) as engine:
        yield engine


def test_guidance_and_frame_local_super_resolution(alone, shared) -> None:
    options = {**OPTIONS, **SR, "sr_guidance": 3.5}
    assert shared.rank == 0 and shared.vae == "plain" and not shared.is_compiled
    assert_alike(shared.generate("a man nods", **options), alone.generate("a man nods", **options))


def test_an_image_and_a_voice(alone, shared, driven) -> None:
    options = {**OPTIONS, **SR, **driven}
    assert_alike(shared.generate("hello", **options), alone.generate("hello", **options))


def test_streams_and_files_have_the_windows_in_order(shared, tmp_path) -> None:
    options = {**OPTIONS, **SR}
    whole = shared.generate("a", save=tmp_path / "clip.mp4", **options)
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    with shared.generate_stream("a", **options) as chunks:
        pieces = list(chunks)
    assert len(pieces) > 1
    assert (np.concatenate([piece.frames for piece in pieces]) == whole.frames).all()


def test_all_leave_a_request_together(shared) -> None:
    """Whatever ends it and in whichever stage, the next one is served."""
    expected = shared.generate("a", **OPTIONS, **SR)
    for stage in ("denoise", "super_resolve", "decode_video"):
        cancel = threading.Event()

        def stop(progress: runtime.Progress, stage=stage, cancel=cancel) -> None:
            if (progress.stage == stage and progress.step > 0) or stage == "denoise":
                cancel.set()

        with pytest.raises(runtime.Cancelled):
            shared.generate("a", on_progress=stop, cancel=cancel, **OPTIONS, **SR)
    with pytest.raises(runtime.DeadlineExceeded):
        shared.generate("a", deadline_s=0.3, **{**OPTIONS, "steps": 32}, **SR)
    again = shared.generate("a", **OPTIONS, **SR)
    assert (again.frames == expected.frames).all()
    assert shared.is_usable


def test_a_lack_of_memory_on_rank_0_leaves_the_engine_usable(shared, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("magihuman.runtime.parallel.context_parallel.decode_group", full)
        with pytest.raises(runtime.DeviceError, match="ran out of memory"):
            shared.generate("a", **OPTIONS, **SR)
    assert shared.is_usable
    shared.generate("a", **OPTIONS, **SR)


def test_an_engine_whose_other_process_was_killed_says_so(shared) -> None:
    """Last of those with this engine."""
    (worker,) = shared._context_parallel.team._workers
    worker.kill()
    worker.wait()
    end = time.monotonic() + 300
    while shared.is_usable:  # it says so before anybody asks for a clip
        assert time.monotonic() < end
        time.sleep(0.02)
    for _ in range(2):
        with pytest.raises(runtime.EngineUnusable, match="rank 1 ended with code -9"):
            shared.generate("a", **OPTIONS, **SR)
    assert not shared.is_usable
    shared.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_parallel": 0}, "whole number from 1 up, got 0"),
        ({"context_parallel": 2.0}, "whole number from 1 up, got 2.0"),
        ({"context_parallel": 2, "memory_limit_gb": 20}, "memory_limit_gb must go with"),
        ({"context_parallel": 3}, "key/value heads, 2, got 3; use 1 or 2"),
        ({"context_parallel": 2, "vae": "tensorrt", "turbo_vae": "."}, "vae='tensorrt' must go"),
    ],
)
def test_what_cannot_be_shared_is_refused(tiny_dir, options, message) -> None:
    with pytest.raises(runtime.InvalidRequestError, match=message):
        runtime.load(tiny_dir, device="cpu", **options)


def test_rank_0_reads_while_the_others_start(tiny_dir, monkeypatch) -> None:
    reading, start = threading.Event(), Team.start

    def late(*given: object) -> Team:
        assert reading.wait(300)
        return start(*given)

    monkeypatch.setattr(Team, "start", late)
    with runtime.load(
        tiny_dir, device="cpu", context_parallel=2, on_load=lambda *read: reading.set()
    ) as engine:
        assert engine.generate("a", **OPTIONS).frames.any()


def test_what_rank_0_alone_cannot_read_ends_all(tiny_dir, tmp_path) -> None:
    """While the others start; it has the error, and nothing is left of the team."""
    started, start = [], Team.start
    shutil.copytree(tiny_dir, tmp_path / "model")
    (file,) = (tmp_path / "model" / AUDIO_FOLDER).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Team, "start", lambda *given: started.append(start(*given)) or started[0])
        with pytest.raises(runtime.CheckpointError, match=AUDIO_FOLDER):
            runtime.load(tmp_path / "model", device="cpu", context_parallel=2)
    assert [worker.poll() is not None for worker in started[0]._workers] == [True]
    assert not torch.distributed.is_initialized()


def test_under_torchrun(tiny_dir, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    arguments = ("--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, script, tiny_dir,
         tmp_path / "clip.mp4"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[-2:] == ["done 0", "done 1"]
    assert (tmp_path / "clip.mp4").stat().st_size > 0
