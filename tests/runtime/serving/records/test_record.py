"""A record can say anything, in a `job.json` of an earlier release or in a row of a table: it is a
job that can be served, or it is left alone.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from magihuman.runtime.serving import record
from magihuman.runtime.serving.record import MAX_STATE_BYTES, STATE, Job, Status
from magihuman.runtime.serving.records.database import FILE
from magihuman.runtime.serving.schema import VideoObject
from magihuman.runtime.serving.store import Store


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """In memory where there is such a place: each start here makes a database of its own."""
    with tempfile.TemporaryDirectory(dir=SHM if os.path.isdir(SHM) else tmp_path) as place:
        yield Path(place)


SHM = "/dev/shm"  # noqa: S108 - a folder is drawn in it
NUMBER, TEXT, NULL, LIST, OBJECT = (int, float), (str,), (type(None),), (list,), (dict,)
TYPES: dict[str, tuple[type, ...]] = {
    "prompt": TEXT,
    "options": OBJECT,
    "id": TEXT,
    "status": TEXT,
    "created_at": NUMBER,
    "started_at": NUMBER + NULL,
    "completed_at": NUMBER + NULL,
    "expires_at": NUMBER + NULL,
    "attempts": (int,),
    "timings_s": OBJECT,
    "warnings": LIST,
    "error": OBJECT + NULL,
}
OPTIONS: dict[str, tuple[type, ...]] = {
    "seconds": NUMBER,
    "width": (int,),
    "height": (int,),
    "seed": (int,),
    "negative_prompt": TEXT,
    "steps": (int, *NULL),
    "guidance": NUMBER + NULL,
}
VALUES: list[Any] = [
    *(None, True, False),
    *(0, 1, -1, 2**31, 2**63, 10**400, 0.0, 1.5, -1e-9, 1e18, 1e300, float("inf"), float("nan")),
    *("", " ", "1", "x", "null", "\0", "\ud800", "é" * 5000, "queued", "failed", "/etc/passwd"),
    *([], [1], ["x"], [None], [["x"]], ["\udfff"], [{}] * 1000),
    *({}, {"x": 1}, {"x": None}, {"code": 1, "message": "x"}, {"code": "x"}, {"\ud800": 1}),
    *({"x": "1"}, {"x": float("nan")}, {"x": [1]}, {"image": "/etc/passwd"}, {"seconds": "1"}),
]


def state(folder: Path) -> dict[str, Any]:
    """Of a job that an earlier release has left, and that has all fields and options."""
    options = {"seconds": 0.2, "width": 32, "height": 32, "seed": 7}
    options |= {"negative_prompt": "no", "steps": 1, "guidance": 1.0}
    job = Job("hi", options)
    (folder / job.id).mkdir(parents=True)
    values = json.loads(json.dumps(record.kept(job)))
    put(folder, values)
    return values


def put(folder: Path, values: dict[str, Any], name: str | None = None) -> None:
    """Leave a file as an earlier release did. name: of the job that it is to be of."""
    (folder / (name or values["id"]) / STATE).write_text(json.dumps(values))


def started(folder: Path, *others: dict[str, Any]) -> Store:
    """A server that finds what lies there, these jobs too, and has no records yet."""
    (folder / FILE).unlink(missing_ok=True)
    for values in others:
        put(folder, values)
    return Store(folder, 100)


def served(store: Store, name: str) -> bool:
    """Whether a job is there; all that is done with one must then work."""
    job = store.jobs.get(name)
    if job is None:
        return False
    answer = VideoObject.of(job, "tiny").model_dump(mode="json")
    json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
    store.request(job)
    store.expire()
    if job.status is Status.QUEUED:
        store.begin(job)
        store.fail(job, "x", "y")
    kept = store._records.load()[name]
    assert kept is not None and kept.id == name
    return True


@pytest.mark.parametrize(
    ("field", "option"), [(name, None) for name in TYPES] + [("options", name) for name in OPTIONS]
)
def test_every_field_times_every_value(tmp_path, field, option):
    good, neighbour = state(tmp_path), state(tmp_path)
    allowed = TYPES[field] if option is None else OPTIONS[option]
    for value in VALUES:
        values = dict(good)
        values[field] = value if option is None else {**good["options"], option: value}
        put(tmp_path, values, good["id"])
        store = started(tmp_path, neighbour)
        assert neighbour["id"] in store.jobs
        is_served = served(store, good["id"])
        assert not is_served or type(value) in allowed, value


@pytest.mark.parametrize("seed", range(20))
def test_several_wrong_fields_at_once(tmp_path, seed):
    draw = random.Random(seed)
    good, neighbour = state(tmp_path), state(tmp_path)
    for _ in range(10):
        values = {name: draw.choice((good[name], *VALUES)) for name in draw.sample(list(good), 11)}
        put(tmp_path, values, good["id"])
        store = started(tmp_path, neighbour)
        assert neighbour["id"] in store.jobs
        served(store, good["id"])


def test_fields_that_are_not_there(tmp_path):
    good = state(tmp_path)
    for name in good:
        values = {key: value for key, value in good.items() if key != name}
        put(tmp_path, values, good["id"])
        is_needed = name in ("prompt", "options", "id", "status")
        assert served(started(tmp_path), good["id"]) == (not is_needed)
    for name in good["options"]:
        options = {key: value for key, value in good["options"].items() if key != name}
        put(tmp_path, {**good, "options": options})
        assert served(started(tmp_path), good["id"])


def test_an_ended_one_without_its_end_is_not_kept_for_ever(tmp_path):
    good = {**state(tmp_path), "status": "failed", "error": {"code": "x", "message": "y"}}
    put(tmp_path, good)
    store = Store(tmp_path, 0)
    store.expire()
    assert store.jobs == {}


def test_a_waiting_one_does_not_expire(tmp_path):
    good = {**state(tmp_path), "expires_at": 1.0}
    put(tmp_path, good)
    store = Store(tmp_path, 0)
    store.expire()
    assert list(store.jobs) == [good["id"]]


# Of SQLite itself: null where there must be something, numbers of more than 64 bits, half pairs.
REFUSALS = (sqlite3.IntegrityError, OverflowError, UnicodeEncodeError)
COLUMNS = ("status", "created_at", "started_at", "expires_at", "attempts", "request", "result")


@pytest.mark.parametrize("column", ["id", *COLUMNS])
def test_every_column_times_every_value(tmp_path, column):
    good, neighbour = state(tmp_path), state(tmp_path)
    for value in [*VALUES, "[" * 100_000, '{"prompt": "x"}', '{"status": "failed"}', b"\xff"]:
        started(tmp_path, good, neighbour)
        content = json.dumps(value) if isinstance(value, (list, dict)) else value
        change = f"UPDATE OR IGNORE magihuman_videos SET {column} = ? WHERE id = ?"  # noqa: S608
        with sqlite3.connect(tmp_path / FILE) as records, suppress(*REFUSALS):
            records.execute(change, [content, good["id"]])
        store = Store(tmp_path, 100)
        assert neighbour["id"] in store.jobs
        served(store, good["id"])


BOMBS = {
    "lists": b"[" * 1_000_000,
    "objects": b'{"a":' * 1_000_000,
    "closed": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"attempts": ' + b"9" * 5000 + b"}",
    "wide": b"[" + b"{}," * 30_000_000 + b"{}]",
    "at the limit": (b"[" + b"{}," * (MAX_STATE_BYTES // 3 - 2) + b"{}]"),
    "bytes": b"\xff\xfe" + b"{}" * 100,
    "nothing": b"",
}
READER = """
import resource, sys
from pathlib import Path
from magihuman.runtime.serving.store import Store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = Store(Path(sys.argv[1]), 100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *store.jobs)
"""


def test_what_is_no_state_at_all(tmp_path):
    """Bombs, pipes, folders, links: nothing waits, runs or takes memory."""
    names = [state(tmp_path)["id"] for _ in range(len(BOMBS) + 5)]
    for name, content in zip(names, BOMBS.values(), strict=False):
        (tmp_path / name / STATE).write_bytes(content)
    pipe, folder, link, image, good = (tmp_path / name for name in names[len(BOMBS) :])
    for place in (pipe, folder, link):
        (place / STATE).unlink()
    os.mkfifo(pipe / STATE)
    (folder / STATE).mkdir()
    (link / STATE).symlink_to("/dev/zero")
    (image / "image").symlink_to("/etc/passwd")  # would be read by an engine
    (tmp_path / f"video_{'0' * 32}").symlink_to(good)
    (tmp_path / f"video_{'1' * 32}").write_text("no folder")
    command = [sys.executable, "-c", READER, str(tmp_path)]
    limits = (2 << 30, 2 << 30)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits),
    )
    assert done.returncode == 0, done.stderr
    grown_kib, *found = done.stdout.split()
    assert found == [good.name] and int(grown_kib) < 500 * 2**10
    assert done.stderr.count("is left alone") == len(names) + 1
    assert max(map(len, done.stderr.splitlines())) < 1000


def test_a_state_that_no_restart_would_read_is_refused(tmp_path):
    job = Job("x" * MAX_STATE_BYTES, {})
    with pytest.raises(OSError, match="too large"), Store(tmp_path, 100).create(job):
        pass
    assert not list(tmp_path.glob("video_*")) and Store(tmp_path, 100).jobs == {}


def test_the_longest_prompts_can_be_read_again(tmp_path):
    from magihuman.runtime.cli.serve import MAX_PROMPT_CHARS

    longest = "\U0001f600" * MAX_PROMPT_CHARS  # twelve bytes each
    job, store = Job(longest, {"negative_prompt": longest}), Store(tmp_path, 100)
    with store.create(job):
        pass
    assert Store(tmp_path, 100).jobs[job.id].prompt == longest
