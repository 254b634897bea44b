"""Files where every node finds them: whole or not at all, and in pieces to whoever fetches one."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from contextlib import suppress

import pytest

from magihuman.runtime import InvalidRequestError, MissingExtraError
from magihuman.runtime.serving.storage.files import PIECE_BYTES, Storage, StorageError, Stored
from magihuman.runtime.serving.transfer.stored import download

SIZE = 2 * PIECE_BYTES + 12345
CONTENT = random.Random(0).randbytes(SIZE)


@pytest.fixture
def storage(storage_url) -> Storage:
    made = Storage(storage_url)
    made.check()
    return made


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.mp4"
    path.write_bytes(CONTENT)
    return path


def test_files_come_back_as_they_were(storage, storage_url, source, tmp_path):
    assert storage.names("video_1") == set()
    storage.put(source, "video_1/video-1.mp4")
    other = Storage(storage_url)  # as another process has it
    other.put(source, "video_1/image")
    assert storage.names("video_1") == other.names("video_1") == {"video-1.mp4", "image"}
    assert other.size("video_1/video-1.mp4") == SIZE
    other.get("video_1/video-1.mp4", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert other.read("video_1/video-1.mp4", 5, 10) == CONTENT[5:10]
    source.write_bytes(b"another")
    storage.put(source, "video_1/image")
    assert other.read("video_1/image", 0, 100) == b"another"
    storage.remove("video_1/image")
    assert other.names("video_1") == {"video-1.mp4"}
    storage.remove("video_1")
    storage.remove("video_1")
    assert other.names("video_1") == set()
    with pytest.raises(FileNotFoundError):
        other.size("video_1/video-1.mp4")
    with pytest.raises(FileNotFoundError):
        other.get("video_1/video-1.mp4", tmp_path / "copy")


def test_nothing_half_written_is_seen(storage, storage_url, tmp_path):
    """While a file is written, and where it is replaced: whoever looks finds a whole one."""
    versions = [bytes([number]) * (PIECE_BYTES + number) for number in range(4)]
    seen, is_over = set(), threading.Event()
    other = Storage(storage_url)
    # fsspec's own memory is for one thread, and can lose a name while it lists them.
    passed_over = (StorageError,) if storage_url.startswith("memory") else ()

    def look() -> None:
        while not is_over.is_set():
            with suppress(*passed_over):
                for name in other.names("video_1"):
                    seen.add((name, other.read(f"video_1/{name}", 0, 2 * PIECE_BYTES)))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for content in versions:
            (tmp_path / "source").write_bytes(content)
            storage.put(tmp_path / "source", "video_1/video.mp4")
    finally:
        is_over.set()
        looking.join()
    assert seen <= {("video.mp4", content) for content in versions}


def test_a_full_disk_takes_nothing(disk, source):
    storage = Storage(str(disk.place / "storage"))
    storage.check()
    disk.fill()
    with pytest.raises(StorageError, match="No space left"):
        storage.put(source, "video_1/video.mp4")
    disk.free()
    assert storage.names("video_1") == set()
    assert [path for path in disk.place.rglob("*") if path.is_file()] == []


def test_a_bucket_that_is_not_there(s3_url, source):
    storage = Storage(s3_url.replace("videos", "nowhere"))
    with pytest.raises((StorageError, FileNotFoundError)):
        storage.check()
    with pytest.raises((StorageError, FileNotFoundError)):
        storage.put(source, "video_1/video.mp4")


def test_a_server_that_is_away(s3_url, source, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError):
        Storage(s3_url).check()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftpx://host/x", "a URL that fsspec knows, as s3://bucket/folder, got ftpx://host/x"),
        ("/", "must be a folder, a bucket or a folder of one, got /"),
    ],
)
def test_urls_of_no_storage(url, says):
    with pytest.raises(InvalidRequestError, match=says):
        Storage(url)


def test_what_s3_needs(monkeypatch):
    import fsspec.registry  # noqa: F401 - a function of the package has the same name

    found = sys.modules["fsspec.registry"]._registry  # of file systems that were used before
    monkeypatch.delitem(found, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtraError, match=r"needs .*s3fs.*magihuman\[cluster\]"):
        Storage("s3://bucket/x")


# -- ranges ---------------------------------------------------------------------------------------

RANGES = [
    None,
    *(
        "bytes=0-0",
        "bytes=0-99",
        "bytes=5-",
        "bytes=-5",
        f"bytes=-{SIZE + 1}",
        "bytes=0-",
        "bytes=1-1",
    ),
    *(f"bytes={SIZE - 1}-", f"bytes={SIZE - 1}-{SIZE + 9}", f"bytes=0-{SIZE}", f"bytes={SIZE}-"),
    *(f"bytes={2 * SIZE}-{3 * SIZE}", f"bytes={PIECE_BYTES - 1}-{PIECE_BYTES}", "BYTES=0-9"),
]


def answered(response, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """What an answer sends."""
    sent = []

    async def send(message) -> None:
        sent.append(message)

    async def receive():
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "headers": lines}
    asyncio.run(response({**scope, "asgi": {"spec_version": "2.4"}}, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert not sent[-1].get("more_body")
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize("asked", RANGES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_ranges_are_those_of_a_file(tmp_path, source, asked, method):
    """As a client gets them of a file on the disk."""
    storage = Storage(str(tmp_path / "storage"))
    storage.put(source, "video_1/video.mp4")
    headers = {} if asked is None else {"range": asked}
    of_disk, of_storage = (
        answered(asyncio.run(download(place, "video/mp4", "v.mp4")), method, **headers)
        for place in (source, Stored(storage, "video_1/video.mp4"))
    )
    assert of_storage[0] == of_disk[0]
    assert of_storage[0] == 416 or of_storage[2] == of_disk[2]
    for name in ("content-range", "content-type", "content-disposition", "accept-ranges"):
        if of_disk[0] != 416 or name == "content-range":
            assert of_storage[1].get(name) == of_disk[1].get(name), name
    if of_disk[0] != 416:
        assert of_storage[1]["content-length"] == of_disk[1]["content-length"]


def test_what_is_no_range_or_of_another_file_is_answered_with_all(storage, source):
    storage.put(source, "video_1/video.mp4")
    place = Stored(storage, "video_1/video.mp4")
    for asked in ("bytes=5-2", "bytes=a-b", "bytes=0-1,5-9", "bytes=-", "lines=1-2", "x"):
        status, _, content = answered(asyncio.run(download(place, "video/mp4", "v")), range=asked)
        assert (status, content) == (200, CONTENT), asked
    etag = answered(asyncio.run(download(place, "video/mp4", "v")))[1]["etag"]
    for tag, expected in ((etag, 206), ('"other"', 200)):
        answer = asyncio.run(download(place, "video/mp4", "v"))
        assert answered(answer, range="bytes=0-9", if_range=tag)[0] == expected


def test_what_is_not_there(storage):
    with pytest.raises(FileNotFoundError):
        asyncio.run(download(Stored(storage, "video_1/video.mp4"), "video/mp4", "v"))
