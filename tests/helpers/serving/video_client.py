"""What a client of the server does, over HTTP."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from magihuman.runtime.serving.record import Job
from magihuman.runtime.serving.records.database import FILE, Database, in_folder
from magihuman.runtime.serving.records.records import Records

TOKEN = "the-token-of-these-tests"  # noqa: S105 - of no server that stays
TOKEN_SHA256 = hashlib.sha256(TOKEN.encode()).digest()
BEARER = {"Authorization": f"Bearer {TOKEN}"}
SMALL = {"prompt": "hi", "seconds": "0.2", "size": "32x32", "num_inference_steps": "1"}
# Many steps, each of some milliseconds: it runs for as long as a test needs, and ends when told.
LONG = {**SMALL, "num_inference_steps": "1000"}
PATIENCE_S = 180  # far above what anything takes, for machines that are busy with something else


def until(condition: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
    return found


@dataclass
class Client:
    """With the token."""

    http: httpx.Client

    def post(self, fields: dict[str, Any] | None = None, **files: Any) -> httpx.Response:
        parts = {name: (None, value) for name, value in (fields or SMALL).items()}
        return self.http.post("/v1/videos", files={**parts, **files})

    def create(self, fields: dict[str, Any] | None = None, **files: Any) -> str:
        answer = self.post(fields, **files)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def get(self, name: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/videos/{name}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def delete(self, name: str) -> None:
        assert self.http.delete(f"/v1/videos/{name}").json() == {
            "id": name,
            "object": "video.deleted",
            "deleted": True,
        }

    def when(self, name: str, status: str, within_s: float = PATIENCE_S) -> dict[str, Any]:
        """The video, once it has this status."""
        seen: list[dict[str, Any]] = []

        def has_it() -> bool:
            seen.append(self.get(name))
            is_other_end = seen[-1]["status"] in ("completed", "failed")
            assert seen[-1]["status"] == status or not is_other_end, seen[-1]
            return seen[-1]["status"] == status

        until(has_it, within_s)
        return seen[-1]

    def content(self, name: str, **headers: str) -> httpx.Response:
        return self.http.get(f"/v1/videos/{name}/content", headers=headers)


def kept(folder: Path) -> dict[str, Job]:
    """The jobs in a server's folder, by its records."""
    found = Records(Database(in_folder(folder))).load()
    return {name: job for name, job in found.items() if job is not None}


def left_in(folder: Path) -> list[str]:
    """What lies in a server's folder beside its records."""
    return [place.name for place in folder.iterdir() if not place.name.startswith(FILE)]
