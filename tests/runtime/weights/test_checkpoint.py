from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from magihuman.graphs.quantization import linears, quantize_model, quantized_linears
from magihuman.kernels.reference import FP8, INT8
from magihuman.runtime import CheckpointError, config
from magihuman.runtime.config import VARIANTS, DiTConfig
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.weights import checkpoint, random_weights
from magihuman.runtime.weights.locate import AUDIO_FOLDER, TEXT_FOLDER, TURBO_FOLDER
from magihuman.runtime.weights.t5gemma import load_text_encoder
from magihuman.runtime.weights.tiny import DIT

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
Edit = Callable[[Path], object]


def edit_json(name: str, change: Callable[[dict], object]) -> Edit:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        replaced = change(value)
        (folder / name).write_text(json.dumps(value if replaced is None else replaced))

    return edit


def edit_tensors(name: str, change: Callable[[dict], object]) -> Edit:
    def edit(folder: Path) -> None:
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name, metadata={"format": "pt"})

    return edit


def write(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, end: int) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def remove(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names]


def damaged(source: Path, target: Path, edit: Edit) -> Path:
    folder = target / source.name
    shutil.copytree(source, folder)
    edit(folder)
    return folder


# -- transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [BF16, FP32])
@pytest.mark.parametrize("name", ["base", "distill", "540p_sr", "1080p_sr"])
def test_a_dit_has_the_weights_of_its_files_in_the_right_types(tiny_dir, name, linear):
    """`base` is on disk in two shards with bf16 linears, the others in one fp32 file."""
    folder = tiny_dir / name
    model = checkpoint.load_dit(folder, VARIANTS[name], CPU, linear)
    on_disk = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert (len(list(folder.glob("*.safetensors"))) == 2) == (name == "base")
    assert (on_disk["block.layers.0.mlp.down_proj.weight"].dtype == BF16) == (name == "base")
    state = model.state_dict()
    assert state.keys() == on_disk.keys()
    for key, value in state.items():
        is_linear = key.startswith("block.") and value.ndim == 2
        assert value.dtype == (linear if is_linear else FP32), key
        assert torch.equal(value, on_disk[key].to(value.dtype)), key
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_norms_are_fp32_even_where_a_file_holds_bf16(tiny_dir, tmp_path):
    def to_bf16(state: dict) -> None:
        state.update({key: value.bfloat16() for key, value in state.items()})

    folder = damaged(tiny_dir / "distill", tmp_path, edit_tensors("model.safetensors", to_bf16))
    model = checkpoint.load_dit(folder, VARIANTS["distill"], CPU, BF16)
    assert model.adapter.rope.bands.dtype == model.final_norm_video.weight.dtype == FP32


def test_linears_are_quantised_while_they_are_read(tiny_dir, monkeypatch):
    """With the result of quantising the bf16 model, of which no copy is made."""
    made = []
    to_empty = torch.nn.Module.to_empty

    def watch(module: torch.nn.Module, **options: object) -> torch.nn.Module:
        to_empty(module, **options)
        made.append([key for key, value in module.state_dict().items() if value.dtype == BF16])
        return module

    monkeypatch.setattr(torch.nn.Module, "to_empty", watch)
    names = quantized_linears(DIT, "modality")
    for variant, dtype in (("base", FP8), ("distill", INT8)):  # bf16 and fp32 on disk
        source = (tiny_dir / variant, VARIANTS[variant], CPU, BF16)
        model = checkpoint.load_dit(*source, quantized=dict.fromkeys(names, dtype))
        left = [f"{name}.weight" for name in linears(DIT) if name not in names]
        assert made.pop() == left
        wanted = checkpoint.load_dit(*source)
        made.clear()
        quantize_model(wanted, names, dtype)
        state = wanted.state_dict()
        assert model.state_dict().keys() == state.keys()
        for key, value in model.state_dict().items():
            assert value.dtype == state[key].dtype and value.stride() == state[key].stride(), key
            assert torch.equal(value.float(), state[key].float()), key
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reading_is_reported_in_bytes(tiny_dir):
    reports: list[tuple[int, int]] = []
    checkpoint.load_dit(
        tiny_dir / "base", VARIANTS["base"], CPU, BF16, lambda done, of: reports.append((done, of))
    )
    done = [report[0] for report in reports]
    assert done == sorted(set(done))
    total = sum(info.size_bytes for info in checkpoint.scan(tiny_dir / "base").values())
    assert reports[-1] == (total, total)
    files = sum(file.stat().st_size for file in (tiny_dir / "base").glob("*.safetensors"))
    assert 0.9 * files < total < files  # the files have headers too


INDEX, SIZES = checkpoint.INDEX_NAME, checkpoint.ARCHITECTURE_NAME


TWICE = "block.layers.0.attention.linear_proj.weight"


@pytest.mark.parametrize("owner", [FIRST, SECOND])
def test_a_tensor_in_two_shards_is_that_of_the_index(tiny_dir, tmp_path, owner):
    def add(state: dict) -> None:
        state.setdefault(TWICE, torch.full((384, 128), 7.0))

    folder = tiny_dir / "base"
    for name in (FIRST, SECOND):
        folder = damaged(folder, tmp_path / name, edit_tensors(name, add))
    edit_json(INDEX, lambda index: index["weight_map"].update({TWICE: owner}))(folder)
    with safe_open(folder / owner, "pt") as file:
        expected = file.get_tensor(TWICE)
    reports = []
    model = checkpoint.load_dit(
        folder, VARIANTS["base"], CPU, FP32, lambda *report: reports.append(report)
    )
    assert torch.equal(model.state_dict()[TWICE], expected.float())
    assert reports[-1][0] == reports[-1][1]
    (info,) = (info for key, info in checkpoint.scan(folder).items() if key == TWICE)
    assert info.file.name == owner
    edit_json(INDEX, lambda index: index["weight_map"].pop(TWICE) and None)(folder)
    with pytest.raises(CheckpointError, match=f"{SECOND} holds {TWICE}, and so does .*{FIRST}"):
        checkpoint.scan(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove(INDEX), "holds neither model.safetensors.index.json nor model.safetensors"),
        (remove(SECOND), f"{SECOND} is missing; download the folder again"),
        (cut(SECOND, -1), f"{SECOND} is damaged or cut short .*; compare its size"),
        (cut(SECOND, 100), f"{SECOND} is damaged or cut short"),
        (cut(FIRST, 4), f"{FIRST} is damaged or cut short"),
        (cut(FIRST, 0), f"{FIRST} is damaged or cut short"),
        (cut(INDEX, 100), f"{INDEX} cannot be read as JSON: Unterminated string"),
        (write(INDEX, b"\xff\xfe"), f"{INDEX} cannot be read as JSON: 'utf-8' codec"),
        (write(INDEX, b"[]"), f"{INDEX} must hold a JSON object, got list"),
        (write(INDEX, b"{}"), f"{INDEX} must have a weight_map"),
        (write(INDEX, b'{"weight_map": {"a": [1]}}'), f"{INDEX} must have a weight_map"),
        (write(INDEX, b'{"weight_map": {"a": null}}'), f"{INDEX} must have a weight_map"),
        (
            edit_json(INDEX, lambda index: index["weight_map"].update({"phantom": FIRST})),
            f"{INDEX} names tensors that its files lack: phantom$",
        ),
        (
            edit_json(INDEX, lambda index: index["weight_map"].update({"phantom": "no"})),
            "no is missing; download the folder again",
        ),
        (write(SIZES, b"{"), f"{SIZES} cannot be read as JSON"),
        (write(SIZES, b"3"), f"{SIZES} must hold a JSON object, got int"),
        (edit_json(SIZES, lambda v: v.update(hidden=1)), f"{SIZES}: unknown field.s. hidden; know"),
        (edit_json(SIZES, lambda v: v.update(hidden_size=0)), "hidden_size must be a positive who"),
        (edit_json(SIZES, lambda v: v.update(hidden_size="128")), "hidden_size must be a .* '128'"),
        (edit_json(SIZES, lambda v: v.update(num_layers=True)), "num_layers must be a .*got True"),
        (edit_json(SIZES, lambda v: v.update(gelu7_layers=0)), "gelu7_layers must be a list of wh"),
        (edit_json(SIZES, lambda v: v.update(gelu7_layers=[5])), r"below num_layers = 5, got .*5"),
        (edit_json(SIZES, lambda v: v.update(modality_layers=[-1])), r"below num_layers = 5"),
        (edit_json(SIZES, lambda v: v.update(head_dim=48)), "hidden_size must be a multiple of"),
        (edit_json(SIZES, lambda v: v.update(kv_heads=3)), "and heads of kv_heads, got 128, 32"),
        (edit_json(SIZES, lambda v: v.update(head_dim=4)), "head_dim must be a multiple of 8"),
        (
            edit_json(SIZES, lambda v: v.update(num_layers=6)),
            "base does not fit the model: 8 missing: block.layers.5.attention.pre_norm.weight, ",
        ),
        (
            edit_json(SIZES, lambda v: v.update(text_channels=32)),
            r"1 misshapen: adapter.text_embedder.weight is \[128, 64\], should be \[128, 32\]$",
        ),
        (remove(SIZES), "280 missing: .* and 272 more; "),
    ],
)
def test_a_wrong_transformer_is_refused_by_name(tiny_dir, tmp_path, edit, message):
    folder = damaged(tiny_dir / "base", tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_dit(folder, VARIANTS["base"], CPU, BF16)


def test_all_that_is_wrong_is_told_at_once(tiny_dir, tmp_path):
    def change(state: dict) -> None:
        del state["adapter.rope.bands"]
        state["extra.weight"] = torch.zeros(1)
        state["final_norm_video.weight"] = torch.zeros(3)

    folder = damaged(tiny_dir / "distill", tmp_path, edit_tensors("model.safetensors", change))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_dit(folder, VARIANTS["distill"], CPU, BF16)
    assert str(caught.value) == (
        f"{folder} does not fit the model: 1 missing: adapter.rope.bands;"
        " 1 unexpected: extra.weight;"
        " 1 misshapen: final_norm_video.weight is [3], should be [128]"
    )


# -- the published architecture ---------------------------------------------------------------


def test_the_published_architecture():
    with torch.device("meta"):
        state = DiT(DiTConfig()).state_dict()
    wanted = {"adapter.rope.bands", "final_linear_video.weight", "final_linear_audio.weight"}
    wanted |= {"final_norm_video.weight", "final_norm_audio.weight"}
    for modality in ("video", "text", "audio"):
        wanted |= {f"adapter.{modality}_embedder.{kind}" for kind in ("weight", "bias")}
    for i in range(40):
        attention = ("pre_norm", "linear_qkv", "linear_proj", "q_norm", "k_norm")
        wanted |= {f"block.layers.{i}.attention.{part}.weight" for part in attention}
        mlp = ("pre_norm", "up_gate_proj", "down_proj")
        wanted |= {f"block.layers.{i}.mlp.{part}.weight" for part in mlp}
    assert state.keys() == wanted and len(wanted) == 331
    assert round(sum(value.numel() for value in state.values()) / 1e9, 2) == 15.30

    shapes = {key: list(value.shape) for key, value in state.items()}
    assert shapes["adapter.rope.bands"] == [16]
    assert shapes["adapter.text_embedder.weight"] == [5120, 3584]
    for i in range(40):
        experts = 3 if i < 4 or i > 35 else 1
        up, down = (20480, 20480) if i < 4 else (27304, 13652)
        layer = f"block.layers.{i}"
        assert shapes[f"{layer}.attention.linear_qkv.weight"] == [experts * 7208, 5120]
        assert shapes[f"{layer}.attention.q_norm.weight"] == [experts * 128]
        assert shapes[f"{layer}.mlp.up_gate_proj.weight"] == [experts * up, 5120]
        assert shapes[f"{layer}.mlp.down_proj.weight"] == [experts * 5120, down]


def test_only_1080p_attends_locally():
    dense = {3, 7, 11, 15, 19, 23, 27, 31}
    for name, variant in VARIANTS.items():
        local = set(variant.architecture(DiTConfig()).local_attention_layers)
        assert local == (set(range(40)) - dense if name == "1080p_sr" else set())
    assert DiTConfig().frame_reach == 11


def test_local_layers_come_from_the_variant_unless_the_folder_names_them(tiny_dir, tmp_path):
    def local(folder: Path, name: str) -> tuple[int, ...]:
        return checkpoint.dit_config(folder, VARIANTS[name]).local_attention_layers

    assert local(tiny_dir / "1080p_sr", "1080p_sr") == (0, 1, 2, 4)
    assert local(tiny_dir / "540p_sr", "540p_sr") == ()
    named = edit_json(SIZES, lambda values: values.update(local_attention_layers=[2]))
    assert local(damaged(tiny_dir / "1080p_sr", tmp_path, named), "1080p_sr") == (2,)
    assert checkpoint.dit_config(tmp_path, VARIANTS["base"]) == DiTConfig()


# -- host memory ------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from magihuman.runtime import config
from magihuman.runtime.weights import checkpoint

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def load(folder):
    variant = config.VARIANTS["base"]
    return checkpoint.load_dit(Path(folder), variant, torch.device("cpu"), torch.bfloat16)

load(sys.argv[1])  # a tiny one first: what is imported on the way does not count
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
before = status("VmRSS")
model = load(sys.argv[2])
print(before, status("VmHWM"), sum(v.nbytes for v in model.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_holds_less_than_two_shards_beside_the_model(tiny_dir, tmp_path):
    sizes = {
        "num_layers": 12,
        "hidden_size": 768,
        "head_dim": 64,
        "kv_heads": 4,
        "modality_layers": [0, 11],
        "gelu7_layers": [0],
    }
    with torch.device("meta"):
        wanted = DiT(DiTConfig.from_dict(sizes, "here")).state_dict()
    keys = sorted(wanted, key=lambda key: wanted[key].numel())  # so that shards are alike
    shards, weight_map = 6, {}
    for i in range(shards):
        part = {key: torch.ones(wanted[key].shape) for key in keys[i::shards]}  # fp32 on disk
        save_file(part, tmp_path / f"{i}.safetensors")
        weight_map.update(dict.fromkeys(part, f"{i}.safetensors"))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / SIZES).write_text(json.dumps(sizes))
    shard = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))

    command = [sys.executable, "-c", MEASURE, str(tiny_dir / "base"), str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    before, peak, model = map(int, result.stdout.split())
    assert model > 150 * 2**20 and shard > 50 * 2**20  # large beside all that is not weights
    assert before + model < peak  # so the measurement sees the weights
    assert peak < before + model + 2 * shard


# -- Turbo VAE --------------------------------------------------------------------------------

TURBO_JSON, TURBO_CKPT = checkpoint.TURBO_VAE_CONFIG, checkpoint.TURBO_VAE_WEIGHTS


class RunsCode:
    """Pickles as a call, as a malicious checkpoint would."""

    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('the pickle ran code')",))


def save(value: object) -> Edit:
    return lambda folder: torch.save(value, folder / TURBO_CKPT)


def edit_state(change: Callable[[dict], object]) -> Edit:
    def edit(folder: Path) -> None:
        value = torch.load(folder / TURBO_CKPT, weights_only=True)
        change(value["ema_state_dict"])
        torch.save(value, folder / TURBO_CKPT)

    return edit


def turbo_json(**changes: object) -> Edit:
    return edit_json(TURBO_JSON, lambda values: values.update(changes))


BIAS = "module.decoder.conv_in.conv.bias"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (save({"ema_state_dict": RunsCode()}), "holds more than tensors .*; download it again"),
        (cut(TURBO_CKPT, -1000), f"{TURBO_CKPT} is damaged, cut short"),
        (cut(TURBO_CKPT, 1000), f"{TURBO_CKPT} is damaged, cut short"),
        (cut(TURBO_CKPT, 0), f"{TURBO_CKPT} is damaged, cut short"),
        (write(TURBO_CKPT, b"hello world" * 99), f"{TURBO_CKPT} is damaged, cut short"),
        (remove(TURBO_CKPT), rf"must hold {TURBO_CKPT}, or exactly one \*.ckpt file; it has 0"),
        (save([1]), f"{TURBO_CKPT} must hold a dictionary, got list"),
        (save({"state_dict": {}}), f"{TURBO_CKPT} must hold an ema_state_dict"),
        (save({"ema_state_dict": []}), f"{TURBO_CKPT} must hold an ema_state_dict"),
        (save({"ema_state_dict": {1: 2}}), "80 missing: decoder.conv_in.conv.weight, "),
        (edit_state(lambda s: s.pop(BIAS)), "1 missing: decoder.conv_in.conv.bias$"),
        (edit_state(lambda s: s.update({BIAS: 3})), "decoder.conv_in.conv.bias must be a tensor"),
        (edit_state(lambda s: s.update({BIAS: torch.zeros(2)})), r"conv_in.conv.bias is \[2\]"),
        (
            edit_state(lambda s: s.update({"module.decoder.more": torch.zeros(2)})),
            "1 unexpected: decoder.more$",
        ),
        (remove(TURBO_JSON), rf"must hold {TURBO_JSON}, or exactly one \*.json file; it has 0"),
        (write(TURBO_JSON, b"{"), f"{TURBO_JSON} cannot be read as JSON"),
        (write(TURBO_JSON, b"[]"), f"{TURBO_JSON} must hold a JSON object, got list"),
        (edit_json(TURBO_JSON, lambda v: {"a": 1}), "the field latent_channels is missing"),
        (turbo_json(latent_channels=16), "latent_channels must be 48, the only structure"),
        (turbo_json(decoder_is_dw_conv=[True] * 5), "decoder_is_dw_conv must be "),
        (turbo_json(decoder_layers_per_block=[2, 2]), "must have 5 entries for 4 blocks, got"),
        (turbo_json(decoder_block_out_channels=5), "decoder_block_out_channels must be of the ki"),
        (turbo_json(decoder_spatio_only=[0, 1, 0, 0]), "decoder_spatio_only must be of the kind"),
        (turbo_json(step_size=0), "step_size must be of the kind of 7, got 0"),
        (turbo_json(first_chunk_size="7"), "first_chunk_size must be of the kind of 7, got '7'"),
        (turbo_json(decoder_block_out_channels=[4, 8, 16, 64]), "misshapen: decoder.conv_in"),
    ],
)
def test_a_wrong_turbo_vae_is_refused_by_name(tiny_dir, tmp_path, edit, message):
    folder = damaged(tiny_dir / TURBO_FOLDER, tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_turbo_vae(folder, CPU, FP32)


@pytest.mark.parametrize(
    "edit",
    [
        turbo_json(learning_rate=1e-4),  # the published file has fields of its training
        edit_state(lambda state: state.update(n_averaged=3)),  # and other things in its state
        lambda folder: torch.save(  # the format before PyTorch 1.6, which cannot be mapped
            torch.load(folder / TURBO_CKPT, weights_only=True),
            folder / TURBO_CKPT,
            _use_new_zipfile_serialization=False,
        ),
        lambda folder: (folder / TURBO_CKPT).rename(folder / "checkpoint-7.ckpt"),
    ],
)
def test_what_the_turbo_vae_does_not_need_is_ignored(tiny_dir, tmp_path, edit):
    wanted = torch.load(tiny_dir / TURBO_FOLDER / TURBO_CKPT, weights_only=True)["ema_state_dict"]
    folder = damaged(tiny_dir / TURBO_FOLDER, tmp_path, edit)
    state = checkpoint.load_turbo_vae(folder, CPU, FP32).state_dict()
    assert all(torch.equal(value, wanted[f"module.{key}"]) for key, value in state.items())
    assert len(wanted) == len(state) + 1  # and the projection heads


# -- the audio autoencoder --------------------------------------------------------------------

AUDIO_JSON, AUDIO_WEIGHTS = "model_config.json", checkpoint.SINGLE_NAME


def oobleck_json(change: Callable[[dict, dict], object]) -> Edit:
    def edit(values: dict) -> None:
        inner = values["model"]["pretransform"]["config"]
        change(inner["encoder"], inner["decoder"])

    return edit_json(AUDIO_JSON, edit)


def both(**changes: object) -> Edit:
    return oobleck_json(lambda enc, dec: [side["config"].update(changes) for side in (enc, dec)])


PREFIX = checkpoint.AUDIO_VAE_PREFIX


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove(AUDIO_JSON), f"{AUDIO_JSON} is missing"),
        (write(AUDIO_JSON, b"{"), f"{AUDIO_JSON} cannot be read as JSON"),
        (write(AUDIO_JSON, b"{}"), "the field 'model' is missing"),
        (write(AUDIO_JSON, b'{"model": []}'), "a field is not as expected"),
        (write(AUDIO_JSON, b'{"model": {}}'), "the field 'encoder' is missing"),
        (oobleck_json(lambda enc, dec: enc.pop("config")), "the field 'config' is missing"),
        (oobleck_json(lambda enc, dec: enc.update(type="dac")), "must be of type oobleck"),
        (oobleck_json(lambda enc, dec: dec["config"].update(channels=4)), "mirror each other"),
        (oobleck_json(lambda enc, dec: enc["config"].update(latent_dim=64)), "mirror each other"),
        (oobleck_json(lambda enc, dec: dec["config"].update(final_tanh=True)), "final_tanh false"),
        (both(use_snake=False), "use_snake must be true"),
        (both(channels="8"), "sizes must be positive whole numbers, got"),
        (both(strides=[2, 4, 4, 8, 0]), "sizes must be positive whole numbers, got"),
        (both(strides=2), "a field is not as expected"),
        (both(channels=16), "does not fit the model: .* misshapen: encoder.layers.0.weight is"),
        (
            edit_json(
                AUDIO_JSON,
                lambda v: v["model"]["pretransform"]["config"]["bottleneck"].update(type="rvq"),
            ),
            "the bottleneck must be of type vae",
        ),
        (remove(AUDIO_WEIGHTS), f"{AUDIO_WEIGHTS} is missing"),
        (cut(AUDIO_WEIGHTS, -10), f"{AUDIO_WEIGHTS} is damaged or cut short"),
        (
            edit_tensors(AUDIO_WEIGHTS, lambda s: s.pop(f"{PREFIX}decoder.layers.0.bias")),
            "1 missing: decoder.layers.0.bias$",
        ),
        (
            edit_tensors(AUDIO_WEIGHTS, lambda s: s.pop(f"{PREFIX}decoder.layers.0.weight_g")),
            "decoder.layers.0.weight_v has no decoder.layers.0.weight_g beside it",
        ),
    ],
)
def test_a_wrong_audio_autoencoder_is_refused_by_name(tiny_dir, tmp_path, edit, message):
    folder = damaged(tiny_dir / AUDIO_FOLDER, tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_audio_vae(folder, CPU)


def test_the_published_audio_config_is_the_default(tmp_path, tiny_dir):
    folder = damaged(tiny_dir / AUDIO_FOLDER, tmp_path, both(channels=128))
    sizes = checkpoint.oobleck_config(folder / AUDIO_JSON)
    assert sizes == checkpoint.OobleckConfig() and sizes.samples_per_latent == 2048


def test_the_diffusion_model_beside_the_autoencoder_is_not_read(tiny_dir, tmp_path):
    more = edit_tensors(AUDIO_WEIGHTS, lambda s: s.update({"model.model.x": torch.zeros(3)}))
    folder = damaged(tiny_dir / AUDIO_FOLDER, tmp_path, more)
    assert "model.x" not in checkpoint.load_audio_vae(folder, CPU).state_dict()


def test_weight_norm_is_folded_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    gain, direction = (torch.randn(s, generator=generator) for s in ((6, 1, 1), (6, 4, 7)))
    folded = checkpoint.fold_weight_norm({"a.weight_g": gain, "a.weight_v": direction, "a.b": gain})
    assert folded.keys() == {"a.weight", "a.b"}
    # One norm of 28 terms and two products: a few roundings of fp32.
    expected = torch._weight_norm(direction, gain, 0)
    torch.testing.assert_close(folded["a.weight"], expected, rtol=1e-6, atol=1e-6)


# -- the text encoder -------------------------------------------------------------------------

QUERY = "model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("config.json"), "lacks config.json$"),
        (remove("tokenizer.json"), "lacks tokenizer.json or tokenizer.model$"),
        (write("tokenizer.json", b"{"), "cannot be loaded"),
        (write("config.json", b"{"), "cannot be loaded: .*config.json"),
        (remove("model.safetensors"), "cannot be loaded: .*model.safetensors"),
        (
            cut("model.safetensors", -1000),
            "cannot be loaded: .*(?:incomplete metadata|MetadataIncompleteBuffer)",
        ),
        (cut("model.safetensors", 10), "cannot be loaded: .*header"),
        (
            edit_tensors("model.safetensors", lambda state: state.pop(QUERY)),
            "lacks 1 tensors: encoder.layers.0.self_attn.q_proj.weight$",
        ),
        (
            edit_tensors("model.safetensors", lambda s: s.update({QUERY: torch.zeros(5, 64)})),
            "has 1 misshapen tensors: encoder.layers.0.self_attn.q_proj.weight$",
        ),
    ],
)
def test_a_wrong_text_encoder_is_refused_by_name(tiny_dir, tmp_path, edit, message):
    folder = damaged(tiny_dir / TEXT_FOLDER, tmp_path, edit)
    with pytest.raises(CheckpointError, match=f"the text encoder at {folder} {message}"):
        load_text_encoder(folder, CPU, BF16)


def test_the_text_encoder_is_that_of_the_file(tiny_dir):
    encoder = load_text_encoder(tiny_dir / TEXT_FOLDER, CPU, BF16)
    on_disk = load_file(tiny_dir / TEXT_FOLDER / "model.safetensors")
    state = encoder.model.state_dict()
    assert encoder.channels == DIT.text_channels
    assert torch.equal(state[QUERY.removeprefix("model.")], on_disk[QUERY])
    assert not any(key.startswith("decoder.") for key in state)


# -- random weights ---------------------------------------------------------------------------


def test_random_weights_depend_on_seed_and_name_alone():
    first = random_weights.dit(DIT, 0, CPU, BF16, "base").state_dict()
    again = random_weights.dit(DIT, 0, CPU, BF16, "base").state_dict()
    other_seed = random_weights.dit(DIT, 1, CPU, BF16, "base").state_dict()
    other_name = random_weights.dit(DIT, 0, CPU, BF16, "distill").state_dict()
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
        if key != "adapter.rope.bands":  # not drawn
            assert not torch.equal(value, other_seed[key]), key
            assert not torch.equal(value, other_name[key]), key
    assert config.VARIANTS["base"].architecture(DIT) == DIT
