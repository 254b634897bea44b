"""Estimates of memory, and the advice that comes of them."""

from __future__ import annotations

import re

import pytest
import torch

from magihuman.runtime.config import VARIANTS, DiTConfig
from magihuman.runtime.memory import estimate
from magihuman.runtime.memory.estimate import advice, free_bytes, working_bytes
from magihuman.runtime.request import Request

ROWS = DiTConfig().mlp_widths(20)[0]
DISTILL = VARIANTS["distill"]
GIB = 2**30


@pytest.mark.parametrize(
    ("request_", "sr", "measured_gib"),
    [
        (Request("hi"), None, 2.0),  # 49.0 GiB at the peak, 47 of them weights
        (Request("hi"), "540p", 6.9),  # the decoder at 896x512; 6.5 for the transformer
    ],
)
def test_estimates_are_near_what_was_measured(request_, sr, measured_gib):
    # Rounded up for prompts of any length; a third more would refuse what fits.
    found = working_bytes(request_, DISTILL, sr, ROWS) / GIB
    assert 0.9 * measured_gib <= found <= 1.35 * measured_gib


@pytest.mark.parametrize("sr", [None, "540p", "1080p"])
def test_what_is_advised_fits(sr):
    asked = Request("hi", seconds=20, width=640, height=352)
    free = int(0.6 * working_bytes(asked, DISTILL, sr, ROWS))
    said = advice(asked, DISTILL, sr, ROWS, free)
    size = {None: "640x352", "540p": "896x512", "1080p": "1920x1088"}[sr]
    assert said.startswith(f"20 s of {size} takes about ") and said.endswith(" would fit")
    options = re.findall(r"([\d.]+) s of (\d+)x(\d+)", said)[1:]
    assert options
    for seconds, width, height in options:
        sizes = {"sr_width": int(width), "sr_height": int(height)}
        wanted = (
            Request("hi", seconds=float(seconds), width=int(width), height=int(height))
            if sr is None
            else Request("hi", seconds=float(seconds), width=256, height=128, **sizes)
        )
        assert working_bytes(wanted, DISTILL, sr, ROWS) <= free


def test_the_largest_that_fits_is_advised():
    asked = Request("hi", seconds=10, width=960, height=544)
    needed = working_bytes(asked, DISTILL, None, ROWS)
    assert "9 s of 960x544" in advice(asked, DISTILL, None, ROWS, int(0.95 * needed))


def test_where_nothing_fits():
    said = advice(Request("hi", seconds=0.2, width=32, height=32), DISTILL, None, ROWS, 2**20)
    assert said.endswith("by this estimate no clip fits: free memory, or use a larger device")


def test_where_the_estimate_and_the_failure_disagree():
    said = advice(Request("hi"), DISTILL, None, ROWS, 100 * GIB)
    assert "takes about 2." in said and "100.0 GiB are free now" in said
    assert said.endswith("try again")


def test_free_memory_of_the_host():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


def test_what_a_limit_leaves_is_free(monkeypatch):
    """Of a device with 60 of 80 GiB free, PyTorch has 15, of which 5 are unused."""
    counts = {"mem_get_info": (60 * GIB, 80 * GIB), "memory_reserved": 15 * GIB}
    counts |= {"memory_allocated": 10 * GIB}
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, count=count: count)
    for share, expected in ((1.0, 65), (0.5, 30), (0.125, 5)):
        monkeypatch.setattr(
            torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share
        )
        assert free_bytes(torch.device("cuda:0")) == expected * GIB


def test_pages_of_files_count_as_free(tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    monkeypatch.setattr(estimate, "MEMINFO", info)
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50  # where there is no such file
    info.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  5000 kB\n")
    assert free_bytes(torch.device("cpu")) == 5000 * 1024
