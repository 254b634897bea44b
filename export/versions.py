"""What the export depends on beside the weights, for builds that are to notice when it changes.

python -m magihuman.export.versions FILE          writes FILE, only where it would change
python -m magihuman.export.versions --builder SM  says what would make engines here, or why not
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SOURCES = (
    "export/*.py",
    "runtime/exported.py",
    "runtime/tensorrt.py",
    "runtime/config.py",
    "runtime/model/turbo_vae.py",
    "kernels/reference.py",
)
DISTRIBUTIONS = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt-rtx")


def versions() -> dict[str, str]:
    """Of every library in use, and a hash of the sources that decide what is exported."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(PACKAGE.glob(pattern)):
            digest.update(file.read_bytes())
    return {**found, "sources": digest.hexdigest()}


def main() -> None:
    """Entry point; see the module."""
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
    """What will make engines here; ends the process with the reason where nothing can."""
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
