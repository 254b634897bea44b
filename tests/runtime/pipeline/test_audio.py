from __future__ import annotations

import math
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from sounds import loudest_hz, sine, write_silent_video, write_sine, write_wave

from magihuman.runtime import InvalidRequestError, config
from magihuman.runtime.media.sound import read_audio
from magihuman.runtime.model.oobleck import OobleckConfig
from magihuman.runtime.pipeline.audio import (
    AudioVAE,
    merge_overlapping,
    open_driving_audio,
    resample,
)
from magihuman.runtime.weights import random_weights

RATE = config.LATENT_AUDIO_RATE_HZ
LATENT = 2048  # samples
WINDOW = 29 * RATE  # 725 latents
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> AudioVAE:
    """The published strides one channel wide, so that a minute of sound encodes in a second."""
    return AudioVAE(random_weights.audio_vae(OobleckConfig(channels=1), 0, CPU))


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100, 48000, 96000])
def test_any_rate_becomes_mono_at_51200_hz(tmp_path, rate_hz, channels):
    path = write_sine(tmp_path / "voice.wav", rate_hz, channels, seconds=1.0, hz=440.0)
    samples, note = open_driving_audio(path, 1.0)
    assert samples.dtype == np.float32 and samples.ndim == 1 and note is None
    # Resampling may round the length by a sample or two of the source.
    assert abs(len(samples) - RATE) <= 2 * RATE / rate_hz
    # One bin of the spectrum of one second is 1 Hz.
    assert abs(loudest_hz(samples, RATE) - 440.0) <= 1.0
    # Equal channels average to themselves: the level stays. 1 % covers 16 bits and filter ripple.
    middle = samples[RATE // 4 : -RATE // 4]
    assert np.abs(middle).max() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac"])
def test_formats(tmp_path, suffix):
    path = write_sine(tmp_path / f"voice.{suffix}", 44100, 2, seconds=1.0, hz=523.25)
    samples, _ = open_driving_audio(path, 5.0)
    # mp3 comes in frames of 1152 samples and may keep up to two of them as padding.
    assert abs(len(samples) - RATE) <= 2 * 1152 / 44100 * RATE
    assert abs(loudest_hz(samples, RATE) - 523.25) <= 1.0


def test_channels_are_averaged(tmp_path):
    left = sine(48000, 0.5, 440.0)
    opposite = write_wave(tmp_path / "opposite.wav", np.stack([left, -left]), 48000)
    one_sided = write_wave(tmp_path / "one.wav", np.stack([left, 0 * left]), 48000)
    # The files hold 16 bits.
    assert np.abs(read_audio(opposite, RATE, 10)).max() <= 2**-15
    assert np.abs(read_audio(one_sided, RATE, 10)[4000:-4000]).max() == pytest.approx(0.25, 0.01)


def test_surround_sound_is_averaged(tmp_path):
    samples = read_audio(write_sine(tmp_path / "voice.wav", 48000, 6), RATE, 10)
    assert np.abs(samples[4000:-4000]).max() == pytest.approx(0.5, rel=0.01)


def test_reading_stops_at_the_limit(tmp_path):
    path = write_sine(tmp_path / "voice.wav", 48000, seconds=4.0)
    assert 1.0 <= len(read_audio(path, RATE, limit_s=1.0)) / RATE < 1.2


def test_a_few_bytes_do_not_become_gigabytes(tmp_path):
    """A block of 2000 samples at 1 Hz would be half an hour, and blocks can be of 65535."""
    path = tmp_path / "slow.flac"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("flac", rate=1, layout="mono", options={"frame_size": "2000"})
        block = np.zeros((1, 2000), np.int16)
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 1, 0, Fraction(1)
        file.mux([*stream.encode(frame), *stream.encode(None)])
    assert path.stat().st_size < 10_000
    with pytest.raises(InvalidRequestError, match="2000 samples of 1 channels at 1 Hz"):
        read_audio(path, RATE, 10)


def test_callers_choose_formats(tmp_path):
    """As a server does, since a playlist that a stranger uploads would open files of the server."""
    voice = write_sine(tmp_path / "voice.wav", 48000, seconds=0.5)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{voice}\n#EXT-X-ENDLIST\n")
    chosen = ("wav", "mp3")
    assert len(read_audio(voice, RATE, 10, chosen)) == pytest.approx(0.5 * RATE, abs=2)
    with pytest.raises(InvalidRequestError, match="must be in a format FFmpeg reads"):
        read_audio(playlist, RATE, 10, chosen)
    (tmp_path / "one.concat").write_text(f"ffconcat version 1.0\nfile '{voice.name}'\n")
    assert len(read_audio(tmp_path / "one.concat", RATE, 10)) > 0  # what happens without
    with pytest.raises(InvalidRequestError, match="must be in a format FFmpeg reads"):
        read_audio(tmp_path / "one.concat", RATE, 10, chosen)


def test_a_sound_track_of_a_video_will_do(engine, tmp_path):
    video = engine.generate("hi", seconds=0.4, width=64, height=64, steps=1)
    samples, _ = open_driving_audio(video.save(tmp_path / "clip.mp4"), 0.4)
    # AAC comes in frames of 1024 samples; the sound track is as long as the picture, 0.36 s.
    assert len(samples) / RATE == pytest.approx(0.36, abs=1024 / 44100)


def test_a_cut_file_gives_the_sound_it_still_has(tmp_path):
    path = write_sine(tmp_path / "voice.flac", 44100, seconds=2.0)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    samples, _ = open_driving_audio(path, 5.0)
    assert 0.5 < len(samples) / RATE < 1.5
    assert abs(loudest_hz(samples, RATE) - 440.0) <= 2.0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidRequestError) as caught:
        open_driving_audio(tmp_path / "no.wav", 5.0)
    assert str(caught.value) == (
        f"audio must be a readable file, got {tmp_path / 'no.wav'}, which does not exist"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"audio must not be empty, got .*voice.wav of 0 bytes"),
        (b"RIFF", r"in a format FFmpeg reads \(WAV, MP3, FLAC, ...\), got .*voice.wav"),
        (b"hello " * 500, r"in a format FFmpeg reads .*voice.wav: Invalid data"),
        (np.random.default_rng(0).bytes(5000), r"in a format FFmpeg reads .*voice.wav"),
    ],
)
def test_what_is_no_sound_is_refused(tmp_path, content, message):
    (tmp_path / "voice.wav").write_bytes(content)
    with pytest.raises(InvalidRequestError, match=message):
        open_driving_audio(tmp_path / "voice.wav", 5.0)


def test_a_folder_and_a_wrong_type_are_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="which is not a file"):
        open_driving_audio(tmp_path, 5.0)
    with pytest.raises(InvalidRequestError, match="audio must be a path, got a ndarray"):
        open_driving_audio(np.zeros(100), 5.0)


def test_a_video_without_sound_is_refused(tmp_path):
    path = write_silent_video(tmp_path / "clip.mp4")
    with pytest.raises(InvalidRequestError, match=r"must have a sound track, got .*clip.mp4"):
        open_driving_audio(path, 5.0)


def test_too_short_a_sound_is_refused(tmp_path):
    path = write_sine(tmp_path / "voice.wav", seconds=0.1)
    with pytest.raises(InvalidRequestError, match=r"at least 0.2 s long, got 0.100 s in .*voice"):
        open_driving_audio(path, 5.0)


# -- length -----------------------------------------------------------------------------------


def test_longer_audio_is_cut_with_a_note(tmp_path):
    path = write_sine(tmp_path / "voice.wav", seconds=2.0)
    samples, note = open_driving_audio(path, 1.0)
    assert len(samples) == RATE
    assert note == "the audio is 2.00 s long and is cut to the 1 s asked for"


def test_shorter_audio_sets_the_length_with_a_note(tmp_path):
    path = write_sine(tmp_path / "voice.wav", seconds=1.0)
    samples, note = open_driving_audio(path, 5.0)
    assert len(samples) == RATE
    assert note == "the clip is as long as its audio: 1.00 s, not the 5 s asked for"


@pytest.mark.parametrize("seconds", [1.0, 1.03])
def test_less_than_a_frame_is_not_worth_a_note(tmp_path, seconds):
    path = write_sine(tmp_path / "voice.wav", seconds=1.0)
    assert open_driving_audio(path, seconds)[1] is None


def test_a_length_that_is_not_exact_in_floating_point(tmp_path):
    # 51200 * 1.16 is 59391.99999999999; truncated, the sound would be a latent too short.
    samples, _ = open_driving_audio(write_sine(tmp_path / "voice.wav", seconds=2.0), 1.16)
    assert len(samples) == 29 * LATENT


# -- the autoencoder --------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [5 * LATENT, 5 * LATENT + 2047, WINDOW])
def test_one_window_has_whole_latents(vae, samples):
    assert vae.encode(sine(RATE, samples / RATE), torch.zeros_like).shape == (
        1,
        samples // LATENT,
        64,
    )


@pytest.mark.parametrize("samples", [WINDOW + 1, 45 * RATE + 777, 60 * RATE])
def test_windows_cover_the_sound(vae, samples):
    wave = np.random.default_rng(0).normal(0, 0.3, samples).astype(np.float32)
    latents = vae.encode(wave, torch.zeros_like)
    assert latents.shape == (1, math.ceil(samples / LATENT), 64)
    # Up to where the second window starts, half a window in, the first one is heard alone.
    first = vae.encode(wave[:WINDOW], torch.zeros_like)
    assert torch.equal(latents[:, :363], first[:, :363])
    # From the first window's end to the third's start the second is heard alone. It starts at
    # latent 362.5 and is placed at 363, as in the published code.
    second = np.zeros(WINDOW, np.float32)
    part = wave[WINDOW // 2 : WINDOW // 2 + WINDOW]
    second[: len(part)] = part
    expected = vae.encode(second, torch.zeros_like)[:, 362:363]
    assert torch.equal(latents[:, 725:726], expected)


def test_latents_are_sampled_from_mean_and_deviation(vae):
    wave = sine(RATE, 0.4)
    mean, std = vae.model.encode(torch.from_numpy(wave).expand(1, 2, -1))
    latents = vae.encode(wave, lambda like: torch.full_like(like, 2.0))
    assert std.min() > 0
    assert torch.equal(latents, (mean + 2 * std).transpose(1, 2))


def test_windows_are_cross_faded_linearly():
    # Window k holds the constant k, so that the result is a staircase with ramps: windows of 7
    # start every 4 latents and overlap by 3.
    parts = [torch.full((1, 7, 2), float(k)) for k in range(4)]
    expected = []
    for position in range(3 * 4 + 7):
        k, i = min(position // 4, 3), position - 4 * min(position // 4, 3)
        expected.append(k - 1 + i / 3 if k > 0 and i < 3 else k)
    merged = merge_overlapping(parts)
    assert merged.shape == (1, 19, 2)
    # Values up to 3 in fp32 carry roundings of 2.4e-7 each.
    torch.testing.assert_close(merged[0, :, 0], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("latents", [1, 6, 26])
def test_decoding_gives_stereo_at_44100_hz(vae, latents):
    wave = vae.decode(torch.randn(1, latents, 64, generator=torch.Generator().manual_seed(0)))
    assert wave.dtype == np.float32
    assert wave.shape == (int(latents * LATENT * 441 / 512), 2)
    assert np.isfinite(wave).all() and wave.std() > 0


def test_resampling_keeps_pitch_and_level():
    wave = np.stack([sine(RATE, 1.0, 440.0), sine(RATE, 1.0, 1000.0)], axis=1)
    out = resample(wave)
    assert out.shape == (44100, 2) and out.dtype == np.float32
    # Both frequencies are whole in one second, so FFT resampling is exact up to fp32 roundings.
    expected = np.stack([sine(44100, 1.0, 440.0), sine(44100, 1.0, 1000.0)], axis=1)
    assert np.abs(out - expected).max() < 1e-5
