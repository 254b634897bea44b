"""The README's figures are those of the results that stand in the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_speed_section_is_rendered_from_the_results() -> None:
    script = ROOT / "benchmarks" / "render_readme.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
