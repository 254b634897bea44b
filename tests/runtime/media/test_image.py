from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from magihuman.runtime import CheckpointError, InvalidRequestError, config
from magihuman.runtime.media.image import fit, open_image
from magihuman.runtime.model.image_encoder import to_tensor, wan_vae
from magihuman.runtime.weights.locate import IMAGE_FOLDER
from magihuman.runtime.weights.tiny import WAN_BASE_DIM, published_wan_key
from magihuman.runtime.weights.wan_vae import WEIGHTS_NAME, diffusers_key, load_image_vae

CPU = torch.device("cpu")
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
