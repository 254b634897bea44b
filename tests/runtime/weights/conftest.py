from __future__ import annotations

from pathlib import Path

import hostile
import pytest


@pytest.fixture(scope="module")
def folders(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders of every kind, for a module to damage copies of."""
    root = tmp_path_factory.mktemp("models")
    hostile.write_folders(tiny_dir, root)
    return root
