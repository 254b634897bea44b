"""`magihuman completion`: what a shell needs to complete commands, options and their values.

It is made of the parsers and printed once, so that a shell starts no process at a key press.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import typer

from magihuman.runtime import config
from magihuman.runtime.cli.terminal.console import user_errors
from magihuman.runtime.errors import one_of

NAME = "magihuman"
VALUES = {
    "--precision": get_args(config.Precision),
    "--variant": config.BASE_VARIANTS,
    "--sr": tuple(config.SR_SIZES),
    "--vae": get_args(config.Vae),
    "--device": ("cpu", "cuda"),
    "--target": ("onnx", "tensorrt"),
    "--dtype": ("bf16", "fp16", "fp32"),
    "--model": (config.NANO,),
}
# Text for the parsers, since each may be something else as well, and for people mostly a path.
PATHS = (
    "--out", "--model", "--transformer", "--sr-transformer", "--turbo-vae", "--text-encoder",
    "--audio-vae", "--image-vae", "model",
)  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """An option of a command, or an argument, which has no names.

    Attributes:
        names: as on the command line.
        about: its help, in one line.
        takes_value: whether a value follows.
        values: those that are known.
        is_file: whether the value is the name of a file or folder.
    """

    names: tuple[str, ...]
    about: str
    takes_value: bool
    values: tuple[str, ...]
    is_file: bool


@dataclass(frozen=True)
class Command:
    """A command and what it takes."""

    name: str
    about: str
    parameters: tuple[Parameter, ...]

    @property
    def options(self) -> list[Parameter]:
        """The parameters that have names."""
        return [each for each in self.parameters if each.names]

    @property
    def takes_files(self) -> bool:
        """Whether an argument is the name of a file or folder."""
        return any(each.is_file for each in self.parameters if not each.names)


def completion(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")],
) -> None:
    """Print a script that completes commands and options, for bash, zsh or fish.

    In bash: eval "$(magihuman completion bash)".
    """
    with user_errors():
        one_of("shell", shell, tuple(SHELLS))
        print(SHELLS[shell](_commands(context.find_root().command)), end="")


def _commands(group: Any) -> list[Command]:
    """What the parsers of a group's commands know."""
    found = []
    for name, parser in sorted(group.commands.items()):
        parameters = tuple(_parameter(each) for each in parser.params if not _is_hidden(each))
        found.append(Command(name, _line(parser.help), (*parameters, HELP)))
    return found


HELP = Parameter(("-h", "--help"), "Show what there is and exit.", False, (), False)


def _is_hidden(parameter: Any) -> bool:
    return bool(getattr(parameter, "hidden", False)) or parameter.name == "help"


def _parameter(parameter: Any) -> Parameter:
    is_argument = parameter.param_type_name == "argument"
    names = () if is_argument else (*parameter.opts, *parameter.secondary_opts)
    takes_value = is_argument or not parameter.is_flag
    values = next((VALUES[name] for name in names if name in VALUES), ())
    is_path = _is_path(parameter) or any(name in PATHS for name in (*names, parameter.name))
    about = _line(getattr(parameter, "help", ""))
    return Parameter(names, about, takes_value, values, takes_value and is_path)


def _is_path(parameter: Any) -> bool:
    """Whether the parser makes a path of the value; typer has said so in two ways."""
    kind = getattr(parameter, "type", None)
    if kind is not None:
        return kind.name in ("path", "file", "directory")
    return "Path" in str(parameter.type_descriptor.annotation)


def _line(text: str | None) -> str:
    """The first sentence or paragraph of a help, in one line."""
    return " ".join((text or "").partition("\n\n")[0].split())


def _bash(commands: list[Command]) -> str:
    names = " ".join(command.name for command in commands)
    return f"""\
# Completion of {NAME} for bash.
_{NAME}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    local command= options= files= i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${{COMP_WORDS[i]}} == -* ]] || {{ command=${{COMP_WORDS[i]}}; break; }}
    done
    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "{names} --version --help" -- "$current"))
        return
    fi
    case $command:$before in
{"".join(_bash_values(commands))}    esac
    case $command in
{"".join(_bash_options(commands))}    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    elif [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
    fi
}}
complete -F _{NAME} {NAME}
"""


def _bash_values(commands: list[Command]) -> Iterator[str]:
    """A case for each option that takes a value."""
    for command in commands:
        for option in command.options:
            if not option.takes_value:
                continue
            patterns = "|".join(f"{command.name}:{name}" for name in option.names)
            words = f'-W "{" ".join(option.values)}"' if option.values else ""
            yield f"        {patterns})\n"
            if option.is_file:
                yield "            compopt -o filenames 2>/dev/null\n"
                words += " -f"
            if words:
                yield f'            mapfile -t COMPREPLY < <(compgen {words} -- "$current")\n'
            yield "            return ;;\n"


def _bash_options(commands: list[Command]) -> Iterator[str]:
    for command in commands:
        names = " ".join(name for option in command.options for name in option.names)
        files = " files=1" if command.takes_files else ""
        yield f'        {command.name}) options="{names}"{files} ;;\n'


def _zsh(commands: list[Command]) -> str:
    listed = "".join(f"        {_quoted(f'{c.name}:{c.about}')}\n" for c in commands)
    cases = "".join(_zsh_cases(commands))
    return f"""\
#compdef {NAME}
# Completion of {NAME} for zsh.
_{NAME}() {{
    local -a commands
    commands=(
{listed}    )
    if (( CURRENT == 2 )); then
        _describe command commands
        _arguments '--version[Print the version and exit.]' '--help[Show what there is and exit.]'
        return
    fi
    shift words
    (( CURRENT-- ))
    case $words[1] in
{cases}    esac
}}
compdef _{NAME} {NAME}
"""


def _zsh_cases(commands: list[Command]) -> Iterator[str]:
    for command in commands:
        yield f"        {command.name})\n            _arguments -s"
        for option in command.options:
            action = _zsh_action(option)
            for name in option.names:
                word = _quoted(f"{name}[{_zsh_text(option.about)}]{action}")
                yield f" \\\n                {word}"
        yield " \\\n                '*:file:_files'" if command.takes_files else ""
        yield "\n            ;;\n"


def _zsh_action(option: Parameter) -> str:
    """What follows an option: nothing, a file, words, or anything."""
    if not option.takes_value:
        return ""
    words = f"({' '.join(option.values)})" if option.values else ""
    if option.is_file:
        return f":file:{{compadd {' '.join(option.values)}; _files}}" if words else ":file:_files"
    return f":value:{words}"


def _zsh_text(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "[]:\\" else letter for letter in text)


def _fish(commands: list[Command]) -> str:
    lines = [f"# Completion of {NAME} for fish.", f"complete -c {NAME} -f"]
    first = "-n __fish_use_subcommand"
    for command in commands:
        about = _quoted(command.about, "\\'")
        lines.append(f"complete -c {NAME} {first} -a {command.name} -d {about}")
    lines.append(f"complete -c {NAME} {first} -l version -d 'Print the version and exit.'")
    for command in commands:
        seen = f"complete -c {NAME} -n '__fish_seen_subcommand_from {command.name}'"
        lines.extend(" ".join([seen, *_fish_words(option)]) for option in command.options)
        if command.takes_files:
            lines.append(f"{seen} -F")
    return "\n".join(lines) + "\n"


def _fish_words(option: Parameter) -> Iterator[str]:
    for name in option.names:
        yield f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
    if option.takes_value:
        yield "-r"
        if option.values:
            yield f"-a {_quoted(' '.join(option.values))}"
        yield "-F" if option.is_file else "-f"
    yield f"-d {_quoted(option.about, chr(92) + chr(39))}"


def _quoted(text: str, quote: str = "'\\''") -> str:
    """The text in single quotes, for a shell. quote: what a single quote in it becomes."""
    return "'" + text.replace("'", quote) + "'"


SHELLS: dict[str, Callable[[list[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
