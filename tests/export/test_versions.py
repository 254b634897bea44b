"""What a build looks at to see whether its engines are stale."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import magihuman.kernels.decoder.ops
import magihuman.kernels.decoder.reference
import magihuman.kernels.reference
import magihuman.runtime.evaluate.clip_score
import magihuman.runtime.model.turbo_vae
from magihuman.export import versions

USED = [
    magihuman.kernels.decoder.reference,
    magihuman.kernels.reference,
    magihuman.runtime.model.turbo_vae,
    versions,
]
UNUSED = [magihuman.kernels.decoder.ops, magihuman.runtime.evaluate.clip_score]


def python(*arguments: str, path: Path | None = None) -> str:
    environment = dict(os.environ) if path is None else {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with a copy of the package's modules."""
    for file in versions.PACKAGE.glob("*/**/*.py"):
        copy = tmp_path / "tree" / "magihuman" / file.relative_to(versions.PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return tmp_path / "tree"


def test_a_change_of_what_is_used_is_noticed_and_no_other(tree):
    written = tree / "versions"

    def sources() -> str:
        python("-m", "magihuman.export.versions", str(written), path=tree)
        return json.loads(written.read_text())["sources"]

    def change(module) -> None:
        file = tree / "magihuman" / Path(module.__file__).relative_to(versions.PACKAGE)
        with file.open("a") as end:
            end.write("\n# changed\n")

    seen = [sources()]
    assert seen[0] == versions.versions()["sources"]
    for module in UNUSED:
        change(module)
    assert sources() == seen[0]
    for module in USED:
        change(module)
        seen.append(sources())
    assert len(set(seen)) == len(seen)


def test_all_that_is_imported_is_looked_at():
    """As they run; the text has those inside functions too."""
    code = (
        f"import sys, {', '.join(versions.ROOTS)}\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.startswith('magihuman.') and module.__file__: print(module.__file__)\n"
    )
    imported = {Path(line) for line in python("-c", code).splitlines()}
    assert Path(magihuman.kernels.decoder.reference.__file__) in imported
    assert imported <= set(versions.sources())


def test_looking_imports_no_torch(tmp_path):
    code = (
        "import sys; from magihuman.export import versions; versions.main();"
        " print('torch' in sys.modules)"
    )
    assert python("-c", code, str(tmp_path / "versions")) == "False\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import a.b, c", {"a.b", "c"}),
        ("from a import b", {"a", "a.b"}),
        ("from . import b\nfrom ..d import e", {"x.y", "x.y.b", "x.d", "x.d.e"}),
        ("def f():\n    if True:\n        import a", {"a"}),
        ("if not TYPE_CHECKING:\n    import a", {"a"}),
        ("if TYPE_CHECKING:\n    import a\nif typing.TYPE_CHECKING:\n    import b", set()),
    ],
)
def test_imports_are_read_from_the_text(text, names):
    assert set(versions._imports(ast.parse(text), "x.y")) == names
