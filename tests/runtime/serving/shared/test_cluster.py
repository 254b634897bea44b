"""The server on a Ray cluster of two nodes, of which an engine, a node and an API are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from video_client import BEARER, SMALL, TOKEN, Client, until

from magihuman.runtime.serving.records.database import Database
from magihuman.runtime.serving.records.leases import SharedRecords

pytest.importorskip("ray", reason="the extra [serve] is not installed")
pytestmark = pytest.mark.timeout(900)

ENGINES, APIS, MOST = 3, 2, 100  # videos in line at most
STORE_BYTES = 80 * 2**20

ENGINE, API = "ray::ServeReplica:magihuman:engine", "ray::ServeReplica:magihuman:api"
WORK = {**SMALL, "num_inference_steps": "20"}


# Nodes of `ray.cluster_utils.Cluster`, in a process of their own: Ray reads that they are to listen
# on loopback alone when it is imported.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
own = {"num_cpus": 2, "object_store_memory": int(sys.argv[1])}
cluster = Cluster(initialize_head=True, head_node_args={**own, "include_dashboard": False})
worker = cluster.add_node(**own)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\\n":
        cluster.remove_node(worker, allow_graceful=False)
    else:
        worker = cluster.add_node(**own)
    print("done", flush=True)
cluster.shutdown()
"""
ENVIRONMENT = {
    "MAGIHUMAN_TOKEN": TOKEN,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Cluster:
    """A Ray cluster of two nodes on loopback."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(STORE_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self.address = self._answer()

    def kill_node(self) -> None:
        """That which is not the head, with all that runs there."""
        self._tell("kill")

    def add_node(self) -> None:
        self._tell("add")

    def close(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(300)
        for process in (*children, self._process):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(300)
        self._process.stdout.close()

    def _tell(self, what: str) -> None:
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self) -> str:
        for line in self._process.stdout:
            if line.strip() == "done" or re.fullmatch(r"[\d.]+:\d+", line.strip()):
                return line.strip()
        raise AssertionError("the cluster has ended")


@dataclass
class Nodes:
    """The server on a cluster.

    Attributes:
        url: of a proxy.
        log: of the command.
    """

    cluster: Cluster
    command: list[str]
    url: str
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once the server is ready."""
        with self.log.open("ab") as log:
            environment = {**os.environ, **ENVIRONMENT}
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        with httpx.Client(base_url=self.url, headers=BEARER, timeout=300) as http:

            def is_ready() -> bool:
                assert self.process.poll() is None, self.log.read_text()[-5000:]
                with suppress(httpx.TransportError):
                    return http.get("/ready").status_code == 200
                return False

            until(is_ready, 300)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(120)
            self.process.kill()
        self.process = None

    def kill_one(self, of: str) -> None:
        """As the kernel does when memory runs out."""
        mine = psutil.Process().children(recursive=True)
        running = []
        for process in mine:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if of in " ".join(process.cmdline()):
                    running.append(process)
        assert running, of
        os.kill(running[0].pid, signal.SIGKILL)


@pytest.fixture
def nodes(tiny_dir, postgresql_url, s3_url, tmp_path, free_port) -> Iterator[Nodes]:
    port = free_port()
    cluster = Cluster()
    options = {
        "--model": tiny_dir,
        "--folder": tmp_path / "scratch",
        "--ray-address": cluster.address,
        "--database": postgresql_url,
        "--storage": s3_url,
        "--api-replicas": APIS,
        "--min-replicas": ENGINES,
        "--max-replicas": ENGINES,
        "--queue-limit": MOST,
        "--device": "cpu",
        "--port": port,
    }
    command = [sys.executable, "-m", "magihuman.runtime.cli", "serve"]
    command += [str(part) for option in options.items() for part in option]
    made = Nodes(cluster, command, f"http://127.0.0.1:{port}", tmp_path / "log")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        cluster.close()


@contextmanager
def client(nodes: Nodes) -> Iterator[Client]:
    with httpx.Client(base_url=nodes.url, headers=BEARER, timeout=300) as http:
        yield Client(http)


def asked(nodes: Nodes, number: int, videos: int) -> list[str]:
    """The ids of what one client was told to have been taken, whatever happens meanwhile."""
    taken = []
    with client(nodes) as here:
        for index in range(videos):
            seed = str(number * videos + index)

            def is_taken(seed: str = seed) -> bool:
                with suppress(httpx.TransportError):
                    answer = here.post({**WORK, "seed": seed})
                    if answer.status_code == 200:
                        taken.append(answer.json()["id"])
                        return True
                    assert answer.status_code in (429, 500, 503), answer.text
                time.sleep(0.2)
                return False

            until(is_taken)
    return taken


def ended(nodes: Nodes, name: str) -> dict:
    """The video, once it has ended."""
    seen: list[dict] = []

    def has_ended() -> bool:
        with suppress(httpx.TransportError), client(nodes) as here:
            answer = here.http.get(f"/v1/videos/{name}")
            if answer.status_code == 200:
                seen.append(answer.json())
                return seen[-1]["status"] in ("completed", "failed")
            assert answer.status_code >= 500, answer.text
        time.sleep(0.2)
        return False

    until(has_ended, 400)
    return seen[-1]


@pytest.mark.parametrize(
    ("clients", "videos"), [(4, 5), pytest.param(10, 10, marks=pytest.mark.thorough)]
)
def test_every_video_ends_once_whatever_is_killed(nodes, postgresql_url, clients, videos):
    """An engine, a node and an API process; finished ones can be fetched after a restart."""

    def done(count: int) -> bool:
        database = Database(postgresql_url)
        rows = SharedRecords(database, "test", 1).changes()
        database.close()
        return sum(row.job is not None and row.job.has_ended for row in rows) >= count

    count = clients * videos
    with ThreadPoolExecutor(clients) as pool:
        given = [pool.submit(asked, nodes, number, videos) for number in range(clients)]
        until(lambda: done(count // 20), 300)
        nodes.kill_one(ENGINE)
        until(lambda: done(count // 5), 300)
        nodes.kill_one(API)
        until(lambda: done(2 * count // 5), 300)
        nodes.cluster.kill_node()
        names = [name for each in given for name in each.result(600)]
    assert len(set(names)) == count
    ends = {name: ended(nodes, name) for name in names}
    for name, end in ends.items():
        assert end["status"] == "completed" or end["error"]["code"] == "engine_lost", (name, end)
    completed = [name for name, end in ends.items() if end["status"] == "completed"]
    assert len(completed) >= count - 3 * ENGINES
    nodes.stop()
    nodes.cluster.add_node()
    nodes.start()
    with client(nodes) as here:
        for name in names:
            assert here.get(name)["status"] == ends[name]["status"]
        for name in completed:
            answer = here.content(name)
            assert answer.status_code == 200 and answer.content[4:8] == b"ftyp"
