from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from images import (
    DISPLAY_P3,
    chunk,
    cmyk_profile,
    exif,
    grey_profile,
    iccp,
    matrix_profile,
    png,
)
from PIL import Image, ImageCms, PngImagePlugin

from magihuman.runtime import CheckpointError, InvalidRequestError, config
from magihuman.runtime.media.image import fit, open_image
from magihuman.runtime.model.image_encoder import to_tensor, wan_vae
from magihuman.runtime.weights.locate import IMAGE_FOLDER
from magihuman.runtime.weights.tiny import WAN_BASE_DIM, published_wan_key
from magihuman.runtime.weights.wan_vae import WEIGHTS_NAME, diffusers_key, load_image_vae

CPU = torch.device("cpu")
CASES = Path(__file__).parents[2] / "data" / "cases"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def noise_image(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_a_lossless_file_comes_back_as_it_was(tmp_path, suffix):
    image = noise_image()
    image.save(tmp_path / f"face.{suffix}")
    assert np.array_equal(open_image(tmp_path / f"face.{suffix}"), image)
    assert np.array_equal(open_image(str(tmp_path / f"face.{suffix}")), image)


def test_a_pil_image_is_taken_and_left_alone():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(image).getpixel((0, 0)) == WHITE
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (255, 0, 0, 0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidRequestError) as caught:
        open_image(tmp_path / "no.png")
    assert str(caught.value) == (
        f"image must be a readable file, got {tmp_path / 'no.png'}, which does not exist"
    )


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_an_impossible_name_is_a_missing_file(tmp_path, name):
    with pytest.raises(InvalidRequestError, match="which does not exist"):
        open_image(str(tmp_path / name))


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(InvalidRequestError, match="which is not a file"):
        open_image(tmp_path)


@pytest.mark.parametrize("value", [5, b"face.png", np.zeros((4, 4, 3))])
def test_another_type_is_refused(value):
    with pytest.raises(InvalidRequestError, match="must be a path or a PIL image, got a "):
        open_image(value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "face.png").touch()
    with pytest.raises(InvalidRequestError, match=r"must not be empty, got .*face.png of 0 bytes"):
        open_image(tmp_path / "face.png")


def test_garbage_is_refused(tmp_path):
    (tmp_path / "face.png").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(InvalidRequestError, match=r"in a format Pillow reads .*face.png"):
        open_image(tmp_path / "face.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"face.{suffix}"
    noise_image(200, 200).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InvalidRequestError, match=f"face.{suffix}"):
        open_image(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "face.png"
    noise_image(200, 200).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(InvalidRequestError, match=r"face.png cannot be decoded .*; save it again"):
        open_image(path)


@pytest.mark.parametrize("size", [(11000, 10000), (0, 10)])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(InvalidRequestError, match=f"1 to 100000000 pixels, got {size[0]}x"):
        open_image(Image.new("1", size))


def test_callers_choose_formats_and_a_smaller_limit(tmp_path):
    """As a server does with what strangers upload."""
    image = Image.new("RGB", (20, 10), "red")
    for name in ("a.png", "a.gif", "a.eps"):
        image.save(tmp_path / name)
    chosen = {"formats": ("PNG", "JPEG"), "max_pixels": 200}
    assert open_image(tmp_path / "a.png", **chosen).size == (20, 10)
    for name in ("a.gif", "a.eps"):
        with pytest.raises(InvalidRequestError, match="one of the formats PNG, JPEG, got"):
            open_image(tmp_path / name, **chosen)
    with pytest.raises(InvalidRequestError, match="must have 1 to 199 pixels, got 20x10"):
        open_image(tmp_path / "a.png", max_pixels=199)


def test_a_decompression_bomb_is_refused_unread(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(InvalidRequestError, match=r"bomb.png cannot be read: .*400000000 pixels"):
        open_image(tmp_path / "bomb.png")


# -- modes ------------------------------------------------------------------------------------


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (255, 0, 0, alpha))
    pixels = np.asarray(open_image(image))[0]
    # Over white a red pixel keeps 255 in red and has 255 (1 - alpha / 255) in the others.
    assert pixels.tolist() == [[255, 255, 255], [255, 127, 127], [255, 0, 0]]


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "face.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "face.png"))[0].tolist() == [[*WHITE], [*BLUE]]


def test_a_transparent_colour_becomes_white(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    image.save(tmp_path / "face.png", transparency=RED)
    assert np.asarray(open_image(tmp_path / "face.png"))[0].tolist() == [[*WHITE], [*BLUE]]


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("1", 1, WHITE),
        ("CMYK", (0, 255, 255, 0), RED),
    ],
)
def test_other_modes_become_rgb(mode, colour, rgb):
    assert open_image(Image.new(mode, (2, 2), colour)).getpixel((1, 1)) == rgb


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, dtype):
    values = np.array([[0, 257, 257 * 100, 65535]], dtype=dtype)
    Image.fromarray(values).save(tmp_path / "face.tif")
    assert np.asarray(open_image(tmp_path / "face.tif"))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_floats_are_refused():
    with pytest.raises(InvalidRequestError, match="floats of no known range; save it as PNG"):
        open_image(Image.new("F", (4, 4), 0.5))


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture has to be turned clockwise to be upright
    image.save(tmp_path / "face.png", exif=exif)
    upright = open_image(tmp_path / "face.png")
    assert upright.size == (1, 2)
    assert [upright.getpixel((0, y)) for y in (0, 1)] == [RED, BLUE]


# -- colours ----------------------------------------------------------------------------------

ALL_COLOURS = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3, indexing="ij"), axis=-1).reshape(
    64, 64, 3
)


def apart(one: Image.Image, other: object) -> int:
    """The largest difference of any sample, in levels."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB's own curve (IEC 61966-2-1), to levels."""
    linear = linear.clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curved


TO_SRGB = np.array(  # from XYZ under D50, by Lindbloom
    [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
)


def as_pillow_gives(tmp_path, content: bytes) -> tuple[Image.Image, Image.Image]:
    """The same file read by its path and through Pillow."""
    path = tmp_path / "face.png"
    path.write_bytes(content)
    with Image.open(path) as image:
        return open_image(path), open_image(image)


def test_a_profile_is_followed():
    plain = open_image(CASES / "colours-srgb.png")
    assert apart(open_image(CASES / "colours-swapped-primaries.png"), plain) <= 1
    with Image.open(CASES / "colours-swapped-primaries.png") as image:
        assert apart(open_image(image), plain) <= 1
        assert apart(image, plain) > 100


def test_display_p3_becomes_srgb(tmp_path):
    content = png(ALL_COLOURS, 8, 2, iccp(matrix_profile(DISPLAY_P3, 2.2)))
    linear = (ALL_COLOURS / 255) ** (563 / 256)  # 2.2, as a profile holds it
    expected = encoded(linear @ np.array(DISPLAY_P3) @ TO_SRGB.T)
    for image in as_pillow_gives(tmp_path, content):
        # Where sRGB has such a colour: the tables of a profile are of 16 bits, steep near black.
        inside = ((expected > 8) & (expected < 247)).all(axis=-1)
        assert inside.sum() > 1000
        assert np.abs(np.asarray(image)[inside] - expected[inside]).max() <= 2
    assert np.abs(ALL_COLOURS[inside] - expected[inside]).max() > 20


def test_srgb_stays_as_it_is(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image in as_pillow_gives(tmp_path, png(ALL_COLOURS, 8, 2, iccp(profile))):
        assert apart(image, ALL_COLOURS) <= 1


def test_grey_has_profiles_too(tmp_path):
    grey = np.arange(256).reshape(16, 16, 1)
    content = png(grey, 8, 0, iccp(grey_profile(1.0)))  # linear light
    expected = encoded(grey / 255)
    for image in as_pillow_gives(tmp_path, content):
        bright = expected[..., 0] > 60  # steep near black
        assert np.abs(np.asarray(image)[bright] - expected[bright]).max() <= 2


def test_inks_have_profiles_too(tmp_path):
    image = Image.new("CMYK", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.save(tmp_path / "face.tif", icc_profile=cmyk_profile(50.0))
    pixels = np.asarray(open_image(tmp_path / "face.tif"))[0].astype(int)
    # L* of 50 is a luminance of 18.4 %, 119 of 255 in sRGB.
    assert np.abs(pixels - [[255] * 3, [119] * 3]).max() <= 2
    image.save(tmp_path / "plain.tif")
    assert open_image(tmp_path / "plain.tif").getpixel((1, 0)) == (0, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_every_format_has_profiles(tmp_path, suffix):
    image = Image.new("RGB", (32, 32), (200, 90, 30))
    image.save(tmp_path / f"face.{suffix}", icc_profile=matrix_profile(DISPLAY_P3, 2.2))
    red, green, blue = open_image(tmp_path / f"face.{suffix}").getpixel((16, 16))
    # More saturated by about ten levels in sRGB's terms; JPEG and WebP are within a few.
    assert red > 208 and green < 88 and blue < 16


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"no profile",
        matrix_profile(DISPLAY_P3, 2.2)[:200],
        matrix_profile(DISPLAY_P3, 2.2)[:300] + b"\xff" * 200,
        grey_profile(1.0),
        cmyk_profile(50.0),
    ],
    ids=["empty", "text", "cut", "damaged", "grey", "inks"],
)
def test_a_profile_that_is_broken_or_of_another_kind_is_ignored(tmp_path, profile):
    (tmp_path / "face.png").write_bytes(png(ALL_COLOURS, 8, 2, iccp(profile)))
    assert apart(open_image(tmp_path / "face.png"), ALL_COLOURS) == 0


def test_a_large_profile_is_followed(tmp_path):
    """Above Pillow's limit of 1 MiB."""
    profile = matrix_profile(DISPLAY_P3, 2.2)
    (tmp_path / "small.png").write_bytes(png(ALL_COLOURS, 8, 2, iccp(profile)))
    large = iccp(profile + b"\0" * 2**21)
    (tmp_path / "large.png").write_bytes(png(ALL_COLOURS, 8, 2, large))
    small = open_image(tmp_path / "small.png")
    assert apart(open_image(tmp_path / "large.png"), small) == 0 and apart(small, ALL_COLOURS) > 9
    bomb = iccp(b"\0" * 2**26)
    (tmp_path / "bomb.png").write_bytes(png(ALL_COLOURS, 8, 2, bomb))
    assert apart(open_image(tmp_path / "bomb.png"), ALL_COLOURS) == 0


def light(samples: np.ndarray) -> np.ndarray:
    """sRGB of 0 to 255 to light, the inverse of `encoded`."""
    share = samples / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def gamma(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


P3_XY = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
P3 = chunk(b"cHRM", struct.pack(">8I", *P3_XY))
SRGB = chunk(b"sRGB", b"\0")
P3_TO_SRGB = np.array(DISPLAY_P3) @ TO_SRGB.T
FROM_P3 = encoded(light(ALL_COLOURS) @ P3_TO_SRGB)
FROM_LIGHT = encoded(ALL_COLOURS / 255)
MADE_LINEAR = iccp(matrix_profile(DISPLAY_P3, 1.0))


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        (chunk(b"cICP", bytes([12, 13, 0, 1])), FROM_P3),
        (chunk(b"cICP", bytes([1, 8, 0, 1])), FROM_LIGHT),
        (chunk(b"cICP", bytes([12, 13, 0, 1])) + MADE_LINEAR + gamma(1.0), FROM_P3),
        (chunk(b"cICP", bytes([1, 13, 0, 1])) + MADE_LINEAR, ALL_COLOURS),
        (gamma(1.0), FROM_LIGHT),
        (gamma(1 / 1.8), encoded((ALL_COLOURS / 255) ** 1.8)),
        (gamma(1 / 2.2), ALL_COLOURS),
        (gamma(1 / 2.2) + P3, FROM_P3),
        (P3, ALL_COLOURS),
        (gamma(1.0) + P3 + SRGB, ALL_COLOURS),
        (gamma(2.2) + MADE_LINEAR + SRGB, encoded(ALL_COLOURS / 255 @ P3_TO_SRGB)),
    ],
    ids=[
        "P3", "light", "codes first", "sRGB by codes", "gamma 1", "gamma 1.8", "gamma 2.2",
        "gamma and primaries", "primaries alone", "sRGB before gamma", "a profile before sRGB",
    ],
)  # fmt: skip
def test_colours_by_numbers(tmp_path, chunks, expected):
    by_path, by_pillow = as_pillow_gives(tmp_path, png(ALL_COLOURS, 8, 2, chunks))
    inside = ((expected > 20) & (expected < 247)).all(axis=-1)
    images = [by_path] if b"cICP" in chunks else [by_path, by_pillow]  # which Pillow does not read
    for image in images:
        assert np.abs(np.asarray(image)[inside].astype(int) - expected[inside]).max() <= 4


@pytest.mark.parametrize("colour_type", [0, 4])
def test_grey_by_numbers(tmp_path, colour_type):
    grey = np.arange(256).reshape(16, 16, 1)
    samples = grey if colour_type == 0 else np.dstack([grey, np.full((16, 16), 255)])
    expected = encoded(grey / 255)
    for chunks in (gamma(1.0) + P3, chunk(b"cICP", bytes([9, 8, 0, 1]))):
        (tmp_path / "face.png").write_bytes(png(samples, 8, colour_type, chunks))
        bright = expected[..., 0] > 60
        actual = np.asarray(open_image(tmp_path / "face.png"))[bright]
        assert np.abs(actual - expected[bright]).max() <= 2


@pytest.mark.parametrize(
    "chunks",
    [
        gamma(0.0), gamma(20_000.0), chunk(b"gAMA", b"\0"), chunk(b"gAMA", b""),
        gamma(1 / 2.2) + chunk(b"cHRM", b"\0" * 32),
        gamma(1 / 2.2) + chunk(b"cHRM", b"\0\0\0\1" * 8),
        gamma(1 / 2.2) + chunk(b"cHRM", b"\xff" * 32),
        gamma(1 / 2.2) + chunk(b"cHRM", b"\0" * 31),
        chunk(b"cICP", b""), chunk(b"cICP", b"\x0c"), chunk(b"cICP", bytes(5)),
        chunk(b"cICP", bytes([0, 13, 0, 1])), chunk(b"cICP", bytes([12, 2, 0, 1])),
        chunk(b"cICP", bytes([12, 13, 1, 1])), chunk(b"cICP", bytes([9, 16, 0, 1])),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_ignored(tmp_path, chunks):
    (tmp_path / "face.png").write_bytes(png(ALL_COLOURS, 8, 2, chunks))
    assert apart(open_image(tmp_path / "face.png"), ALL_COLOURS) == 0


def test_transparent_pixels_lie_over_white_after_conversion(tmp_path):
    samples = np.dstack([ALL_COLOURS, np.full((64, 64), 255)])
    samples[:, :32, 3] = 0
    content = png(samples, 8, 6, iccp(matrix_profile(DISPLAY_P3, 2.2)))
    opaque = png(ALL_COLOURS, 8, 2, iccp(matrix_profile(DISPLAY_P3, 2.2)))
    (expected, _) = as_pillow_gives(tmp_path, opaque)
    for image in as_pillow_gives(tmp_path, content):
        assert (np.asarray(image)[:, :32] == 255).all()
        assert apart(image.crop((32, 0, 64, 64)), expected.crop((32, 0, 64, 64))) == 0


# -- transparency at every depth --------------------------------------------------------------


def test_sixteen_bits_are_compared_before_they_are_scaled():
    pixels = np.asarray(open_image(CASES / "grey16-transparent-300.png"))
    with Image.open(CASES / "grey16-transparent-300.png") as image:
        values = np.asarray(image)
        again = open_image(image)
    assert 0 < (values == 300).sum() < values.size
    assert (pixels[values == 300] == 255).all()
    assert (pixels[values != 300] == (values[values != 300] // 257)[:, None]).all()
    assert np.array_equal(pixels, again)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [0, 1])
def test_grey_of_any_depth(tmp_path, depth, transparent):
    values = np.arange(min(16, 2**depth)).reshape(1, -1, 1)
    top = 2**depth - 1
    if depth == 16:
        values = values + 300  # of one level in 8 bits
        transparent += 300
    content = png(values, depth, 0, chunk(b"tRNS", struct.pack(">H", transparent)))
    (tmp_path / "face.png").write_bytes(content)
    expected = np.where(values == transparent, 255, values * 255 // top)
    assert np.array_equal(np.asarray(open_image(tmp_path / "face.png"))[..., :1], expected)


@pytest.mark.parametrize("interlaced", [False, True])
def test_colours_of_sixteen_bits(tmp_path, interlaced):
    """Only one of these colours, which are the same in 8 bits, is the transparent one."""
    values = np.array([[[300, 301, 302], [300, 301, 303], [301, 301, 302], [9000, 301, 302]]])
    content = png(values, 16, 2, chunk(b"tRNS", struct.pack(">3H", 300, 301, 302)))
    if interlaced:  # of one row and four pixels, Adam7 has these three passes
        head = bytearray(content[16:29])
        head[12] = 1
        rows = [b"\0" + values[0, part].astype(">u2").tobytes() for part in ([0], [2], [1, 3])]
        content = content[:8] + chunk(b"IHDR", bytes(head)) + content[33:]
        start, end = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
        content = content[:start] + chunk(b"IDAT", zlib.compress(b"".join(rows))) + content[end:]
    (tmp_path / "face.png").write_bytes(content)
    pixels = np.asarray(open_image(tmp_path / "face.png"))[0]
    assert pixels.tolist() == [[*WHITE], [1, 1, 1], [1, 1, 1], [35, 1, 1]]


def test_eight_bit_colours_with_a_transparent_one(tmp_path):
    values = np.array([[[10, 20, 30], [10, 20, 31]]])
    content = png(values, 8, 2, chunk(b"tRNS", struct.pack(">3H", 10, 20, 30)))
    for image in as_pillow_gives(tmp_path, content):
        assert np.asarray(image)[0].tolist() == [[*WHITE], [10, 20, 31]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palette_with_transparency_of_any_depth(tmp_path, depth):
    values = np.array([[[0], [1]]])
    before = chunk(b"PLTE", bytes([*RED, *BLUE])) + chunk(b"tRNS", bytes([128, 255]))
    for image in as_pillow_gives(tmp_path, png(values, depth, 3, before)):
        assert np.asarray(image)[0].tolist() == [[255, 127, 127], [*BLUE]]


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("1", 0, (0, 0, 0)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 0), WHITE),
        ("La", (0, 0), WHITE),
        ("PA", (0, 0), WHITE),
        ("I;16", 257 * 9, (9, 9, 9)),
        ("I;16B", 257 * 9, (9, 9, 9)),
        ("I", 257 * 9, (9, 9, 9)),
        ("I", -5, (0, 0, 0)),
        ("I", 2**30, WHITE),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 0), WHITE),
        ("RGBa", (0, 0, 0, 0), WHITE),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (255, 128, 128), WHITE),
        ("HSV", (0, 255, 255), RED),
        ("LAB", (255, 128, 128), WHITE),
        ("LAB", (0, 128, 128), (0, 0, 0)),
    ],
)
def test_every_mode(mode, colour, rgb):
    image = open_image(Image.new(mode, (3, 2), colour))
    assert image.mode == "RGB" and image.size == (3, 2)
    assert apart(image, np.full((2, 3, 3), rgb)) <= 1


# -- orientation ------------------------------------------------------------------------------

TURNED = np.arange(6).reshape(2, 3) * 40  # 3 wide, 2 high
UPRIGHT = {
    1: TURNED,
    2: TURNED[:, ::-1],
    3: TURNED[::-1, ::-1],
    4: TURNED[::-1],
    5: TURNED.T,
    6: np.rot90(TURNED, -1),
    7: np.rot90(TURNED, 2).T,
    8: np.rot90(TURNED),
}
# Tags beside the orientation that make no sense: pointers to nowhere, types nobody knows.
MALFORMED = [
    (0x011A, 5, 1, 2**31),
    (0x010F, 2, 2**31, 9),
    (0x8769, 4, 1, 2**30),
    (0x8825, 5, 7, 1),
    (0x9C9B, 77, 1, 1),
    (0x0132, 0, 0, 0),
]


def test_a_malformed_tag_beside_the_orientation(tmp_path):
    upright = open_image(CASES / "orientation6-bad-rational.jpg")
    with Image.open(CASES / "orientation6-bad-rational.jpg") as image:
        assert np.array_equal(upright, image.convert("RGB").transpose(Image.Transpose.ROTATE_270))
        assert np.array_equal(open_image(image), upright)


@pytest.mark.parametrize("end", "<>")
@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation(tmp_path, value, end):
    tags = exif(*MALFORMED[:3], (0x0112, 3, 1, value), *MALFORMED[3:], end=end)
    content = png(TURNED[..., None], 8, 0, chunk(b"eXIf", tags))
    (tmp_path / "face.png").write_bytes(content)
    assert np.array_equal(np.asarray(open_image(tmp_path / "face.png"))[..., 0], UPRIGHT[value])


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
@pytest.mark.parametrize("tag", range(len(MALFORMED)))
def test_every_format_with_every_malformed_tag(tmp_path, suffix, tag):
    image = Image.new("RGB", (64, 32), "red")
    tags = b"Exif\0\0" + exif((0x0112, 3, 1, 6), MALFORMED[tag])
    image.save(tmp_path / f"face.{suffix}", exif=tags)
    assert open_image(tmp_path / f"face.{suffix}").size == (32, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, when it opens it
        given = Image.open(tmp_path / f"face.{suffix}")
    with given:
        assert open_image(given).size == (32, 64)


@pytest.mark.parametrize(
    "tags",
    [
        b"",
        b"II*\0",
        b"MM\0*" + b"\xff" * 8,
        exif((0x0112, 3, 1, 6))[:15],
        exif((0x0112, 3, 1, 9)),
        exif((0x0112, 3, 1, 0)),
        exif((0x0112, 4, 1, 6)),
        exif((0x0112, 3, 2, 6)),
    ],
)
def test_an_orientation_that_makes_no_sense_is_none(tmp_path, tags):
    (tmp_path / "face.png").write_bytes(png(TURNED[..., None], 8, 0, chunk(b"eXIf", tags)))
    assert open_image(tmp_path / "face.png").size == (3, 2)


def test_an_orientation_in_xml_or_in_a_text_counts(tmp_path):
    xmp = b'<rdf:Description xmlns:tiff="x" tiff:Orientation="6"/>'
    tags = exif((0x0112, 3, 1, 8))
    raw = b"\nexif\n      %d\n%s\n" % (len(tags), tags.hex().encode())
    plain = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)
    texts = {
        chunk(b"iTXt", plain): 6,
        chunk(b"iTXt", packed): 6,
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)): 8,
        chunk(b"tEXt", b"Raw profile type exif\0" + raw): 8,
        chunk(b"tEXt", b"Raw profile type exif\0" + b"no digits at all"): 1,
    }
    for text, value in texts.items():
        content = png(TURNED[..., None], 8, 0, text)
        (tmp_path / "face.png").write_bytes(content)
        read = np.asarray(open_image(tmp_path / "face.png"))[..., 0]
        assert np.array_equal(read, UPRIGHT[value])


@pytest.mark.parametrize("value", range(1, 9))
def test_tiff_is_turned_once(tmp_path, value):
    tags = Image.Exif()
    tags[0x0112] = value
    image = Image.fromarray(TURNED.astype(np.uint8))
    image.save(tmp_path / "face.tif", exif=tags)
    assert np.array_equal(np.asarray(open_image(tmp_path / "face.tif"))[..., 0], UPRIGHT[value])
    # As a file: by its name, Pillow maps one that is not compressed in the wrong shape.
    with (tmp_path / "face.tif").open("rb") as file, Image.open(file) as given:
        assert np.array_equal(np.asarray(open_image(given))[..., 0], UPRIGHT[value])


# -- what lies beside the pixels --------------------------------------------------------------


def test_a_text_that_inflates_is_ignored():
    assert open_image(CASES / "text-chunk-inflates.png").size == (8, 8)


@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (b"zTXt", b"Comment\0\0"),
        (b"iTXt", b"Comment\0\1\0\0\0"),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
        (b"zTXt", b"Raw profile type exif\0\0"),
    ],
)
def test_seventy_megabytes_of_text(tmp_path, kind, head, is_behind):
    text = chunk(kind, head + zlib.compress(b"x" * 70_000_000, 9))
    content = png(TURNED[..., None], 8, 0, b"" if is_behind else text)
    if is_behind:
        content = content[:-12] + text + content[-12:]
    (tmp_path / "face.png").write_bytes(content)
    assert np.array_equal(np.asarray(open_image(tmp_path / "face.png"))[..., 0], TURNED)


def test_much_plain_text_is_ignored(tmp_path):
    text = chunk(b"tEXt", b"Comment\0" + b"x" * 2**20) * 70
    (tmp_path / "face.png").write_bytes(png(TURNED[..., None], 8, 0, text))
    assert open_image(tmp_path / "face.png").size == (3, 2)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_frames(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "white")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"face.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert open_image(path).getpixel((16, 16)) == RED


# -- shared and failing -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_given_to_six_threads_at_once(tmp_path, suffix):
    """Pillow opens a file lazily, and two threads that load one object spoil it for both."""
    path = tmp_path / f"face.{suffix}"
    noise_image(300, 200).save(path)
    expected = np.asarray(open_image(path))
    with ThreadPoolExecutor(6) as pool:
        for _ in range(40):
            at_once = threading.Barrier(6, timeout=300)
            with Image.open(path) as image:

                def read(image=image, at_once=at_once) -> bool:
                    at_once.wait()
                    return np.array_equal(open_image(image), expected)

                results = [pool.submit(read) for _ in range(6)]
                assert all(result.result() for result in results)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        struct.error("x"),
        zlib.error("x"),
        MemoryError(),
        OverflowError("x"),
        RecursionError(),
        KeyError("x"),
        AttributeError("x"),
    ],
)
def test_no_error_of_pillow_leaves_as_itself(tmp_path, monkeypatch, error):
    (tmp_path / "face.png").write_bytes(png(TURNED[..., None], 8, 0))

    def broken(*_):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    with pytest.raises(InvalidRequestError, match=r"image must be whole, but .*face.png cannot"):
        open_image(tmp_path / "face.png")
    with (
        Image.open(tmp_path / "face.png") as image,
        pytest.raises(InvalidRequestError, match="the one given cannot be decoded"),
    ):
        open_image(image)


def test_whoever_interrupts_reading_is_heard(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_image(noise_image())


def test_an_image_whose_file_has_gone_is_refused():
    buffer = io.BytesIO()
    noise_image().save(buffer, "PNG")
    with Image.open(buffer) as image:
        pass
    image.close()
    with pytest.raises(InvalidRequestError, match="the one given cannot be decoded"):
        open_image(image)


# -- geometry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kept"),
    # A frame of GREEN around the centred part of the target's aspect, which is RED and BLUE.
    [((200, 100), (50, 0, 150, 100)), ((100, 200), (0, 50, 100, 150)), ((64, 64), (0, 0, 64, 64))],
)
def test_fit_keeps_the_centre(size, kept):
    image = Image.new("RGB", size, (0, 255, 0))
    left, top, right, bottom = kept
    image.paste(RED, kept)
    image.paste(BLUE, ((left + right) // 2, top, right, bottom))
    pixels = np.asarray(fit(image, 64, 64))
    assert pixels.shape == (64, 64, 3)
    assert not pixels[..., 1].any()  # none of the frame
    # Lanczos looks 3 source pixels (here at most 100 / 64 * 3 = 4.7 target ones) past the edge.
    assert (pixels[:, :27] == RED).all() and (pixels[:, 37:] == BLUE).all()


def test_fit_of_the_same_aspect_only_resizes():
    image = noise_image(96, 64)
    expected = image.resize((48, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(fit(image, 48, 32), expected)


def test_fit_to_the_same_size_changes_nothing():
    image = noise_image(96, 64)
    assert np.array_equal(fit(image, 96, 64), image)


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1)])
def test_fit_copes_with_slivers(size):
    pixels = np.asarray(fit(Image.new("RGB", size, RED), 64, 32))
    assert pixels.shape == (32, 64, 3) and (pixels == RED).all()


def test_to_tensor_orders_and_scales():
    image = Image.new("RGB", (3, 2), (0, 51, 255))
    image.putpixel((2, 1), WHITE)
    pixels = to_tensor(image)
    assert pixels.shape == (1, 3, 1, 2, 3) and pixels.dtype == torch.float32
    # 51 / 255 * 2 - 1 = -0.6, within an fp32 rounding of each of the three operations.
    assert pixels[0, :, 0, 0, 0].tolist() == pytest.approx([-1.0, -0.6, 1.0], abs=3e-7)
    assert pixels[0, :, 0, 1, 2].tolist() == [1.0, 1.0, 1.0]


# -- the encoder ------------------------------------------------------------------------------


def encoder_keys() -> list[str]:
    vae = wan_vae(WAN_BASE_DIM)
    del vae.decoder, vae.post_quant_conv
    return list(vae.state_dict())


def test_the_two_key_maps_are_inverse():
    keys = encoder_keys()
    published = [published_wan_key(key) for key in keys]
    assert len(set(published)) == len(keys)
    assert not set(published) & set(keys)
    assert [diffusers_key(key) for key in published] == keys


@pytest.mark.parametrize(
    ("published", "ours"),
    # Names as they are in the published Wan2.2_VAE.pth, against those that the conversion script
    # in diffusers' repository (convert_wan_to_diffusers.py, convert_vae_22) gives them.
    [
        ("conv1.weight", "quant_conv.weight"),
        ("encoder.conv1.bias", "encoder.conv_in.bias"),
        ("encoder.head.0.gamma", "encoder.norm_out.gamma"),
        ("encoder.head.2.weight", "encoder.conv_out.weight"),
        ("encoder.middle.0.residual.0.gamma", "encoder.mid_block.resnets.0.norm1.gamma"),
        ("encoder.middle.1.to_qkv.weight", "encoder.mid_block.attentions.0.to_qkv.weight"),
        ("encoder.middle.2.residual.6.bias", "encoder.mid_block.resnets.1.conv2.bias"),
        (
            "encoder.downsamples.0.downsamples.1.residual.2.weight",
            "encoder.down_blocks.0.resnets.1.conv1.weight",
        ),
        (
            "encoder.downsamples.1.downsamples.0.shortcut.weight",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        ),
        (
            "encoder.downsamples.1.downsamples.2.time_conv.bias",
            "encoder.down_blocks.1.downsampler.time_conv.bias",
        ),
        (
            "encoder.downsamples.0.downsamples.2.resample.1.weight",
            "encoder.down_blocks.0.downsampler.resample.1.weight",
        ),
    ],
)
def test_published_names(published, ours):
    assert diffusers_key(published) == ours
    assert ours in encoder_keys()


@pytest.mark.parametrize(
    "key", ["conv2.weight", "decoder.conv1.weight", "decoder.middle.0.residual.0.gamma", ""]
)
def test_the_decoder_is_left_out(key):
    assert diffusers_key(key) is None


def test_encode_equals_diffusers_own_module(tiny_dir):
    folder = tiny_dir / IMAGE_FOLDER
    image, (width, height) = noise_image(100, 90), (96, 64)
    latent = load_image_vae(folder, CPU, torch.float32).encode(image, width, height)

    published = torch.load(folder / WEIGHTS_NAME, weights_only=True)
    vae = AutoencoderKLWan(
        base_dim=WAN_BASE_DIM,
        decoder_base_dim=4,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    result = vae.load_state_dict({diffusers_key(k): v for k, v in published.items()}, strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith(("decoder.", "post_quant_conv.")) for key in result.missing_keys)
    pixels = np.asarray(fit(image, width, height), dtype=np.float32) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None])
    mean = torch.tensor(config.LATENT_MEAN).view(1, 48, 1, 1, 1)
    std = torch.tensor(config.LATENT_STD).view(1, 48, 1, 1, 1)
    expected = (posterior.latent_dist.mean - mean) / std

    assert latent.shape == (1, 48, 1, height // 16, width // 16) and latent.dtype == torch.float32
    # Same module and weights; the pixels differ by an fp32 rounding (1e-7), which the encoder and
    # the division by a std of at least 0.35 amplify; anything wrong is of the order of 1.
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1  # and there is something to compare


def test_the_encoder_sees_the_image(tiny_dir):
    vae = load_image_vae(tiny_dir / IMAGE_FOLDER / WEIGHTS_NAME, CPU, torch.float32)
    red, blue = (vae.encode(Image.new("RGB", (64, 64), c), 64, 64) for c in (RED, BLUE))
    assert (red - blue).abs().max() > 0.01
    assert torch.equal(red, vae.encode(Image.new("RGB", (64, 64), RED), 64, 64))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("encoder.conv1.weight"), "has no encoder.conv1.weight"),
        (lambda state: state.pop("encoder.head.0.gamma"), "1 missing: encoder.norm_out.gamma"),
        (
            lambda state: state.update({"conv1.bias": torch.zeros(3)}),
            r"1 misshapen: quant_conv.bias is \[3\], should be \[96\]",
        ),
        (
            lambda state: state.update({"conv1.bias": 3}),
            "quant_conv.bias must be a tensor, got int",
        ),
        (lambda state: state.update({"encoder.conv1.weight": torch.zeros(())}), "not the Wan 2.2"),
    ],
)
def test_wrong_weights_are_named(tiny_dir, tmp_path, edit, message):
    state = torch.load(tiny_dir / IMAGE_FOLDER / WEIGHTS_NAME, weights_only=True)
    edit(state)
    torch.save(state, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=message):
        load_image_vae(tmp_path, CPU, torch.float32)


def test_missing_and_damaged_weights_are_named(tiny_dir, tmp_path):
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME} is missing"):
        load_image_vae(tmp_path, CPU, torch.float32)
    whole = (tiny_dir / IMAGE_FOLDER / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME} is damaged, cut short"):
        load_image_vae(tmp_path, CPU, torch.float32)
