"""What all commands have: a version, help, tables for any terminal, a word on what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Column, Table
from typer.testing import CliRunner

from magihuman.export.cli import cli as exported
from magihuman.runtime import MissingExtraError
from magihuman.runtime.cli.main import app
from magihuman.runtime.cli.terminal import console
from magihuman.runtime.files import version

ROOT = Path(__file__).parents[3]

assert exported.app is app  # with `export` bound to it


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process where a module is not installed."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; from magihuman.export.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_version_is_printed_and_nothing_is_loaded_for_it():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"magihuman {version()}\n")


def test_the_package_itself_can_be_run(tmp_path):
    """From the links that an editable install puts on the path."""
    links = ROOT / ".editable"
    done = subprocess.run(
        [sys.executable, "-m", "magihuman", "--version"],
        env={**os.environ, "PYTHONPATH": str(links)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"magihuman {version()}\n", "")


@pytest.mark.parametrize("command", [[], ["generate"], ["doctor"], ["export"]])
def test_help_has_a_short_name(command):
    assert run(*command, "-h").stdout == run(*command, "--help").stdout != ""


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("ray", ["serve", "-m", "nano"], "serve"),
        ("fastapi", ["serve", "-m", "nano"], "serve"),
        ("onnx", ["export", "OUT", "--vae", "-m", "nano"], "onnx"),
    ],
)
def test_a_missing_extra_is_named_with_its_command(tmp_path, module, command, extra):
    command = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    if "serve" in command:
        command += ["--folder", str(tmp_path / "videos"), "--device", "cpu"]
    done = without(module, *command)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: {command[0]} needs {module}, which is not installed:"
        f" pip install 'magihuman[{extra}]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_missing_extra_goes_through_pickle():
    import pickle

    error = MissingExtraError("serve", "serve", "ray")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# -- tables -----------------------------------------------------------------------------------


def shown(table: Table, width: int, monkeypatch) -> list[str]:
    from rich.console import Console

    with monkeypatch.context() as patch:
        patch.setattr(console, "out", Console(width=width, soft_wrap=True, highlight=False))
        with console.out.capture() as captured:
            console.print_table(table)
    return captured.get().splitlines()


def test_a_table_that_does_not_fit_becomes_blocks(monkeypatch):
    table = Table(Column("component", no_wrap=True), "state", "disk", title="what there is")
    table.add_row("stable-audio-open-1.0", "ok", "1.1 MiB")
    table.add_row("turbo_vae", "", "two\nlines")
    wide = shown(table, 80, monkeypatch)
    assert any("stable-audio-open-1.0" in line and "1.1 MiB" in line for line in wide)
    assert shown(table, 20, monkeypatch) == [
        "what there is",
        "stable-audio-open-1.0",
        "  state: ok",
        "  disk: 1.1 MiB",
        "turbo_vae",
        "  disk: two",
        "    lines",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["doctor", "--sr", "1080p", "--memory-limit-gb", "36", "--precision", "bf16"],
        ["doctor", "--sr", "1080p", "--memory-limit-gb", "200"],
        ["inspect", "nano"],
        ["explain", "--seconds", "1"],
    ],
)
def test_tables_fit_eighty_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*command)
    assert result.exit_code == 0, result.output
    drawn = [line for line in result.stdout.splitlines() if line[:1] in "┏┃┡│└┌├"]
    assert drawn and max(map(len, drawn)) <= 80
    assert "…" not in "".join(drawn)  # and nothing is cut


def test_a_plan_tells_what_changes_from_stage_to_stage():
    options = ("--sr", "1080p", "--precision", "bf16", "--memory-limit-gb", 40)
    lines = run("doctor", *options).stdout.splitlines()
    changes = [
        line.split("│")[1:3] for line in lines if line.startswith("│") and line.count("│") == 5
    ]
    found, name = {}, ""
    for stage, change in changes:
        name = stage.strip() or name
        found.setdefault(name, []).append(change.strip())
    assert "+ text encoder 17.2 GiB" in found["text"]
    assert found["audio"] == ["- text encoder"]
    assert found["image"] == [""]
    assert found["denoise"][0].startswith("+ transformer 28.5 GiB")
    assert found["super_resolve"][0] == "- transformer"
    assert found["decode"] == ["- super-resolution transformer"]
