"""One forward and the distilled loop, plain and compiled; both decoders; a whole request.

The transformer and the engine do not fit one GPU together: each fixture lives as long as its tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from harness import measure
from harness.sizes import Size
from magihuman import runtime
from magihuman.graphs import support
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.runtime import config
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.model.tokens import Layout
from magihuman.runtime.pipeline import decode, denoise
from magihuman.runtime.pipeline.audio import AudioVAE
from magihuman.runtime.weights import random_weights

pytestmark = pytest.mark.benchmark(group="model")


def forward_flops(arch: config.DiTConfig, layout: Layout) -> int:
    """Of the linears in the layers and of attention: all but a few thousandths of a forward."""
    total = 0
    for layer in range(arch.num_layers):
        up, down = arch.mlp_widths(layer)
        weights = arch.hidden_size * (arch.qkv_rows + arch.hidden_size + up + down)
        total += 2 * layout.tokens * weights + 4 * layout.tokens**2 * arch.hidden_size
    return total


@pytest.fixture(scope="class")
def model(size: Size) -> DiT:
    measure.release()
    return random_weights.dit(size.arch, 0, size.device, torch.bfloat16, "distill")


@pytest.fixture(scope="class")
def example(size: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return measure.example(size.layout, size.arch.text_channels, size.device)


@pytest.fixture(scope="class", params=["plain", "compiled"])
def velocity(
    request: pytest.FixtureRequest, size: Size, model: DiT, example: tuple[torch.Tensor, ...]
) -> denoise.Velocity:
    """The plain model comes first: compiling lays its weights out anew."""
    forward = None
    if request.param == "compiled":
        reason = support.why_not(size.arch, torch.bfloat16, size.device)
        if reason is not None:
            pytest.skip(reason)
        forward = CompiledForward(model, size.arch, torch.bfloat16, size.device)
    return denoise.velocity_of(model, size.layout, example[2], "v2", forward)


class TestTransformer:
    """Random weights; the compiled forward pads the text, which its FLOP leave out."""

    def test_forward(
        self,
        size: Size,
        time_stage: Callable,
        velocity: denoise.Velocity,
        example: tuple[torch.Tensor, ...],
    ) -> None:
        flops = forward_flops(size.arch, size.layout)
        time_stage(lambda: velocity(*example[:2]), 5, flops=flops)

    def test_steps(
        self,
        time_stage: Callable,
        velocity: denoise.Velocity,
        example: tuple[torch.Tensor, ...],
    ) -> None:
        video, audio, _ = example
        time_stage(lambda: measure.distilled_steps(velocity, video, audio), steps=measure.STEPS)


def test_decode_video(size: Size, time_stage: Callable) -> None:
    """To uint8 frames in host memory."""
    measure.release()
    dtype = torch.bfloat16 if size.device.type == "cuda" else torch.float32  # as `load` has it
    vae = random_weights.turbo_vae(size.turbo_vae, 0, size.device, dtype)
    video, _, _ = measure.example(size.layout, size.arch.text_channels, size.device)
    time_stage(lambda: decode.decode_frames(vae, video), 5)


def test_decode_audio(size: Size, time_stage: Callable) -> None:
    """To resampled samples in host memory."""
    measure.release()
    vae = AudioVAE(random_weights.audio_vae(size.audio_vae, 0, size.device))
    _, audio, _ = measure.example(size.layout, size.arch.text_channels, size.device)
    time_stage(lambda: vae.decode(audio), 5)


@pytest.fixture(scope="module")
def engine(size: Size, tmp_path_factory: pytest.TempPathFactory) -> Iterator[runtime.Engine]:
    """As a service gets it: compiled where the machine can."""
    measure.release()
    source: Path | runtime.synthetic = runtime.synthetic("distill")
    if size.name == "tiny":
        source = tmp_path_factory.mktemp("tiny")
        runtime.write_tiny(source)
    with runtime.load(source, device=size.device) as loaded:
        yield loaded


def test_generate(size: Size, time_stage: Callable, engine: runtime.Engine, tmp_path: Path) -> None:
    """From the prompt to an mp4."""
    videos = []

    def request() -> None:
        videos.append(engine.generate(size.prompt, seed=1, **size.request))
        videos[-1].save(tmp_path / "clip.mp4")

    info = time_stage(request, is_compiled=engine.is_compiled)
    info["stages_s"] = videos[-1].timings_s
