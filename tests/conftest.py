from __future__ import annotations

from pathlib import Path

import pytest

from magihuman import runtime


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A tiny model directory of every component, with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    runtime.write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def engine(tiny_dir):
    """The tiny distilled model, on the CPU."""
    with runtime.load(tiny_dir, variant="distill", device="cpu") as loaded:
        yield loaded
