"""Every threat that SECURITY.md lists has its tests, which exist."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache

import pages

PAGE = "SECURITY.md"


@cache
def functions(path: str) -> set[str]:
    """Names of the functions at the top of a file; none where it is no file of tests."""
    file = pages.ROOT / path
    if not (file.name.startswith("test_") and file.suffix == ".py" and file.is_file()):
        return set()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds)}


def gone(tests: Iterable[str]) -> list[str]:
    """Those of `path::name` that name no test."""
    found = []
    for test in tests:
        path, _, name = test.partition("::")
        if not name.startswith("test_") or name not in functions(path):
            found.append(test)
    return found


def test_every_row_names_tests_that_exist():
    rows = pages.rows(PAGE, "threat")
    assert len(rows) > 30
    for *_, tests in rows:
        assert tests and gone(tests) == [], tests


def test_all_tests_are_named_in_rows():
    """Else the test above would not see them."""
    named = [code for code in pages.code(PAGE) if "::" in code]
    assert named == [test for row in pages.rows(PAGE, "threat") for test in row[-1]]
    assert len(named) == len(set(named))


def test_a_test_that_is_gone_is_found():
    here = "tests/docs/test_threats.py"
    there = [f"{here}::test_a_test_that_is_gone_is_found"]
    lost = [
        f"{here}::test_no_such",
        f"{here}::gone",
        here,
        "tests/helpers/pages.py::rows",
        "no.py::test_a",
    ]
    assert gone([*there, *lost]) == lost
