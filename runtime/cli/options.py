"""Options of the commands as dataclasses: a command takes one instance, not thirty parameters.

A field is an option, its annotation says how it is written on the command line. Options that
several commands have are dataclasses to inherit from. A class that gives a field again changes its
default or its help.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

ENVIRONMENT = "MAGIHUMAN_"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="MAGIHUMAN_MODEL",
        help="Model directory, hub id (owner/name), or nano, the small one in this package.",
    ),
]
SrOption = Annotated[str | None, typer.Option(help="Super-resolution: 540p or 1080p.")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        help="bf16, fp32, fp8, fp8-attn or int8; by default that of a converted transformer, else"
        " bf16."
    ),
]
KernelsOption = Annotated[
    str,
    typer.Option(
        help="auto: those for Hopper on Hopper, portable ones elsewhere; or portable: always."
    ),
]
TextPrecisionOption = Annotated[
    str | None,
    typer.Option(help="Of the text encoder's weights: bf16 (default), int8 or fp8."),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")]


def takes_options(command: Callable[[Any], None]) -> Callable[..., None]:
    """Make a function of one dataclass one that typer can read, with a parameter for each field.

    Fields of the class itself come first, then those of the classes it inherits from, in the order
    in which these are named: so `--help` begins with what the command alone has.
    """
    (parameter,) = inspect.signature(command).parameters
    options = get_type_hints(command)[parameter]
    annotations = get_type_hints(options, include_extras=True)
    defaults = {field.name: field.default for field in fields(options)}
    classes = [given for given in options.__mro__ if given is not object]
    names = dict.fromkeys(name for given in classes for name in inspect.get_annotations(given))

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        command(options(**values))

    expanded.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if defaults[name] is MISSING else defaults[name],
                annotation=annotations[name],
            )
            for name in names
        ]
    )
    expanded.__annotations__ = {**{name: annotations[name] for name in names}, "return": None}
    return expanded


def from_environment(command: Callable[..., None]) -> Callable[..., None]:
    """Let each option of what `takes_options` has made come from the environment, too.

    `--queue-limit` is `MAGIHUMAN_QUEUE_LIMIT`, unless it has another variable already, and one of
    two names has two. What stands on the command line goes before. An option that may be repeated
    has its values between spaces.
    """
    signature = inspect.signature(command)
    parameters = []
    for name, parameter in signature.parameters.items():
        kind, info = get_args(parameter.annotation)
        if info.envvar is None:
            info = copy.copy(info)
            info.envvar = _variables(name, info)
        parameters.append(parameter.replace(annotation=Annotated[kind, info]))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {
        **{parameter.name: parameter.annotation for parameter in parameters},
        "return": None,
    }
    return command


def _variables(parameter: str, info: Any) -> list[str]:
    """The variables of an option, one for each of its long names."""
    given = (info.default, *(info.param_decls or ()))  # typer takes the first for a default
    names = [each for each in given if isinstance(each, str) and each.startswith("--")]
    return [
        ENVIRONMENT + name.partition("/")[0].removeprefix("--").replace("-", "_").upper()
        for name in names or [parameter]
    ]


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """Whether one JSON object is printed, for programs, instead of tables."""

    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """The one device that a command computes on."""

    device: DeviceOption = None


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """Which transformer makes the clips of a comparison, and how large they are."""

    variant: Annotated[str, typer.Option(help="distill or base.")] = "distill"
    transformer: Annotated[
        str | None, typer.Option(help="Folder of a transformer that lies elsewhere.")
    ] = None
    seconds: Annotated[float | None, typer.Option(help="By default 5, or as suits.")] = None
    width: Annotated[int | None, typer.Option(help="Pixels; by default 480, or as suits.")] = None
    height: Annotated[int | None, typer.Option(help="Pixels; by default 256, or as suits.")] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """The precision of a transformer, and the linears that stay bf16 beside those in 8 bits."""

    precision: PrecisionOption = None
    keep_bf16: Annotated[
        str | None,
        typer.Option(
            help="With 8 bits, what stays bf16: none, modality, or names and patterns, by commas."
        ),
    ] = None

    @property
    def kept_names(self) -> str | list[str] | None:
        """The words that `load` knows are kept as they are; anything else is a list of names."""
        text = self.keep_bf16
        return text if text in (None, "none", "modality") else text.split(",")


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """A bound on GPU memory, in GiB."""

    memory_limit_gb: Annotated[
        float | None,
        typer.Option(
            help="GiB of GPU memory to stay below; what has no room rests in host memory. By"
            " default what is free."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Where weights are that do not lie in the folders of the model."""

    revision: Annotated[str | None, typer.Option(help="Revision of the hub repository.")] = None
    transformer: Annotated[
        str | None, typer.Option(help="Folder of the transformer, published or converted.")
    ] = None
    sr_transformer: Annotated[
        str | None, typer.Option(help="Folder of the super-resolution transformer.")
    ] = None
    turbo_vae: Annotated[str | None, typer.Option(help="Path of the Turbo VAE.")] = None


@dataclass(frozen=True, kw_only=True)
class ComponentOptions:
    """Where the components beside the transformers are, if not with the model."""

    text_encoder: Annotated[
        str | None, typer.Option(help="Path or hub id of the text encoder.")
    ] = None
    audio_vae: Annotated[
        str | None, typer.Option(help="Path or hub id of the audio autoencoder.")
    ] = None
    image_vae: Annotated[str | None, typer.Option(help="Path or hub id of the image encoder.")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """How the file of a clip is encoded, and what it says."""

    crf: Annotated[
        int | None,
        typer.Option(
            help="Rate factor, lower is better: 0 to 51 for mp4 (17), 0 to 63 for webm (24)."
        ),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(help="Of x264, for mp4: ultrafast to veryslow, by default veryfast."),
    ] = None
    tags: Annotated[
        bool, typer.Option(help="Name prompt, seed, model and version in the file.")
    ] = True

    @property
    def encoding(self) -> dict[str, Any]:
        """These options as arguments of `Output`, beside its path."""
        return {"crf": self.crf, "preset": self.preset, "tags": self.tags}


@dataclass(frozen=True, kw_only=True)
class EngineOptions(PrecisionOptions, FileOptions, ComponentOptions, LimitOptions):
    """What an engine is loaded as: all of `load` that a command can say."""

    model: ModelOption
    variant: Annotated[str, typer.Option(help="distill or base.")] = "distill"
    sr: SrOption = None
    kernels: KernelsOption = "auto"
    vae: Annotated[str | None, typer.Option(help="fast, plain or tensorrt.")] = None
    device: DeviceOption = None
    context_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs, from --device on, that make a clip together.")
    ] = 1
    text_precision: TextPrecisionOption = None

    def load_arguments(self) -> dict[str, Any]:
        """Return these options as arguments of `runtime.load`: each field that has such a name."""
        from magihuman.runtime.engine import LoadOptions

        known = {field.name for field in fields(LoadOptions)}
        names = [field.name for field in fields(EngineOptions) if field.name in known]
        return {**{name: getattr(self, name) for name in names}, "keep_bf16": self.kept_names}


@dataclass(frozen=True, kw_only=True)
class PlanOptions(LimitOptions, JsonOptions):
    """What a memory plan is asked for."""

    variant: Annotated[str, typer.Option(help="For the memory plan: distill or base.")] = "distill"
    sr: Annotated[
        str | None, typer.Option(help="For the memory plan: super-resolution, 540p or 1080p.")
    ] = None
    precision: PrecisionOption = None
    kernels: KernelsOption = "auto"
    context_parallel: Annotated[
        int, typer.Option(min=1, help="For the memory plan: GPUs that work on each request.")
    ] = 1
    text_precision: TextPrecisionOption = None
