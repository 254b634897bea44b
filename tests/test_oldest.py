"""The oldest dependencies that pyproject.toml allows, as `.ci/oldest.py` writes them for pip."""

from __future__ import annotations

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "oldest.py"
PROJECT = {
    "name": "magihuman",
    "dependencies": ["numpy>=1.26", "torch>=2.11,<2.15", "triton>=3.6; platform_system == 'Linux'"],
    "optional-dependencies": {
        "metrics": ["prometheus-client>=0.20"],
        "serve": ["magihuman[metrics]", "ray[serve]>=2.60"],
        "stubs": ["scipy-stubs"],
        "dev": ["magihuman[serve, stubs]", "numpy!=2.0,>=1.27"],
    },
}
ALWAYS = ["numpy==1.26", "torch==2.11", "triton==3.6; platform_system == 'Linux'"]


@pytest.mark.parametrize(
    ("extras", "more"),
    [
        ([], []),
        (["metrics"], ["prometheus-client==0.20"]),
        (["serve"], ["prometheus-client==0.20", "ray==2.60"]),
        (["dev"], ["numpy==1.27", "prometheus-client==0.20", "ray==2.60"]),
    ],
)
def test_lower_bounds_of_what_is_asked_for(extras, more):
    constraints = runpy.run_path(str(SCRIPT))["constraints"]
    assert constraints(PROJECT, extras) == sorted(ALWAYS + more)


def test_a_requirement_that_pip_does_not_read_is_named():
    constraints = runpy.run_path(str(SCRIPT))["constraints"]
    with pytest.raises(ValueError, match="got '@'"):
        constraints({"name": "magihuman", "dependencies": ["@"]}, [])


def test_every_dependency_of_this_project_has_a_lower_bound():
    said = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    project = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]
    assert len(said.stdout.splitlines()) == len(project["dependencies"])
