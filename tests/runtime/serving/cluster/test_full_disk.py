"""`magihuman serve` on a disk that is full, from outside."""

from __future__ import annotations

import pytest
from video_client import SMALL, kept, until

from magihuman.runtime.serving.store import Job, Store

pytest.importorskip("ray", reason="the extra [serve] is not installed")

ENGINE = "ray::ServeReplica:magihuman:engine"
OPTIONS = {"seconds": 0.2, "width": 32, "height": 32, "seed": 7, "steps": 1}


def put(store: Store) -> Job:
    job = Job("hi", dict(OPTIONS))
    with store.create(job):
        pass
    store.jobs[job.id] = job
    return job


def test_a_full_disk_ends_no_process_and_no_reading(disk, server_at):
    """Its server starts, finished videos are fetched and removed, and others fail, not engines."""
    store = Store(disk.place / "videos", keep_s=3600)
    finished, gone, waiting = (put(store) for _ in range(3))
    for job in (finished, gone):
        store.begin(job)
        store.video(job).write_bytes(b"mp4" * 1000)
        store.complete(job, {}, ())
    disk.fill()
    server = server_at(disk.place / "videos")
    server.start()
    assert server.content(finished.id).content == b"mp4" * 1000
    engines = server.processes(ENGINE)
    assert server.when(waiting.id, "failed")["error"]["code"] == "disk"
    refused = server.post()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "disk")
    assert "retry-after" in refused.headers
    text = server.http.get("/metrics").text
    assert 'magihuman_requests_total{outcome="failed"} 1.0' in text
    assert "magihuman_videos_requeued_total 0.0" in text
    server.delete(gone.id)  # a rename takes no room

    disk.free()
    server.when(server.create(SMALL), "completed")
    assert server.processes(ENGINE) == engines and len(engines) == 1
    until(lambda: kept(disk.place / "videos")[waiting.id].status == "failed")  # as it has said
    assert not list(disk.place.rglob("*.db"))
