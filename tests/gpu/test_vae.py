"""The video decoder's kernels and its captured windows on a GPU.

Errors are relative to the reference in fp32 over the same inputs, and may be at most a tenth larger
than those of the plain bf16 version.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import golden
from magihuman.kernels.decoder import reference as ref
from magihuman.kernels.decoder.bands import Band
from magihuman.runtime.config import TurboVAEConfig
from magihuman.runtime.model.turbo_vae import TurboVAE
from magihuman.runtime.pipeline import BandedDecoder
from magihuman.runtime.pipeline.decode import Frames, decode_frames
from magihuman.runtime.weights import random_weights

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman.graphs.decoder.replay import CompiledDecoder
from magihuman.kernels.decoder import channel_norm, frames
from magihuman.kernels.decoder import ops as decoder_ops

DEVICE = torch.device("cuda")
SLACK = 1.1


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next is full of NaN."""
    torch.full((1 << 28,), float("nan"), device=DEVICE)


def video(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    made = torch.randn(shape, device=DEVICE).to(dtype)
    return made.contiguous(memory_format=torch.channels_last_3d)


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert golden.error(ours, exact) <= SLACK * golden.error(plain, exact) + 1e-7


@pytest.mark.parametrize("channels", [8, 48, 64, 256, 512])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (9, 16, 30)])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_channel_norm(channels: int, size: tuple[int, int, int], activation: str) -> None:
    """Of a video and of a part of one, which the join or its norm replaces or not."""
    deep, high, wide = size
    bias = torch.randn(channels, device=DEVICE)
    whole = video(2, channels, deep, high + 2, wide + 2)
    settings = 1e-8, activation, 1, 1
    for delta, other_eps, is_part in itertools.product(
        (None, video(2, channels, *size)), (None, 1e-6), (False, True)
    ):
        x = whole.clone()[..., :high, :wide] if is_part else video(2, channels, *size)
        exact = ref.join_norm(
            x.float(), None if delta is None else delta.float(), bias, *settings, other_eps
        )
        # As the plain model computes: each step rounded.
        total = x + bias.bfloat16()[:, None, None, None]
        total = total if delta is None else total + delta
        plain = ref.pad_time(ref.ACTIVATIONS[activation](ref.channel_norm(total, 1e-8)), 1)
        other = total if other_eps is None else ref.channel_norm(total, other_eps)
        before = x.clone()
        norm = channel_norm.Norm(*settings)
        out = channel_norm.channel_norm(x, delta, bias, norm)
        assert torch.equal(x, before)
        assert_close(out, plain, exact[0])
        again = channel_norm.channel_norm(
            x, delta, bias, norm._replace(other_eps=other_eps), replace=True
        )
        assert torch.equal(again, out)
        assert_close(x, other, exact[1])


@pytest.mark.parametrize("channels", [8, 128])
def test_channel_norm_puts_phases_into_their_places(channels: int) -> None:
    by_phases, x = video(2, 4 * channels, 3, 6, 8), video(2, channels, 3, 10, 14)
    bias = torch.randn(channels, device=DEVICE)
    placed = ref.from_phases(by_phases).contiguous(memory_format=torch.channels_last_3d)
    settings = bias, channel_norm.Norm(1e-8, "relu", 1, 1)
    expected = channel_norm.channel_norm(placed, x, *settings)
    assert torch.equal(channel_norm.channel_norm(by_phases, x, *settings, True), expected)
    delta = by_phases[:, :, 1:2], x[:, :, 1:2]  # and of parts
    expected = channel_norm.channel_norm(delta[1], placed[:, :, 1:2], *settings)
    ours = channel_norm.channel_norm(delta[1], delta[0], *settings, False, True)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1)])
def test_a_long_convolution_is_the_sum_of_its_parts(
    kernel: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at fewer elements than is needed."""
    x, weight = video(1, 64, 23, 9, 14), video(96, 64, *kernel) * 0.05
    padding = [0, kernel[1] // 2, kernel[2] // 2]
    exact = torch.nn.functional.conv3d(x.float(), weight.float(), None, 1, padding)
    whole = decoder_ops.conv(x, weight, padding)
    for frames_at_once in (4, 7, 22, 23):
        monkeypatch.setattr(decoder_ops, "INDEXED", frames_at_once * 96 * 9 * 14)
        parts = decoder_ops.conv(x, weight, padding)
        assert parts.shape == whole.shape
        assert parts.is_contiguous(memory_format=torch.channels_last_3d)
        assert_close(parts, whole, exact)


@pytest.mark.parametrize("channels", [8, 64, 512])
def test_frames_and_pixels(channels: int) -> None:
    for in_time, drop in itertools.product((True, False), (0, 1)):
        x = video(2, channels * (2 if in_time else 1), 3, 5, 7)
        ours = frames.join_frames(x, None, None, in_time, drop)
        assert torch.equal(ours, ref.join_frames(x, None, None, in_time, drop))
    x, bias = video(2, 16, 3, 5, 301), torch.randn(16, device=DEVICE)
    ours = frames.pixels(x, bias, 3, 2, torch.uint8)
    expected = ref.join_pixels(x, bias, 3, 2, torch.uint8)
    # A value next to a whole number may be truncated to either side of it.
    assert (ours.int() - expected.int()).abs().max() <= 1
    assert (ours != expected).float().mean() <= 1e-3


@pytest.mark.parametrize("size", [(1, 2, 2), (3, 34, 70), (9, 256, 480), (2, 1088, 1920)])
def test_yuv420(size: tuple[int, int, int]) -> None:
    rgb = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    assert torch.equal(frames.yuv420(rgb.to(DEVICE)).cpu(), ref.to_yuv420(rgb))


def golden_vae() -> tuple[TurboVAE, dict[str, Tensor]]:
    values = golden.META["turbo_vae"]["config"]
    values = {**values, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}
    vae = TurboVAE(TurboVAEConfig.from_dict(values, "golden"))
    data = golden.load("turbo_vae")
    vae.load_state_dict({k.removeprefix("w."): v for k, v in data.items() if k[:2] == "w."})
    return vae.to(DEVICE, torch.bfloat16).requires_grad_(False), data


def clip_of(vae: TurboVAE, z: Tensor, decoder: CompiledDecoder | None) -> Tensor:
    if decoder is None:
        return vae(z).float()
    x = vae.denormalize(z)
    parts = [
        decoder(x[:, :, w.begin : w.end], w.is_first, w.skip, w.frames).clone()
        for w in vae.plan(z.shape[2])
    ]
    return torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3)


@torch.inference_mode()
def test_golden_windows_through_captured_graphs() -> None:
    vae, data = golden_vae()
    decoder = CompiledDecoder(vae.decoder, vae.config, dtype=torch.float32)
    for latents in (5, 7, 14, 15, 7):  # and one again, replayed
        z, exact = data[f"z{latents}"].to(DEVICE), data[f"y{latents}"].to(DEVICE)
        assert_close(clip_of(vae, z, decoder), clip_of(vae, z, None), exact)


@pytest.fixture(scope="module")
def full() -> tuple[TurboVAE, TurboVAE]:
    """The published size in bf16 and, of the same weights before rounding, in fp32."""
    config = TurboVAEConfig()
    rounded, exact = (
        random_weights.turbo_vae(config, 0, DEVICE, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    return rounded, exact


@torch.inference_mode()
def test_full_size_is_as_near_to_fp32_as_the_plain_decoder(
    full: tuple[TurboVAE, TurboVAE],
) -> None:
    rounded, exact_vae = full
    z = torch.randn(1, 48, 15, 6, 10, device=DEVICE)
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = clip_of(exact_vae, z, None)
    decoder = CompiledDecoder(rounded.decoder, rounded.config, dtype=torch.float32)
    assert_close(clip_of(rounded, z, decoder), clip_of(rounded, z, None), exact)


@torch.inference_mode()
def test_windows_arrive_in_order_and_whole(full: tuple[TurboVAE, TurboVAE]) -> None:
    """Also several at once, and again, over the same fixed outputs."""
    vae, _ = full
    z = torch.randn(1, 48, 32, 4, 6, device=DEVICE)
    plain = decode_frames(vae, z)
    for batch in (1, 3):
        decoder = CompiledDecoder(vae.decoder, vae.config, batch=batch)
        for _ in range(2):
            parts: list[Tensor] = []
            planes: list[Tensor] = []

            def keep(
                frames: Frames, yuv: Frames | None, to: tuple[list[Tensor], ...] = (parts, planes)
            ) -> None:
                for made, kept in zip((frames, yuv), to, strict=True):
                    kept.append(torch.tensor(made))

            whole = decode_frames(vae, z, decoder=decoder, on_window=keep)
            assert torch.equal(torch.cat(parts), torch.from_numpy(whole))
            assert torch.equal(torch.cat(planes), ref.to_yuv420(torch.from_numpy(whole)))
            # Two roundings of values to bf16 and to bytes apart, of windows, not of their order:
            # a window in another's place would be off by tens.
            difference = abs(whole.astype(int) - plain.astype(int))
            assert difference.mean() <= 2 and whole.shape == plain.shape


@torch.inference_mode()
def test_bands_are_parts_of_whole_windows(full: tuple[TurboVAE, TurboVAE]) -> None:
    """Captured, each a size of its own, within the rounding of sums in another order."""
    vae, exact_vae = full
    decoder = CompiledDecoder(vae.decoder, vae.config, dtype=torch.float32)
    z = torch.randn(1, 48, 9, 2, 44, device=DEVICE)
    whole = decoder(z.bfloat16(), False, 4, 28).clone()
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = exact_vae.decoder(z.bfloat16().float(), False)[:, :, 4:32]
    exact = exact.permute(0, 2, 3, 4, 1)
    for _ in range(2):
        bands = [Band(4, 0, 18), Band(4, 18, 26), Band(4, 26, 44)]
        pieces = [decoder(z.bfloat16(), False, 4, 28, band).clone() for band in bands]
        assert [piece.shape[3] for piece in pieces] == [288, 128, 288]
        assert_close(torch.cat(pieces, dim=3), whole, exact)


@torch.inference_mode()
def test_windows_in_bands_take_less_memory_and_are_the_same(
    full: tuple[TurboVAE, TurboVAE],
) -> None:
    """One after another, as with little memory, in three bands that no number divides."""
    vae, _ = full
    z = torch.randn(1, 48, 15, 16, 91, device=DEVICE)
    whole = CompiledDecoder(vae.decoder, vae.config, replays=False)
    made, peaks = {}, {}
    for bands in (1, 3):
        decoder = whole if bands == 1 else BandedDecoder(whole, vae.config, bands)
        decode_frames(vae, z, decoder=decoder)  # compiles
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        made[bands] = decode_frames(vae, z, decoder=decoder)
        peaks[bands] = torch.cuda.max_memory_reserved() - before
    difference = abs(made[1].astype(int) - made[3].astype(int))
    assert difference.mean() <= 1 and made[3].shape == made[1].shape
    assert peaks[3] < 0.6 * peaks[1], peaks
