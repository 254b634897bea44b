from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client import generate_latest
from sounds import write_sine
from video_client import BEARER, TOKEN, Client, until

from magihuman.runtime.serving.api import create_app
from magihuman.runtime.serving.front.bounds import Bounds
from magihuman.runtime.serving.front.server import Front
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.messages import Make
from magihuman.runtime.serving.metrics import Metrics
from magihuman.runtime.serving.replica import EngineReplica
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.shared.jobs import SharedJobs
from magihuman.runtime.serving.shared.staging import staged
from magihuman.runtime.serving.uploads import DECODERS


@dataclass
class Local(Client):
    """The server's parts in this process, without Ray."""

    url: str = ""
    jobs: list[Jobs] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    loop: list[asyncio.AbstractEventLoop] = field(default_factory=list)

    def run(self, coroutine: Any) -> Any:
        """In the server's own thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop[0]).result(300)


@contextmanager
def served(
    settings: Settings,
    replica: EngineReplica,
    make: Make | None = None,
    bounds: Bounds | None = None,
) -> Iterator[Local]:
    """Everything but Ray, on a port of its own. make: in place of the replica's."""
    local = Local(httpx.Client(headers=BEARER))

    async def is_ready() -> bool:
        return True

    line = Jobs if settings.shared is None else SharedJobs
    app = create_app(settings, lambda: local.jobs[0], is_ready, lambda: local.metrics[0])

    async def main() -> None:
        jobs = line(settings, make or partial(staged, make=replica.make), slots=2)
        local.loop.append(asyncio.get_running_loop())
        local.jobs.append(jobs)
        local.metrics.append(Metrics(jobs, lambda: generate_latest(replica.registry)))
        jobs.start()
        front, ending = Front(app, bounds), asyncio.Event()
        local.url = f"http://127.0.0.1:{await front.start('127.0.0.1', 0)}"
        ready.set()
        endings.append(lambda: local.loop[0].call_soon_threadsafe(ending.set))
        await ending.wait()
        await front.stop()
        await jobs.close()

    ready, endings = threading.Event(), []
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        until(lambda: ready.is_set() or not thread.is_alive())
        local.http.base_url = httpx.URL(local.url)
        with local.http:
            yield local
    finally:
        for end in endings:
            end()
        thread.join(300)
        DECODERS.close()


@pytest.fixture(scope="session")
def replica(tiny_dir) -> Iterator[EngineReplica]:
    engine = EngineReplica({"model": tiny_dir, "device": "cpu"}, [])
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One for all tests, since it takes its time to start."""
    from browsing import chromium  # not everywhere where other tests run

    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="session")
def face(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("face") / "face.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(path)
    return path


@pytest.fixture(scope="session")
def voice(tmp_path_factory) -> Path:
    return write_sine(tmp_path_factory.mktemp("voice") / "voice.wav", seconds=0.4)


@pytest.fixture(scope="session")
def serve_here():
    """See `served`."""
    return served


@pytest.fixture
def local(settings, replica, serve_here):
    """A server in this process, with what the module's `settings` say."""
    with serve_here(settings, replica) as running:
        yield running


class Held:
    """Windows of a decoder, each of which waits to be let through but for the first."""

    def __init__(self, windows: Any) -> None:
        self.let, self.decoded = threading.Semaphore(0), 0
        self._windows = windows

    def __call__(self, latent: Any) -> Iterator[Any]:
        self.decoded = 0
        for index, window in enumerate(self._windows(latent)):
            if index:
                assert self.let.acquire(timeout=120)
            self.decoded = index + 1
            yield window


@pytest.fixture
def held(replica, monkeypatch) -> Iterator[Held]:
    """The windows of the replica's decoder."""
    decoder = replica._engine._parts.turbo_vae
    windows = Held(decoder.windows)
    monkeypatch.setattr(decoder, "windows", windows)
    yield windows
    windows.let.release(100)


@dataclass(frozen=True)
class Disk:
    """A small file system of its own, in memory."""

    place: Path

    def fill(self) -> None:
        """Leave no byte."""
        with (self.place / "filling").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Make room again."""
        (self.place / "filling").unlink()

    def refuse(self, is_read_only: bool) -> None:
        """Refuse every change, renames included, or take them again."""
        option = f"remount,{'ro' if is_read_only else 'rw'}"
        subprocess.run(["mount", "-o", option, str(self.place)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    """Of 4 MiB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "magihuman-test", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
    yield Disk(place)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


# That of a service which has no home of its own, and of somebody who has opened another Ray.
ENVIRONMENT = {
    "MAGIHUMAN_TOKEN": TOKEN,
    "HOME": "/proc/none",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ADDRESS": "127.0.0.1:1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
}


@dataclass
class Server(Client):
    """`magihuman serve` in processes of its own."""

    command: list[str]
    log: Path
    url: str
    process: subprocess.Popen[bytes] | None = None

    def another(self, folder: Path) -> Server:
        """One like it, with a folder and a port of its own, that is not started yet."""
        command, port = list(self.command), free_port()
        command[command.index("--folder") + 1] = str(folder / "videos")
        command[command.index("--port") + 1] = str(port)
        return Server(self.http, command, folder / "log", f"http://127.0.0.1:{port}")

    def launch(self) -> int:
        """Start it, and return the length of the log before."""
        with self.log.open("ab") as log:
            before = log.tell()
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **ENVIRONMENT},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return before

    def start(self) -> None:
        """Returns once it is ready."""
        before = self.launch()

        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            if b"serving at" not in self.log.read_bytes()[before:]:
                return False  # what answers may be left of one that was killed
            with suppress(httpx.TransportError):
                return self.http.get("/ready").status_code == 200
            return False

        until(is_ready)

    def processes(self, of: str = "") -> list[int]:
        """Those of the server and of its Ray whose command has this in it."""
        listed = subprocess.run(
            ["ps", "-ww", "-eo", "pid=,sid=,args="], capture_output=True, text=True, check=True
        )
        processes = [line.split(None, 2) for line in listed.stdout.splitlines()]
        return [
            int(pid) for pid, sid, args in processes if int(sid) == self.process.pid and of in args
        ]

    def folder(self) -> Path:
        """Where it keeps its videos."""
        return Path(self.command[self.command.index("--folder") + 1])

    def private_folder(self) -> Path:
        """That of its Ray, or the one above which is open to its owner alone."""
        (process,) = self.processes("gcs/gcs_server ")
        arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        (place,) = (Path(text[14:]) for text in arguments if text.startswith("--session-dir="))
        return next(path for path in (place, *place.parents) if not path.stat().st_mode & 0o077)

    def clear(self) -> None:
        """Remove all videos."""
        for place in self.folder().glob("video_*"):
            self.http.delete(f"/v1/videos/{place.name}")

    def kill(self, of: str) -> None:
        """As the kernel does when memory runs out."""
        (pid,) = self.processes(of)
        os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(120)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def server(one_server) -> Server:
    """The server, running. Tests leave no video of theirs being made."""
    if one_server.process is None or one_server.process.poll() is not None:
        one_server.start()
    return one_server


def free_port() -> int:
    """None that the system gives to whoever asks for any, as Ray's processes do while they start
    (on Linux from 32768 on), and none of Ray's workers (10002 to 19999).
    """
    for port in random.sample(range(20000, 32768), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port found")


@pytest.fixture(name="free_port")
def port_finder():
    """See `free_port`."""
    return free_port


@pytest.fixture
def server_at(tiny_dir, tmp_path) -> Iterator[Callable[[Path], Server]]:
    """Makes a server of a folder, yet to be started. Its service has no home."""
    with ExitStack() as made:

        def make(folder: Path) -> Server:
            port = free_port()
            command = ["env", "-u", "HOME", sys.executable, "-m", "magihuman.runtime.cli", "serve"]
            command += ["--model", str(tiny_dir), "--folder", str(folder), "--device", "cpu"]
            command += ["--port", str(port)]
            url = f"http://127.0.0.1:{port}"
            http = made.enter_context(httpx.Client(base_url=url, headers=BEARER, timeout=300))
            server = Server(http, command, tmp_path / "log", url)
            made.callback(server.end)
            return server

        yield make


@pytest.fixture(scope="session")
def one_server(tiny_dir, tmp_path_factory) -> Iterator[Server]:
    """One for all tests, since it takes its time to start."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    options = {
        "--model": tiny_dir,
        "--folder": folder / "videos",
        "--port": port,
        "--device": "cpu",
        "--max-upload-mib": 1,
        "--max-prompt-chars": 200,
        "--max-seconds": 2,
        "--max-pixels": 256 * 256,
        "--timeout-seconds": 180,
    }
    command = [sys.executable, "-m", "magihuman.runtime.cli", "serve"]
    command += [str(part) for option in options.items() for part in option]
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, headers=BEARER, timeout=300) as http:
        running = Server(http, command, folder / "log", url)
        yield running
        with suppress(httpx.TransportError):
            running.clear()
        running.end()
