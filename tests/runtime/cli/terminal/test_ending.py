"""Commands that are told to stop, whose disk is full, or whose output nobody takes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from magihuman import runtime
from magihuman.runtime.files import staged_folder, write_text

COMMAND = [sys.executable, "-m", "magihuman.export.cli"]
SMALL = ("--seconds", "0.2", "--width", "64", "--height", "64", "--steps", "1")
# What Python runs when it starts: nothing half-written becomes whole, however late a signal comes.
UNFINISHED = """
import os, time
def held(rename):
    def late(source, *rest, **options):
        while ".magihuman-" in str(source):
            time.sleep(0.1)
        return rename(source, *rest, **options)
    return late
os.rename, os.replace = held(os.rename), held(os.replace)
"""


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders, at any depth."""
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".magihuman-")]


@pytest.fixture
def unfinished(tmp_path_factory) -> dict[str, str]:
    """The environment of a command that never comes to its end by itself."""
    folder = tmp_path_factory.mktemp("unfinished")
    (folder / "sitecustomize.py").write_text(UNFINISHED)
    path = os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))
    return {**os.environ, "PYTHONPATH": path}


def stopped(process: subprocess.Popen[str], folder: Path, number: int) -> tuple[int, str]:
    """Send the signal once something is half-written below the folder; exit code and stderr."""
    end = time.monotonic() + 120
    while not leftovers(folder):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    try:
        _, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, stderr


@pytest.mark.parametrize(
    ("command", "number"),
    [
        # One handler for all commands, and a way of its own for Ctrl-C.
        *((command, signal.SIGTERM) for command in ("generate", "tiny", "convert", "export")),
        *(("tiny", number) for number in (signal.SIGHUP, signal.SIGINT)),
        ("generate", signal.SIGINT),
    ],
)
def test_a_signal_leaves_nothing_half_written(tiny_dir, tmp_path, unfinished, command, number):
    out = tmp_path / "out"
    arguments = {
        "generate": (
            "-m", tiny_dir, "-p", "hi", "-o", tmp_path / "out.mp4", *SMALL,
        ),
        "tiny": (out,),
        "convert": (out, "-m", tiny_dir),
        "export": (out, "-m", tiny_dir, "--vae", "--size", "64x64"),
    }[command]  # fmt: skip
    if command == "generate":
        # What is looked for is the clip, not the file that tries the folder before.
        process = start(command, *arguments, env=unfinished)
        end = time.monotonic() + 120
        while not list(tmp_path.glob(".magihuman-*.mp4")):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        code = process.returncode
    else:
        process = start(command, *arguments, env=unfinished)
        code, stderr = stopped(process, tmp_path, number)
    assert code == (1 if number == signal.SIGINT else 128 + number), stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_what_nohup_ignores_stays_ignored(tiny_dir, tmp_path):
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start("tiny", tmp_path / "out", preexec_fn=ignore)
    code, stderr = stopped(process, tmp_path, signal.SIGHUP)
    assert code == 0, stderr
    assert len(list((tmp_path / "out").iterdir())) == 8


def test_a_library_installs_no_handlers(tiny_dir, tmp_path):
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with runtime.load(tiny_dir, device="cpu") as engine:
        engine.generate("hi", seconds=0.2, width=32, height=32, steps=1, save=tmp_path / "a.mp4")
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before


# -- a full disk ------------------------------------------------------------------------------


def limit(size_bytes: int):
    """Writing beyond this size fails, as on a full disk (with EFBIG instead of ENOSPC)."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


@pytest.fixture
def uncached() -> dict[str, str]:
    """The environment of a command that keeps nothing of what Python compiles: cut short by a limit
    it would be taken for whole by all that run after.
    """
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize(
    ("size_bytes", "is_new"),
    [
        pytest.param(100, True, marks=pytest.mark.thorough),
        (20_000, False),
        (200_000, True),
        pytest.param(200_000, False, marks=pytest.mark.thorough),
    ],
)
def test_tiny_on_a_full_disk(tiny_dir, tmp_path, uncached, size_bytes, is_new):
    folder = tmp_path / "parent" / "model"
    if not is_new:
        (folder / "distill").mkdir(parents=True)
        (folder / "distill" / "model.safetensors").write_bytes(b"old")
        (folder / "mine").touch()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    process = start("tiny", folder, preexec_fn=limit(size_bytes), env=uncached)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    assert (
        stderr.startswith("error: the checkpoint cannot be written to")
        and len(stderr.splitlines()) == 1
    )
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    if not is_new:
        assert (folder / "distill" / "model.safetensors").read_bytes() == b"old"


def test_tiny_replaces_what_is_there_and_keeps_the_rest(tiny_dir, tmp_path):
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "model.safetensors").write_bytes(b"old")
    (tmp_path / "distill" / "mine").write_bytes(b"mine")
    folders = runtime.write_tiny(tmp_path)
    assert load_file(tmp_path / "distill" / "model.safetensors")
    assert (tmp_path / "distill" / "mine").read_bytes() == b"mine"
    assert sorted(folders) == sorted(tmp_path.iterdir()) and leftovers(tmp_path) == []


def test_explain_on_a_full_disk(tmp_path, uncached):
    page = tmp_path / "page.html"
    page.write_text("old")
    process = start("explain", "--html", page, preexec_fn=limit(500), env=uncached)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and f"{page} cannot be written" in stderr
    assert list(tmp_path.iterdir()) == [page] and page.read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_staged_files_arrive_together_or_not_at_all(tmp_path, error):
    def broken(folder: Path) -> None:
        with staged_folder(folder) as temporary:
            (temporary / "a").mkdir()
            (temporary / "a" / "b").write_text("half")
            raise error

    for folder in (tmp_path, tmp_path / "new", tmp_path / "newer" / "new"):
        with pytest.raises(error):
            broken(folder)
        assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_to_as_it_is(tmp_path):
    read, write = os.pipe()
    write_text(Path(f"/dev/fd/{write}"), "straight")
    assert os.read(read, 100) == b"straight"
    os.close(read)
    os.close(write)


# -- nowhere to say it ------------------------------------------------------------------------

SAYING = {
    "inspect": ("nano",),
    "inspect --json": ("nano", "--json"),
    "doctor": (),
    "doctor --json": ("--json",),
    "explain": (),
    "explain --json": ("--json",),
    "tiny": ("{folder}/tiny",),
    "convert --json": ("{folder}/converted", "-m", "{tiny}", "--json"),
    "generate": ("-m", "{tiny}", "-p", "hi", "-o", "{folder}/clip.mp4", *SMALL),
    "generate --json": ("-m", "{tiny}", "-p", "hi", "-o", "{folder}/clip.mp4", *SMALL, "--json"),
    "verify --json": ("-m", "{tiny}", "-p", "hi", *SMALL, "--json"),
}


# What is printed raises in either place; how, differs between plain lines and JSON alone. Where a
# command loads a model, seconds go into that.
HEAVY = ("inspect", "explain", "generate", "generate --json", "verify --json")
NOWHERE = [
    *(
        pytest.param(command, "/dev/full", marks=[pytest.mark.thorough] * (command in HEAVY))
        for command in SAYING
    ),
    *((command, "a closed pipe") for command in ("doctor", "doctor --json")),
    ("generate --json", "a closed pipe"),
]


@pytest.mark.parametrize(("command", "place"), NOWHERE)
def test_output_that_nobody_takes_is_one_line(tiny_dir, tmp_path, command, place):
    if place == "/dev/full" and not Path(place).exists():
        pytest.skip("this system has no /dev/full")
    given = [part.format(tiny=tiny_dir, folder=tmp_path) for part in SAYING[command]]
    if place == "/dev/full":
        out = os.open(place, os.O_WRONLY)
    else:
        read, out = os.pipe()
        os.close(read)
    try:
        done = subprocess.run(
            [*COMMAND, command.split()[0], *given], stdout=out, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(out)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "standard output" in said[0], done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
