"""Completion in the shells themselves, from the scripts that the command prints."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from magihuman.export.cli import cli as exported
from magihuman.runtime.cli.main import app

assert exported.app is app  # with `export` bound to it


def script(shell: str) -> str:
    result = CliRunner().invoke(app, ["completion", shell])
    assert result.exit_code == 0, result.output
    return result.stdout


def shell_output(shell: str, code: str, folder: Path) -> list[str]:
    """The lines that a shell prints once it has read the script."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (folder / "script").write_text(script(shell))
    done = subprocess.run(
        [shell, "-c", f"source ./script\n{code}"],
        cwd=folder,
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout.splitlines()


def completed(words: list[str], folder: Path) -> list[str]:
    """What bash offers for the last of the words."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""
COMP_WORDS=(magihuman {quoted}); COMP_CWORD=${{#COMP_WORDS[@]}}; ((COMP_CWORD--))
_magihuman
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return [line for line in shell_output("bash", code, folder) if line]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gen"], ["generate"]),
        (["--ver"], ["--version"]),
        (["generate", "--pre"], ["--precision", "--preset"]),
        (["generate", "--variant", ""], ["base", "distill"]),
        (["generate", "-p", "hi", "--sr", "5"], ["540p"]),
        (["generate", "--no-t"], ["--no-tags"]),
        (["generate", "--seed", ""], []),
        (["generate", "--image", "fa"], ["face.png"]),
        (["generate", "-o", "fa"], ["face.png"]),
        (["inspect", "fa"], ["face.png"]),
        (["export", "--target", "t"], ["tensorrt"]),
        (["serve", "--model", "n"], ["nano"]),
        (["no-such-command", "--x"], []),
    ],
)
def test_bash_completes(tmp_path, words, expected):
    (tmp_path / "face.png").touch()
    assert sorted(completed(words, tmp_path)) == expected


def test_bash_knows_every_option_of_every_command(tmp_path):
    for name, command in get_command(app).commands.items():
        names = {each for p in command.params if p.param_type_name == "option" for each in p.opts}
        offered = completed([name, "-"], tmp_path)
        assert names | {"--help", "-h"} <= set(offered), name


def test_fish_completes(tmp_path):
    (tmp_path / "face.png").touch()
    lines = 'for i in "gen" "generate --pre" "generate --sr 5" "inspect fa"'
    code = f'{lines}; complete -C "magihuman $i"; end'
    lines = [line.partition("\t")[0] for line in shell_output("fish", code, tmp_path)]
    assert lines == ["generate", "--precision", "--preset", "540p", "face.png"]


def test_zsh_reads_the_script(tmp_path):
    code = "compdef() { :; }; source ./script; whence -w _magihuman"
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "script").write_text(script("zsh"))
    done = subprocess.run(["zsh", "-f", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("_magihuman: function\n", "")


def test_another_shell_is_refused():
    result = CliRunner().invoke(app, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert result.stderr == "error: shell must be one of 'bash', 'zsh', 'fish', got 'tcsh'\n"
