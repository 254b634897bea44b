"""A PostgreSQL server of the tests' own, in a folder that goes with it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

USER = "postgres"  # that of Debian's package: PostgreSQL does not run as root
SETTINGS = {
    "fsync": "off",  # nothing of it outlives the tests
    "listen_addresses": "",
    "shared_buffers": "16MB",
    "max_connections": "50",
}


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database. Skips the test where PostgreSQL is not installed."""
    pytest.importorskip("psycopg", reason="the extra [cluster] is not installed")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb", path=os.pathsep.join([*map(str, programs), os.environ["PATH"]]))
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    commands = Path(found).parent
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:  # of a socket, which has a short path
        if os.getuid() == 0:
            shutil.chown(folder, USER)
        data = Path(folder, "data")
        run(commands / "initdb", "-D", data, "-U", "magihuman", "-A", "trust", "--no-sync")
        options = [f"-c {name}={value!r}" for name, value in SETTINGS.items()]
        start = ["-o", " ".join([f"-k {folder}", *options]), "-l", Path(folder, "log")]
        run(commands / "pg_ctl", "-D", data, "-w", *start, "start")
        try:
            yield f"postgresql://magihuman@/postgres?host={quote(folder, safe='')}"
        finally:
            run(commands / "pg_ctl", "-D", data, "-m", "immediate", "stop")


def run(*command: object) -> None:
    user = USER if os.getuid() == 0 else None
    home = pwd.getpwnam(USER).pw_dir if user else None
    done = subprocess.run(
        [str(part) for part in command],
        user=user,
        group=user and pwd.getpwnam(user).pw_gid,
        cwd=home or "/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr
