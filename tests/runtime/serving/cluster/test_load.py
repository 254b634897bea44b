"""Many clients at once, who also go away, remove and send too much. By default a few jobs, and
600 of 20 clients with `--load-jobs 600`.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import av
import httpx
import pytest
from video_client import BEARER, PATIENCE_S, SMALL, Client, until

pytest.importorskip("ray", reason="the extra [serve] is not installed")

LARGE = 300  # jobs from which on the rest is large, too
SIZES = ("32x32", "64x32", "32x64", "64x64")
GROWTH = 1.05  # of the memory of all processes, in the last quarter of the jobs


@pytest.fixture(scope="module")
def jobs(request) -> int:
    return request.config.getoption("--load-jobs")


@pytest.fixture
def loaded(server, jobs) -> Iterator:
    """The server; for many jobs with its own limits, of 32 MiB for a body among them."""
    if jobs < LARGE:
        yield server
        return
    command = server.command
    server.end()
    at = command.index("--max-upload-mib")
    server.command = command[:at] + command[at + 2 :]
    server.start()
    yield server
    server.end()
    server.command = command


def memory_bytes(server, but: str = "no such command") -> int:
    """Of all processes of the server and of its Ray, what they share counted once.

    but: in the command of those that are left out.
    """
    total = 0
    for process in set(server.processes()) - set(server.processes(but)):
        with suppress(FileNotFoundError, ProcessLookupError):
            found = re.search(
                r"^Pss: +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M
            )
            total += int(found[1]) * 1024 if found else 0
    return total


@dataclass
class Seen:
    """What clients know of their videos: of those that stay, their size in pixels."""

    stay: dict[str, str] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    refused: int = 0


@dataclass
class Rogue:
    """A client that now and then goes away, or removes what it has asked for."""

    server: object
    dice: random.Random
    seen: Seen
    files: dict[str, bytes]

    def run(self, count: int) -> None:
        with httpx.Client(base_url=self.server.url, headers=BEARER, timeout=PATIENCE_S) as http:
            self.client = Client(http)
            for _ in range(count):
                self._one()

    def _one(self) -> None:
        if self.dice.random() < 0.3:
            self._cut("POST", "/v1/videos", self._half())
        size = self.dice.choice(SIZES)
        name = self._asked(size)
        if self.dice.random() < 0.3:
            self._remove(name)  # while it waits, or is made
            return
        self.client.when(name, "completed")
        if self.dice.random() < 0.3:
            self._cut("GET", f"/v1/videos/{name}/content")
        self._check(name, size)
        if self.dice.random() < 0.3:
            self._remove(name)
        else:
            self.seen.stay[name] = size

    def _asked(self, size: str) -> str:
        fields = {**SMALL, "size": size, "seed": str(self.dice.randrange(1000))}
        names = self.dice.choice([[], ["input_reference"], ["audio"], ["input_reference", "audio"]])
        while True:
            if self.dice.random() < 0.5:
                answer = self.client.post(fields, **{name: self.files[name] for name in names})
            else:
                numbers = {"seed": int(fields["seed"]), "num_inference_steps": 1}
                url = "data:;base64,"
                urls = {n: url + base64.b64encode(self.files[n]).decode() for n in names}
                answer = self.client.http.post("/v1/videos", json={**fields, **numbers, **urls})
            if answer.status_code != 429:
                break
            self.seen.refused += 1
            time.sleep(0.2)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def _check(self, name: str, size: str) -> None:
        """All of it is what lies on the disk, and a clip of that size."""
        kept = (self.server.folder() / name / "video.mp4").read_bytes()
        assert self.client.content(name).content == kept
        first, last = sorted(self.dice.sample(range(len(kept)), 2))
        part = self.client.content(name, Range=f"bytes={first}-{last}")
        assert part.content == kept[first : last + 1]
        with av.open(io.BytesIO(kept)) as file:
            picture = file.streams.video[0]
            assert f"{picture.width}x{picture.height}" == size

    def _remove(self, name: str) -> None:
        self.client.delete(name)
        self.seen.removed.add(name)

    def _half(self) -> bytes:
        content = json.dumps({"prompt": "cut", "audio": "data:;base64," + "A" * 200_000}).encode()
        return content[: self.dice.randrange(len(content))]

    def _cut(self, method: str, path: str, content: bytes = b"") -> None:
        with self.begun(method, path, 900_000 if content else 0) as connection:
            if content:
                connection.sendall(content)
            else:
                connection.recv(100)

    @contextmanager
    def begun(self, method: str, path: str, length: int) -> Iterator[socket.socket]:
        """A connection on which the headers have been sent."""
        host, port = self.server.url.removeprefix("http://").split(":")
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
        lines += [f"Authorization: {BEARER['Authorization']}", f"Content-Length: {length}", "", ""]
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
            connection.sendall("\r\n".join(lines).encode())
            yield connection


def load(server, jobs: int, clients: int, seen: Seen, seed: int, files: dict[str, bytes]) -> None:
    rogues = [Rogue(server, random.Random(f"{seed} {i}"), seen, files) for i in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        done = [
            pool.submit(rogue.run, len(range(index, jobs, clients)))
            for index, rogue in enumerate(rogues)
        ]
        for part in done:
            part.result()


def count(server, status: str) -> int:
    text = server.http.get("/metrics").text
    return int(float(re.search(rf'^magihuman_videos{{status="{status}"}} (\S+)$', text, re.M)[1]))


def test_no_job_is_lost_or_left_and_no_memory_kept(loaded, jobs, face, voice):
    loaded.clear()
    files = {"input_reference": face.read_bytes(), "audio": voice.read_bytes()}
    clients, seen, memory = (20 if jobs >= LARGE else 5), Seen(), []
    # What an engine takes goes up and down, and it has hardly begun after few jobs.
    but = "no such command" if jobs >= LARGE else "ServeReplica:magihuman:engine"
    for quarter in range(4):
        load(loaded, jobs // 4, clients, seen, quarter, files)
        until(lambda: count(loaded, "queued") == count(loaded, "in_progress") == 0)
        memory.append(memory_bytes(loaded, but))
    print(f"{len(seen.stay)} stay, {len(seen.removed)} removed, {seen.refused} told to come again")
    print("MiB after each quarter:", [used // 2**20 for used in memory])
    rogue = Rogue(loaded, random.Random(0), seen, files)
    rogue.client = loaded
    for name, size in seen.stay.items():
        assert loaded.get(name)["status"] == "completed"
        rogue._check(name, size)
    for name in seen.removed:
        assert loaded.http.get(f"/v1/videos/{name}").status_code == 404
    until(lambda: {place.name for place in loaded.folder().glob("video_*")} == set(seen.stay))
    assert count(loaded, "completed") == len(seen.stay) and count(loaded, "failed") == 0
    until(lambda: not list(loaded.folder().glob(".magihuman-*")))  # of bodies that were cut
    assert memory[-1] < GROWTH * max(memory[:-1])
    loaded.clear()


@contextmanager
def watched(server) -> Iterator[list[tuple[float, int]]]:
    """Seconds that `/health` took and the memory in use, again and again."""
    seen: list[tuple[float, int]] = []
    is_over = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
            while not is_over.is_set():
                start_s = time.monotonic()
                assert http.get("/health").status_code == 200
                seen.append((time.monotonic() - start_s, memory_bytes(server)))
                is_over.wait(0.1)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield seen
            known = len(seen)
            until(lambda: len(seen) > known + 1)  # once more since then
        finally:
            is_over.set()
            watching.result()


@pytest.mark.parametrize("kind", ["file", "structure"])
def test_large_bodies_cost_neither_memory_nor_others_time(loaded, jobs, kind):
    """40 of 30 MB each where the load is large: with a long string, or with many lists."""
    bodies, size = (40, 30_000_000) if jobs >= LARGE else (10, 900_000)
    head, unit, end = {
        "file": (b'{"prompt": "hi", "audio": "data:;base64,', b"AAAA", b'"}'),
        "structure": (b'{"prompt": [', b"[], ", b"[]]}"),
    }[kind]
    content = head + unit * (size // 4) + end
    rogue = Rogue(loaded, random.Random(0), Seen(), {})
    before = memory_bytes(loaded)

    def send() -> int:
        """The status; 0 where the connection ends before all is sent. Costs this process little."""
        with rogue.begun("POST", "/v1/videos", len(content)) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(content)
            with suppress(ConnectionResetError):
                return int(connection.recv(100).split()[1])
        return 0

    with watched(loaded) as seen, ThreadPoolExecutor(bodies) as pool:
        sent = [pool.submit(send) for _ in range(bodies)]
        statuses = [done.result() for done in sent]
    slowest_s = max(seconds for seconds, _ in seen)
    most = max(memory for _, memory in seen)
    print(
        f"{bodies} {kind}: {statuses}, /health {slowest_s:.2f} s, {(most - before) / 2**20:.0f} MiB"
    )
    assert set(statuses) <= {0, 400, 422, 429}
    assert most - before < 10**9
    if jobs >= LARGE:
        assert slowest_s < 0.5
    name = loaded.create()
    loaded.when(name, "completed")
    loaded.delete(name)
