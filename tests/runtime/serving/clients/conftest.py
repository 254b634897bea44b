"""Clients of others, as they are installed, against `magihuman serve` with nano.

`make test-clients` installs them into a folder and runs these tests, which are skipped without it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from sounds import write_sine
from video_client import BEARER


@pytest.fixture(scope="session")
def clients(request) -> Path:
    """The folder in which clients are installed: virtual environments, and node's modules."""
    folder = request.config.getoption("--clients")
    if folder is None:
        pytest.skip("clients are tried by `make test-clients`")
    return Path(folder).absolute()


@pytest.fixture(scope="session")
def program(clients):
    """Return the path of a client's program; without it, the test is skipped."""

    def find(name: str) -> str:
        found = shutil.which(name) or shutil.which(clients / name / "bin" / name)
        if found is None:
            pytest.skip(f"{name} is not installed")
        return str(found)

    return find


@pytest.fixture(scope="session")
def nano(clients, one_server, tmp_path_factory) -> Iterator:
    """A server of the nano model with all defaults, but for its folder, port and device."""
    like = one_server.another(tmp_path_factory.mktemp("nano"))
    ours = like.command[: like.command.index("serve") + 1]
    for option in ("--folder", "--port", "--device"):
        place = like.command.index(option)
        ours += like.command[place : place + 2]
    with httpx.Client(base_url=like.url, headers=BEARER, timeout=300) as http:
        server = dataclasses.replace(like, http=http, command=[*ours, "--model", "nano"])
        server.start()
        yield server
        server.clear()
        server.end()


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "face.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(path)
    return path


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    return write_sine(tmp_path_factory.mktemp("sound") / "voice.wav", seconds=0.6)
