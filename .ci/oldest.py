"""Print the oldest releases that pyproject.toml allows, as constraints for pip.

    python .ci/oldest.py serve test > constraints.txt
    pip install -c constraints.txt '.[serve,test]'

They are those of the dependencies and of the extras named, and of the extras that these name.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
# As in `ray[serve]>=2.60; platform_system != 'Windows'`.
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[(?P<extras>[^\]]*)\])?(?P<bounds>[^;]*)(?P<marker>;.*)?"
)
LOWER_BOUND = re.compile(r">=\s*([\w.]+)")


def constraints(project: dict[str, Any], extras: list[str]) -> list[str]:
    """Return `name==version` for each lower bound, sorted; what has none is left to pip.

    project: the table of that name. Constraints take no extras: `ray[serve]` is held as `ray`.
    """
    lines = set()
    for requirement in _requirements(project, project["dependencies"], extras):
        bound = LOWER_BOUND.search(requirement["bounds"])
        if bound is not None:
            lines.add(f"{requirement['name']}=={bound[1]}{requirement['marker'] or ''}")
    return sorted(lines)


def _requirements(
    project: dict[str, Any], dependencies: list[str], extras: list[str]
) -> Iterator[re.Match[str]]:
    """Yield the requirements in parts, and in place of extras of the package what these need."""
    for text in dependencies:
        requirement = REQUIREMENT.fullmatch(text)
        if requirement is None:
            raise ValueError(f"{PYPROJECT} must have requirements as pip reads them, got {text!r}")
        if requirement["name"] == project["name"]:
            extras = [*extras, *re.split(r"\s*,\s*", requirement["extras"])]
        else:
            yield requirement
    for extra in extras:
        yield from _requirements(project, project["optional-dependencies"][extra], [])


if __name__ == "__main__":
    with PYPROJECT.open("rb") as file:
        print("\n".join(constraints(tomllib.load(file)["project"], sys.argv[1:])))
