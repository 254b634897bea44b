"""`magihuman serve`: runs until it is told to stop. Exit codes as for all commands."""

from __future__ import annotations

import errno
import hashlib
import math
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from magihuman import runtime
from magihuman.runtime.cli.options import (
    EncodingOptions,
    EngineOptions,
    ModelOption,
    from_environment,
    takes_options,
)
from magihuman.runtime.cli.prompt import EnhanceOptions, enhancer_of
from magihuman.runtime.cli.terminal.console import need, user_errors
from magihuman.runtime.cli.terminal.ending import noted_signals
from magihuman.runtime.errors import one_of
from magihuman.runtime.request import MAX_SECONDS, MIN_SECONDS, MIN_SIDE_PX
from magihuman.runtime.serving.cluster.isolation import isolate

if TYPE_CHECKING:
    from ray.serve import Application

    from magihuman.runtime.prompts import Enhancer
    from magihuman.runtime.serving.settings import Settings, Shared

TOKEN_VARIABLE = "MAGIHUMAN_TOKEN"  # noqa: S105 - where it is, not what
MAX_PROMPT_CHARS = 150_000  # two of them fit a job's state, which is bounded
SHARED = "shared.sqlite"  # in the folder, of servers that share a storage alone
POLL_S = 0.1
WAIT_S = 15.0  # for the processes of a server that has just been killed
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions, EnhanceOptions, EncodingOptions):
    """Where the server listens, what it keeps and takes, and its engines."""

    model: ModelOption
    folder: Annotated[
        Path, typer.Option(help="Where videos and what is asked for are kept; made if need be.")
    ] = Path("videos")
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Records in a database that several servers share, as postgresql://...",
        ),
    ] = None
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Clips and uploads where all of them are, as s3://bucket/folder."
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Run on this Ray cluster, or on that of this machine (auto)."
        ),
    ] = None
    api_replicas: Annotated[
        int, typer.Option(min=1, help="Processes that speak HTTP; on a Ray cluster alone.")
    ] = 1
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"A file with the token that clients must send; or {TOKEN_VARIABLE}."),
    ] = None
    min_replicas: Annotated[int, typer.Option(min=1, help="Engines to begin with.")] = 1
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Engines under load; by default one for each GPU.")
    ] = None
    context_parallel: Annotated[
        int,
        typer.Option(
            "--gpus-per-engine",
            "--context-parallel",
            min=1,
            help="GPUs that work on each video together.",
        ),
    ] = 1
    queue_limit: Annotated[int, typer.Option(min=1, help="Videos that may wait.")] = 64
    max_upload_mib: Annotated[int, typer.Option(min=1, help="Of a request, its files too.")] = 32
    max_prompt_chars: Annotated[
        int, typer.Option(min=1, max=MAX_PROMPT_CHARS, help="Of a prompt.")
    ] = 10_000
    max_seconds: Annotated[
        float | None, typer.Option(help="Of a clip; by default the model's, or 60.")
    ] = None
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=MIN_SIDE_PX**2,
            help="Of a frame, before super-resolution; by default the model's, or 4096x4096.",
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; may be repeated, the first is answered."),
    ] = None
    strict_model: Annotated[
        bool, typer.Option("--strict-model", help="Refuse other names, in place of a warning.")
    ] = False
    allow_fetch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="Fetch files from addresses of this host; may be repeated."
        ),
    ] = None
    timeout_seconds: Annotated[
        float | None, typer.Option(help="A video that takes an engine longer fails.")
    ] = None
    keep_hours: Annotated[float, typer.Option(help="How long finished videos are kept.")] = 24.0
    drain_seconds: Annotated[
        float, typer.Option(help="For what is being made when the server is told to stop.")
    ] = 60.0
    warmup: Annotated[
        list[str] | None,
        typer.Option(metavar="WxHxS", help="Compile for clips like 480x256x5; may be repeated."),
    ] = None
    device: Annotated[str | None, typer.Option(help="cpu, or cuda.")] = None
    log_format: Annotated[str, typer.Option(help="Of lines on standard error: text or json.")] = (
        "text"
    )
    ray_logs: Annotated[
        bool, typer.Option("--ray-logs", help="Also print what Ray and its processes say.")
    ] = False
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send spans of requests to this collector, such as http://localhost:4318.",
        ),
    ] = None

    @property
    def place(self) -> str:
        """The address at which a browser finds the server."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@from_environment
@takes_options
def serve(options: ServeOptions) -> None:
    """Serve videos over HTTP, with a page to try it. Needs pip install 'magihuman[serve]'."""
    with user_errors(), noted_signals() as is_told:
        token = token_of(options.token_file)
        enhancer = enhancer_of(options)
        _check_numbers(options)
        _check_encoding(options)
        if options.ray_address is not None:
            _serve_on(options.ray_address, options, token, enhancer, is_told)
            return
        if options.api_replicas != 1:
            raise runtime.InvalidRequestError(
                f"--api-replicas must go with --ray-address, got {options.api_replicas}; leave it"
                " out, or start the server more than once"
            )
        sizes = tuple(_size(text) for text in options.warmup or ())
        isolate()
        _check_extra()
        _observe(options)
        gpus = _gpus(options.device)
        max_replicas = _max_replicas(options, gpus)
        # Of the GPUs, an engine's process sees its own alone.
        arguments = {
            **options.load_arguments(),
            "device": "cuda:0" if gpus else "cpu",
        }
        rows = _check_model(arguments, sizes)
        from magihuman.runtime.serving import app

        settings = _settings(options, token, _memory_bytes(gpus), rows, enhancer)
        own = options.context_parallel if gpus else 0
        replicas = options.min_replicas, max_replicas
        engines = app.Engines(arguments, sizes, own, *replicas, options.encoding)
        _check_place(options, settings)
        _say(f"loading {options.model}")
        app.run(
            settings,
            engines,
            (options.host, options.port),
            options.drain_seconds,
            is_told,
            lambda: _wait(options.place, is_told),
            options.ray_logs,
        )


def _serve_on(
    cluster: str,
    options: ServeOptions,
    token: bytes | None,
    enhancer: Enhancer | None,
    is_told: Callable[[], bool],
) -> None:
    """Serve on a Ray cluster that is there, until the process is told to stop."""
    _check_extra()
    built = clustered(options, token, enhancer)
    from magihuman.runtime.serving import app
    from magihuman.runtime.serving.cluster.local import check_reached

    check_reached(cluster)
    _warn_of_strangers(options, token)
    _say(f"loading {options.model}")
    place = options.host, options.port
    app.run_on(
        cluster, built, place, is_told, lambda: _wait(options.place, is_told), options.ray_logs
    )


def clustered(options: ServeOptions, token: bytes | None, enhancer: Enhancer | None) -> Application:
    """Return what Ray Serve runs on a cluster.

    Of the model no more is read than its `request.json`, where it is there: its machines have it.

    Args:
        token: SHA-256 of the bearer token.
        enhancer: rewrites prompts, where somebody is to.

    Raises:
        InvalidRequestError: an option cannot be used, or one that a cluster needs is missing.
    """
    _check_numbers(options)
    _check_encoding(options)
    _observe(options)
    if options.database is None or options.storage is None:
        missing = "--database" if options.database is None else "--storage"
        raise runtime.InvalidRequestError(
            f"on a cluster --database and --storage must name what all of its machines reach, and"
            f" {missing} is not given"
        )
    from magihuman.runtime.engine import LoadOptions
    from magihuman.runtime.serving import app

    is_cpu = options.device == "cpu"
    arguments = {**options.load_arguments(), "device": "cpu" if is_cpu else "cuda:0"}
    LoadOptions(**arguments).check()
    most = max(options.min_replicas, options.max_replicas or 1)
    engines = app.Engines(
        arguments,
        tuple(_size(text) for text in options.warmup or ()),
        0 if is_cpu else options.context_parallel,
        options.min_replicas,
        most,
        options.encoding,
    )
    settings = _settings(options, token, None, 0, enhancer)
    _check_shared(settings.shared)
    return app.clustered(settings, engines, options.api_replicas)


def _check_numbers(options: ServeOptions) -> None:
    """Refuse times that are out of their ranges."""
    for name, value in (
        ("--keep-hours", options.keep_hours),
        ("--drain-seconds", options.drain_seconds),
    ):
        if not 0 <= value <= 1e6:
            raise runtime.InvalidRequestError(f"{name} must be 0 to 1000000, got {value:g}")
    if options.max_seconds is not None and not MIN_SECONDS <= options.max_seconds <= MAX_SECONDS:
        raise runtime.InvalidRequestError(
            f"--max-seconds must be {MIN_SECONDS:g} to {MAX_SECONDS:g}, got {options.max_seconds:g}"
        )
    timeout_s = options.timeout_seconds
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise runtime.InvalidRequestError(f"--timeout-seconds must be above 0, got {timeout_s:g}")


def _check_encoding(options: ServeOptions) -> None:
    """Refuse a rate factor or a preset that there is not."""
    from magihuman.runtime.media import Mp4Writer

    Mp4Writer.check_encoding(runtime.Output("video.mp4", **options.encoding))


def _max_replicas(options: ServeOptions, gpus: int) -> int:
    """Return the number of engines under load: as given, or as many as the GPUs make."""
    each = options.context_parallel
    if each > 1 and options.vae == "tensorrt":
        raise runtime.InvalidRequestError(
            f"--vae tensorrt must go with --gpus-per-engine 1, got {each}; use fast or plain"
        )
    if gpus and each > gpus:
        raise runtime.InvalidRequestError(
            f"--gpus-per-engine must be at most the number of GPUs, {gpus}, got {each}"
        )
    fitting = gpus // each
    most = options.max_replicas or max(options.min_replicas, fitting)
    if not options.min_replicas <= most <= (fitting or most):
        shared = "" if each == 1 else f" by --gpus-per-engine, {each}"
        raise runtime.InvalidRequestError(
            f"--max-replicas must be from --min-replicas, {options.min_replicas}, to the number of"
            f" engines that the GPUs have room for{shared}, {fitting}, got {most}"
        )
    return most


def _settings(
    options: ServeOptions,
    token: bytes | None,
    memory_bytes: int | None,
    rows: int,
    enhancer: Enhancer | None = None,
) -> Settings:
    """Return what the part that speaks HTTP is told.

    Args:
        token: SHA-256 of the bearer token.
        memory_bytes: of the device of an engine, None where it is not known.
        rows: output rows of the transformer's widest linear.
        enhancer: rewrites prompts, where somebody is to.
    """
    from magihuman.runtime.memory import estimate
    from magihuman.runtime.serving.settings import Capacity, Limits, Settings
    from magihuman.runtime.weights import largest, prompts, suited

    model, each = options.model, options.context_parallel
    name = Path(model).absolute().name if Path(model).exists() else model
    names = tuple(dict.fromkeys(options.served_model_name or [name]))
    if memory_bytes is not None and options.memory_limit_gb is not None:
        memory_bytes = min(memory_bytes, int(options.memory_limit_gb * 2**30))
    most = largest(model)
    return Settings(
        folder=options.folder.absolute(),
        model=names[0],
        aliases=names[1:],
        is_model_strict=options.strict_model,
        fetched_hosts=tuple(options.allow_fetch or ()),
        variant=options.variant,
        sr=options.sr,
        keep_s=options.keep_hours * 3600,
        timeout_s=options.timeout_seconds,
        token_sha256=token,
        is_local=options.host in LOOPBACK and token is None and options.ray_address is None,
        shared=_shared(options),
        limits=Limits(
            body_bytes=options.max_upload_mib * 2**20,
            prompt_chars=options.max_prompt_chars,
            queued=options.queue_limit,
            seconds=options.max_seconds or most["seconds"],
            pixels=options.max_pixels or most["width"] * most["height"],
        ),
        suited=suited(model),
        enhancer=enhancer,
        prompts=prompts(model),
        # The least that is taken, by fused kernels, and of a window by its bands: what is refused
        # would fit in no way.
        capacity=None
        if memory_bytes is None
        else Capacity(
            memory_bytes,
            token_bytes=estimate.denoising_bytes(1, rows, is_compiled=True) / each,
            pixel_bytes=estimate.decoding_bytes(1, 1, is_compiled=True)
            / max(each, estimate.BANDS[-1]),
        ),
    )


def _shared(options: ServeOptions) -> Shared | None:
    """Return where records and files lie that several servers have, if they do."""
    from magihuman.runtime.serving.settings import Shared

    if options.database is None and options.storage is None:
        return None
    folder = options.folder.absolute()
    storage = options.storage or str(folder)
    return Shared(
        options.database or f"sqlite:///{folder / SHARED}",
        storage if "://" in storage else str(Path(storage).absolute()),
    )


def token_of(file: Path | None) -> bytes | None:
    """Return the token's SHA-256, and take the token out of the environment that others inherit."""
    token = os.environ.pop(TOKEN_VARIABLE, None)
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise runtime.InvalidRequestError(
                f"--token-file must be a text file that can be read, got {file}: {error}"
            ) from error
    if token is None:
        return None
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise runtime.InvalidRequestError(
            "the token must be printable ASCII without spaces, and not empty"
        )
    return hashlib.sha256(token.encode()).digest()


def _size(text: str) -> tuple[int, int, float]:
    """Return width and height in pixels and length in seconds, from WIDTHxHEIGHTxSECONDS."""
    try:
        width, height, seconds = text.split("x")
        return int(width), int(height), float(seconds)
    except ValueError:
        raise runtime.InvalidRequestError(
            f"--warmup must be WIDTHxHEIGHTxSECONDS, as in 480x256x5, got {text!r}"
        ) from None


def _check_extra() -> None:
    """Refuse where a library of the extra is not installed."""
    modules = ("fastapi", "python_multipart", "prometheus_client", "ray.serve", "sqlalchemy")
    need("serve", "serve", *modules)


def _observe(options: ServeOptions) -> None:
    """Tell all processes, by the environment, how they log and where they send spans."""
    from magihuman.runtime.serving.observe import lines, tracing

    one_of("--log-format", options.log_format, lines.FORMATS)
    os.environ[lines.FORMAT_VARIABLE] = options.log_format
    if options.otlp_endpoint is not None:
        os.environ[tracing.ENDPOINT_VARIABLE] = options.otlp_endpoint
    if any(os.environ.get(name) for name in tracing.VARIABLES):
        need("tracing", "otel", "opentelemetry.sdk.trace", tracing.EXPORTER)


def _gpus(device: str | None) -> int:
    """Return how many GPUs there are to use, 0 for the CPU."""
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device not in (None, "cpu", "cuda"):
        raise runtime.InvalidRequestError(f"--device must be cpu, or cuda, got {device!r}")
    if device == "cuda" and not gpus:
        raise runtime.DeviceError("--device cuda needs a GPU, and here is none; use --device cpu")
    return gpus


def _memory_bytes(gpus: int) -> int:
    """Return the bytes of the smallest of so many GPUs, or of this machine where there is none."""
    if not gpus:
        from magihuman.runtime.memory import estimate

        return estimate.host_bytes()[0]
    # A process of its own, since whoever asks holds some of their memory until it ends.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return min(pool.map(_gpu_bytes, range(gpus)))


def _gpu_bytes(index: int) -> int:
    import torch

    return torch.cuda.get_device_properties(index).total_memory


def _check_model(arguments: dict[str, Any], sizes: Sequence[tuple[int, int, float]]) -> int:
    """Refuse before processes are started what can be: options, sizes, missing or damaged files.

    Returns:
        Output rows of the widest linear of the transformers.
    """
    import torch

    from magihuman.runtime.engine import LoadOptions
    from magihuman.runtime.memory import limit_of
    from magihuman.runtime.weights import TransformerOptions, find, plan

    options = LoadOptions(**arguments)
    options.check()
    if options.context_parallel > 1:
        options.check_together()
    if options.device == "cpu":
        limit_of(options.memory_limit_gb, torch.device("cpu"))
    for width, height, seconds in sizes:
        request = runtime.Request("-", width=width, height=height, seconds=seconds)
        request.plan(options.base, options.sr)
    paths = find(
        arguments["model"], options.base, options.upscaler, options.overrides, options.revision
    )
    # Headers alone are read, and no GPU is touched: its memory belongs to the engines.
    ranks = options.context_parallel
    headers = TransformerOptions(torch.device("cpu"), None, None, False, ranks)
    try:
        specs = [plan(options.base, paths.dit, headers)]
        if options.upscaler is not None:
            specs.append(plan(options.upscaler, paths.sr, headers))
    except runtime.InvalidRequestError as error:
        told = str(error).replace("context_parallel", "--gpus-per-engine")
        raise runtime.InvalidRequestError(told) from error
    for spec in specs:
        spec.scan()
    return max(
        spec.config.mlp_widths(i)[0] for spec in specs for i in range(spec.config.num_layers)
    )


def _wait(place: str, is_told: Callable[[], bool]) -> None:
    """Return once the process is told to stop."""
    _say(f"serving at {place}")
    while not is_told():
        time.sleep(POLL_S)
    _say("stopping: what is being made may end, all else is kept for the next start")


def _check_place(options: ServeOptions, settings: Settings) -> None:
    """Refuse a folder or an address that another has, and warn where everybody is let in."""
    if settings.shared is None:
        from magihuman.runtime.serving.records.database import Database, in_folder
        from magihuman.runtime.serving.store import locked

        with locked(settings.folder, WAIT_S):  # the process that keeps the jobs takes it
            Database(in_folder(settings.folder)).check()
    else:
        _check_shared(settings.shared)
    _check_port(options.host, options.port)
    _warn_of_strangers(options, settings.token_sha256)


def _warn_of_strangers(options: ServeOptions, token: bytes | None) -> None:
    if options.host not in LOOPBACK and token is None:
        _say(
            f"warning: without a token, everybody who reaches {options.host} can make videos"
            f" and fetch them; set {TOKEN_VARIABLE} or --token-file"
        )


def _check_shared(shared: Shared | None) -> None:
    """Refuse a database or a storage that cannot be used."""
    assert shared is not None
    from magihuman.runtime.serving.records.database import Database
    from magihuman.runtime.serving.storage.files import Storage

    storage = Storage(shared.storage)
    Database(shared.database).check()
    try:
        storage.check()
    except OSError as error:
        raise runtime.OutputError(
            f"the storage must take files, and {shared.storage} does not:"
            f" {error.strerror or error}; make it, or let the server write to it"
        ) from error


def _check_port(host: str, port: int) -> None:
    """Refuse an address that stays taken, or is none of this machine's."""
    end_s = time.monotonic() + WAIT_S
    while True:
        try:
            family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
            return
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < end_s:
                time.sleep(0.1)
                continue
            raise runtime.InvalidRequestError(
                f"the server must be able to listen on {host} port {port}: {error.strerror}; name"
                " others with --host and --port"
            ) from error


def _say(text: str) -> None:
    from magihuman.runtime.serving.observe.lines import say

    say(text)
