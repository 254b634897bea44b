from __future__ import annotations

import io
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from sounds import (
    loudest_hz,
    sine,
    wav,
    write_silent_video,
    write_sine,
    write_track,
    write_wave,
)

from magihuman.runtime import InvalidRequestError, config
from magihuman.runtime.media import sound
from magihuman.runtime.media.downmix import mix, mix_weights
from magihuman.runtime.media.sound import read_audio
from magihuman.runtime.media.voice import open_driving_audio

RATE = config.LATENT_AUDIO_RATE_HZ
LATENT = 2048  # samples
CASES = Path(__file__).parents[2] / "data" / "cases"


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


def test_a_block_of_too_many_values_is_refused(tmp_path, monkeypatch):
    path = write_sine(tmp_path / "voice.flac", 48000)
    monkeypatch.setattr(sound, "MAX_BLOCK_VALUES", 1000)
    with pytest.raises(InvalidRequestError, match="no more than 1000 values at 51200 Hz, got "):
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
    with pytest.raises(InvalidRequestError, match="audio must be a path, got a list"):
        open_driving_audio([0.0] * 100, 5.0)


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
    assert note == "the audio is longer than the 1 s asked for and is cut there"


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


# -- rates and channels -----------------------------------------------------------------------

CENTRE_ALONE = 0.4  # of 5.1, see `mix_weights`
SURROUND = 0x3F  # the mask of 5.1
ALL_AROUND = 0x63F  # of 7.1


def is_voice(samples, seconds: float, hz: float = 440.0, level: float = 0.5) -> None:
    """Whether it is that sine, over all of that time."""
    assert len(samples) / RATE == pytest.approx(seconds, abs=0.003)
    # A bin of the spectrum is 1 / seconds wide.
    assert abs(loudest_hz(samples, RATE) - hz) <= 1 / seconds
    middle = samples[len(samples) // 8 : -len(samples) // 8]
    for part in np.array_split(middle, 4):  # 2 % covers 16 bits and the filter's ripple
        assert np.abs(part).max() == pytest.approx(level, rel=0.02)


@pytest.mark.parametrize("channels", [*range(1, 12), 16, 17, 24, 32, 63, 64])
def test_any_number_of_channels_is_mixed_down(tmp_path, channels):
    path = tmp_path / "voice.wav"
    path.write_bytes(wav(np.stack([sine(48000, 0.5)] * channels), 48000))
    is_voice(read_audio(path, RATE, 10), 0.5)


@pytest.mark.parametrize("channels", [65, 200, 1000])
def test_more_channels_are_refused(tmp_path, channels):
    path = tmp_path / "voice.wav"
    path.write_bytes(wav(np.stack([sine(48000, 0.1)] * channels), 48000))
    with pytest.raises(InvalidRequestError, match=r"voice\.wav"):
        read_audio(path, RATE, 10)


def test_a_file_of_eight_channels_is_read():
    samples = read_audio(CASES / "voice-7.1.flac", RATE, 10)
    assert len(samples) == round(3.2 * RATE)
    assert np.abs(samples).max() == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize(
    ("suffix", "layout", "options"),
    [
        ("mka", "6.1", {}),
        ("mka", "7.1", {}),
        ("webm", "7.1", {}),
        ("ogg", "7.1", {}),
        ("ogg", "hexadecagonal", {"mapping_family": "255"}),
        ("mka", "22.2", {"mapping_family": "255"}),
    ],
)
def test_many_channels_in_a_plane_each_are_mixed_down(tmp_path, suffix, layout, options):
    """As the decoders of Opus, AAC and others hand them over."""
    path = tmp_path / f"voice.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus", rate=48000, layout=layout, options=options)
        container.start_encoding()
        channels, size = stream.codec_context.layout.nb_channels, stream.codec_context.frame_size
        samples = np.round(sine(48000, 0.5) * 32767).astype(np.int16).repeat(channels)
        for start in range(0, 24000, size):
            part = samples[None, start * channels : (start + size) * channels]
            frame = av.AudioFrame.from_ndarray(part, "s16", layout)
            frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        frame = next(container.decode(audio=0))
        assert frame.format.is_planar and frame.layout.nb_channels == channels
    heard = read_audio(path, RATE, 10)
    assert len(heard) == pytest.approx(0.5 * RATE, abs=RATE // 50)
    assert np.abs(heard[4000:-4000]).max() == pytest.approx(0.5, rel=0.1)  # lossy


@pytest.mark.parametrize(
    ("channels", "mask", "speaker", "level"),
    [
        (6, SURROUND, 2, CENTRE_ALONE),
        (6, None, 2, CENTRE_ALONE),  # as files that do not say are meant
        (6, SURROUND, 3, 0.0),  # for low frequencies
        (6, SURROUND, 0, CENTRE_ALONE / 2),
        (6, SURROUND, 4, 0.1),
        (8, ALL_AROUND, 2, CENTRE_ALONE),
        (8, None, 2, CENTRE_ALONE),
        (3, 0x7, 2, 0.5),  # without others behind
        (3, 0xB, 0, 0.5),  # 2.1
        (4, 0x33, 3, 0.25),  # without a centre
    ],
)
def test_a_voice_in_one_loudspeaker_is_heard(tmp_path, channels, mask, speaker, level):
    wave = np.zeros((channels, 24000), np.float32)
    wave[speaker] = sine(48000, 0.5)
    path = tmp_path / "voice.wav"
    path.write_bytes(wav(wave, 48000, mask=mask))
    samples = read_audio(path, RATE, 10)
    assert np.abs(samples[4000:-4000]).max() == pytest.approx(level * 0.5, rel=0.01, abs=1e-6)


@pytest.mark.parametrize(
    "names",
    [
        ("FL", "FR"),
        ("FL", "FR", "FC", "LFE", "BL", "BR"),
        ("FL", "FR", "FC"),
        ("LFE",),
        ("LFE", "LFE2"),
        ("NONE",) * 64,
        ("FC", "FL", "FR", "SL", "SR", "TFL", "TFR", "LFE2", "BC"),
    ],
)
def test_no_mix_clips(names):
    weights = mix_weights(names)
    assert weights.dtype == np.float32 and weights.shape == (len(names),)
    assert weights.min() >= 0
    # Each weight is rounded to 24 bits.
    assert float(weights.sum(dtype=np.float64)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("rate_hz", [1000, 8000, 11025, 37800, 51200, 192000, 768000])
def test_rates_far_apart(tmp_path, rate_hz):
    path = tmp_path / "voice.wav"
    path.write_bytes(wav(sine(rate_hz, 0.5, 100.0)[None], rate_hz))
    is_voice(read_audio(path, RATE, 10), 0.5, 100.0)


@pytest.mark.parametrize("rate_hz", [1, 999, 768_001, 1_190_000_000])
def test_a_rate_nobody_records_at_is_refused_before_it_costs_memory(tmp_path, rate_hz):
    path = tmp_path / "voice.wav"
    path.write_bytes(wav(np.zeros((1, 8000), np.float32), rate_hz))
    with pytest.raises(InvalidRequestError, match=f"1000 to 768000 samples .* at {rate_hz} Hz"):
        read_audio(path, RATE, 10)


# -- files in pieces --------------------------------------------------------------------------


def test_a_rate_that_changes_on_the_way():
    samples = read_audio(CASES / "voice-rate-changes.mp3", RATE, 10)
    # 64 frames of 1152 samples at 44.1 kHz, and 67 at 48 kHz.
    seconds = 64 * 1152 / 44100 + 67 * 1152 / 48000
    assert len(samples) / RATE == pytest.approx(seconds, abs=0.001)
    for start in (0.2, 1.8, 2.9):
        part = samples[round(start * RATE) :][: RATE // 5]
        assert np.sqrt(np.mean(np.square(part))) == pytest.approx(0.0594, rel=0.02)


def adts(rate_hz: int, channels: int, seconds: float, hz: float) -> bytes:
    """AAC as radio has it, each frame with its own header."""
    buffer = io.BytesIO()
    layout = {1: "mono", 2: "stereo"}[channels]
    with av.open(buffer, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=rate_hz, layout=layout)
        wave = np.stack([sine(rate_hz, seconds, hz)] * channels)
        for start in range(0, wave.shape[1], 1024):
            part = np.ascontiguousarray(wave[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate_hz, start
            frame.time_base = Fraction(1, rate_hz)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def test_channels_and_rate_that_change_on_the_way(tmp_path):
    path = tmp_path / "voice.aac"
    pieces = [adts(44100, 1, 1.0, 440.0), adts(44100, 2, 1.0, 660.0), adts(24000, 1, 1.0, 880.0)]
    path.write_bytes(b"".join(pieces))
    samples = read_audio(path, RATE, 10)
    # Each piece has up to two frames of 1024 samples more than it was made of.
    assert 3.0 <= len(samples) / RATE <= 3.3
    heard = [loudest_hz(samples[round(at * RATE) :][: RATE // 2], RATE) for at in (0.3, 1.4, 2.5)]
    assert heard == pytest.approx([440.0, 660.0, 880.0], abs=2.0)


def test_a_chained_file_is_read_to_its_end():
    """Opus at 48 kHz and then Vorbis at 44.1 kHz, 3.2 s by the positions on the last pages."""
    samples = read_audio(CASES / "voice-chained.ogg", RATE, 10)
    assert len(samples) / RATE == pytest.approx(153_600 / 48000 + 141_120 / 44100, abs=0.001)
    for start in (1.0, 4.0, 6.0):
        part = samples[round(start * RATE) :][: RATE // 5]
        assert np.sqrt(np.mean(np.square(part))) == pytest.approx(0.0885, rel=0.02)


def ogg(codec: str, rate_hz: int, channels: int, hz: float) -> bytes:
    buffer = io.BytesIO()
    layout = {1: "mono", 2: "stereo"}[channels]
    with av.open(buffer, "w", format="ogg") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        wave = np.stack([sine(rate_hz, 1.0, hz)] * channels)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        resampler = av.AudioResampler(
            stream.format, layout, rate_hz, stream.codec_context.frame_size or 1024
        )
        parts = [*resampler.resample(frame), *resampler.resample(None), None]
        for part in parts:
            container.mux(stream.encode(part))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "chain",
    [
        [("libopus", 48000, 1), ("libopus", 48000, 2), ("libopus", 48000, 1)],
        [("flac", 44100, 2), ("flac", 22050, 1)],
        [("flac", 48000, 1), ("libopus", 48000, 2)],
    ],
)
def test_every_link_of_a_chain_is_heard(tmp_path, chain):
    path = tmp_path / "voice.ogg"
    tones = [400.0 + 200 * index for index in range(len(chain))]
    links = [ogg(*link, hz) for link, hz in zip(chain, tones, strict=True)]
    path.write_bytes(b"".join(links))
    samples = read_audio(path, RATE, 10)
    assert len(samples) / RATE == pytest.approx(len(chain), abs=0.05 * len(chain))
    heard = [
        loudest_hz(samples[round((index + 0.3) * RATE) :][: RATE // 2], RATE)
        for index in range(len(chain))
    ]
    assert heard == pytest.approx(tones, abs=2.0)
    assert 1.5 <= len(read_audio(path, RATE, 1.5)) / RATE < 2.0  # and no further than asked


def test_a_damaged_packet_does_not_end_the_sound(tmp_path):
    content = bytearray(adts(44100, 1, 2.0, 440.0))
    middle = content.index(b"\xff\xf1", len(content) // 2)
    content[middle + 7 : middle + 40] = b"\xff" * 33  # a frame's content, after its header
    samples = read_audio(_written(tmp_path / "voice.aac", bytes(content)), RATE, 10)
    assert len(samples) / RATE == pytest.approx(2.0, abs=0.1)
    assert loudest_hz(samples[-RATE // 2 :], RATE) == pytest.approx(440.0, abs=2.0)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# -- tracks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov", "avi"])
def test_a_track_that_begins_late_is_in_place(tmp_path, suffix):
    voice = sine(48000, 1.0)
    if suffix == "avi":  # has no times of its own: nothing may be added to what begins at once
        samples = read_audio(write_track(tmp_path / "clip.avi", [voice]), RATE, 10)
        assert len(samples) / RATE == pytest.approx(1.0, abs=0.02)
        return
    path = write_track(tmp_path / f"clip.{suffix}", [voice], late_s=0.98)
    samples = read_audio(path, RATE, 10)
    begins = int(np.argmax(np.abs(samples) > 0.1)) / RATE
    assert begins == pytest.approx(0.98, abs=0.002)
    assert len(samples) / RATE == pytest.approx(1.98, abs=0.02)
    assert not samples[: round(0.97 * RATE)].any()


def test_silence_before_a_late_track_goes_no_further_than_asked(tmp_path):
    path = write_track(tmp_path / "clip.mkv", [sine(48000, 1.0)], late_s=50.0)
    samples = read_audio(path, RATE, 1.0)
    assert len(samples) == RATE and not samples.any()


def test_a_gap_in_a_track_is_silent(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=48000, layout="mono")
        for start_s in (0.0, 0.5, 2.0):
            part = np.round(sine(48000, 0.5)[None] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
            frame.sample_rate, frame.time_base = 48000, Fraction(1, 48000)
            frame.pts = round(start_s * 48000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    samples = read_audio(path, RATE, 10)
    assert len(samples) / RATE == pytest.approx(2.5, abs=0.002)
    assert not samples[round(1.02 * RATE) : round(1.98 * RATE)].any()
    assert np.abs(samples[round(2.1 * RATE) :]).max() == pytest.approx(0.5, rel=0.02)


@pytest.mark.skipif(
    not hasattr(av.stream.Stream, "disposition"), reason="PyAV 14.0 cannot mark a track"
)
@pytest.mark.parametrize("default", [0, 1, 2, None])
def test_the_default_track_is_heard(tmp_path, default):
    tracks = [sine(48000, 1.0, hz) for hz in (400.0, 600.0, 800.0)]
    samples = read_audio(write_track(tmp_path / "clip.mkv", tracks, default=default), RATE, 10)
    assert loudest_hz(samples, RATE) == pytest.approx(400.0 + 200 * (default or 0), abs=1.0)


# -- what cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 3])
def test_samples_that_are_not_finite_are_refused(tmp_path, value, channel):
    wave = np.stack([sine(48000, 0.5)] * 6)
    wave[channel, 9000] = value
    path = _written(tmp_path / "voice.wav", wav(wave, 48000, is_float=True, mask=SURROUND))
    with pytest.raises(InvalidRequestError, match=r"must be finite, got .*voice.wav with NaN or"):
        read_audio(path, RATE, 10)


@pytest.mark.parametrize("value", [3e38, -3e38, 20000, 8.01])
@pytest.mark.parametrize("channels", [1, 2])
def test_absurd_samples_are_refused_with_their_value(tmp_path, value, channels):
    wave = np.stack([sine(48000, 0.5)] * channels)
    wave[-1, 9000] = value
    path = _written(tmp_path / "voice.wav", wav(wave, 48000, is_float=True))
    named = f"{abs(np.float32(value)):.6g}".replace("+", "\\+")
    with pytest.raises(InvalidRequestError, match=f"within 8 times full scale, got .* {named};"):
        read_audio(path, RATE, 10)


def test_samples_far_beyond_full_scale_are_noted(tmp_path):
    wave = sine(48000, 0.5)[None]
    loud = _written(tmp_path / "loud.wav", wav(wave * 8, 48000, is_float=True))
    samples, note = open_driving_audio(loud, 0.5)
    assert np.abs(samples[4000:-4000]).max() == pytest.approx(4.0, rel=0.01)
    assert "times full scale and may clip; scale it to -1 to 1" in note
    full = _written(tmp_path / "full.wav", wav(wave * 2, 48000, is_float=True))
    assert open_driving_audio(full, 0.5)[1] is None


def test_a_long_file_is_read_no_further_than_asked(tmp_path, monkeypatch):
    path = write_sine(tmp_path / "voice.mp3", 8000, seconds=600)
    read = []
    monkeypatch.setattr(sound, "mix", lambda *given: read.append(given) or mix(*given))
    samples, note = open_driving_audio(path, 0.2)
    assert len(samples) == round(0.2 * RATE)
    assert sum(given[0].shape[1] for given in read) < 2 * 8000
    assert note == "the audio is longer than the 0.2 s asked for and is cut there"


# -- names and tags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["12:30.wav", "concat:ok.wav", "file:x.wav", "http:x.wav", "a%03d.wav", "-.wav", "ü.wav"],
)
def test_a_name_is_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(wav(sine(48000, 0.5)[None], 48000))
    for path in (name, tmp_path / name):
        is_voice(read_audio(path, RATE, 10), 0.5)


def test_a_name_that_is_no_unicode(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/voice-\xff.wav"))
    path.write_bytes(wav(sine(48000, 0.5)[None], 48000))
    is_voice(read_audio(path, RATE, 10), 0.5)


def test_tags_of_any_encoding(tmp_path):
    text = "Müller".encode("latin-1") + b"\0\0"
    entries = b"INFO" + b"IART" + struct.pack("<I", len(text)) + text
    extra = b"LIST" + struct.pack("<I", len(entries)) + entries
    path = _written(tmp_path / "voice.wav", wav(sine(48000, 0.5)[None], 48000, extra=extra))
    is_voice(read_audio(path, RATE, 10), 0.5)


def test_a_playlist_opens_nothing_from_elsewhere(tmp_path):
    path = tmp_path / "list.m3u8"
    path.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(InvalidRequestError, match=r"list\.m3u8"):
        read_audio(path, RATE, 10)


def test_a_codec_that_nobody_knows_is_refused(tmp_path):
    content = bytearray(wav(sine(48000, 0.5)[None], 48000))
    content[20:22] = b"\xee\xee"
    path = _written(tmp_path / "voice.wav", bytes(content))
    with pytest.raises(InvalidRequestError, match=r"a codec that FFmpeg decodes, got .*voice\.wav"):
        read_audio(path, RATE, 10)


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), struct.error("x"), MemoryError(), OverflowError("x"), RecursionError()],
)
def test_no_error_of_a_decoder_leaves_as_itself(tmp_path, monkeypatch, error):
    path = write_sine(tmp_path / "voice.wav")

    def broken(*_):
        raise error

    monkeypatch.setattr(sound, "samples_of", broken)
    with pytest.raises(InvalidRequestError, match=r"audio must be whole, but .*voice.wav cannot"):
        read_audio(path, RATE, 10)


def test_whoever_interrupts_reading_is_heard(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sound, "samples_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_audio(write_sine(tmp_path / "voice.wav"), RATE, 10)
