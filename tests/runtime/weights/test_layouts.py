"""Transformers and image encoders in the layouts that others have converted them to."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from magihuman import runtime
from magihuman.graphs.quantization import linears, quantize
from magihuman.kernels.reference import dequantize_rows
from magihuman.runtime import CheckpointError, InvalidRequestError
from magihuman.runtime.cli.inspect import inspect_model
from magihuman.runtime.cli.plans.asked import PlanAsked
from magihuman.runtime.config import VARIANTS
from magihuman.runtime.engine import assemble
from magihuman.runtime.memory import folder_parts
from magihuman.runtime.model import wan_vae
from magihuman.runtime.weights import (
    checkpoint,
    convert,
    layered_bytes,
    layouts,
    load_image_vae,
    locate,
)
from magihuman.runtime.weights import transformer as transformers
from magihuman.runtime.weights.locate import (
    AUDIO_FOLDER,
    IMAGE_FOLDER,
    TEXT_FOLDER,
    TURBO_FOLDER,
)
from magihuman.runtime.weights.tiny import DIT, WAN_BASE_DIM
from magihuman.runtime.weights.wan_vae import WEIGHTS_NAME, encoder_shapes

CPU = torch.device("cpu")
BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
SIZES = checkpoint.ARCHITECTURE_NAME
STEM = "diffusion_pytorch_model"
QKV, PROJ = (f"block.layers.1.attention.linear_{part}.weight" for part in ("qkv", "proj"))
State = dict[str, Tensor]

CONFIG = {
    "_class_name": "MagiHumanDiT",
    "_diffusers_version": "0.33.0",
    "num_layers": 5,
    "hidden_size": 128,
    "head_dim": 32,
    "num_query_groups": 2,
    "video_in_channels": 192,
    "audio_in_channels": 64,
    "text_in_channels": 64,
    "mm_layers": [0, 4],
    "local_attn_layers": [],
    "gelu7_layers": [0],
    "post_norm_layers": [],
    "enable_attn_gating": True,
    "activation_type": "swiglu7",
    "patch_size": [1, 2, 2],
    "tread_selection_rate": 0.5,
}


def stays_fp32(key: str) -> bool:
    return not key.startswith("block.") or key.endswith("norm.weight")


def published(tiny_dir: Path, name: str = "distill") -> State:
    files = (tiny_dir / name).glob("*.safetensors")
    return {key: value for file in files for key, value in load_file(file).items()}


def in_bf16(state: State, keep: Callable[[str], bool] = stays_fp32) -> State:
    return {key: value if keep(key) else value.to(BF16) for key, value in state.items()}


def write_diffusers(folder: Path, state: State, shards: int = 1, **changes: object) -> Path:
    """A part of a pipeline, as `FastVideo/MagiHuman-Diffusers` has it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    if shards == 1:
        save_file(state, folder / f"{STEM}.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"{STEM}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: state[key] for key in sorted(state)[i::shards]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def many(name: str) -> State:
    return {name.format(i): torch.ones(2) for i in range(60)}


def write_file(folder: Path, state: State, name: str = "distill_bf16.safetensors") -> Path:
    """One file, with the tiny sizes beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SIZES).write_text(json.dumps({**SIZE_FIELDS}))
    save_file(state, folder / name)
    return folder / name


SIZE_FIELDS = {
    "num_layers": 5,
    "hidden_size": 128,
    "head_dim": 32,
    "kv_heads": 2,
    "text_channels": 64,
    "modality_layers": [0, 4],
    "gelu7_layers": [0],
    "frame_reach": 2,
}


def others_of(tiny_dir: Path, root: Path) -> Path:
    """A model's directory with all but the transformers."""
    root.mkdir(parents=True, exist_ok=True)
    for name in (TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER):
        (root / name).symlink_to(tiny_dir / name)
    return root


def load(place: Path, name: str = "distill", dtype: torch.dtype = BF16) -> State:
    spec = transformers.plan(
        VARIANTS[name], place, transformers.TransformerOptions(CPU, compile=False)
    )
    assert spec.folder is not None
    return checkpoint.load_dit(spec.folder, VARIANTS[name], CPU, dtype).state_dict()


def assert_equal(actual: State, wanted: State) -> None:
    assert actual.keys() == wanted.keys()
    for key, value in actual.items():
        assert value.dtype == wanted[key].dtype, key
        assert torch.equal(value, wanted[key]), key


@pytest.fixture(scope="module")
def clip(engine) -> list[object]:
    """What the published layout makes."""
    video = engine.generate("hi", seconds=0.2, width=64, height=64, steps=1)
    return [video.frames, video.audio]


def assert_makes(clip: list[object], model: object, **options: object) -> None:
    with runtime.load(model, device="cpu", **options) as loaded:
        video = loaded.generate("hi", seconds=0.2, width=64, height=64, steps=1)
    assert (video.frames == clip[0]).all() and (video.audio == clip[1]).all()


# -- Diffusers --------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("place", ["in the model", "the pipeline", "its part"])
def test_diffusers_files_make_the_published_clip(tiny_dir, tmp_path, clip, shards, place):
    """With linears in bf16, as they compute, and the rest as published: bit for bit."""
    root = others_of(tiny_dir, tmp_path / "model")
    state = in_bf16(published(tiny_dir))
    if place == "in the model":
        write_diffusers(root / "distill" / "transformer", state, shards)
        assert_makes(clip, root)
        return
    part = write_diffusers(tmp_path / "elsewhere" / "transformer", state, shards)
    assert_makes(clip, root, transformer=part if place == "its part" else part.parent)


def test_a_pipelines_folder_may_be_the_model(tiny_dir, tmp_path, clip):
    root = others_of(tiny_dir, tmp_path / "distill")
    write_diffusers(root / "transformer", in_bf16(published(tiny_dir)))
    assert_makes(clip, root)
    with pytest.raises(
        CheckpointError, match="by the name of its folder it holds distill; ask for"
    ):
        runtime.load(root, variant="base", device="cpu")


def test_super_resolution_has_folders_of_both_names(tiny_dir, tmp_path):
    """`sr_540p` of such a repository holds the base transformer too."""
    umbrella = others_of(tiny_dir, tmp_path / "umbrella")
    (umbrella / "base").symlink_to(tiny_dir / "base")
    state = published(tiny_dir, "540p_sr")
    write_diffusers(umbrella / "sr_540p" / "sr_transformer", in_bf16(state))
    write_diffusers(umbrella / "sr_540p" / "transformer", in_bf16(published(tiny_dir, "base")))
    wanted = load(tiny_dir / "540p_sr", "540p_sr")
    for place in (umbrella / "sr_540p", umbrella / "sr_540p" / "sr_transformer"):
        assert_equal(load(place, "540p_sr"), wanted)
    assert_equal(load(umbrella / "sr_540p", "base"), load(tiny_dir / "base", "base"))
    with runtime.load(umbrella, variant="base", sr="540p", device="cpu") as engine:
        assert engine._parts.sr_dit is not None
        assert_equal(engine._parts.sr_dit.state_dict(), wanted)
    found = layouts.in_model(others_of(tiny_dir, tmp_path / "sr_540p"), VARIANTS["base"])
    assert found is None
    shutil.copytree(umbrella / "sr_540p", tmp_path / "sr_540p", dirs_exist_ok=True)
    part = layouts.in_model(tmp_path / "sr_540p", VARIANTS["base"])
    assert part == tmp_path / "sr_540p" / "transformer"
    with pytest.raises(CheckpointError, match=r"must hold 1080p_sr, and .* holds 540p_sr"):
        layouts.in_model(tmp_path / "sr_540p", VARIANTS["1080p_sr"])


def test_what_is_fp32_here_is_so_whatever_the_file_has(tiny_dir, tmp_path):
    """A converter cast embedders and heads too: the rounded values, computed in fp32."""
    state = in_bf16(published(tiny_dir), lambda key: key.endswith(("norm.weight", "bands")))
    place = write_diffusers(tmp_path / "transformer", state)
    wanted = load(tiny_dir / "distill")
    for key, value in load(place).items():
        assert value.dtype == (FP32 if stays_fp32(key) else BF16), key
        assert torch.equal(value, state[key].to(value.dtype)), key
        assert value.dtype == wanted[key].dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "WanTransformer3DModel"}, "must have the _class_name 'MagiHumanDiT', got"),
        (
            {"activation_type": "gelu"},
            "activation_type must be 'swiglu7', as published, got 'gelu'",
        ),
        ({"post_norm_layers": [1]}, r"post_norm_layers must be \[\], as published, got \[1\]"),
        ({"local_attn_layers": [1]}, "local_attn_layers must be those of distill, .* another var"),
        ({"num_layers": 0}, "num_layers must be a positive whole number"),
        ({"text_in_channels": 32}, r"1 misshapen: adapter.text_embedder.weight is \[128, 64\]"),
    ],
)
def test_a_configuration_of_another_model_is_refused(tiny_dir, tmp_path, changes, message):
    place = write_diffusers(tmp_path / "transformer", published(tiny_dir), **changes)
    with pytest.raises(CheckpointError, match=message):
        load(place)


# -- single files -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["the file", "its folder", "in the model", "a folder there"])
def test_one_file_with_published_names_makes_the_published_clip(tiny_dir, tmp_path, clip, place):
    root = others_of(tiny_dir, tmp_path / "model")
    state = in_bf16(published(tiny_dir))
    if place == "in the model":
        write_file(root, state, "distill.safetensors")
        assert_makes(clip, root)
    elif place == "a folder there":
        write_file(root / "distill", state)
        assert_makes(clip, root)
    else:
        file = write_file(tmp_path / "elsewhere", state)
        assert_makes(clip, root, transformer=file if place == "the file" else file.parent)


# -- fp8 with scales --------------------------------------------------------------------------


def spread(scale: Tensor, value: Tensor) -> Tensor:
    """A scale of one of the shapes below, as it broadcasts to its weight."""
    rows, columns = value.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape in ((rows,), (rows, 1)):
        return scale.reshape(rows, 1)
    if scale.shape == (1, columns):
        return scale
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]


def in_fp8(state: State, scale_of: Callable[[Tensor], Tensor]) -> State:
    """Block linears in e4m3 with what `scale_of` has for each, laid out as it has it."""
    made = {}
    for key, value in state.items():
        if stays_fp32(key):
            made[key] = value
            continue
        scale = scale_of(value.float())
        whole = spread(scale, value)
        made[key] = (value.float() / whole).clamp(-448, 448).to(FP8)
        made[key + layouts.SCALE] = scale.contiguous()
    return made


def stands_for(state: State) -> State:
    """What such a file means, by the plainest of sums."""
    meant = {}
    for key, value in state.items():
        if key.endswith(layouts.SCALE):
            continue
        scale = state.get(key + layouts.SCALE)
        if scale is not None:
            value = value.float() * spread(scale, value)
        meant[key] = value
    return meant


def by_row(value: Tensor) -> Tensor:
    return value.abs().amax(1) / 448


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "one, of no axes": lambda value: value.abs().max() / 448,
    "one, of one axis": lambda value: (value.abs().max() / 448)[None],
    "rows": by_row,
    "rows, of two axes": lambda value: by_row(value)[:, None],
}
OTHER_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda value: value.abs().amax(0)[None] / 448,
    "blocks": lambda value: (
        torch.nn.functional.max_pool2d(value.abs()[None], 128, ceil_mode=True)[0] / 448
    ),
}


@pytest.fixture
def capable(monkeypatch) -> None:
    """As on a device whose kernels take fp8; what they would compute is not asked for."""
    monkeypatch.setattr(transformers, "why_not", lambda *arguments, **options: None)
    monkeypatch.setattr(assemble, "compiled", lambda *arguments: None)


@pytest.mark.parametrize("kind", SCALES)
def test_fp8_weights_with_a_scale_for_rows_are_used_as_they_are(tiny_dir, tmp_path, capable, kind):
    state = in_fp8(published(tiny_dir), SCALES[kind])
    file = write_file(tmp_path, state)
    options = transformers.TransformerOptions(CPU)
    spec = transformers.plan(VARIANTS["distill"], file, options)
    assert spec.precision == "fp8" and set(spec.quantized) == set(linears(DIT))
    model = spec.read(CPU)
    for name in linears(DIT):
        linear, key = model.get_submodule(name), f"{name}.weight"
        assert torch.equal(linear.weight.float(), state[key].float())
        scale = state[key + layouts.SCALE].reshape(-1).expand(len(state[key]))
        assert torch.equal(linear.weight_scale, scale) and linear.weight_scale.is_contiguous()
        reference, _ = quantize(state[key].float())
        assert linear.weight.stride() == reference.stride()  # as kernels want it
        whole = linear.weight.as_strided(
            (len(linear.weight), linear.weight.stride(0)), linear.weight.stride()
        )
        assert not whole[:, linear.weight.shape[1] :].float().any()
    outside = spec.device_bytes - sum(
        t.nbytes for key, t in model.state_dict().items() if not key.endswith(".weight_scale")
    )
    assert outside > 0  # scales, and the padding of rows


@pytest.mark.parametrize("kind", [*SCALES, *OTHER_SCALES])
def test_fp8_weights_run_as_bf16_where_fp8_cannot(tiny_dir, tmp_path, kind, caplog):
    """The forward is that of the published layout with the values that the file stands for."""
    caplog.set_level("WARNING", logger="magihuman")
    state = in_fp8(published(tiny_dir), {**SCALES, **OTHER_SCALES}[kind])
    file = write_file(tmp_path / "fp8", state)
    meant = write_file(tmp_path / "meant", stands_for(state))
    options = transformers.TransformerOptions(CPU)
    spec = transformers.plan(VARIANTS["distill"], file, options)
    assert spec.precision == "bf16"
    assert_equal(spec.read(CPU).state_dict(), load(meant))
    if kind != "blocks":  # of which the smallest weights have one alone, as is used here
        assert ("run as bf16, rounded as they are" in caplog.text) == (kind in SCALES)
    assert_equal(load(file, dtype=FP32), load(meant, dtype=FP32))


def test_fp8_files_make_the_clip_of_what_they_stand_for(tiny_dir, tmp_path):
    state = in_fp8(published(tiny_dir), by_row)
    root = others_of(tiny_dir, tmp_path / "model")
    frames = []
    for place, values in (("fp8", state), ("meant", stands_for(state))):
        file = write_file(tmp_path / place, values)
        with runtime.load(root, transformer=file, device="cpu") as loaded:
            video = loaded.generate("hi", seconds=0.2, width=64, height=64, steps=1)
            frames.append(video.frames)
    assert (frames[0] == frames[1]).all()
    with pytest.raises(InvalidRequestError, match="precision='fp8' needs"):
        runtime.load(root, transformer=tmp_path / "fp8", precision="fp8", device="cpu")


def test_columns_and_blocks_are_rounded_again_where_fp8_is_asked_for(tiny_dir, tmp_path, capable):
    state = in_fp8(published(tiny_dir), OTHER_SCALES["columns"])
    file = write_file(tmp_path, state)
    options = transformers.TransformerOptions(CPU, transformers.PrecisionPolicy.FP8)
    model = transformers.plan(VARIANTS["distill"], file, options).read(CPU)
    linear = model.get_submodule(QKV.removesuffix(".weight"))
    values, scale = quantize(stands_for(state)[QKV].to(BF16))
    assert torch.equal(
        dequantize_rows(linear.weight, linear.weight_scale), dequantize_rows(values, scale)
    )


@pytest.mark.parametrize("kind", [*SCALES, *OTHER_SCALES])
def test_fp8_files_run_in_int8_where_that_is_asked_for(tiny_dir, tmp_path, capable, kind):
    """Of the values that they stand for, all linears, whichever the file has in fp8."""
    state = in_fp8(published(tiny_dir), {**SCALES, **OTHER_SCALES}[kind])
    state[PROJ] = state[PROJ].float().mul(spread(state.pop(PROJ + layouts.SCALE), state[PROJ]))
    root = others_of(tiny_dir, tmp_path / "model")
    file = write_file(tmp_path, state)
    with runtime.load(root, transformer=file, precision="int8", device="cpu") as loaded:
        assert loaded.precision == "int8"
        model = loaded._parts.dit
    for name, value in stands_for(state).items():
        if stays_fp32(name):
            continue
        linear = model.get_submodule(name.removesuffix(".weight"))
        values, scale = quantize(value.to(BF16), torch.int8)
        assert linear.weight.dtype == torch.int8 and torch.equal(linear.weight, values)
        assert linear.weight.stride() == values.stride()
        assert torch.equal(linear.weight_scale, scale)


def test_linears_that_a_foreign_file_is_to_keep_are_bf16(tiny_dir, tmp_path, capable):
    state = in_fp8(published(tiny_dir), by_row)
    file = write_file(tmp_path, state)
    for precision in transformers.PrecisionPolicy.FP8, transformers.PrecisionPolicy.INT8:
        options = transformers.TransformerOptions(CPU, precision, keep_bf16=["*.linear_proj"])
        model = transformers.plan(VARIANTS["distill"], file, options).read(CPU)
        assert model.get_parameter(QKV).dtype == precision.narrow
        assert torch.equal(model.get_parameter(PROJ), stands_for(state)[PROJ].to(BF16))


@pytest.mark.parametrize("layout", ["Diffusers", "one file"])
def test_other_layouts_are_converted_to_int8(tiny_dir, tmp_path, capable, layout):
    state = in_bf16(published(tiny_dir))
    root = others_of(tiny_dir, tmp_path / "model")
    if layout == "Diffusers":
        write_diffusers(root / "distill" / "transformer", state, shards=2)
    else:
        write_file(root, state, "distill.safetensors")
    made, wanted = (
        convert(model, tmp_path / name, precision="int8")
        for name, model in (("made", root), ("wanted", tiny_dir))
    )
    for file in wanted.glob("*.safetensors"):
        assert_equal(load_file(made / file.name), load_file(file))
    loaded = [
        runtime.load(root, device="cpu", **options)
        for options in ({"precision": "int8"}, {"transformer": made})
    ]
    models = [engine._parts.dit.state_dict() for engine in loaded]
    for engine in loaded:
        engine.close()
    assert_equal(*models)
    found = transformers.plan(VARIANTS["distill"], made, transformers.TransformerOptions(CPU))
    assert found.layout == "converted, int8"


def test_fp8_files_are_not_converted(tiny_dir, tmp_path):
    root = tmp_path / "model"
    write_file(root / "distill", in_fp8(published(tiny_dir), by_row))
    with pytest.raises(CheckpointError, match="got fp8, which would be rounded again; load it as"):
        convert(root, tmp_path / "out")


def test_other_layouts_are_converted(tiny_dir, tmp_path):
    root = tmp_path / "model"
    write_diffusers(root / "distill" / "transformer", in_bf16(published(tiny_dir)))
    made, wanted = (
        convert(model, tmp_path / name, precision="bf16")
        for name, model in (("made", root), ("wanted", tiny_dir))
    )
    for file in wanted.glob("*.safetensors"):
        assert_equal(load_file(made / file.name), load_file(file))


# -- what is refused --------------------------------------------------------------------------


def renamed(change: Callable[[str], str | None]) -> Callable[[State], State]:
    return lambda state: {new: value for key, value in state.items() if (new := change(key))}


def with_scale(scale: Tensor) -> Callable[[State], State]:
    return lambda state: {**state, PROJ: state[PROJ].to(FP8), PROJ + layouts.SCALE: scale}


ROWS = torch.ones(128)
REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "a file of ComfyUI": (
        renamed(lambda key: f"model.diffusion_model.{key}"),
        r"looks like one file of ComfyUI.* Of its 51 tensors 0 have names of the transformer, and"
        r" 51 have not \(model.diffusion_mod.*; 51 of the transformer's 51 are lacking. Take the p",
    ),
    "a prefix": (renamed(lambda key: f"module.{key}"), "with a prefix before each name.* Take the"),
    "ComfyUI's scales": (
        lambda state: {**state, QKV.replace("weight", "scale_weight"): ROWS},
        r"looks like an fp8 file of ComfyUI. Of its 52 tensors 51 have names of the transformer \("
        r".*\), and 1 have not \(block.layers.1.attention.linear_qkv.scale_weight\)",
    ),
    "no manifest": (
        lambda state: {**state, QKV.removesuffix("weight") + "weight_scale": ROWS},
        "a converted transformer without its manifest.json.* Copy its folder whole",
    ),
    "quanto": (
        renamed(lambda key: f"{key}._data" if key == QKV else key),
        "8-bit weights of optimum-quanto",
    ),
    "4 bits": (
        lambda state: {**state, f"{QKV}.absmax": ROWS},
        "weights in 4 bits",
    ),
    "a LoRA": (
        lambda state: {"block.layers.0.attention.linear_qkv.lora_A.weight": ROWS},
        "a LoRA, of differences alone",
    ),
    "another transformer": (
        lambda state: many("blocks.{}.attn1.to_q.weight"),
        "the transformer of another model",
    ),
    "a text encoder": (
        lambda state: many("model.encoder.layers.{}.weight"),
        "a text encoder.* Give it as text_encoder=",
    ),
    "an autoencoder": (
        lambda state: many("decoder.up_blocks.{}.weight"),
        "an autoencoder",
    ),
    "nothing known": (
        lambda state: many("a.{}"),
        "looks like nothing that is known. .* Give published or Diffusers files, one safetensors",
    ),
    "no scales": (
        lambda state: {**state, QKV: state[QKV].to(FP8)},
        f"1 tensors of fp8 weights without a scale named after them, ending in .*: {QKV}; take a",
    ),
    "a scale alone": (
        lambda state: {**state, QKV + layouts.SCALE: ROWS},
        f"scales without an fp8 weight: {QKV}{layouts.SCALE}; download",
    ),
    "a scale of nothing": (
        lambda state: {**state, "x.weight" + layouts.SCALE: ROWS},
        "scales without an fp8 weight: x.weight",
    ),
    "a scale of another shape": (
        with_scale(torch.ones(127)),
        rf"scales that do not fit their weights: {PROJ}{layouts.SCALE} is \[127\] for \[128, 128\]",
    ),
    "a scale for half of the rows": (with_scale(torch.ones(64)), r"is \[64\] for \[128, 128\]"),
    "a scale of whole numbers": (
        with_scale(torch.ones(128, dtype=torch.int32)),
        "a dtype that is not read: .*I32",
    ),
    "whole numbers": (
        lambda state: {**state, QKV: state[QKV].to(torch.int8)},
        rf"a dtype that is not read: {QKV} \(I8\); tensors must be F32, BF16, F16, F8_E4M3",
    ),
    "the other fp8": (
        lambda state: {**state, QKV: state[QKV].to(torch.float8_e5m2)},
        "F8_E5M2",
    ),
    "one missing": (renamed(lambda key: None if key == QKV else key), f"1 missing: {QKV}$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused_by_what_it_looks_like(tiny_dir, tmp_path, case):
    change, message = REFUSED[case]
    file = write_file(tmp_path, change(published(tiny_dir)))
    with pytest.raises(CheckpointError, match=message):
        load(file)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "distill-Q4_K_M.gguf",
            "it holds distill-Q4_K_M.gguf: GGUF files are not read, take a saf",
        ),
        ("distill.ckpt", "it holds distill.ckpt: pickles of transformers are not read"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.scan(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"must be a .safetensors file with the published nam"
    ):
        checkpoint.scan(tmp_path / file)


def test_two_files_without_an_index_are_named(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"a": ROWS}, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"it holds a.safetensors, b.safetensors: give the one"
    ):
        checkpoint.scan(tmp_path)


# -- the image encoder ------------------------------------------------------------------------


@pytest.mark.parametrize("width", [7, WAN_BASE_DIM, 160])
def test_the_encoders_shapes_are_those_of_diffusers_model(width):
    with torch.device("meta"):
        vae = wan_vae(width)
    del vae.decoder, vae.post_quant_conv
    wanted = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    assert encoder_shapes(width) == wanted


def write_vae(folder: Path, tiny_dir: Path) -> Path:
    """Diffusers' own model, encoder and decoder, with the published encoder's weights."""
    vae = wan_vae(WAN_BASE_DIM)
    encoder = load_image_vae(tiny_dir / IMAGE_FOLDER, CPU, FP32).model
    vae.load_state_dict(encoder.state_dict(), strict=False)
    folder.mkdir(parents=True)
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def vae_folder(tiny_dir, tmp_path_factory) -> Path:
    return write_vae(tmp_path_factory.mktemp("wan") / "Wan2.2-TI2V-5B-Diffusers", tiny_dir)


@pytest.mark.parametrize("part", ["", "vae", "vae/diffusion_pytorch_model.safetensors"])
def test_diffusers_vae_is_the_published_encoder(tiny_dir, vae_folder, part):
    """Against the installed diffusers' model, which reads its own files."""
    from diffusers import AutoencoderKLWan

    pixels = torch.rand(1, 3, 1, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = AutoencoderKLWan.from_pretrained(vae_folder / "vae").encode(pixels)
    own = load_image_vae(vae_folder / part, CPU, FP32)
    latents = [vae.latent_dist.mode() for vae in (wanted, own.model.encode(pixels))]
    assert torch.equal(*latents) and latents[0].std() > 0
    from_published = load_image_vae(tiny_dir / IMAGE_FOLDER, CPU, FP32)
    assert_equal(own.model.state_dict(), from_published.model.state_dict())


def test_published_names_may_be_in_safetensors(tiny_dir, tmp_path):
    state = torch.load(tiny_dir / IMAGE_FOLDER / WEIGHTS_NAME, weights_only=True)
    save_file(state, tmp_path / "wan2.2_vae.safetensors")
    own, wanted = (load_image_vae(p, CPU, FP32) for p in (tmp_path, tiny_dir / IMAGE_FOLDER))
    assert_equal(own.model.state_dict(), wanted.model.state_dict())


def test_a_model_finds_its_image_encoder_in_that_layout(tiny_dir, tmp_path, vae_folder):
    root = others_of(tiny_dir, tmp_path / "model")
    (root / "distill").symlink_to(tiny_dir / "distill")
    assert locate.image_folder(root) == root / IMAGE_FOLDER
    (root / vae_folder.name).symlink_to(vae_folder)
    assert locate.image_folder(root) == root / vae_folder.name
    with runtime.load(root, device="cpu") as engine:
        assert engine._parts.image_vae is not None
    sizes = [
        {part.name: part.total_bytes for part in folder_parts(*parts, 2, is_engine=False)}
        for image in (vae_folder, tiny_dir / IMAGE_FOLDER)
        for parts in [[root / n for n in (TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER)] + [image]]
    ]
    assert sizes[0] == sizes[1]


def test_another_vae_is_refused(tmp_path):
    save_file({"decoder.conv_in.weight": ROWS}, tmp_path / "vae.safetensors")
    with pytest.raises(
        CheckpointError, match=r"it is not the Wan 2.2 VAE: of its tensors 0 have na"
    ):
        load_image_vae(tmp_path, CPU, FP32)
    save_file({"encoder.conv_in.weight": torch.ones(8, 3, 3, 3, 3)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit the model: \d+ missing: "):
        load_image_vae(tmp_path, CPU, FP32)
    save_file({"a": ROWS}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"must hold one file .* got b.safetensors, vae.safe"):
        load_image_vae(tmp_path, CPU, FP32)


# -- inspect ----------------------------------------------------------------------------------


def test_inspect_names_the_layouts(tiny_dir, tmp_path, vae_folder):
    root = others_of(tiny_dir, tmp_path / "model")
    write_diffusers(root / "distill" / "transformer", in_bf16(published(tiny_dir)), shards=2)
    write_file(root / "base", in_fp8(published(tiny_dir), by_row), "any.safetensors")
    part = write_diffusers(root / "sr_540p" / "sr_transformer", published(tiny_dir))
    (root / "1080p_sr").symlink_to(tiny_dir / "1080p_sr")
    (root / vae_folder.name).symlink_to(vae_folder)
    found = {component.name: component for component in inspect_model(root, check=True)}
    assert {c.state for c in found.values()} == {"ok"}
    assert found["distill"].layout == "Diffusers, sharded"
    assert found["base"].layout == "one file, any.safetensors, fp8 with scales"
    assert found["540p_sr"].layout == "Diffusers, one file"
    assert found["1080p_sr"].layout == "published, one file"
    assert found[IMAGE_FOLDER].layout == f"safetensors, {STEM}.safetensors"
    (part / "config.json").write_text("{")
    broken = {component.name: component for component in inspect_model(root)}
    assert "config.json cannot be read as JSON" in broken["540p_sr"].state


@pytest.mark.parametrize("kind", ["fp8 with scales", "converted fp8", "converted int8"])
def test_a_plan_has_the_bytes_of_files_in_8_bits(tiny_dir, tmp_path, kind):
    root = others_of(tiny_dir, tmp_path / "model")
    if kind == "fp8 with scales":
        write_file(root / "distill", in_fp8(published(tiny_dir), by_row))
    else:
        convert(tiny_dir, root / "distill", precision=kind.split()[1])
    wanted = {
        precision: layered_bytes(DIT, BF16, linears(DIT) if precision != "bf16" else ())
        for precision in ("fp8", "bf16")
    }
    components = inspect_model(root)
    asked = PlanAsked("distill", None, None, 4)
    plan, reason = asked.of_folder(root, components)
    assert plan is not None, reason
    outside, layers = wanted["fp8"]
    assert plan.stages[0].weights["transformer"] == outside + sum(layers)
    if kind == "fp8 with scales":
        plan, _ = dataclasses.replace(asked, precision="bf16").of_folder(root, components)
        outside, layers = wanted["bf16"]
        assert plan is not None and plan.stages[0].weights["transformer"] == outside + sum(layers)


# -- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_dir, tmp_path, monkeypatch) -> dict[str, list[str]]:
    """Repositories in folders; what is asked of each. Only the download itself is made here."""
    umbrella = "FastVideo/MagiHuman-Diffusers"
    write_diffusers(tmp_path / umbrella / "distill" / "transformer", published(tiny_dir))
    part = tmp_path / umbrella / "sr_540p" / "sr_transformer"
    write_diffusers(part, published(tiny_dir, "540p_sr"))
    others_of(tiny_dir, tmp_path / locate.PUBLISHED_ID)
    for name, repo in locate.HUB_IDS.items():
        (tmp_path / repo).parent.mkdir(exist_ok=True)
        (tmp_path / repo).symlink_to(tiny_dir / name)
    asked: dict[str, list[str]] = {}

    def download(repo: str, patterns: list[str], revision: str | None) -> Path:
        asked[repo] = patterns
        return tmp_path / repo

    monkeypatch.setattr(locate, "_download", download)
    return asked


def test_a_hub_id_may_go_on_with_a_pipelines_folder(hub, tmp_path):
    umbrella = "FastVideo/MagiHuman-Diffusers"
    variants = VARIANTS["distill"], VARIANTS["540p_sr"]
    paths = locate.find(f"{umbrella}/distill", *variants, {})
    assert paths.dit == tmp_path / umbrella / "distill" / "transformer"
    assert paths.sr == tmp_path / umbrella / "sr_540p"
    assert paths.turbo_vae == tmp_path / locate.PUBLISHED_ID / TURBO_FOLDER
    assert paths.image_vae == tmp_path / locate.HUB_IDS[IMAGE_FOLDER]
    asked = set(hub[umbrella])
    assert {"distill/transformer/*", "sr_540p/sr_transformer/*"} <= asked
    assert not any(pattern.startswith(("sr_540p/transformer", "sr_540p/*")) for pattern in asked)
    whole = locate.find(umbrella, *variants, {})
    assert (whole.dit, whole.sr) == (paths.dit.parent, paths.sr)


def test_a_transformer_may_be_a_hub_id(hub, tiny_dir, tmp_path):
    given = "FastVideo/MagiHuman-Diffusers/distill"
    paths = locate.find(tiny_dir, VARIANTS["distill"], None, {"distill": given})
    assert paths.dit == tmp_path / given
    assert "distill/transformer/*" in hub["FastVideo/MagiHuman-Diffusers"]
    assert_equal(load(paths.dit), load(tiny_dir / "distill"))
