from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image
from prometheus_client import generate_latest
from sounds import write_sine
from video_client import BEARER, Client, until

from magihuman.runtime.serving.api import create_app
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.messages import Make
from magihuman.runtime.serving.metrics import Metrics
from magihuman.runtime.serving.replica import EngineReplica
from magihuman.runtime.serving.settings import Settings


@dataclass
class Local(Client):
    """The server's parts in this process, without Ray."""

    url: str = ""
    jobs: list[Jobs] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    loop: list[asyncio.AbstractEventLoop] = field(default_factory=list)

    def run(self, coroutine: Any) -> Any:
        """In the server's own thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop[0]).result(60)


@contextmanager
def served(settings: Settings, replica: EngineReplica, make: Make | None = None) -> Iterator[Local]:
    """Everything but Ray, on a port of its own. make: in place of the replica's."""
    local = Local(httpx.Client(headers=BEARER))

    async def is_ready() -> bool:
        return True

    app = create_app(settings, lambda: local.jobs[0], is_ready, lambda: local.metrics[0])

    async def main() -> None:
        jobs = Jobs(settings, make or replica.make, slots=2)
        local.loop.append(asyncio.get_running_loop())
        local.jobs.append(jobs)
        local.metrics.append(Metrics(jobs, lambda: generate_latest(replica.registry)))
        jobs.start()
        await server.serve()
        await jobs.close()

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        local.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        local.http.base_url = httpx.URL(local.url)
        with local.http:
            yield local
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="session")
def replica(tiny_dir) -> Iterator[EngineReplica]:
    made = EngineReplica({"model": tiny_dir, "device": "cpu"}, [])
    yield made
    made.close()


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
