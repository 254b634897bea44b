"""`magihuman serve --gpus-per-engine`, whose engines are several processes each."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest
from listeners import is_loopback, listening
from video_client import SMALL, until

pytest.importorskip("ray", reason="the extra [serve] is not installed")

REQUESTS = 20
ENGINE = "ray::ServeReplica:magihuman:engine"


def children(parents: list[int]) -> dict[int, int]:
    """The processes that engines have started, and of which engine each is one."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    lines = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return {
        int(pid): int(parent)
        for pid, parent, args in lines
        if int(parent) in parents and "parallel.team" in args
    }


def figure(server, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_process_of_an_engine_is_killed_and_nothing_is_lost(server_at, tmp_path) -> None:
    """Of two engines of two processes. The engine's other process ends, and is replaced."""
    server = server_at(tmp_path / "videos")
    server.command += ["--gpus-per-engine", "2", "--min-replicas", "2", "--max-replicas", "2"]
    server.start()
    until(lambda: figure(server, "magihuman_engines") == 2)
    assert figure(server, "magihuman_engine_devices") == 4
    engines = server.processes(ENGINE)
    followers = children(engines)
    assert len(engines) == 2 and sorted(followers.values()) == sorted(engines)
    ports = listening([*engines, *followers])
    assert ports and all(map(is_loopback, ports.values())), ports
    names = [server.create({**SMALL, "num_inference_steps": "10"}) for _ in range(REQUESTS)]
    until(lambda: sum(server.get(name)["status"] == "completed" for name in names) >= 2)
    killed, engine = next(iter(followers.items()))
    os.kill(killed, signal.SIGKILL)
    for name in names:
        server.when(name, "completed")
        assert server.content(name).content[4:8] == b"ftyp"
    until(lambda: engine not in server.processes(ENGINE))
    until(lambda: len(children(server.processes(ENGINE))) == 2)
    until(lambda: figure(server, "magihuman_engine_devices") == 4)
    left = children(server.processes(ENGINE))
    server.end()
    until(lambda: not any(os.path.exists(f"/proc/{follower}") for follower in left))
