"""What a server with thousands of finished videos takes to start, and to list a page of them.

    python benchmarks/host/many_videos.py [--videos N] [--folder RESULTS] [--tiny]

The start is that of `Store`, which is all that grows with the number: once with an empty folder,
once with so many finished videos. Pages of 100 are asked of the server's application, without a
network, the newest and the oldest first in turns. Seconds are the least of a few, and those of the
processor stand beside them, which neighbours on the machine do not change.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import generate_latest

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment
from magihuman.runtime.serving.api import create_app
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.metrics import Metrics
from magihuman.runtime.serving.records.database import Database, in_folder
from magihuman.runtime.serving.records.records import Records
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import Job, Status, Store

PAGE = 100
TIMES = 10
OPTIONS = {"seconds": 5.0, "width": 480, "height": 256, "seed": 42}
KEEP_S = 24 * 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=5000)
    given = environment.arguments(parser)
    count = 200 if given.tiny else given.videos
    with tempfile.TemporaryDirectory() as scratch:
        empty, full = Path(scratch, "empty"), Path(scratch, "full")
        write_finished(full, count)
        figures = {
            "videos": count,
            "start_empty": least(lambda: Store(empty, KEEP_S)),
            "start": least(lambda: Store(full, KEEP_S)),
            "page": asyncio.run(page(full)),
        }
    for name, value in figures.items():
        print(name, value)
    environment.write("many_videos", figures, given.folder)


def write_finished(folder: Path, count: int) -> None:
    """So many videos, as a server leaves them, but for what is in their files."""
    now, jobs = time.time(), []
    for index in range(count):
        job = Job("A woman smiles and says: hello!", dict(OPTIONS), created_at=now - count + index)
        job.status, job.started_at, job.completed_at = Status.COMPLETED, now, now
        job.expires_at, job.attempts = now + KEEP_S, 1
        job.timings_s = {"text": 0.1, "denoise": 1.4, "decode_video": 0.3, "write": 0.1}
        place = folder / job.id
        place.mkdir(parents=True, mode=0o700)
        (place / "video.mp4").write_text("mp4")
        (place / "video.mp4").chmod(0o600)
        jobs.append(job)
    Records(Database(in_folder(folder))).save(*jobs)


def least(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the fastest of a few calls, and of the processor in it."""
    found = []
    for _ in range(TIMES):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        call()
        found.append((time.perf_counter() - start_s, time.process_time() - start_cpu_s))
    return dict(zip(("s", "cpu_s"), min(found), strict=True))


async def page(folder: Path) -> dict[str, float]:
    """Seconds of a page, and of the processor in it."""
    settings = Settings(folder, "nano")
    jobs = Jobs(settings, lambda work: no_engine(), slots=1)
    metrics = Metrics(jobs, generate_latest)

    async def is_ready() -> bool:
        return True

    app = create_app(settings, lambda: jobs, is_ready, lambda: metrics)
    found = []
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for index in range(2 * TIMES):
            query = {"limit": PAGE, "order": ("desc", "asc")[index % 2]}
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            answer = await client.get("/v1/videos", params=query)
            found.append((time.perf_counter() - start_s, time.process_time() - start_cpu_s))
            assert len(answer.json()["data"]) == PAGE
    return dict(zip(("s", "cpu_s"), min(found), strict=True))


async def no_engine() -> Any:
    """There is nothing to be made."""
    raise AssertionError
    yield


if __name__ == "__main__":
    main()
