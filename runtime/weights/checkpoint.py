"""Published files to weights on the device, checked by name and shape before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from magihuman.graphs.quantization import quantize_linear
from magihuman.runtime.config import MOST_CHANNELS, DiTConfig, TurboVAEConfig, Variant
from magihuman.runtime.errors import CheckpointError, shown
from magihuman.runtime.model import DiT, Oobleck, OobleckConfig, TurboVAE
from magihuman.runtime.weights import layouts
from magihuman.runtime.weights.layouts import INDEX_NAME as INDEX_NAME
from magihuman.runtime.weights.layouts import SINGLE_NAME as SINGLE_NAME
from magihuman.runtime.weights.layouts import scaled
from magihuman.runtime.weights.layouts import scan as scan
from magihuman.runtime.weights.reading import TensorInfo as TensorInfo
from magihuman.runtime.weights.reading import exists, names
from magihuman.runtime.weights.reading import load_pickle as load_pickle
from magihuman.runtime.weights.reading import open_shard as open_shard
from magihuman.runtime.weights.reading import read_json as read_json
from magihuman.runtime.weights.reading import scan_files as scan_files
from magihuman.runtime.weights.reading import shapes as shapes

ARCHITECTURE_NAME = "magihuman.json"  # beside a DiT that is not of the published size
TURBO_VAE_CONFIG = "TurboV3-Wan22-TinyShallow_7_7.json"
TURBO_VAE_WEIGHTS = "checkpoint-340000.ckpt"
AUDIO_VAE_PREFIX = "pretransform.model."
MOST_LEVELS = 16  # of the audio autoencoder
CHECKED_AT_ONCE = 2**24  # values
CPU = torch.device("cpu")

OnRead = Callable[[int, int], None]  # (bytes read, of how many)
Module = TypeVar("Module", bound=nn.Module)


def check_keys(on_disk: Mapping[str, tuple[int, ...]], model: nn.Module, source: str) -> None:
    """Raise `CheckpointError` unless names and shapes agree exactly with the model's."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_shapes(on_disk, wanted, source)


def check_shapes(
    on_disk: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise `CheckpointError` unless names and shapes are exactly those expected."""
    problems = []
    missing = [key for key in expected if key not in on_disk]
    unexpected = [key for key in on_disk if key not in expected]
    misshapen = [
        f"{key} is {shown(list(on_disk[key]))}, should be {list(expected[key])}"
        for key in expected
        if key in on_disk and tuple(on_disk[key]) != tuple(expected[key])
    ]
    for title, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("misshapen", misshapen),
    ):
        if keys:
            problems.append(f"{len(keys)} {title}: {names(keys)}")
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}")


def dit_config(place: Path, variant: Variant) -> DiTConfig:
    """The published architecture, or that of the `magihuman.json` beside the files, or of the
    `config.json` of Diffusers' layout.

    place: the folder of the files, or the one file.
    """
    folder = layouts.beside(place)
    path = folder / ARCHITECTURE_NAME
    if not exists(path):
        if layouts.is_config(folder):
            return layouts.read_config(folder, variant)
        return variant.architecture(DiTConfig())
    values = read_json(path)
    config = DiTConfig.from_dict(values, str(path))
    return config if "local_attention_layers" in values else variant.architecture(config)


def sketched(
    config: DiTConfig,
    tensors: Mapping[str, TensorInfo],
    source: str,
    linear_dtype: torch.dtype = torch.bfloat16,
) -> DiT:
    """A DiT of this architecture, without weights, whose names and shapes are those of `tensors`.

    tensors: without the scales of those in fp8.

    Raises:
        CheckpointError: they are not. Where there are fewer tensors than layers, no layer is made.
    """
    if config.num_layers > len(tensors):
        layouts.refuse_foreign(tensors, None, source)
        raise CheckpointError(
            f"{source} does not fit the model: num_layers is {config.num_layers}, and its files"
            f" hold {len(tensors)} tensors"
        )
    with torch.device("meta"):
        model = DiT(config, linear_dtype)
    layouts.refuse_foreign(tensors, model.state_dict().keys(), source)
    check_keys({key: info.shape for key, info in tensors.items()}, model, source)
    return model


def load_dit(
    place: Path,
    variant: Variant,
    device: torch.device,
    linear_dtype: torch.dtype,
    on_read: OnRead = lambda done, total: None,
    quantized: Mapping[str, torch.dtype] | None = None,
    rest: torch.device | None = None,
) -> DiT:
    """A DiT on the device. Shards are mapped one at a time and copied tensor by tensor.

    Block linears are converted to `linear_dtype`, and those that `quantized` names from there to
    its dtype before the next tensor is read; everything else is fp32, whatever is on disk. What is
    in fp8 on disk stands for its product with its scale; where it is to be in fp8, and its scale is
    by rows, it stays as it is. place: folder of the files, or the one file. rest: where the weights
    are to be, if not on the device, which then only quantises.
    """
    tensors = scan(place)
    files = layouts.split(tensors, str(place))
    model = sketched(dit_config(place, variant), files.weights, str(place), linear_dtype)
    scales, as_they_are = files.read_scales(), files.as_they_are

    dtypes = {f"{name}.weight": dtype for name, dtype in (quantized or {}).items()}
    narrow = {key: model.get_submodule(key.removesuffix(".weight")) for key in dtypes}
    for linear in narrow.values():
        del linear.weight  # no room is made for what is never held
    model = model.to_empty(device=rest or device)
    targets = model.state_dict()

    def put(key: str, value: Tensor) -> None:
        stays = key.removesuffix(".weight") in as_they_are and value.dtype == dtypes.get(key)
        if stays:
            scaled.hold(narrow[key], value, scales[key], rest or device)
            return
        if rest is None or key in narrow:
            value = value.to(device)
        if key in scales:
            value = scaled.multiplied(value, scales[key].to(value.device))
        if key in narrow:
            quantize_linear(narrow[key], value.to(linear_dtype), rest, dtypes[key])
        else:
            targets[key].copy_(value)

    total, done = sum(info.size_bytes for info in tensors.values()), 0
    for key, value in read_all(tensors):
        if key in files.weights:
            put(key, value)
        done += tensors[key].size_bytes
        on_read(done, total)
    return frozen(model)


def read_all(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with its name, mapped, one file after another."""
    for file in sorted({info.file for info in infos.values()}):
        with open_shard(file) as shard:
            for key, info in infos.items():
                if info.file == file:
                    yield key, shard.get_tensor(key)


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raise `CheckpointError` that names the tensors with a value that is NaN or infinite.

    tensors: of any float dtype, fp8 included; they are read in blocks. source: that they are from.
    """
    bad = [key for key, value in tensors if not _is_finite(value)]
    if bad:
        raise CheckpointError(
            f"{source} holds NaN or infinity in {len(bad)} tensors: {names(bad)}; download it"
            " again, or convert it again"
        )


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    blocks = value.reshape(-1).split(CHECKED_AT_ONCE)
    return all(bool(block.float().isfinite().all()) for block in blocks)


def turbo_vae_files(folder: Path) -> tuple[Path, Path]:
    """JSON and checkpoint of the decoder, by their published names or as the only ones."""
    return _one(folder, TURBO_VAE_CONFIG, "*.json"), _one(folder, TURBO_VAE_WEIGHTS, "*.ckpt")


def turbo_vae_config(folder: Path) -> TurboVAEConfig:
    """The sizes of the decoder, from its JSON."""
    path, _ = turbo_vae_files(folder)
    return TurboVAEConfig.from_dict(read_json(path), str(path))


def load_turbo_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> TurboVAE:
    """The decoder from its JSON and its training checkpoint.

    Of `ema_state_dict` only `decoder.` is taken (after `module.`); the rest,
    `aligned_feature_projection_heads` among it, belongs to training. Latent statistics are Wan
    2.2's, not the checkpoint's.
    """
    config, (_, weights_path) = turbo_vae_config(folder), turbo_vae_files(folder)
    state = load_pickle(weights_path).get("ema_state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"{weights_path} must hold an ema_state_dict")
    named = {str(key).removeprefix("module."): value for key, value in state.items()}
    kept = {key: value for key, value in named.items() if key.startswith("decoder.")}
    model = load_strictly(lambda: TurboVAE(config), kept, str(weights_path))
    return frozen(model.to(device=device, dtype=dtype))


def oobleck_config(path: Path) -> OobleckConfig:
    """The sizes of the autoencoder in a stable-audio-tools `model_config.json`."""
    try:
        model = read_json(path)["model"]
        config = model["pretransform"]["config"] if "pretransform" in model else model
        encoder, decoder = config["encoder"], config["decoder"]
        if encoder["type"] != "oobleck" or decoder["type"] != "oobleck":
            raise CheckpointError(f"{path}: encoder and decoder must be of type oobleck")
        enc, dec = encoder["config"], decoder["config"]
        same = all(enc[name] == dec[name] for name in ("channels", "c_mults", "strides"))
        if not same or enc["latent_dim"] != 2 * dec["latent_dim"]:
            raise CheckpointError(f"{path}: encoder and decoder must mirror each other")
        if not enc["use_snake"] or not dec["use_snake"] or dec["final_tanh"]:
            raise CheckpointError(f"{path}: use_snake must be true and final_tanh false")
        if config["bottleneck"]["type"] != "vae":
            raise CheckpointError(f"{path}: the bottleneck must be of type vae")
        levels = (*dec["c_mults"], *dec["strides"])
        sizes = (dec["channels"], *levels, dec["latent_dim"], dec["out_channels"])
        if any(type(size) is not int or size < 1 for size in sizes):
            raise CheckpointError(
                f"{path}: sizes must be positive whole numbers, got {shown(sizes)}"
            )
        if not 1 <= len(dec["c_mults"]) == len(dec["strides"]) <= MOST_LEVELS:
            raise CheckpointError(
                f"{path}: c_mults and strides must have as many entries, 1 to {MOST_LEVELS}, got"
                f" {len(dec['c_mults'])} and {len(dec['strides'])}"
            )
        if max(*sizes, dec["channels"] * max(levels)) > MOST_CHANNELS:
            raise CheckpointError(
                f"{path}: no level must have more than {MOST_CHANNELS} channels, got {shown(sizes)}"
            )
        return OobleckConfig(
            dec["channels"],
            tuple(dec["c_mults"]),
            tuple(dec["strides"]),
            dec["latent_dim"],
            dec["out_channels"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: the field {error} is missing") from error
    except TypeError as error:
        raise CheckpointError(f"{path}: a field is not as expected ({error})") from error


def load_audio_vae(folder: Path, device: torch.device) -> Oobleck:
    """The autoencoder of a stable-audio-open folder; its diffusion model, if there, is not read."""
    config = oobleck_config(folder / "model_config.json")
    weights_path = folder / SINGLE_NAME
    with open_shard(weights_path) as shard:
        state = {
            key.removeprefix(AUDIO_VAE_PREFIX): shard.get_tensor(key)
            for key in shard.keys()  # noqa: SIM118
            if key.startswith(AUDIO_VAE_PREFIX)
        }
        folded = fold_weight_norm(state, str(weights_path))
        model = load_strictly(lambda: Oobleck(config), folded, str(weights_path))
    return frozen(model.to(device=device, dtype=torch.float32))


def fold_weight_norm(state: Mapping[str, Tensor], source: str = "the file") -> dict[str, Tensor]:
    """Each `weight_g`, `weight_v` pair as `weight` = g v / ||v||, the norm over all but dim 0."""
    folded = {}
    for key, value in state.items():
        if key.endswith(".weight_v"):
            stem = key.removesuffix("_v")
            gain = state.get(f"{stem}_g")
            if gain is None:
                raise CheckpointError(f"{source}: {key} has no {stem}_g beside it")
            rows = (*value.shape[:1], *[1] * (value.ndim - 1))
            if value.ndim < 2 or gain.shape != rows:
                raise CheckpointError(
                    f"{source}: {stem}_g must be {list(rows)}, a norm for each row of {key}, got"
                    f" {list(gain.shape)}"
                )
            norm = value.float().flatten(1).norm(dim=1).view(gain.shape)
            folded[stem] = value.float() * (gain.float() / norm)
        elif not key.endswith(".weight_g"):
            folded[key] = value
    return folded


def load_strictly(build: Callable[[], Module], state: Mapping[str, Tensor], source: str) -> Module:
    """The module that `build` makes, on the CPU, with the weights of a state dict.

    Raises:
        CheckpointError: a name or shape differs; no room has been made for weights then.
    """
    with torch.device("meta"):
        sketch = build()
    check_keys(shapes(state, source), sketch, source)
    model = undrawn(build, CPU)
    model.load_state_dict(dict(state), strict=True)
    return model


def undrawn(
    build: Callable[[], Module], device: torch.device, dtype: torch.dtype | None = None
) -> Module:
    """The module that `build` makes, on the device, with room for its weights and nothing in it.

    A constructor that fills weights draws from the process's random numbers, which are the host's.
    Buffers that are to hold something are made on a device that `build` names. dtype: of the
    weights, by default that in which they are made.
    """
    with torch.device("meta"):
        module = build()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                room = torch.empty_strided(
                    parameter.shape,
                    parameter.stride(),
                    dtype=dtype or parameter.dtype,
                    device=device,
                )
                setattr(owner, name, nn.Parameter(room, requires_grad=False))
    return module.to(device)


def frozen(model: Module) -> Module:
    """The module, in evaluation mode and without gradients."""
    return model.eval().requires_grad_(False)


def _one(folder: Path, name: str, pattern: str) -> Path:
    """The published file name, or the only file of its kind."""
    if (folder / name).is_file():
        return folder / name
    matches = sorted(folder.glob(pattern))
    if len(matches) == 1:
        return matches[0]
    raise CheckpointError(
        f"{folder} must hold {name}, or exactly one {pattern} file; it has {len(matches)}"
    )
