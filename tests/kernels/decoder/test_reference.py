"""The decoder's reference blocks against their formulas in float64, on fresh random inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import golden
from magihuman.kernels.decoder import reference as ref

FP32 = 1e-6  # fp32 sums over a few hundred terms


def test_channel_norm_and_time_padding() -> None:
    x = torch.randn(1, 6, 3, 2, 2)
    scale = (x.double().square().mean(1, keepdim=True) + 1e-3) ** -0.5
    assert golden.error(ref.channel_norm(x, 1e-3), x.double() * scale) <= FP32
    padded = ref.pad_time(x, 2)
    assert (padded == x[:, :, [0, 0, 0, 1, 2, 2, 2]]).all()


def test_interleaving_and_unpatchifying_move_values_where_they_belong() -> None:
    x = torch.randn(1, 6, 2, 2, 2)
    frames = ref.interleave_time(x)
    assert frames.shape == (1, 3, 4, 2, 2)
    for half in range(2):
        assert (frames[:, :, half::2] == x[:, 3 * half : 3 * half + 3]).all()
    y = torch.randn(1, 12, 2, 3, 4)
    pixels = ref.unpatchify(y, 2)
    assert pixels.shape == (1, 3, 2, 6, 8)
    for channel in range(3):
        for column in range(2):
            for row in range(2):
                source = y[0, channel * 4 + column * 2 + row]
                assert (pixels[0, channel, :, row::2, column::2] == source).all()


def test_a_convolution_by_phases_is_one_over_repeated_pixels() -> None:
    x, weight = torch.randn(2, 5, 3, 4, 6).double(), torch.randn(7, 5, 1, 3, 3).double()
    repeated = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    expected = F.conv3d(repeated, weight, padding=(0, 1, 1))
    by_phases = F.conv3d(x, ref.phase_weight(weight).double(), padding=(0, 1, 1))
    assert golden.error(ref.from_phases(by_phases), expected) <= FP32  # the weights' sums


def test_yuv420_is_bt709_of_filtered_colours() -> None:
    """From the definition in ITU-T H.273, in fp64; chroma filtered by 1 2 1 along lines."""
    colors = torch.cartesian_prod(*[torch.tensor([0, 1, 128, 254, 255])] * 3)  # the extremes too
    blocks = colors.repeat_interleave(4, 0).unflatten(0, (25, 10, 2)).swapaxes(1, 2)
    random = torch.randint(0, 256, (2, 50, 10, 3))
    for rgb in (blocks.reshape(1, 50, 10, 3), random):
        planes = ref.to_yuv420(rgb.to(torch.uint8)).double().flatten(1)
        _, height, width, _ = rgb.shape
        luma, blue_diff, red_diff = planes.split([height * width, *[height * width // 4] * 2], 1)
        red, green, blue = rgb.double().unbind(-1)
        y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        # A rounding, and those of the weights: three times 2^-17 of 255.
        within = 0.5 + 3 * 255 * 2.0**-17
        assert (luma.view_as(y) - (16 + 219 / 255 * y)).abs().max() <= within
        for plane, color, scale in ((blue_diff, blue, 1.8556), (red_diff, red, 1.5748)):
            exact = 128 + 224 / 255 * (color - y) / scale
            before = torch.cat((exact[..., :1], exact[..., 1:-1:2]), -1)
            exact = (before + 2 * exact[..., ::2] + exact[..., 1::2]) / 4
            exact = (exact[:, ::2] + exact[:, 1::2]) / 2
            assert (plane.view_as(exact) - exact).abs().max() <= within


def test_greys_have_no_colour_in_yuv420() -> None:
    grey = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    planes = ref.to_yuv420(grey)
    assert (planes[:, 2:] == 128).all()
    assert planes[0, 0, 0] == 16 and planes[255, 0, 0] == 235
