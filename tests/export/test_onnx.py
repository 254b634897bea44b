"""ONNX graphs in onnxruntime against the modules they were exported from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from magihuman.export.onnx import INPUT, OPSET, OUTPUT, SharedWeights, Sound, Window, write_onnx
from magihuman.export.tensorrt import build_engine
from magihuman.runtime.config import TurboVAEConfig
from magihuman.runtime.exported.manifest import Builder
from magihuman.runtime.model.turbo_vae import TurboVAE
from magihuman.runtime.weights import random_weights
from magihuman.runtime.weights.tiny import AUDIO_VAE, TURBO_VAE

# Every operator and every change of size, in a third of the time: exporting costs by the node.
SHALLOW = dataclasses.replace(TURBO_VAE, decoder_layers_per_block=(1,) * 5)
CPU = torch.device("cpu")
FP32 = 1e-4  # sums in fp32 in other orders, through some forty layers; about 5e-6 is seen
FP16 = 9.8e-3  # 20 roundings to 11 bits; the plain decoder in fp16 is about 10 off


def in_onnxruntime(path: Path, latents: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: latents.numpy()})[0])


def error(decoded: torch.Tensor, exact: torch.Tensor) -> float:
    return float((decoded.double() - exact.double()).norm() / exact.double().norm())


def latents_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, 48, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def vae(config: TurboVAEConfig, dtype: torch.dtype = torch.float32) -> TurboVAE:
    return random_weights.turbo_vae(config, 0, CPU, dtype).eval()


def fixed(*sizes: int) -> dict[str, tuple[int, int, int]]:
    return {n: (s, s, s) for n, s in zip(("latents", "height", "width"), sizes, strict=True)}


@torch.inference_mode()
def test_the_full_width_decoder(tmp_path):
    window = Window(vae(TurboVAEConfig()).decoder, is_first=True)
    z = latents_of(8, 2, 2)
    path = tmp_path / "window.onnx"
    with torch.inference_mode(False):
        write_onnx(window, z, fixed(8, 2, 2), path, SharedWeights(tmp_path))
    decoded = in_onnxruntime(path, z)
    assert decoded.shape == (1, 3, 29, 32, 32)
    assert error(decoded, window(z)) <= FP32


RANGE = {"latents": (9, 9, 9), "height": (2, 4, 6), "width": (2, 6, 8)}


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory) -> tuple[Window, Path]:
    """A middle window that takes a range of sizes, and its graph."""
    folder = tmp_path_factory.mktemp("dynamic")
    window = Window(vae(SHALLOW).decoder, is_first=False)
    write_onnx(window, latents_of(9, 4, 6), RANGE, folder / "window.onnx", SharedWeights(folder))
    return window, folder / "window.onnx"


@torch.inference_mode()
def test_a_dynamic_graph_at_its_ends(dynamic):
    window, path = dynamic
    (given,) = onnx.load(path, load_external_data=False).graph.input
    names = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert names == [1, 48, 9, "height", "width"]
    for size in ((2, 2), (4, 6), (6, 8), (6, 2)):
        z = latents_of(9, *size)
        assert error(in_onnxruntime(path, z), window(z)) <= FP32


def test_a_dynamic_graph_becomes_one_engine(dynamic):
    trt = pytest.importorskip("tensorrt_rtx", reason="it has wheels for Linux on x86-64 only")
    builder = Builder("tensorrt_rtx", trt.__version__, 89)
    shape = ((1, 1, 1), (48, 48, 48), *RANGE.values())
    steps: list[tuple[int, int]] = []
    content = build_engine(
        dynamic[1], shape, builder, 2**30, lambda done, of: steps.append((done, of))
    )
    assert len(content) > 10**5
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))


@torch.inference_mode()
def test_sixteen_bits_are_in_the_graph_and_means_stay_fp32(tmp_path, record_property):
    decoder = vae(TURBO_VAE, torch.float16).decoder
    z = latents_of(8, 4, 4, dtype=torch.float16)
    path = tmp_path / "window.onnx"
    with torch.inference_mode(False):
        write_onnx(Window(decoder, True), z, fixed(8, 4, 4), path, SharedWeights(tmp_path))
    model = onnx.load(path)
    assert model.opset_import[0].version == OPSET >= 18
    half = TensorProto.FLOAT16
    ends = (*model.graph.input, *model.graph.output)
    assert {value.type.tensor_type.elem_type for value in ends} == {half}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert {types[name] for name in (*node.input, *node.output)} == {half}
        if node.op_type == "ReduceMean":
            assert types[node.output[0]] == TensorProto.FLOAT
    off = error(in_onnxruntime(path, z), Window(decoder.float(), True)(z.float()))
    record_property("fp16 error", off)
    print(f"fp16 in onnxruntime: {off:.1e} from fp32")
    assert off <= FP16


def test_graphs_share_their_weights_and_name_no_machine(engines_dir):
    decoder = vae(TURBO_VAE, torch.bfloat16).decoder.state_dict()
    own = sum(value.nbytes for value in decoder.values())
    shared = (engines_dir / "weights.bin").stat().st_size  # each tensor starts on a page
    assert own * 0.9 < shared < own + 4096 * len(decoder)
    for path in engines_dir.glob("*.onnx"):
        assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()


@torch.inference_mode()
def test_the_audio_decoder_at_any_length(tmp_path):
    sound = Sound(random_weights.audio_vae(AUDIO_VAE, 0, CPU).eval())
    latents = torch.randn(1, 64, 40, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "sound.onnx"
    with torch.inference_mode(False):
        write_onnx(sound, latents, {"latents": (1, 40, 300)}, path, SharedWeights(tmp_path))
    for length in (1, 7, 40):
        decoded = in_onnxruntime(path, latents[..., :length])
        assert decoded.shape == (1, 2, 2048 * length)
        assert error(decoded, sound(latents[..., :length])) <= FP32
