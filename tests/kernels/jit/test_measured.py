"""Timings that were kept: taken where they are times of the candidates at hand, else measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from magihuman.kernels.jit import cache, measured

NAMES = ("one", "two")
TIMES = {"one": 2.0, "two": 1.0}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> measured.Measurements:
    monkeypatch.setattr(measured, "machine_key", lambda device: {"gpu": "one"})
    return measured.Measurements(torch.device("cpu"), tmp_path)


def plant(kept: measured.Measurements, text: str, folder: Path) -> None:
    """A file that was kept as any is, whatever it says."""
    kept.put("key", TIMES)
    (file,) = folder.iterdir()
    cache.write(measured.KIND, file.name, text.encode(), folder)


def measure_as(name: str, asked: list[str]) -> dict[str, float]:
    asked.append(name)
    return {**TIMES, name: 0.5}


def test_times_are_measured_once(kept: measured.Measurements) -> None:
    asked: list[str] = []
    for _ in range(2):
        assert kept.fastest("key", lambda: measure_as("one", asked), NAMES) == "one"
    assert asked == ["one"]
    assert kept.get("key") == {"one": 0.5, "two": 1.0}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        7,
        "one",
        {"one": None},
        {"one": "1.0"},
        {"one": True},
        {"one": [1.0]},
        {"one": {"two": 1.0}},
        {"one": -1.0},
        {"one": float("nan")},
        {"one": float("inf")},
        {"one": 1.0, "two": None},
        {"three": 0.1},
        {"one": 2.0, "__import__('os').abort()": 0.1},
    ],
)
def test_what_are_no_times_of_the_candidates_is_measured_again(
    entry: object, kept: measured.Measurements, tmp_path: Path
) -> None:
    plant(kept, json.dumps({"key": entry}), tmp_path)
    asked: list[str] = []
    assert kept.fastest("key", lambda: measure_as("one", asked), NAMES) == "one"
    assert asked == ["one"]
    assert kept.get("key") == {"one": 0.5, "two": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[1]",
        '{"key": {"one": 1.0}',
        '{"key": ' + "[" * 100_000,
        '{"key": {"one": ' + "9" * 5000 + "}}",
        "\udc80".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_what_is_no_json_is_measured_again(
    text: str, kept: measured.Measurements, tmp_path: Path
) -> None:
    plant(kept, text, tmp_path)
    assert kept.get("key") is None
    assert kept.fastest("key", lambda: dict(TIMES), NAMES) == "two"
    assert kept.get("key") == TIMES
