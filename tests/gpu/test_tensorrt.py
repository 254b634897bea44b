"""The Turbo VAE on TensorRT engines against the plain decoder.

Needs a TensorRT for this GPU: tensorrt-rtx for compute capability 7.5 to 8.9 and 12, full TensorRT
for the others.
"""

from __future__ import annotations

import pytest
import torch

from magihuman import runtime
from magihuman.runtime.errors import DeviceError, InvalidRequestError
from magihuman.runtime.exported.manifest import read_manifest
from magihuman.runtime.exported.tensorrt import TensorRTVAE, device_sm, flavour_for
from magihuman.runtime.pipeline.decode import decode_frames
from magihuman.runtime.weights import checkpoint

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("onnx")
try:
    flavour_for(device_sm() or 0, device_sm())
except DeviceError as reason:
    pytest.skip(str(reason), allow_module_level=True)

from magihuman.export.exporting import VaeExport, export_vae
from magihuman.export.verify import verify

CUDA = torch.device("cuda", 0)
BF16 = 0.078  # 20 roundings to 8 bits; the plain decoder in bf16 is about 10 off
SIZES = ("64x64", "64x64:128x96:160x96")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    runtime.write_tiny(folder / "tiny")
    export_vae(folder / "tiny", folder / "engines", VaeExport(target="tensorrt", sizes=SIZES))
    return folder


@pytest.fixture(scope="module")
def fast(engines) -> TensorRTVAE:
    return TensorRTVAE(read_manifest(engines / "engines"), CUDA)


def plain(engines, dtype: torch.dtype):
    return checkpoint.load_turbo_vae(engines / "tiny" / "turbo_vae", CUDA, dtype)


@pytest.mark.parametrize("latents", [1, 7, 8, 15, 32])
@pytest.mark.parametrize("size", [(4, 4), (6, 10)])
@torch.inference_mode()
def test_clips_of_every_length(engines, fast, latents, size):
    z = torch.randn(1, 48, latents, *size, device=CUDA)
    exact = plain(engines, torch.float32)(z)
    found = torch.cat(list(fast.windows(z)), dim=2)
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    assert (found - exact).norm() / exact.norm() <= BF16
    assert decode_frames(fast, z).shape == (4 * (latents - 1) + 1, 16 * size[0], 16 * size[1], 3)


@torch.inference_mode()
def test_an_engine_in_a_cuda_graph(fast):
    window = fast.bound(is_first=True, shape=(1, 48, 8, 4, 4))
    window.input.normal_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        window.run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            window.run()
    for _ in range(3):
        window.input.normal_()
        window.run()
        torch.cuda.synchronize()
        eager = window.output.clone()
        window.output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(window.output, eager, rtol=0, atol=0)


def test_the_figures_of_engines_are_in_the_manifest(engines):
    verdict = verify(engines / "engines", engines / "tiny")
    assert verdict.engines_not_run is None and verdict.is_ok
    assert len([f for f in verdict.figures if f.file.endswith(".engine")]) == 4 + 2 * 4


def test_other_sizes_are_refused(fast):
    with pytest.raises(InvalidRequestError, match="64x64, 64x64 to 160x96, got 192x64"):
        list(fast.windows(torch.zeros(1, 48, 1, 4, 12)))
