"""What the export depends on beside the weights, for builds that are to notice when it changes.

python -m magihuman.export.versions FILE          writes FILE, only where it would change
python -m magihuman.export.versions --builder SM  says what would make engines here, or why not
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent  # the folder of `magihuman`
ROOTS = ("magihuman.export.exporting", "magihuman.export.verify")  # what makes a folder
NEVER = ("TYPE_CHECKING", "typing.TYPE_CHECKING")  # conditions of imports for annotations alone
DISTRIBUTIONS = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt-rtx")


def versions() -> dict[str, str]:
    """Return every library's version, and a hash of the sources that decide what is exported."""
    numbers = {}
    for name in DISTRIBUTIONS:
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            numbers[name] = "not installed"
    digest = hashlib.sha256()
    for file in sources():
        digest.update(file.read_bytes())
    return {**numbers, "sources": digest.hexdigest()}


def sources() -> list[Path]:
    """Return the files of this folder, and of every module of ours that `ROOTS` import, in turn.

    Imports are read from the text, those inside functions too: to run them takes seconds.
    """
    files: dict[str, Path] = {}
    left = list(ROOTS)
    while left:
        name = left.pop()
        file, parent = _file_of(name), name.rpartition(".")[0]
        if name in files or file is None:
            continue
        files[name] = file
        package = name if file.name == "__init__.py" else parent
        left += [parent, *_imports(ast.parse(file.read_bytes()), package)]
    return sorted({*files.values(), *HERE.rglob("*.py")})


def _file_of(name: str) -> Path | None:
    """Return the file of a module of ours; None for others, and for what is no module."""
    top, *parts = name.split(".")
    if top != "magihuman" or not parts:
        return None
    folder = PACKAGE.joinpath(*parts)
    files = folder / "__init__.py", folder.with_suffix(".py")
    return next((file for file in files if file.is_file()), None)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield what a module imports when it runs; what is taken out of another may be a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (origin, *(f"{origin}.{alias.name}" for alias in node.names))
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) in NEVER):
            yield from _imports(node, package)


def main() -> None:
    """Do what the module's docstring says of the arguments."""
    match sys.argv[1:]:
        case ["--builder", sm]:
            print(_builder(int(sm) if sm else None))
        case [name]:
            path, text = Path(name), json.dumps(versions(), indent=1) + "\n"
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
        case _:
            raise SystemExit(__doc__)


def _builder(sm: int | None) -> str:
    """Say what makes engines here; end the process with the reason where nothing can."""
    try:
        from magihuman.export import exporting, verify  # noqa: F401 - all they need is there
        from magihuman.export.tensorrt import builder_for
        from magihuman.runtime.errors import MagiHumanError
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed; pip install 'magihuman[tensorrt]'"
        ) from error
    try:
        return str(builder_for(sm))
    except MagiHumanError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
