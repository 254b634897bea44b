"""Connections within bounds: heads of requests, time, and how many."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from video_client import BEARER, PATIENCE_S, TOKEN_SHA256

from magihuman.runtime.serving.front.bounds import Bounds
from magihuman.runtime.serving.front.crowd import Crowd
from magihuman.runtime.serving.front.server import Front
from magihuman.runtime.serving.settings import Settings

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
SHORT = Bounds(head_s=1, idle_s=1, connections=10)


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256)


@pytest.fixture(scope="module")
def local(tmp_path_factory, replica, serve_here):
    settings = Settings(tmp_path_factory.mktemp("front"), "tiny", token_sha256=TOKEN_SHA256)
    with serve_here(settings, replica) as running:
        yield running


@contextmanager
def connection(local, **options) -> Iterator[socket.socket]:
    host, _, port = local.url.rpartition("//")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as opened:
        for name, value in options.items():
            opened.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        yield opened


def answer(opened: socket.socket) -> tuple[int, bytes]:
    """Status and all else, once the server has closed the connection."""
    content = b"".join(iter(lambda: opened.recv(65536), b""))
    return int(content.split(None, 2)[1]) if content else 0, content


def sent(local, content: bytes) -> tuple[int, bytes]:
    with connection(local) as opened:
        opened.sendall(content)
        return answer(opened)


def padded(total: int) -> bytes:
    """The head of a request with so many bytes."""
    start, end = HEALTH + b"Connection: close\r\nX-Padding: ", b"\r\n\r\n"
    return start + b"x" * (total - len(start) - len(end)) + end


def code_of(content: bytes) -> str:
    return json.loads(content.partition(b"\r\n\r\n")[2])["error"]["code"]


@pytest.mark.parametrize(("total", "status"), [(1000, 200), (65536, 200), (65537, 431)])
def test_a_head_has_no_more_than_64_kib(local, total, status):
    assert sent(local, padded(total))[0] == status


@pytest.mark.parametrize("count", [128, 129, 20_000])
def test_a_head_has_no_more_than_128_headers(local, count):
    head = HEALTH + b"Connection: close\r\n" + b"a:\r\n" * (count - 2) + b"\r\n"
    status, content = sent(local, head)
    assert status == (200 if count == 128 else 431)
    assert status == 200 or code_of(content) == "headers_too_large"


@pytest.mark.parametrize(
    "begin", [b"GET /" + b"x" * 70_000, b"x" * 70_000, b"GET / HTTP/1.1\r\nX: "]
)
def test_a_head_without_an_end_is_refused_while_it_is_sent(local, begin):
    """The client sends on, and reads the answer all the same."""
    status, content = sent(local, begin + b"x" * 3_000_000)
    assert status == 431 and code_of(content) == "headers_too_large"
    assert b"connection: close" in content


def test_a_head_is_the_same_in_one_piece_and_in_many(local):
    with connection(local) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for each in HEALTH + b"Connection: close\r\n\r\n":
            opened.sendall(bytes([each]))
        assert answer(opened)[0] == 200


@pytest.mark.parametrize(
    "content",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\r\n\r\n"],
)
def test_what_is_no_http(local, content):
    status, said = sent(local, content)
    assert status == 400 and code_of(said) == "malformed_request"


def test_one_connection_has_many_requests(local):
    with connection(local) as opened:
        for _ in range(3):
            opened.sendall(HEALTH + b"\r\n")
            said = b""
            while b"ok" not in said:
                said += opened.recv(65536)
            assert said.startswith(b"HTTP/1.1 200")


def test_requests_are_not_sent_ahead(local):
    """The second has been seen by no bounds; whoever sent it sends it again."""
    status, content = sent(local, HEALTH + b"\r\n" + HEALTH + b"\r\n")
    assert status == 200 and content.count(b"HTTP/1.1 200") == 1


def test_the_rest_of_a_refused_body_is_taken_for_a_while(local):
    """So that the client can read why."""
    body = b"x" * 5_000_000
    head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connection(local) as opened:
        opened.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert opened.recv(65536).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("begun", [b"", HEALTH])
def test_a_head_has_its_time(settings, replica, serve_here, begun):
    """From the connection, however often something is sent; what has begun is told why."""
    with serve_here(settings, replica, bounds=SHORT) as local, connection(local) as opened:
        opened.sendall(begun)
        ended = threading.Event()

        def drip() -> None:
            while begun and not ended.wait(0.1):
                with suppress(OSError):
                    opened.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        status, content = answer(opened)
        ended.set()
        thread.join()
        assert status == (408 if begun else 0)
        assert not begun or code_of(content) == "headers_too_slow"


def test_the_next_request_has_the_same_time(settings, replica, serve_here):
    with serve_here(settings, replica, bounds=SHORT) as local:
        status, content = sent(local, HEALTH + b"\r\n")
        assert status == 200 and content.count(b"HTTP/1.1") == 1


def test_a_client_that_takes_nothing_is_dropped():
    async def main() -> None:
        gone = asyncio.Event()

        async def endless(scope, receive, send) -> None:
            async def fill() -> None:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                while True:
                    await send(
                        {"type": "http.response.body", "body": bytes(65536), "more_body": True}
                    )
                    await asyncio.sleep(0)

            filling = asyncio.create_task(fill())
            while (await receive())["type"] != "http.disconnect":
                pass
            filling.cancel()
            gone.set()

        front = Front(endless, SHORT)
        port = await front.start("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEALTH + b"\r\n")
        assert (await reader.read(8)).startswith(b"HTTP/1.1")
        await asyncio.wait_for(gone.wait(), PATIENCE_S)
        writer.close()
        await front.stop()

    asyncio.run(main())


def test_who_says_nothing_makes_room(settings, replica, serve_here):
    with (
        serve_here(settings, replica, bounds=Bounds(connections=10)) as local,
        ExitStack() as stack,
    ):
        silent = [stack.enter_context(connection(local)) for _ in range(30)]
        assert sent(local, HEALTH + b"Connection: close\r\n\r\n")[0] == 200
        with suppress(ConnectionError):
            assert silent[0].recv(1) == b""  # the one that has waited longest has gone
        silent[-1].sendall(HEALTH + b"\r\n")
        assert silent[-1].recv(65536).startswith(b"HTTP/1.1 200")


class Silent:
    def __init__(self) -> None:
        self.is_dropped = False

    def drop(self) -> None:
        self.is_dropped = True


def test_whoever_has_a_request_stays():
    crowd, members = Crowd(2), [Silent() for _ in range(4)]
    assert crowd.join(members[0]) and crowd.join(members[1])
    crowd.busy(members[0])
    assert crowd.join(members[2]) and members[1].is_dropped and not members[0].is_dropped
    crowd.busy(members[2])
    assert not crowd.join(members[3]) and len(crowd) == 2
    crowd.idle(members[2])
    assert crowd.join(members[3]) and members[2].is_dropped


# -- the whole server ---------------------------------------------------------------------------


def memory(server) -> int:
    """Bytes that all its processes have to themselves."""
    pages = 0
    for process in server.processes():
        with suppress(FileNotFoundError):
            _, resident, shared, *_ = Path(f"/proc/{process}/statm").read_text().split()
            pages += int(resident) - int(shared)
    return pages * resource.getpagesize()


def health_s(server) -> float:
    """Seconds to an answer, on a connection of its own; the middle one of a few."""

    def once() -> float:
        start = time.monotonic()
        assert sent(server, HEALTH + b"Connection: close\r\n\r\n")[0] == 200
        return time.monotonic() - start

    return statistics.median(once() for _ in range(9))


@pytest.fixture
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 6000:
        pytest.skip("this process may not have 6,000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 6000), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_idle_connections_and_endless_headers(server):
    """5,000 connections that say nothing, or little, and 600 MB of headers."""
    pytest.importorskip("ray")
    before, lines = memory(server), b"X-Line: 0123456789\r\n" * 50_000
    with ExitStack() as stack:
        for number in range(5000):
            opened = stack.enter_context(connection(server))
            with suppress(ConnectionError):
                opened.sendall(HEALTH if number % 2 else b"")
        assert health_s(server) < 0.5
        for _ in range(20):
            with connection(server) as opened, suppress(ConnectionError):
                opened.sendall(HEALTH)
                for _ in range(30):
                    opened.sendall(lines)
        assert health_s(server) < 0.5
        assert memory(server) < before + 2**30
    assert server.http.get("/ready", headers=BEARER).status_code == 200
