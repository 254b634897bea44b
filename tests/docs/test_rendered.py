"""The figures of the README, of docs/ and of nano's cards are those of benchmarks/results."""

from __future__ import annotations

import subprocess
import sys

import pages

SCRIPT = pages.ROOT / "benchmarks" / "reports" / "render_readme.py"


def test_the_tables_are_rendered_from_the_results() -> None:
    subprocess.run([sys.executable, SCRIPT, "--check"], check=True)
