"""The video decoder rewritten to fused operators, on the CPU: what is found, and the numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import golden
from magihuman.graphs.decoder import replay
from magihuman.graphs.decoder.compile import compile_decoder
from magihuman.graphs.decoder.passes.crop import crop
from magihuman.graphs.decoder.passes.trim import trim
from magihuman.graphs.decoder.replay import CompiledDecoder, _share_buffers
from magihuman.graphs.rewrite import arguments
from magihuman.graphs.rewrite.report import CompileError, CompileReport
from magihuman.kernels.decoder import bands
from magihuman.kernels.decoder import reference as ref
from magihuman.runtime.config import TurboVAEConfig
from magihuman.runtime.model.turbo_vae import TurboVAE

# The same sums in fp32 over other layouts, with biases added to sums rather than to terms: through
# some 40 convolutions, of which norms keep the size, a few hundred units of 6e-8 at the very most.
FP32 = 3e-5
VAE = 1e-4  # of the golden data, as for the plain decoder
WINDOWS = {True: (7, 8), False: (8, 9)}  # latents of the windows that clips are cut into
Graphs = dict[bool, tuple[fx.GraphModule, CompileReport]]


@pytest.fixture(scope="module")
def vae() -> TurboVAE:
    """The golden decoder."""
    values = golden.META["turbo_vae"]["config"]
    values = {**values, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}
    vae = TurboVAE(TurboVAEConfig.from_dict(values, "golden"))
    data = golden.load("turbo_vae")
    weights = {key.removeprefix("w."): value for key, value in data.items() if key[:2] == "w."}
    vae.load_state_dict(weights, strict=True)
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graphs(vae: TurboVAE) -> Graphs:
    """By kind of window; values as the decoder's own."""
    return {
        first: compile_decoder(vae.decoder, vae.config, first, torch.float32)
        for first in (True, False)
    }


def run(module: fx.GraphModule, x: Tensor) -> Tensor:
    """[B, 3, T, H, W], like the plain decoder's."""
    pixels: Tensor = module(x.contiguous(memory_format=torch.channels_last_3d))[0]
    return pixels.permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("first", [True, False])
def test_rewritten_windows_are_the_plain_ones(vae: TurboVAE, graphs: Graphs, first: bool) -> None:
    """One graph for any size, also for one frame and for several windows at once."""
    module, _ = graphs[first]
    for frames in (1, *WINDOWS[first]):
        for batch, rows, columns in ((1, 2, 3), (2, 1, 2)):
            x = torch.randn(batch, 48, frames, rows, columns)
            expected = vae.decoder(x, first)
            assert golden.error(run(module, x), expected) <= FP32


def test_every_block_is_found(graphs: Graphs) -> None:
    for module, report in graphs.values():
        assert report.matches == {
            "norm, SiLU, pad": 24,
            "norm, ReLU, pad": 7,
            "norm of shortcuts": 3,
            "pad": 3,
            "upsample": 3,
            "pixels": 1,
            "convolution": 40,
            "joins": 40 + 15,  # biases, and the additions of residual blocks
        }
        calls = Counter(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        # A norm of a shortcut rides along with another.
        assert calls == {
            "magihuman.conv.default": 40,
            "magihuman.join_norm.default": 24 + 7 + 3 - 8 - 3,
            "magihuman.join_norm_.default": 8 + 3,
            "magihuman.join_frames.default": 3,
            "magihuman.join_pixels.default": 1,
        }


def test_sums_are_stored_only_where_they_are_read_again(graphs: Graphs) -> None:
    module, _ = graphs[False]
    norms = [n for n in module.graph.nodes if str(n.target).startswith("magihuman.join_norm")]
    residual = [norm for norm in norms if arguments(norm)["delta"] is not None]
    # Of 15 residual blocks one ends in an upsample without a convolution before it. Their sums are
    # read again by another block, but for those before a shortcut, an upsample or the end.
    assert len(residual) == 14
    kept = [norm for norm in norms if str(norm.target) == "magihuman.join_norm_.default"]
    assert sum(arguments(norm)["other_eps"] is None for norm in kept) == 2 + 2 + 1 + 1 + 2


def test_no_pixels_are_repeated_before_a_convolution(graphs: Graphs) -> None:
    """Each upsample's convolution has taps of 2 by 2 for each of four phases, read by two norms."""
    module, _ = graphs[False]
    shapes = {name: value.shape for name, value in module.named_buffers()}
    upsamples = [shape for name, shape in shapes.items() if "resample.1.weight" in name]
    assert all(shape[0] == 4 * shape[1] and shape[2:] == (1, 2, 2) for shape in upsamples)
    assert len(upsamples) == 3
    norms = [n for n in module.graph.nodes if str(n.target).startswith("magihuman.join_norm")]
    assert [arguments(norm)["phases"] for norm in norms].count([True, False]) == 3
    assert [arguments(norm)["phases"] for norm in norms].count([False, True]) == 3


@pytest.mark.parametrize("axis", bands.AXES)
def test_bands_are_parts_of_whole_windows(vae: TurboVAE, graphs: Graphs, axis: int) -> None:
    """Those at the ends, one between, and one so wide that nothing is cut off."""
    module, _ = graphs[False]
    length, reach = 40, bands.Reach.of(vae.config)
    shape = [1, 48, 2, 2, 2]
    shape[axis] = length
    x = torch.randn(shape)
    whole = run(module, x)[:, :, 4:]
    for begin, end in ((0, 6), (17, 19), (34, 40), (1, 39)):
        band = bands.Band(axis, begin, end)
        part = bands.cut_latents(band, length, reach)
        cropped = crop(trim(module, 2, 4, 4), axis, bands.cuts(band, length, reach))
        ours = run(cropped, x.narrow(axis, part.begin, part.end - part.begin))
        assert golden.error(ours, whole.narrow(axis, 16 * begin, 16 * (end - begin))) <= FP32


def test_a_compiled_decoder_decodes_bands(vae: TurboVAE) -> None:
    """As bytes, with a magnitude of the band's own values; each band is a size of its own."""
    decoder = CompiledDecoder(vae.decoder, vae.config, replays=False, budget_bytes=0)
    x = torch.randn(1, 48, 2, 1, 40)
    whole, most = decoder(x, False, 4, 4).clone(), float(decoder.magnitude)
    pieces, magnitudes = [], []
    for begin, end in ((0, 21), (21, 40)):
        pieces.append(decoder(x, False, 4, 4, bands.Band(4, begin, end)).clone())
        magnitudes.append(float(decoder.magnitude))
    assert (torch.cat(pieces, dim=3).int() - whole.int()).abs().max() <= 1
    assert max(magnitudes) == pytest.approx(most, rel=1e-4) and min(magnitudes) <= most


@pytest.mark.parametrize("first", [True, False])
def test_trimmed_windows_are_parts_of_whole_ones(graphs: Graphs, first: bool) -> None:
    """One frame, either end, the middle as of every window, and everything."""
    module, _ = graphs[first]
    for latents in (1, 2, *WINDOWS[first]):
        x = torch.randn(2, 48, latents, 1, 2)
        whole = run(module, x)
        frames = whole.shape[2]
        middle = min(4, frames - 1)
        for begin, end in {
            (0, frames),
            (0, 1),
            (frames - 1, frames),
            (middle, frames),
            (0, max(1, frames - 4)),
            (middle, max(middle + 1, frames - 4)),
        }:
            part = run(trim(module, latents, begin, end - begin), x)
            assert golden.error(part, whole[:, :, begin:end]) <= FP32


def test_trimming_leaves_work_out(graphs: Graphs) -> None:
    """The last window of a clip of 32 latents keeps 16 of its 32 frames."""
    module, _ = graphs[False]

    def frames_convolved(module: fx.GraphModule) -> list[int]:
        counts = []

        class Recorder(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                made = super().call_function(target, args, kwargs)
                if target is torch.ops.magihuman.conv.default:
                    counts.append(made.shape[2])
                return made

        x = torch.randn(1, 48, 8, 1, 1).contiguous(memory_format=torch.channels_last_3d)
        Recorder(module).run(x)
        return counts

    whole, part = frames_convolved(module), frames_convolved(trim(module, 8, 4, 16))
    assert whole[-1] == 32 and part[-1] == 16
    assert all(a <= b for a, b in zip(part, whole, strict=True))
    # Convolutions of three frames from the end: each needs one more on either side.
    assert part[-3:] == [20, 18, 16]


def test_frames_that_a_window_does_not_have_are_refused(graphs: Graphs) -> None:
    with pytest.raises(ValueError, match=r"must lie in the 32 of 8 latents, got 4 \.\. 33"):
        trim(graphs[False][0], 8, 4, 29)


@pytest.mark.parametrize("latents", [5, 7, 14, 15])
def test_golden_windows_hold(vae: TurboVAE, graphs: Graphs, latents: int) -> None:
    data = golden.load("turbo_vae")
    windows = vae.windows(data[f"z{latents}"], lambda x, first: run(graphs[first][0], x))
    assert golden.error(torch.cat(list(windows), dim=2), data[f"y{latents}"]) <= VAE


def test_bytes_are_those_of_the_plain_frames(vae: TurboVAE) -> None:
    module, _ = compile_decoder(vae.decoder, vae.config, True)
    x = torch.randn(1, 48, 2, 2, 2)
    ours = module(x.contiguous(memory_format=torch.channels_last_3d))[0]
    expected = ref.to_uint8(vae.decoder(x, True))
    # A value next to a whole number may be truncated to either side of it.
    assert (ours.int() - expected.int()).abs().max() <= 1
    assert (ours != expected).float().mean() <= 1e-3


def test_weights_are_laid_out_once_and_shared(vae: TurboVAE) -> None:
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    first, _ = compile_decoder(vae.decoder, vae.config, True)
    later, _ = compile_decoder(vae.decoder, vae.config, False)
    _share_buffers(first, later)
    shared = dict(later.named_buffers())
    for name, value in first.named_buffers():
        assert shared[name] is value
        if value.ndim == 5:
            assert value.is_contiguous(memory_format=torch.channels_last_3d)
    assert len(shared["conv_out.conv.weight"]) == 16  # 12, filled up
    for name, value in vae.state_dict().items():  # the plain decoder is left as it was
        assert torch.equal(value, before[name]) and value.is_contiguous()


def test_windows_without_a_captured_graph(vae: TurboVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels lie in memory of their own: that of the next window is another."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(replay.Captures, "__init__", lambda *arguments: None)
    decoder = CompiledDecoder(vae.decoder, vae.config, replays=False)
    z = torch.randn(2, 48, 3, 2, 4)
    with torch.inference_mode():
        first, second = (decoder(one[None], True, 1, 5) for one in z)
        expected = [ref.to_uint8(vae.decoder(one[None], True)[:, :, 1:6]) for one in z]
    assert first.untyped_storage().nbytes() == first.nbytes  # not a view of what was trimmed
    for ours, theirs in zip((first, second), expected, strict=True):
        assert ours.shape == theirs.shape
        # A value next to a whole number may be truncated to either side of it.
        assert (ours.int() - theirs.int()).abs().max() <= 1
        assert (ours != theirs).float().mean() <= 1e-3


def test_a_model_that_drifts_from_the_reference_is_refused(
    vae: TurboVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ref.pad_time
    monkeypatch.setattr(
        vae.decoder.conv_out, "forward", lambda x: vae.decoder.conv_out.conv(plain(x * 1.0, 1))
    )
    with pytest.raises(
        CompileError,
        match=r"norm, SiLU, pad must find 24 places .* found 23; the model and kernels/decoder/ref",
    ):
        compile_decoder(vae.decoder, vae.config, False)
