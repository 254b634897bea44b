"""What `inspect`, `doctor` and `explain` say of a model directory and this machine, as data."""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata, util
from itertools import combinations
from pathlib import Path

import torch

from magihuman.graphs.cuda_graphs import NoBindingsError, Recorded, bindings
from magihuman.graphs.support import why_not, why_not_decode
from magihuman.kernels.reference import Counts
from magihuman.kernels.target import Kernels, target_of
from magihuman.runtime.config import (
    VARIANTS,
    DiTConfig,
)
from magihuman.runtime.device import pick_device
from magihuman.runtime.errors import CheckpointError, DeviceError, InvalidRequestError
from magihuman.runtime.model import Layout
from magihuman.runtime.request import Request
from magihuman.runtime.weights import (
    AUDIO_FOLDER,
    IMAGE_FOLDER,
    TEXT_FOLDER,
    TURBO_FOLDER,
    TransformerOptions,
    checked_state,
    checkpoint,
    exists,
    file_of,
    image_folder,
    in_model,
    layout_of,
    plan,
    random_weights,
    stored_encoder,
)

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "transformers", "diffusers", "av", "scipy", "pillow",
    "huggingface_hub",
)  # fmt: skip
Tensors = list[tuple[str, int]]  # dtype and bytes of each
WORKSPACE_BYTES = 4 * 2**30  # activations of a 256p clip and the decoder's, rounded up


@dataclass
class Component:
    """One folder of a model directory."""

    name: str
    state: str  # "ok", "missing", or what is wrong with it
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    layout: str = ""  # that its files are in, where there are several
    disk_bytes: int = 0
    device_bytes: int = 0

    @property
    def is_ok(self) -> bool:
        """Whether it is complete, with every name and shape as the model wants it."""
        return self.state == "ok"


def inspect_model(root: Path, check: bool = False) -> list[Component]:
    """Look at every component of a model directory: transformers and text encoder by file headers
    alone, the small ones by loading them.

    check: also read every weight, in blocks, and name the tensors that hold NaN or infinity.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root} must be a directory with the published folders")
    components = [_inspect_dit(root, name, check) for name in VARIANTS]
    cpu = torch.device("cpu")
    components.append(
        _inspect(
            root / TURBO_FOLDER,
            lambda f: _held(checkpoint.load_turbo_vae(f, cpu, torch.float32).state_dict(), check),
        )
    )
    components.append(
        _inspect(root / TEXT_FOLDER, lambda f: _scanned(f, check, "model.encoder.", "encoder."))
    )
    components.append(_inspect(root / AUDIO_FOLDER, lambda f: _inspect_audio(f, check)))
    components.append(_inspect_image(root, check))
    return components


def fits(components: list[Component], memory_bytes: int) -> dict[str, bool]:
    """Say which of the usual line-ups stay in so much memory together, with room to work."""
    size = {component.name: component.device_bytes for component in components}
    shared = sum(size[name] for name in (TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER, IMAGE_FOLDER))
    lineups = {
        "distill": ["distill"],
        "base": ["base"],
        "distill + 540p": ["distill", "540p_sr"],
        "distill + 1080p": ["distill", "1080p_sr"],
    }
    ok = {component.name for component in components if component.is_ok}
    return {
        label: shared + sum(size[name] for name in names) + WORKSPACE_BYTES <= memory_bytes
        for label, names in lineups.items()
        if ok.issuperset(names)
    }


def machine(kernels: Kernels = "auto") -> dict[str, str]:
    """Gather versions, devices and the paths that will be taken here, each with its reason.

    kernels: "auto" or "portable", as of `load`.
    """
    facts = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in PACKAGES:
        facts[name] = metadata.version(name) if util.find_spec(_module(name)) else "not installed"
    fp8 = why_not(DiTConfig(), torch.bfloat16, pick_device(None), fp8=True, kernels=kernels)
    facts["fp8 linears"] = "usable" if fp8 is None else f"not usable: {fp8}"
    facts["free disk"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB here"
    if not torch.cuda.is_available():
        built = (
            "built for CUDA, but no GPU is usable" if torch.version.cuda else "built without CUDA"
        )
        facts["device"] = f"cpu, {torch.get_num_threads()} threads (this PyTorch is {built})"
        facts["transformer"] = "plain PyTorch; sums in fp32 over bf16 operands"
        facts["attention"] = "plain PyTorch in fp32"
        facts["image and video autoencoders"] = "fp32, exact and faster than bf16 on a CPU"
        facts["video decoder"] = "plain PyTorch"
        return facts
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        facts[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor},"
            f" {properties.multi_processor_count} SMs, {free / 2**30:.1f} of {total / 2**30:.1f}"
            " GiB free"
        )
    facts["device"] = f"cuda:0 by default, CUDA {torch.version.cuda}"
    facts |= _transformer_on(torch.device("cuda:0"), kernels)
    facts |= several_gpus(torch.cuda.device_count(), torch.cuda.can_device_access_peer)
    facts["image and video autoencoders"] = "bf16, as published"
    reason = why_not_decode(torch.bfloat16, torch.device("cuda:0"))
    facts["video decoder"] = (
        "fast: fused kernels in captured graphs" if reason is None else f"plain PyTorch: {reason}"
    )
    return facts


def _transformer_on(device: torch.device, kernels: Kernels) -> dict[str, str]:
    """Say how transformers run on a GPU, and by which kernels."""
    config = DiTConfig()
    reason = why_not(config, torch.bfloat16, device, kernels=kernels)
    if reason is not None:
        return {
            "transformer": f"plain PyTorch, bf16 linears on the tensor cores: {reason}",
            "attention": "PyTorch's scaled_dot_product_attention in bf16",
        }
    from magihuman.kernels.attention import backends

    target = target_of(kernels, device)
    facts = {
        "transformer": "compiled: one captured graph of fused kernels, replayed",
        "kernels": f"{target.kernels}, as kernels={kernels!r} chooses on {target.architecture}",
    }
    local = backends.local_for(target, config.head_dim, device)
    facts["super-resolution to 1080p"] = f"compiled, attention by {local}"
    for name in backends.names_for(target):
        missing = backends.why_not(name, config.head_dim, device)
        facts[f"attention by {name}"] = "usable" if missing is None else f"not used: {missing}"
    return facts


def several_gpus(count: int, reaches: Callable[[int, int], bool]) -> dict[str, str]:
    """Say how GPUs can be shared out among engines, and whether they reach each other's memory.

    reaches: whether the first of two GPUs has access to the second.
    """
    if count < 2:
        return {}
    apart = [
        f"{first} and {second}"
        for first, second in combinations(range(count), 2)
        if not (reaches(first, second) and reaches(second, first))
    ]
    heads = DiTConfig().kv_heads
    ways = [
        f"{count // each} of {each}"
        for each in range(1, count + 1)
        if heads % each == 0 and count // each
    ]
    return {
        "engines of serve": f"{', '.join(ways)} GPUs (--gpus-per-engine)",
        "GPUs together": f"no peer access: {', '.join(apart)}" if apart else "peer access",
    }


def compiled_counts(variant: str, request: Request, text_tokens: int) -> Counts:
    """Count the tokens of each modality in one forward pass of a variant that compiles."""
    chosen = VARIANTS.get(variant)
    if chosen is None or chosen.local_attention:
        raise InvalidRequestError(
            f"variant must be distill, base or 540p_sr, without frame-local layers, got {variant!r}"
        )
    plan = request.plan(VARIANTS["distill"], None)
    return Layout(plan.frames, plan.rows, plan.columns, plan.audio, text_tokens).counts


def recorded_forward(counts: Counts) -> Recorded:
    """Return what this GPU records of the compiled forward, over random weights and one layer of
    each kind so that it needs little memory.

    Raises:
        InvalidRequestError: this machine cannot compile, or cannot read what it has recorded.
    """
    from magihuman.graphs.explain import one_of_each

    config = one_of_each(DiTConfig())
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    reason = why_not(config, torch.bfloat16, device)
    if reason is not None:
        raise DeviceError(
            f"--recorded needs a GPU that runs the compiled forward, and here {reason}; leave it"
            " out to explain without one"
        )
    try:
        bindings()
    except NoBindingsError as error:
        raise InvalidRequestError(f"--recorded: {error}") from error
    from magihuman.graphs.transformer import CompiledForward, ReplayOptions

    model = random_weights.dit(config, 0, device, torch.bfloat16, "explain")
    forward = CompiledForward(model, config, torch.bfloat16, device, ReplayOptions(debug=True))
    return forward.recorded(*counts)


def _inspect(place: Path, read: Callable[[Path], Tensors], name: str | None = None) -> Component:
    component = Component(name or place.name, "ok")
    if not exists(place):
        component.state = "missing"
        return component
    files = [place] if place.is_file() else place.rglob("*")
    component.disk_bytes = sum(file.stat().st_size for file in files if file.is_file())
    try:
        tensors = read(place)
    except CheckpointError as error:
        component.state = str(error)
        return component
    component.tensors = len(tensors)
    component.dtypes = dict(Counter(dtype for dtype, _ in tensors))
    component.device_bytes = sum(size for _, size in tensors)
    return component


def _inspect_dit(root: Path, name: str, check: bool) -> Component:
    def read(place: Path) -> Tensors:
        return _on_disk(plan(VARIANTS[name], place, options).scan(), place, check)

    options = TransformerOptions(pick_device(None))
    place = place_of(root, name) or root / name
    component = _inspect(place, read, name)
    if component.is_ok:
        spec = plan(VARIANTS[name], place, options)
        component.device_bytes, component.layout = spec.device_bytes, spec.layout
    return component


def place_of(root: Path, name: str) -> Path | None:
    """Where a directory has a variant; None too where its pipeline is another variant's."""
    try:
        return in_model(root, VARIANTS[name])
    except CheckpointError:
        return None


def _inspect_image(root: Path, check: bool) -> Component:
    def read(folder: Path) -> Tensors:
        checked_state(folder)
        return _held(stored_encoder(file_of(folder)), check)

    place = image_folder(root)
    component = _inspect(place, read, IMAGE_FOLDER)
    if component.is_ok:
        component.layout = layout_of(file_of(place))
    return component


def _inspect_audio(folder: Path, check: bool) -> Tensors:
    checkpoint.load_audio_vae(folder, torch.device("cpu"))
    return _scanned(folder, check, checkpoint.AUDIO_VAE_PREFIX)


def _scanned(folder: Path, check: bool, *prefixes: str) -> Tensors:
    tensors = checkpoint.scan(folder)
    kept = {key: info for key, info in tensors.items() if key.startswith(prefixes)}
    if not kept:
        raise CheckpointError(f"{folder} has no tensors named {' or '.join(prefixes)}...")
    return _on_disk(kept, folder, check)


def _on_disk(infos: Mapping[str, checkpoint.TensorInfo], folder: Path, check: bool) -> Tensors:
    """Return dtypes and sizes of tensors in safetensors files below a folder.

    Raises `CheckpointError` where `check` finds NaN or infinity.
    """
    if check:
        checkpoint.check_finite(checkpoint.read_all(infos), str(folder))
    return [(info.dtype, info.size_bytes) for info in infos.values()]


def _held(state: dict[str, torch.Tensor], check: bool) -> Tensors:
    """Return dtypes and sizes of tensors in memory; `check` as for `_on_disk`."""
    if check:
        checkpoint.check_finite(state.items(), "the file")
    return [
        (str(value.dtype).removeprefix("torch."), value.numel() * value.element_size())
        for value in state.values()
    ]


def _module(package: str) -> str:
    return {"pillow": "PIL"}.get(package, package)
