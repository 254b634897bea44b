"""A server with more videos than anybody looks at."""

from __future__ import annotations

import json
import time

from video_client import TOKEN_SHA256

from magihuman.runtime.serving import record
from magihuman.runtime.serving.records.database import FILE
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import STATE, Job, Status

COUNT = 1000
OPTIONS = {"seconds": 0.2, "width": 32, "height": 32, "seed": 7}


def test_pages_of_many_after_a_restart(tmp_path, replica, serve_here):
    """As an earlier release has left them: all are there, in order, answered from memory."""
    folder, now = tmp_path / "videos", time.time()
    names = []
    for index in range(COUNT):
        job = Job("hi", dict(OPTIONS), created_at=now - COUNT + index)
        job.status, job.completed_at, job.expires_at = Status.COMPLETED, now, now + 3600
        place = folder / job.id
        place.mkdir(parents=True)
        (place / STATE).write_text(json.dumps(record.kept(job)))
        (place / "video.mp4").touch()
        names.append(job.id)
    with serve_here(Settings(folder, "tiny", token_sha256=TOKEN_SHA256), replica) as local:
        assert not list(folder.glob(f"*/{STATE}"))
        (folder / FILE).unlink()
        found, after = [], {}
        while True:
            page = local.http.get("/v1/videos", params={"limit": 100, **after}).json()
            found += [video["id"] for video in page["data"]]
            after = {"after": page["last_id"]}
            if not page["has_more"]:
                break
        assert found == names[::-1]
