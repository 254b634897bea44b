from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from disks import largest_file
from sounds import loudest_hz, sine

from magihuman.kernels.decoder import reference as ref
from magihuman.runtime import OutputError, Video
from magihuman.runtime.media import mp4
from magihuman.runtime.media.mp4 import Mp4Writer, _Frames, _pictures, read_frames, write_mp4

FPS, RATE = 25, 44100


def smooth_frames(count: int = 25, height: int = 64, width: int = 96) -> np.ndarray:
    """Colour gradients that drift a little: nothing for a codec to blur."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    red, green, blue = 255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 30 + t / 20)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def clip(frames: np.ndarray | None = None, sound_s: float = 1.0, hz: float = 440.0) -> Video:
    frames = smooth_frames() if frames is None else frames
    wave = sine(RATE, sound_s, hz)
    return Video(frames, np.stack([wave, wave], axis=1), FPS, RATE)


def noisy_clip() -> Video:
    """Frames that hardly compress, about 10 kB each."""
    return clip(np.random.default_rng(0).integers(0, 256, (25, 64, 96, 3), dtype=np.uint8))


def planes_of(frames: np.ndarray) -> np.ndarray:
    return ref.to_yuv420(torch.from_numpy(frames)).numpy()


def writer_of(video: Video, path: Path) -> Mp4Writer:
    count, height, width = video.frames.shape[:3]
    return Mp4Writer(path, count, width, height, FPS, RATE)


def decode_audio(path: Path) -> np.ndarray:
    """[samples, channels]."""
    with av.open(str(path)) as container:
        return np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1).T


def boxes(path: Path) -> list[str]:
    """Names of the top-level boxes of an mp4, in order."""
    data, position, names = path.read_bytes(), 0, []
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        names.append(data[position + 4 : position + 8].decode("ascii"))
        assert size >= 8
        position += size
    return names


# -- what is in the file ----------------------------------------------------------------------


def test_streams_are_as_promised(tmp_path):
    path = clip().save(tmp_path / "clip.mp4")
    with av.open(str(path)) as container:
        (picture,), (sound,) = container.streams.video, container.streams.audio
        assert (picture.codec_context.name, picture.format.name) == ("h264", "yuv420p")
        assert (picture.width, picture.height) == (96, 64)
        assert (picture.average_rate, picture.frames) == (FPS, 25)
        assert picture.codec_context.colorspace == picture.codec_context.color_primaries == 1
        assert picture.codec_context.color_range == 1
        assert (sound.codec_context.name, sound.channels, sound.rate) == ("aac", 2, RATE)
        for stream in (picture, sound):
            assert abs(float(stream.duration * stream.time_base) - 25 / FPS) <= 1 / FPS
        assert sum(1 for _ in container.decode(video=0)) == 25


def test_the_index_comes_first(tmp_path):
    names = boxes(clip().save(tmp_path / "clip.mp4"))
    assert names[0] == "ftyp"
    assert names.index("moov") < names.index("mdat")


@pytest.mark.parametrize("with_planes", [False, True])
def test_colours_survive(tmp_path, with_planes):
    source = smooth_frames()
    path = tmp_path / "clip.mp4"
    with writer_of(clip(source), path) as writer:
        writer.add_sound(clip().audio)
        writer.add(source, planes_of(source) if with_planes else None)
        writer.finish()
    with av.open(str(path)) as container:
        planes = np.stack([f.to_ndarray() for f in container.decode(video=0)]).astype(float)
    height, width = source.shape[1:3]
    luma = (planes[:, :height] - 16) / 219
    quarters = planes[:, height:].reshape(len(planes), 2, height // 2, width // 2)
    chroma = ((quarters - 128) / 224).repeat(2, 2).repeat(2, 3)
    if with_planes:  # level with even columns
        chroma[..., 1:-1:2] = (chroma[..., 1:-1:2] + chroma[..., 2::2]) / 2
    blue_diff, red_diff = chroma.swapaxes(0, 1)
    # BT.709, from its definition: Y = 0.2126 R + 0.7152 G + 0.0722 B.
    red, blue = luma + 1.5748 * red_diff, luma + 1.8556 * blue_diff
    green = (luma - 0.2126 * red - 0.0722 * blue) / 0.7152
    decoded = np.stack([red, green, blue], axis=-1).clip(0, 1) * 255
    error = decoded - source
    # Rounding to 8-bit YUV costs up to 255 / 219 / 2 = 0.6 from luma and 1.8556 * 255 / 224 / 2 =
    # 1.1 from chroma; half resolution moves chroma by under a pixel of slope, 2.7; and a quantiser
    # step of CRF 17 is 2^((17 - 4) / 6) = 4.5, so 1.1 on average. The sum bounds the mean error.
    # (The matrix of BT.601 would be off by up to 20, full range by 16.)
    assert np.abs(error).mean() < 3
    # And nothing is tinted or lightened as a whole: rounding errors mostly cancel.
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 1


@pytest.mark.parametrize("hz", [440.0, 3000.0])
def test_the_sound_survives(tmp_path, hz):
    wave = decode_audio(clip(hz=hz).save(tmp_path / "clip.mp4"))
    # AAC's frames of 1024 samples may be padded at the end.
    assert abs(len(wave) - RATE) <= 1024
    # A bin of the spectrum of one second is 1 Hz, 1 % is far above AAC's ripple at 192 kbit/s.
    assert abs(loudest_hz(wave[:RATE, 0], RATE) - hz) <= 1
    assert np.abs(wave[4096:-4096]).max() == pytest.approx(0.5, rel=0.02)
    assert np.abs(wave[:, 0] - wave[:, 1]).max() < 0.01


def test_sound_and_picture_stay_together(tmp_path):
    """Silence, then a tone from the middle on: the encoder's delay must not shift it."""
    video = clip()
    video.audio[: RATE // 2] = 0
    wave = decode_audio(video.save(tmp_path / "clip.mp4"))
    onset = np.argmax(np.abs(wave[:, 0]) > 0.2)
    # AAC smears an onset over its window of 2048 samples at most; its delay is 1024 or more.
    assert abs(onset - RATE // 2) < 512


@pytest.mark.parametrize(("sound_s", "kept_s"), [(1.5, 1.0), (0.5, 0.5)])
def test_sound_is_cut_to_the_picture(tmp_path, sound_s, kept_s):
    path = clip(sound_s=sound_s).save(tmp_path / "clip.mp4")
    with av.open(str(path)) as container:
        sound = container.streams.audio[0]
        assert abs(float(sound.duration * sound.time_base) - kept_s) <= 1024 / RATE
        assert container.streams.video[0].frames == 25


def test_sound_beyond_full_scale_is_clipped(tmp_path):
    video = clip()
    video.audio[:] *= 6
    wave = decode_audio(video.save(tmp_path / "clip.mp4"))
    # A sine of amplitude 3 clipped to 1 is nearly a square wave; AAC's band limit overshoots it by
    # Gibbs' 18 % of half the step, and some for its quantisation.
    assert 0.9 < np.abs(wave).max() < 1.3


# -- all or nothing ---------------------------------------------------------------------------


def test_save_returns_the_path_and_leaves_only_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert clip().save("clip.mp4") == tmp_path / "clip.mp4"
    assert os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize("name", ["12:30.mp4", "concat:ok.mp4", "a%03d.mp4"])
def test_a_name_is_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    frames = np.full((5, 32, 32, 3), 128, np.uint8)
    write_mp4(Path(name), frames, np.zeros((8820, 2), np.float32), 25, 44100)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    again, fps = read_frames(Path(name))
    assert fps == 25 and np.abs(again.astype(int) - frames).max() <= 2  # of 8 bits, as YUV


def test_a_clip_with_tags_of_any_encoding_is_read(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Mxller"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Mxller", b"M\xfcller"))
    assert read_frames(path)[0].shape == (1, 48, 64, 3)


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    clip().save(path)
    assert boxes(path)[0] == "ftyp"
    assert os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.usefixtures("same_bytes")  # or the second file may be a thousandth smaller
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_at_any_point_leaves_what_was_there(tmp_path, share, old):
    """At 0.999 the limit is met by the very last write, while the index is moved to the front."""
    video, path = noisy_clip(), tmp_path / "clip.mp4"
    size = video.save(tmp_path / "whole.mp4").stat().st_size
    (tmp_path / "whole.mp4").unlink()
    if old is not None:
        path.write_bytes(old)
    with largest_file(int(size * share)), pytest.raises(OutputError) as caught:
        video.save(path)
    assert str(path) in str(caught.value) and "File too large" in str(caught.value)
    assert os.listdir(tmp_path) == ([] if old is None else ["clip.mp4"])
    assert old is None or path.read_bytes() == old


def test_no_file_is_begun_before_something_is_given(tmp_path):
    """Until then a caller who is ended by a signal may not have the context that removes it."""
    begun = []

    class Noted(Mp4Writer):
        def _temporary(self):
            begun.append(self.path)
            return super()._temporary()

    with Noted(tmp_path / "a.mp4", 5, 64, 64, FPS, RATE):
        pass
    assert begun == []
    with Noted(tmp_path / "a.mp4", 5, 64, 64, FPS, RATE) as writer:
        writer.add(np.zeros((1, 64, 64, 3), np.uint8))
    assert begun == [tmp_path / "a.mp4"] and list(tmp_path.iterdir()) == []


def test_a_picture_the_codec_refuses_leaves_nothing(tmp_path):
    odd = np.zeros((5, 63, 65, 3), np.uint8)
    with pytest.raises(OutputError, match=r"clip.mp4 could not be written: .*; nothing is left"):
        clip(odd).save(tmp_path / "clip.mp4")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        path = clip(smooth_frames(2)).save(tmp_path / "clip.mp4")
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert os.umask(mask) == mask  # and saving has not changed it
    finally:
        os.umask(before)


def test_the_umask_is_not_touched_for_a_moment(tmp_path, monkeypatch):
    """It is the process's: files of other threads would be open to everybody meanwhile."""

    def touched(mask: int) -> int:
        raise AssertionError("the umask was set")

    monkeypatch.setattr(os, "umask", touched)
    clip(smooth_frames(2)).save(tmp_path / "clip.mp4")


def test_save_checks_the_output(tmp_path):
    with pytest.raises(OutputError, match=r"must end in .mp4"):
        clip().save(tmp_path / "clip.avi")


def test_planes_reach_the_encoder_as_they_are_and_rgb_nearly():
    frames = smooth_frames(3, 36, 70)  # lines that are no multiple of any vector
    planes = planes_of(frames)
    for expected, frame in zip(planes, _pictures(_Frames(frames, planes)), strict=True):
        assert (frame.to_ndarray() == expected).all()
    for expected, frame in zip(planes, _pictures(_Frames(frames, None)), strict=True):
        difference = np.abs(frame.to_ndarray().astype(int) - expected)
        assert difference[:36].max() <= 1  # another rounding
        # Half a pixel apart, where red rises by 255 / 70 a pixel and Cr by 0.44 of that: 0.8, of
        # values within 0.5 of theirs and, FFmpeg's, 1.
        assert difference[36:].max() <= 2


# -- writing while frames are made ------------------------------------------------------------


@pytest.mark.usefixtures("same_bytes")
def test_parts_make_the_file_that_the_whole_makes(tmp_path):
    video = clip()
    with writer_of(video, tmp_path / "parts.mp4") as writer:
        for part in np.array_split(video.frames, 4):
            writer.add(part)
        writer.add_sound(video.audio)
        assert writer.finish() == tmp_path / "parts.mp4"
    whole = video.save(tmp_path / "whole.mp4")
    assert (tmp_path / "parts.mp4").read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("same_bytes")
def test_the_order_of_sound_and_frames_leaves_no_trace(tmp_path):
    """Also beyond the 10 s after which FFmpeg would give up waiting for sound."""
    video = clip(smooth_frames(275, 32, 32), sound_s=11)
    with writer_of(video, tmp_path / "late.mp4") as writer:
        writer.add(video.frames)
        time.sleep(0.5)
        writer.add_sound(video.audio)
        writer.finish()
    first = video.save(tmp_path / "first.mp4")
    assert (tmp_path / "late.mp4").read_bytes() == first.read_bytes()


def test_frames_are_encoded_before_the_last_comes(tmp_path):
    video = clip(np.tile(noisy_clip().frames, (4, 1, 1, 1)), sound_s=4)
    with writer_of(video, tmp_path / "clip.mp4") as writer:
        writer.add_sound(video.audio)
        writer.add(video.frames[:-1])
        deadline = time.monotonic() + 300
        # The encoder keeps some twenty frames back; of the others, more than a header is written.
        while sum(file.stat().st_size for file in tmp_path.iterdir()) < 20_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (tmp_path / "clip.mp4").exists()
        writer.add(video.frames[-1:])
        writer.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("frames", [0, 3, 25])
def test_a_caller_that_gives_up_leaves_what_was_there(tmp_path, frames):
    video = clip()
    (tmp_path / "clip.mp4").write_text("old")
    with writer_of(video, tmp_path / "clip.mp4") as writer:
        writer.add_sound(video.audio)
        writer.add(video.frames[:frames])
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_text() == "old"
    assert not writer._thread.is_alive()


def test_an_error_of_the_thread_reaches_the_caller(tmp_path):
    video = noisy_clip()
    with largest_file(2000), writer_of(video, tmp_path / "clip.mp4") as writer:
        writer.add(video.frames)
        writer.add_sound(video.audio)
        with pytest.raises(OutputError, match="could not be written"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_who_gives_up_does_not_wait_for_frames_in_line(tmp_path, monkeypatch):
    encoded, goes_on, pictures = [], threading.Event(), mp4._pictures

    def slow(part):
        for frame in pictures(part):
            encoded.append(frame)
            yield frame
            assert goes_on.wait(300)

    monkeypatch.setattr(mp4, "_pictures", slow)
    video = clip()
    with writer_of(video, tmp_path / "clip.mp4") as writer:
        writer.add(video.frames)
        while not encoded:
            time.sleep(0.001)

        def go_on() -> None:
            while not writer._is_given_up:
                time.sleep(0.001)
            goes_on.set()

        threading.Thread(target=go_on).start()
    assert len(encoded) == 2  # and not all 25
