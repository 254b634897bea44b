from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from magihuman import runtime
from magihuman.runtime.media import mp4

# A shell has what it starts in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Likewise SIGHUP, which nohup has ignored.
if os.name != "nt" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Files that take a minute and more, most of few tests: begun last, one would keep a worker busy
# while the other has nothing left.
LONG = (
    "benchmarks/test_scripts.py",
    "runtime/serving/cluster/test_server.py",
    "runtime/serving/cluster/test_fuzz.py",
    "runtime/serving/page/test_page.py",
    "benchmarks/test_suites.py",
    "runtime/engine/test_soak.py",
    "runtime/media/test_fuzz.py",
    "kernels/test_sm90.py",
    "test_nano.py",
    "test_packaging.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the long files, for what is given out file by file, and leave out what takes too
    long for every change.
    """
    if not config.getoption("--thorough"):
        items[:] = [item for item in items if item.get_closest_marker("thorough") is None]
    names = {str(Path(__file__).parent / name): index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: names.get(str(item.path), len(names)))


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """Closing an engine collects cycles, and it is not to look at all libraries each time."""
    gc.collect()  # what is frozen stays
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A tiny model directory of every component, with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    runtime.write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def engine(tiny_dir):
    """The tiny distilled model, on the CPU."""
    with runtime.load(tiny_dir, variant="distill", device="cpu") as loaded:
        yield loaded


@pytest.fixture
def same_bytes(monkeypatch):
    """x264 makes the same of the same frames: without its macroblock tree, which reads memory that
    it has not written, and chooses quantisers by it.
    """
    monkeypatch.setitem(mp4.ENCODER, "x264-params", "mbtree=0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-requests",
        type=int,
        default=200,
        help="requests of tests/runtime/engine/test_soak.py",
    )
    parser.addoption(
        "--fuzz-count",
        type=int,
        default=2000,
        help="damaged images, and as many sounds, of tests/runtime/media/test_fuzz.py",
    )
    parser.addoption(
        "--thorough",
        action="store_true",
        help="also tests that take long, which `make test` leaves out",
    )
    parser.addoption(
        "--clients",
        help="folder of the clients that tests/runtime/serving/clients tries",
    )
    parser.addoption(
        "--load-jobs",
        type=int,
        default=60,
        help="jobs of tests/runtime/serving/cluster/test_load.py; from 300 on of 20 clients",
    )


@dataclass
class CMake:
    """A build folder of the top-level CMakeLists.txt."""

    build: Path

    def configure(self, **options: object) -> subprocess.CompletedProcess[str]:
        given = [f"-D{name}={value}" for name, value in options.items()]
        source = ("-S", str(Path(__file__).parents[1]), "-B", str(self.build))
        return self._run(*source, "-G", "Unix Makefiles", *given)

    def make(self, target: str) -> str:
        done = self._run("--build", str(self.build), "--target", target)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def would_make(self, target: str) -> str:
        """The commands Make would run."""
        done = self._run("--build", str(self.build), "--target", target, "--", "--dry-run")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        own = Path(sys.executable).parent
        path = f"{own}{os.pathsep}{os.environ['PATH']}"
        cmake = shutil.which("cmake", path=path)
        assert cmake is not None, "cmake comes with the extra [dev]"
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run([cmake, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture
def cmake(tmp_path) -> CMake:
    return CMake(tmp_path / "build")


@pytest.fixture(scope="session")
def engines_build(tiny_dir, tmp_path_factory) -> CMake:
    """The target `engines`, built for sm_89 by TensorRT-RTX, which needs no GPU for it."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed; it has wheels for Linux on x86-64 only")
    made = CMake(tmp_path_factory.mktemp("engines") / "build")
    options = {"MAGIHUMAN_SIZES": "64x64", "MAGIHUMAN_SM": 89, "Python_EXECUTABLE": sys.executable}
    configured = made.configure(MAGIHUMAN_MODEL=tiny_dir, **options)
    assert configured.returncode == 0, configured.stderr
    assert "engines: tensorrt_rtx" in configured.stdout
    made.make("engines")
    return made


@pytest.fixture(scope="session")
def engines_dir(engines_build) -> Path:
    """A folder of engines of the tiny decoder."""
    return engines_build.build / "engines"
