from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sounds import sine, wav, write_sine

from magihuman.runtime import InvalidRequestError
from magihuman.runtime.media import apart
from magihuman.runtime.media.apart import Decoders, ImageTask, SoundTask
from magihuman.runtime.media.image import open_image
from magihuman.runtime.media.voice import open_driving_audio

PIXELS, FORMATS = 10_000_000, ("PNG", "JPEG", "WEBP")


@pytest.fixture(scope="module")
def shared() -> Iterator[Decoders]:
    decoders = Decoders()
    yield decoders
    decoders.close()


@pytest.fixture
def face(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    return tmp_path / "face.png"


def image_task(source: Path, formats: tuple[str, ...] = FORMATS) -> ImageTask:
    return ImageTask(str(source), f"{source}.decoded", PIXELS, formats)


def sound_task(source: Path, kept_s: float, limit_s: float = 10.0) -> SoundTask:
    return SoundTask(str(source), f"{source}.decoded", limit_s, kept_s, ("wav", "mp3"))


def decoded(task: ImageTask | SoundTask) -> Path:
    return Path(task.target)


def test_an_image_comes_out_as_it_is_read_here(shared, face):
    task = image_task(face)
    shared.run("image", task)
    assert np.array_equal(open_image(decoded(task)), open_image(face))


@pytest.mark.parametrize(("kept_s", "note"), [(1.0, "is longer than the 1 s"), (5.0, "2.50 s")])
@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_a_sound_comes_out_as_it_is_read_here(shared, tmp_path, kept_s, note, suffix):
    task = sound_task(write_sine(tmp_path / f"voice.{suffix}", 44100, 2, 2.5), kept_s)
    shared.run("sound", task)
    samples, said = open_driving_audio(decoded(task), kept_s)
    expected, expected_note = open_driving_audio(task.source, kept_s)
    assert np.array_equal(samples, expected)
    assert said == expected_note and (suffix == "mp3" or note in said)
    assert decoded(task).stat().st_size < 51200 * 4 * (kept_s + 1) + 100


def test_loud_samples_are_noted_there_too(shared, tmp_path):
    path = tmp_path / "voice.wav"
    path.write_bytes(wav(8 * sine(48000, 0.5)[None], 48000, is_float=True))
    task = sound_task(path, 0.5)
    shared.run("sound", task)
    assert "times full scale" in open_driving_audio(decoded(task), 0.5)[1]


def test_what_is_refused_says_why(shared, tmp_path, face):
    (tmp_path / "no.png").write_bytes(b"no image")
    voice = write_sine(tmp_path / "voice.wav", seconds=2.0)
    for kind, task, says in [
        ("image", image_task(tmp_path / "no.png"), r"one of the formats PNG, JPEG, WEBP, got .*no"),
        ("image", image_task(face, ("JPEG",)), "must be in one of the formats JPEG"),
        ("image", ImageTask(str(face), "x", 10, FORMATS), "must have 1 to 10 pixels, got 64x48"),
        ("sound", sound_task(voice, 1.0, limit_s=1.5), "no longer than 1.5 s, got more; cut it"),
        ("sound", sound_task(face, 1.0), "must be in a format FFmpeg reads"),
    ]:
        with pytest.raises(InvalidRequestError, match=says):
            shared.run(kind, task)
        assert not decoded(task).exists()
    (process,) = shared.processes()
    shared.run("image", image_task(face))
    assert shared.processes() == [process]  # refusing ends nothing


def test_a_disk_that_does_not_take_it_is_no_fault_of_the_file(shared, face, tmp_path):
    voice = write_sine(tmp_path / "voice.wav", seconds=0.5)
    nowhere = str(tmp_path / "none" / "out")
    for kind, task in [
        ("image", ImageTask(str(face), nowhere, PIXELS, FORMATS)),
        ("sound", SoundTask(str(voice), nowhere, 10.0, 1.0, ("wav",))),
    ]:
        with pytest.raises(FileNotFoundError):
            shared.run(kind, task)
    shared.run("image", image_task(face))


def test_a_process_has_no_torch_and_no_token(shared, face, monkeypatch):
    monkeypatch.setenv("MAGIHUMAN_TEST_TOKEN", "secret")
    with_token = Decoders()
    with_token.run("image", image_task(face))
    (process,) = with_token.processes()
    assert b"secret" not in Path(f"/proc/{process}/environ").read_bytes()
    assert "torch" not in Path(f"/proc/{process}/maps").read_text()
    with_token.close()
    assert not Path(f"/proc/{process}").exists()


@contextmanager
def halted(decoders: Decoders, face: Path) -> Iterator[tuple[Future[None], int, int]]:
    """A task, the process that has it and does not go on with it, and where that says things."""
    decoders.run("image", image_task(face))
    (process,) = decoders.processes()
    answers = decoders._idle[0]._process.stdout.fileno()
    os.kill(process, signal.SIGSTOP)  # in the midst of whatever it does
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(decoders.run, "image", image_task(face))
        while decoders.processes():
            time.sleep(0.01)
        time.sleep(0.1)
        yield asked, process, answers


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, 40])
def test_a_process_killed_while_it_decodes_costs_one_file(face, number):
    """40 has no name."""
    decoders = Decoders()
    name = number.name if isinstance(number, signal.Signals) else "signal 40"
    with halted(decoders, face) as (asked, process, _):
        os.kill(process, number)
        os.kill(process, signal.SIGCONT)
        with pytest.raises(InvalidRequestError, match=f"got one that ends its .*{name}"):
            asked.result(300)
    (fresh,) = decoders.processes()  # starts at once, for the next file
    assert fresh != process
    decoders.run("image", image_task(face))
    decoders.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"junk\n",
        b"[]\n",
        b"[" * 20_000 + b"\n",
        b'{"error": 3, "errno": null}\n',
        b'{"error": null, "errno": "x"}\n',
        b'{"error": null, "errno": 1e99}\n',
        b"x" * 100_000,
    ],
    ids=range(7),
)
def test_a_process_that_a_file_has_taken_over_costs_one_file(face, answer):
    """Whatever it says then."""
    decoders = Decoders()
    with halted(decoders, face) as (asked, process, answers):
        pipe = os.stat(f"/proc/self/fd/{answers}").st_ino
        (place,) = {
            path for path in Path(f"/proc/{process}/fd").iterdir() if path.stat().st_ino == pipe
        }
        with place.open("wb", buffering=0) as its_own, suppress(BrokenPipeError):
            its_own.write(answer)
        with pytest.raises(InvalidRequestError, match="got one that makes its decoder say"):
            asked.result(300)
    assert process not in decoders.processes()
    decoders.run("image", image_task(face))
    decoders.close()


def test_a_process_killed_while_it_starts_costs_nothing(face):
    decoders = Decoders()
    decoders.warm()
    os.kill(decoders.processes()[0], signal.SIGKILL)
    decoders.run("image", image_task(face))
    decoders.close()


def test_a_process_goes_before_all_others_where_memory_runs_out(shared, face):
    shared.run("image", image_task(face))
    for process in shared.processes():
        assert Path(f"/proc/{process}/oom_score_adj").read_text() == "1000\n"


def test_a_process_killed_while_it_waits_costs_nothing(face):
    decoders = Decoders()
    decoders.run("image", image_task(face))
    (process,) = decoders.processes()
    os.kill(process, signal.SIGKILL)
    while Path(f"/proc/{process}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    decoders.run("image", image_task(face))
    decoders.close()


def test_a_file_that_takes_too_long_is_refused(face):
    decoders = Decoders(deadline_s=1.0)
    decoders.run("image", image_task(face))
    (process,) = decoders.processes()
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(InvalidRequestError, match="got one that takes longer than 1 s"):
        decoders.run("image", image_task(face))
    assert not Path(f"/proc/{process}").exists()
    decoders.close()


def test_a_file_that_fills_the_memory_is_refused(tmp_path, face):
    """60 megapixels with transparency are 240 MB each time they are copied."""
    Image.new("RGBA", (10_000, 6_000)).save(tmp_path / "large.png", compress_level=1)
    decoders = Decoders(memory_bytes=600 * 2**20)
    task = ImageTask(str(tmp_path / "large.png"), str(tmp_path / "out"), 100_000_000, FORMATS)
    with pytest.raises(InvalidRequestError, match="decoded"):
        decoders.run("image", task)
    decoders.run("image", image_task(face))
    decoders.close()


def test_a_process_ends_after_so_many_files_and_with_its_parent(face, monkeypatch):
    monkeypatch.setattr(apart, "TASKS", 2)
    decoders = Decoders()
    seen = []
    for _ in range(4):
        decoders.run("image", image_task(face))
        seen += decoders.processes()
    assert len(set(seen)) == 3 and seen[1] == seen[2]
    process = decoders._idle[0]
    process._process.stdin.close()  # as when its parent ends
    assert process._process.wait(300) == 0
    decoders.close()


def test_many_threads_share_them(tmp_path, face):
    decoders = Decoders()
    at_once = threading.Barrier(4, timeout=300)

    def run(index: int) -> bool:
        task = ImageTask(str(face), str(tmp_path / str(index)), PIXELS, FORMATS)
        if index < 4:
            at_once.wait()
        decoders.run("image", task)
        return np.array_equal(open_image(decoded(task)), open_image(face))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(24)))
    assert 1 <= len(decoders.processes()) <= 4
    decoders.close()
