"""What a config file of Ray Serve, or a RayService of KubeRay, names to run the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from magihuman import runtime
from magihuman.runtime.cli.prompt import enhancer_of
from magihuman.runtime.cli.serve import ServeOptions, clustered, serve, token_of

if TYPE_CHECKING:
    from ray.serve import Application


def application(args: Mapping[str, Any]) -> Application:
    """Return the server as an application of Ray Serve, with engines on all nodes of its cluster.

    args: options of `magihuman serve`, as `max_replicas: 4` for `--max-replicas 4`; what is not
        among them comes from the environment, as `MAGIHUMAN_MAX_REPLICAS`. Host and port are those
        of Serve's own proxies.

    Raises:
        InvalidRequestError: an option is unknown, cannot be used, or is missing.
        MissingExtraError: a library is not installed.
        OutputError: the database or the storage cannot be used.
    """
    options = _options(args)
    return clustered(options, token_of(options.token_file), enhancer_of(options))


def _options(args: Mapping[str, Any]) -> ServeOptions:
    """Read options by the rules of the command line, the environment included."""
    command = typer.Typer(add_completion=False)
    command.command()(serve)
    try:
        context = typer.main.get_command(command).make_context("serve", list(_words(args)))
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the command line itself refuses
            raise
        raise runtime.InvalidRequestError(
            f"args must be options of 'magihuman serve': {error.format_message()}"
        ) from None
    return ServeOptions(**{"ray_address": "auto", **_given(context.params)})


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if (name, value) != ("ray_address", None)}


def _words(args: Mapping[str, Any]) -> Iterator[str]:
    """Yield options as a command line has them."""
    for name, given in args.items():
        option = f"--{name.replace('_', '-')}"
        for value in given if isinstance(given, list) else [given]:
            if value is True:
                yield option
            elif value is not False and value is not None:
                yield f"{option}={value}"
