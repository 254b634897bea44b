from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "graphs", "kernels", "export")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "data", "results")

SOURCE = "https://github.com/magihuman/magihuman"
INSTALL = ("-m", "pip", "install", "--no-deps", "--quiet")

T5GEMMA = """
import kernels
from transformers import T5GemmaEncoderModel
from magihuman.kernels import reference
print(T5GemmaEncoderModel.__name__, reference.__file__, hasattr(kernels, "get_kernel"))
"""


def python(*arguments: str, path: list[Path], cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that nothing is left in it."""
    place = tmp_path_factory.mktemp("wheel")
    tree = shutil.copytree(ROOT, place / "tree", ignore=LEFT_OUT)
    shutil.copy(ROOT / ".gitignore", tree)
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(place))
    python(*build, path=[], cwd=tree)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    python(*INSTALL, "--target", str(folder), str(wheel), path=[], cwd=folder)
    return folder


def test_the_only_top_level_name_is_magihuman(names):
    tops = {name.split("/")[0] for name in names}
    (information,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"magihuman", information}


def test_every_module_is_in_the_wheel_and_nothing_else(names):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["scikit-build"]["wheel"]["packages"]
    folders = [name for name in FOLDERS if (ROOT / name).is_dir()]
    assert packages == {
        "magihuman": "entry/magihuman",
        **{f"magihuman/{name}": name for name in folders},
    }
    wanted = {"magihuman/__main__.py"} | {
        f"magihuman/{file.relative_to(ROOT).as_posix()}"
        for name in folders
        for file in (ROOT / name).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == wanted
    assert {"magihuman/kernels/reference.py", "magihuman/export/onnx.py"} <= wanted
    for name in ("page.html", "page.css", "main.js"):
        assert f"magihuman/runtime/serving/static/{name}" in names
    assert not any("test" in name or "benchmark" in name for name in names)


def test_types_license_and_command_are_in_the_wheel(wheel, names):
    assert {"magihuman/runtime/py.typed", "magihuman/kernels/py.typed"} <= set(names)
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in names if ".dist-info/" in name}
    (commands,) = (text for name, text in texts.items() if name.endswith("entry_points.txt"))
    assert "magihuman = magihuman.export.cli:main" in commands
    (metadata,) = (Parser().parsestr(t) for n, t in texts.items() if n.endswith("/METADATA"))
    assert (metadata["Name"], metadata["License-Expression"]) == ("magihuman", "Apache-2.0")
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.fixture(scope="module")
def metadata(wheel, names) -> Message:
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def test_the_package_says_whose_it_is_and_where_to_find_more(metadata):
    assert metadata["Author"] == "the magihuman authors"
    assert "text-to-video" in metadata["Keywords"].split(",")
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert all(url.startswith(SOURCE) for url in urls.values())
    classifiers = metadata.get_all("Classifier")
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(classifiers)
    assert not any("License ::" in text for text in classifiers)  # License-Expression says it


def test_the_long_description_has_no_relative_link(metadata):
    """It is the README, whose relative links lead to files of the repository."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    readme = (ROOT / "README.md").read_text()
    assert description.splitlines()[0] == readme.splitlines()[0] == "# magihuman"
    before, after = links(readme), links(description)
    assert len(before) == len(after) > 20
    relative = 0
    for (kind, given), (_, made) in zip(before, after, strict=True):
        if re.match(r"[a-z]+:|#", given):
            assert made == given
            continue
        raw = "https://raw.githubusercontent.com/magihuman/magihuman/HEAD/"
        assert made == (raw if kind == "image" else f"{SOURCE}/blob/HEAD/") + given
        relative += 1
    assert relative > 20


def test_the_citation_is_of_this_version_and_names_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["cff-version"], cited["type"], cited["title"]) == (
        "1.2.0",
        "software",
        "magihuman",
    )
    for field in ("version", "license"):
        assert cited[field] == project[field]
    assert cited["authors"] == project["authors"]
    assert cited["repository-code"] == project["urls"]["Source"] == SOURCE
    (paper,) = cited["references"]
    assert paper["url"] == "https://arxiv.org/abs/2603.21986"
    assert {"type", "title", "authors"} <= set(paper)  # required of every reference


def links(text: str) -> list[tuple[str, str]]:
    """Kind and target of every link and picture."""
    names = {"link_open": "href", "image": "src"}
    return [
        (part.type, str(part.attrs[names[part.type]]))
        for token in MarkdownIt("commonmark").enable("table").parse(text)
        for part in token.children or ()
        if part.type in names
    ]


def test_the_links_of_an_editable_install_are_the_folders_of_the_wheel():
    links = (ROOT / ".editable" / "magihuman").iterdir()
    assert {link.name: link.readlink().as_posix() for link in links} == {
        "__main__.py": "../../entry/magihuman/__main__.py",
        **{name: f"../../{name}" for name in FOLDERS},
    }


def test_an_editable_install_follows_the_tree(tmp_path):
    """Built by the backend as pip does, and put where only its own files are on the path."""
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=LEFT_OUT)
    shutil.copytree(ROOT / ".editable", tree / ".editable", symlinks=True)
    build = "import sys, scikit_build_core.build as b; b.build_editable(sys.argv[1])"
    python("-c", build, str(tmp_path), path=[], cwd=tree)
    (built,) = tmp_path.glob("*.whl")
    folder = tmp_path / "site"
    with zipfile.ZipFile(built) as archive:
        assert not any(name.startswith("magihuman/") for name in archive.namelist())
        archive.extractall(folder)

    def import_it() -> list[str]:
        code = """
import importlib, site, sys
before = set(sys.path)
site.addsitedir(sys.argv[1])
print(*sorted(set(sys.path) - before))
try:
    print(importlib.import_module("magihuman.kernels.fresh").__file__)
except ModuleNotFoundError as error:
    print(error)
"""
        return python("-I", "-S", "-c", code, str(folder), path=[], cwd=tmp_path).splitlines()

    paths = f"{folder} {tree / '.editable'}"  # and not the folder in which the tree lies
    assert import_it() == [paths, "No module named 'magihuman.kernels.fresh'"]
    module = tree / "kernels" / "fresh.py"
    module.touch()
    linked = tree / ".editable" / "magihuman" / "kernels"
    assert import_it() == [paths, str(linked / "fresh.py")]
    module.unlink()  # and a package in its place
    (tree / "kernels" / "fresh").mkdir()
    (tree / "kernels" / "fresh" / "__init__.py").touch()
    assert import_it() == [paths, str(linked / "fresh" / "__init__.py")]


def test_the_installed_wheel_works(installed, tmp_path):
    code = "from magihuman import runtime; print(runtime.__file__, runtime.Request('hi').steps)"
    said = python("-c", code, path=[installed], cwd=tmp_path).split()
    assert said == [str(installed / "magihuman" / "runtime" / "__init__.py"), "None"]
    for command in ((str(installed / "bin" / "magihuman"),), ("-m", "magihuman")):
        help_text = python(*command, "--help", path=[installed], cwd=tmp_path)
        assert all(command in help_text for command in ("generate", "inspect", "export"))
        assert python(*command, "--version", path=[installed], cwd=tmp_path) == "magihuman 0.1.0\n"


def test_the_runtime_has_its_commands_without_the_export(installed, tmp_path):
    alone = shutil.copytree(installed, tmp_path / "alone")
    shutil.rmtree(alone / "magihuman" / "export")
    module = ("-m", "magihuman.runtime.cli", "--help")
    help_text = python(*module, path=[alone], cwd=tmp_path)
    assert "generate" in help_text and "export  " not in help_text


def test_importing_the_command_imports_nothing_large(installed, tmp_path):
    large = "{'torch', 'onnx', 'ray', 'fastapi'}"
    code = f"import sys, magihuman.export.cli; print({large} & set(sys.modules))"
    assert python("-c", code, path=[installed], cwd=tmp_path).strip() == "set()"


def test_the_repository_root_on_the_path_does_not_disturb_transformers(tmp_path):
    """There, `kernels` is our folder; Hugging Face's package of that name is not installed."""
    name, _, has_get_kernel = python("-c", T5GEMMA, path=[ROOT], cwd=tmp_path).split()
    assert (name, has_get_kernel) == ("T5GemmaEncoderModel", "False")


def test_hugging_faces_kernels_package_wins_over_our_folder(installed, tmp_path):
    """Both installed to the same place, and the repository root before them on the path."""
    command = [sys.executable, *INSTALL, "--target", str(tmp_path / "theirs"), "kernels"]
    theirs = subprocess.run(command, capture_output=True, text=True)
    if theirs.returncode != 0:
        pytest.skip(f"the package cannot be had here: {theirs.stderr.strip().splitlines()[-1]}")
    both = shutil.copytree(installed, tmp_path / "both")
    before = {file.relative_to(both) for file in both.rglob("*.py")}
    added = {f.relative_to(tmp_path / "theirs") for f in (tmp_path / "theirs").rglob("*.py")}
    assert not before & added  # no file of one replaces a file of the other
    shutil.copytree(tmp_path / "theirs", both, dirs_exist_ok=True)
    name, ours, has_get_kernel = python("-c", T5GEMMA, path=[ROOT, both], cwd=tmp_path).split()
    assert (name, has_get_kernel) == ("T5GemmaEncoderModel", "True")
    assert ours == str(both / "magihuman" / "kernels" / "reference.py")
