from __future__ import annotations

import json
import os
import re
import subprocess
import wave
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from disks import largest_file
from PIL import Image
from sounds import loudest_hz, sine

from magihuman.runtime import InvalidRequestError, Output, OutputError, Video
from magihuman.runtime.files import version
from magihuman.runtime.media import check_output, writer_type
from magihuman.runtime.media.clip import provenance

FPS, RATE = 25, 44100
NAMES = ("clip.mp4", "clip.webm", "clip.gif", "clip.wav", "frames/")
FILMS = ("clip.mp4", "clip.webm")
AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
RDF, IPTC = (
    "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}",
    "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}",
)
ODD = {
    "newlines": ("a\nb\r\nc\td", "a\nb\r\nc\td"),
    "emoji": ("\U0001f600 \u00e9", "\U0001f600 \u00e9"),
    "nul": ("a\0b\x1b", "a\ufffdb\ufffd"),
    "long": ("x" * 10_000, "x" * 10_000),
    "surrogate": ("a\udc80b", "a?b"),
    "xml": ("</x:xmpmeta>]]>&<", "</x:xmpmeta>]]>&<"),
}


def flat_frames(count: int = 6, height: int = 32, width: int = 64) -> np.ndarray:
    """Tiles of few colours, which a GIF keeps as they are."""
    tiles = np.random.default_rng(0).integers(0, 256, (count, height // 16, width // 16, 3))
    return tiles.astype(np.uint8).repeat(16, 1).repeat(16, 2)


def clip(frames: np.ndarray | None = None, prompt: str = "says: hello") -> Video:
    frames = flat_frames() if frames is None else frames
    tone = sine(RATE, len(frames) / FPS + 0.1, 440.0)
    return Video(frames, np.stack([tone, tone], 1), FPS, RATE, seed=7, prompt=prompt, model="nano")


def save(video: Video, folder: Path, name: str, **options) -> Path:
    return video.save(f"{folder}/{name}", **options)


def content(path: Path) -> bytes:
    """The bytes of a file, or of all files of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return b"".join(file.read_bytes() for file in files)


# -- what is in the files ---------------------------------------------------------------------


def test_a_webm_has_vp9_and_opus(tmp_path):
    video = clip(flat_frames(50))
    with av.open(str(save(video, tmp_path, "clip.webm"))) as container:
        (picture,), (sound,) = container.streams.video, container.streams.audio
        assert (picture.codec_context.name, picture.width, picture.height) == ("vp9", 64, 32)
        assert (sound.codec_context.name, sound.rate, sound.channels) == ("opus", 48000, 2)
        assert picture.codec_context.colorspace == 1 and picture.codec_context.color_range == 1
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        container.seek(0)
        wave = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert frames.shape == video.frames.shape
    # Chroma has half the resolution, so that edges of tiles blur; within them little is lost.
    assert np.abs(frames[:, 4::16, 4::16].astype(int) - video.frames[:, 4::16, 4::16]).mean() < 6
    assert abs(loudest_hz(wave[0, : 48000 * 2 - 4800], 48000) - 440) <= 1
    assert abs(wave.shape[1] / 48000 - 2.0) < 0.05  # cut to the picture, but for Opus' frames


def test_a_gif_has_all_frames_at_their_rate(tmp_path):
    video = clip()
    with Image.open(save(video, tmp_path, "clip.gif")) as image:
        assert image.n_frames == 6 and image.info["loop"] == 0
        for index, expected in enumerate(video.frames):
            image.seek(index)
            assert image.info["duration"] == 1000 // FPS
            assert (np.asarray(image.convert("RGB")) == expected).all()  # 8 colours a frame


def test_a_gif_of_more_colours_than_it_can_have_is_near(tmp_path):
    y, x = np.meshgrid(np.arange(64), np.arange(96), indexing="ij")
    frames = np.stack([x * 2, y * 3, x + y], axis=-1).astype(np.uint8)[None]
    with Image.open(save(clip(frames), tmp_path, "clip.gif")) as image:
        difference = np.asarray(image.convert("RGB")).astype(int) - frames[0]
    assert np.abs(difference).mean() < 8  # 256 of 6144 colours: a step of 6 in each channel


@pytest.mark.parametrize("name", ["clip.wav", "frames/"])
def test_the_sound_is_kept_to_a_bit_of_sixteen(tmp_path, name):
    video = clip()
    path = save(video, tmp_path, name)
    with wave.open(str(path / "sound.wav" if path.is_dir() else path)) as file:
        facts = file.getnchannels(), file.getframerate(), file.getsampwidth()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
    assert facts == (2, RATE, 2)
    assert len(samples) == round(6 / FPS * RATE)
    assert np.abs(samples / 32767 - video.audio[: len(samples)]).max() <= 0.5 / 32767 + 1e-7


def test_sound_beyond_full_scale_is_clipped(tmp_path):
    video = clip()
    video.audio[:] *= 100
    with wave.open(str(save(video, tmp_path, "clip.wav"))) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert (samples.min(), samples.max()) == (-32767, 32767)


def test_png_files_are_the_frames(tmp_path):
    video = clip()
    folder = save(video, tmp_path, "frames/")
    names = [f"{number:05}.png" for number in range(1, 7)]
    assert sorted(os.listdir(folder)) == [*names, "sound.wav"]
    for name, expected in zip(names, video.frames, strict=True):
        with Image.open(folder / name) as image:
            assert (np.asarray(image) == expected).all()


@pytest.mark.parametrize("name", FILMS)
def test_there_is_a_keyframe_every_two_seconds(tmp_path, name):
    """Also where the scene changes in between, as in noise."""
    noise = np.random.default_rng(0).integers(0, 256, (130, 32, 32, 3), dtype=np.uint8)
    noise[:75] = noise[0]
    with av.open(str(save(clip(noise), tmp_path, name))) as container:
        times = [
            float(packet.pts * packet.time_base)
            for packet in container.demux(video=0)
            if packet.is_keyframe and packet.pts is not None
        ]
    if name.endswith(".mp4"):
        assert times == [0, 2, 4]
    # VP9 may have more of them, after which it counts anew.
    assert times[0] == 0 and np.diff([*times, 130 / FPS]).max() <= 2


def test_a_lower_rate_factor_makes_a_larger_file(tmp_path):
    video = clip(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    for suffix, (best, worst) in {"mp4": (0, 51), "webm": (0, 63)}.items():
        sizes = [
            save(video, tmp_path, f"{crf}.{suffix}", crf=crf).stat().st_size
            for crf in (best, worst)
        ]
        assert sizes[0] > 2 * sizes[1]


def test_a_preset_reaches_the_encoder(tmp_path):
    """x264 writes what it was told into the stream."""
    for preset, search in (("ultrafast", b"subme=0"), ("slow", b"subme=8")):
        assert search in save(clip(), tmp_path, f"{preset}.mp4", preset=preset).read_bytes()


# -- what they say of themselves --------------------------------------------------------------


def tags_of(path: Path) -> dict[str, str]:
    """Prompt, seed, model and version of a file of any format, by names in lower case."""
    if path.is_dir():
        with Image.open(path / "00003.png") as image:
            found = {name: str(text) for name, text in image.info.items() if name != "xmp"}
    else:
        with av.open(str(path)) as container:
            found = {name.lower(): text for name, text in container.metadata.items()}
        if path.suffix in (".gif", ".wav"):
            found = json.loads(found.get("comment", "{}"))
    return {name: found[name] for name in ("prompt", "seed", "model", "version") if name in found}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", NAMES)
def test_tags_name_prompt_seed_model_and_version(tmp_path, name, odd):
    prompt, expected = ODD[odd]
    assert tags_of(save(clip(prompt=prompt), tmp_path, name)) == {
        "prompt": expected,
        "seed": "7",
        "model": "nano",
        "version": f"magihuman {version()}",
    }


@pytest.mark.parametrize("name", NAMES)
def test_tags_can_be_left_out(tmp_path, name):
    path = save(clip(prompt="a secret"), tmp_path, name, tags=False)
    assert tags_of(path) == {}
    assert b"secret" not in content(path) and b"nano" not in content(path)
    assert AI_GENERATED.encode() in content(path)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_that_a_model_has_made_it(tmp_path, name):
    path = save(clip(), tmp_path, name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    assert all(AI_GENERATED.encode() in file.read_bytes() for file in files)


def source_type(xmp: bytes) -> str | None:
    """IPTC's digital source type in an XMP packet."""
    body = re.sub(rb"<\?xpacket[^>]*\?>", b"", xmp)
    tree = ElementTree.fromstring(body)  # noqa: S314 - written here
    return tree.findtext(f"{RDF}RDF/{RDF}Description/{IPTC}DigitalSourceType")


def test_the_mark_of_an_mp4_is_where_readers_of_xmp_look(tmp_path):
    """By the boxes of ISO/IEC 14496-12: at the top, of type uuid, and of XMP's UUID."""
    data, found = save(clip(), tmp_path, "clip.mp4").read_bytes(), {}
    while data:
        size, kind = int.from_bytes(data[:4], "big"), data[4:8]
        found.setdefault(kind, data[8:size])
        data = data[size:]
    assert next(iter(found)) == b"ftyp" and {b"moov", b"mdat", b"uuid"} <= set(found)
    uuid, xmp = found[b"uuid"][:16], found[b"uuid"][16:]
    assert uuid.hex() == "be7acfcb97a942e89c71999491e3afac"
    assert source_type(xmp) == AI_GENERATED
    assert provenance.xmp_of(tmp_path / "clip.mp4") == xmp


def test_the_mark_of_other_files_is_where_their_readers_look(tmp_path):
    folder = save(clip(), tmp_path, "frames/")
    with Image.open(folder / "00001.png") as image:
        assert source_type(image.info["XML:com.adobe.xmp"].encode()) == AI_GENERATED
    with Image.open(save(clip(), tmp_path, "clip.gif")) as image:
        image.seek(image.n_frames - 1)
    gif = (tmp_path / "clip.gif").read_bytes()
    start = gif.index(b"\x21\xff\x0bXMP DataXMP") + 14
    assert source_type(gif[start : gif.index(b"\x01\xff\xfe", start)]) == AI_GENERATED


def test_what_has_no_mark_has_no_xmp(tmp_path):
    for data in (b"", b"\0" * 64, b"\0\0\0\x10free" + b"\0" * 8, b"\0\0\0\x20uuid" + b"x" * 24):
        (tmp_path / "clip.mp4").write_bytes(data)
        assert provenance.xmp_of(tmp_path / "clip.mp4") is None


def test_ffprobe_reads_the_tags(tmp_path):
    path = save(clip(), tmp_path, "clip.mp4")
    command = ["ffprobe", "-v", "error", "-show_format", "-of", "json", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("ffprobe is not installed")
    assert done.stderr == b""
    tags = json.loads(done.stdout)["format"]["tags"]
    assert (tags["prompt"], tags["seed"], tags["model"]) == ("says: hello", "7", "nano")


@pytest.mark.usefixtures("same_bytes")
def test_tags_change_nothing_of_the_picture(tmp_path):
    streams = []
    for tags in (True, False):
        with av.open(str(save(clip(), tmp_path, f"{tags}.mp4", tags=tags))) as container:
            streams.append([bytes(packet) for packet in container.demux(video=0)])
    assert streams[0] == streams[1]


# -- all or nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_failure_at_any_point_leaves_nothing(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    whole = save(clip(noise), tmp_path, name)
    sizes = [file.stat().st_size for file in (whole.iterdir() if whole.is_dir() else [whole])]
    (tmp_path / "other").mkdir()
    with largest_file(int(max(sizes) * share)), pytest.raises(OutputError, match="nothing is left"):
        save(clip(noise), tmp_path / "other", name)
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", [0, 3, 6])
def test_a_caller_that_gives_up_leaves_nothing(tmp_path, name, frames):
    video, output = clip(), Output(f"{tmp_path}/{name}")
    with writer_type(output)(output, 6, 64, 32, FPS, RATE) as writer:
        writer.add_sound(video.audio)
        writer.add(video.frames[:frames])
    assert os.listdir(tmp_path) == []
    assert not writer._thread.is_alive()


@pytest.mark.parametrize("name", NAMES[:-1])
def test_an_existing_file_is_replaced(tmp_path, name):
    (tmp_path / name).write_text("old")
    assert save(clip(), tmp_path, name).read_bytes() != b"old"
    assert os.listdir(tmp_path) == [name]


# -- what is refused before -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.avi", "clip", ".mp4", "clip.mp4.part", "frames.png"])
def test_an_unknown_suffix_is_refused_with_those_that_are_known(tmp_path, name):
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / name)
    assert str(caught.value) == (
        "the output's name must end in .mp4, .webm, .gif or .wav, or in / for a folder of PNG"
        f" files, got {name}"
    )


@pytest.mark.parametrize("name", [name.upper() for name in NAMES])
def test_suffixes_may_be_in_capitals(tmp_path, name):
    check_output(f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_places_that_cannot_be_written_to_are_refused(tmp_path, name):
    with pytest.raises(OutputError, match="the output's folder must exist"):
        check_output(f"{tmp_path}/no/{name}")
    with pytest.raises(OutputError, match=r"the output's folder /proc cannot be written to: "):
        check_output(f"/proc/{name}")
    with pytest.raises(OutputError, match=r"must have \d+ MiB free for this clip, got [\d.]+ MiB"):
        check_output(f"{tmp_path}/{name}", 10**9, 4096, 4096)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("no")])
def test_a_folder_of_png_files_must_be_new(tmp_path, make):
    make(tmp_path / "frames")
    with pytest.raises(OutputError, match="the output's folder must not exist yet"):
        check_output(f"{tmp_path}/frames/")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip.mp4", {"crf": 52}, "crf must be a whole number from 0 to 51 for .mp4, got 52"),
        ("clip.mp4", {"crf": -1}, "crf must be a whole number from 0 to 51 for .mp4, got -1"),
        ("clip.mp4", {"crf": 17.5}, "crf must be a whole number"),
        ("clip.mp4", {"crf": True}, "crf must be a whole number"),
        ("clip.webm", {"crf": 64}, "crf must be a whole number from 0 to 63 for .webm, got 64"),
        ("clip.mp4", {"preset": "warp"}, "preset must be one of ultrafast, .*, got 'warp'"),
        ("clip.webm", {"preset": "slow"}, "preset must be left out for .webm, got 'slow'"),
        ("clip.gif", {"crf": 20}, "crf must be left out for .gif, got 20"),
        ("clip.wav", {"preset": "slow"}, "preset must be left out for .wav, got 'slow'"),
        ("frames/", {"crf": 20}, "crf must be left out for /, got 20"),
    ],
)
def test_what_a_format_cannot_be_told_is_refused(tmp_path, name, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        check_output(Output(f"{tmp_path}/{name}", **options))
    with pytest.raises(InvalidRequestError, match=message):
        save(clip(), tmp_path, name, **options)


def test_what_is_no_path_is_refused():
    for path in (1, None, b"clip.mp4"):
        with pytest.raises(TypeError):
            Output(path)


# -- an engine's ------------------------------------------------------------------------------


def test_an_engine_writes_what_an_output_says(engine, tmp_path):
    small = {"seconds": 0.2, "width": 64, "height": 64, "steps": 1, "seed": 3}
    video = engine.generate("hi", **small, save=Output(f"{tmp_path}/clip.webm", crf=40))
    assert (video.prompt, video.model, engine.model) == ("hi", engine.model, video.model)
    said = tags_of(tmp_path / "clip.webm")
    assert (said["prompt"], said["seed"], said["model"]) == ("hi", "3", engine.model)
    engine.generate("hi", **small, save=f"{tmp_path}/frames/")
    for file, frame in zip(sorted((tmp_path / "frames").glob("*.png")), video.frames, strict=True):
        with Image.open(file) as image:
            assert (np.asarray(image) == frame).all()


def test_an_engine_refuses_an_unknown_suffix_before_it_computes(engine, tmp_path):
    stages = []
    for path in (tmp_path / "clip.avi", Output(tmp_path / "clip.gif", crf=1)):
        with pytest.raises((OutputError, InvalidRequestError)):
            engine.generate("hi", save=path, on_progress=stages.append)
    assert stages == [] and os.listdir(tmp_path) == []


def test_clips_and_engines_are_shown_in_a_line(engine):
    assert repr(clip()) == "<Video of 6 frames of 64x32, 0.24 s, seed 7>"
    assert repr(engine) == f"<Engine {engine.model}: distill bf16 on cpu>"
