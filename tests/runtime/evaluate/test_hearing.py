"""Word and character error rates, and what recognisers hear."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from magihuman import runtime
from magihuman.runtime.evaluate import Case, EvaluatedClip, evaluate, standard_measures
from magihuman.runtime.evaluate.hearing import (
    character_error_rate,
    normalised,
    open_recogniser,
    resampled,
    word_error_rate,
)
from magihuman.runtime.media import read_audio

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# -- rates, worked by hand ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heard", "expected", "rate"),
    [
        ("the cat sat", "the cat sat", 0.0),
        ("The CAT, sat!", "the cat sat.", 0.0),
        ("the bat sat", "the cat sat", 1 / 3),  # one replaced
        ("the sat", "the cat sat", 1 / 3),  # one left out
        ("the fat cat sat", "the cat sat", 1 / 3),  # one added
        ("a b c d", "b c d e", 2 / 4),  # one added, one left out: not four replaced
        ("", "the cat sat", 1.0),
        ("oh no no no", "no", 3.0),
        ("dont", "don’t", 0.0),
        ("well known", "well-known", 0.0),
        ("ＡＢＣ", "abc", 0.0),
        ("Straße", "STRASSE", 0.0),
        ("cafe\u0301", "café", 0.0),
        ("2", "two", 1.0),
        ("hello", "...", None),
    ],
)
def test_word_error_rate(heard, expected, rate):
    assert word_error_rate(heard, expected) == (None if rate is None else pytest.approx(rate))


@pytest.mark.parametrize(
    ("heard", "expected", "rate"),
    [
        ("你好世界", "你 好 ， 世 界 。", 0.0),
        ("你好", "你 好 世 界", 2 / 4),
        ("こんばんは", "こ ん に ち は", 2 / 5),
        ("안녕하세요", "안 녕 하 세 용", 1 / 5),
        ("ｶﾞ", "ガ", 0.0),
        ("", "你", 1.0),
        ("你", "。", None),
    ],
)
def test_character_error_rate(heard, expected, rate):
    assert character_error_rate(heard, expected) == (None if rate is None else pytest.approx(rate))


def test_marks_of_other_scripts_stay():
    assert normalised("नमस्ते, दुनिया!") == "नमस्ते दुनिया"


@pytest.mark.parametrize(
    ("words", "rates"), [("hello there", (0.5, None)), ("你好", (None, 2.5)), (None, (None, None))]
)
def test_the_rate_that_suits_the_words(tmp_path, words, rates):
    asked = []

    def hear(wave, sample_rate_hz, language):
        asked.append((wave.shape, sample_rate_hz, language))
        return "hello"

    word, character, *_ = standard_measures(tmp_path, asr=hear)
    clip = EvaluatedClip(Case("a man", words=words), "bf16", clip_of(np.zeros(100, np.float32)))
    assert (word.of(clip), character.of(clip)) == rates
    languages = {"hello there": ["English"], "你好": ["Mandarin"], None: []}[words]
    assert asked == [((100,), 16000, language) for language in languages]  # once for a clip


def clip_of(wave: np.ndarray) -> runtime.Video:
    return runtime.Video(np.zeros((25, 8, 8, 3), np.uint8), np.stack([wave] * 2, 1), 25, 16000)


# -- a recogniser in earnest, and speech --------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """A synthesised voice that says six words."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng, which speaks, is not installed")
    file = tmp_path_factory.mktemp("voice") / "voice.wav"
    words = "one. five. nine. two. six. four."
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "130", "-w", file, words], check=True)
    return file


class Sphinx:
    """PocketSphinx, whose model comes with it, over the words of `WORDS`."""

    def __init__(self) -> None:
        from pocketsphinx import Decoder

        self._decoder = Decoder(samprate=16000, lm=None, loglevel="FATAL")
        grammar = f"#JSGF V1.0; grammar g; public <s> = ({' | '.join(WORDS)})+;"
        self._decoder.add_jsgf_string("words", grammar)
        self._decoder.activate_search("words")

    def __call__(self, wave, sample_rate_hz, language):
        samples = resampled(wave, sample_rate_hz, 16000)
        self._decoder.start_utt()
        scaled = (samples * 32767).clip(-32768, 32767).astype(np.int16)
        self._decoder.process_raw(scaled.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else found.hypstr


@pytest.fixture(scope="module")
def sphinx() -> Sphinx:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx, which hears, is not installed")
    return Sphinx()


def test_speech_is_heard(spoken, sphinx):
    wave = read_audio(spoken, 16000, 20.0)
    word, *_ = standard_measures("nano", asr=sphinx)
    said = EvaluatedClip(Case("-", words="One, five, nine, two, six, four!"), "bf16", clip_of(wave))
    assert word.of(said) <= 1 / 6
    other = EvaluatedClip(Case("-", words="three three eight seven"), "bf16", clip_of(wave))
    assert word.of(other) >= 1
    silence = EvaluatedClip(said.case, "bf16", clip_of(np.zeros(16000, np.float32)))
    assert word.of(silence) > 0.8


def test_clips_of_a_voice_are_heard(spoken, sphinx):
    """End to end: the voice goes through the model, which has learnt other sounds."""
    case = Case("a man", audio=spoken, words="one five nine two six four")
    measures = standard_measures("nano", asr=sphinx)
    found = evaluate("nano", [case], ["bf16"], measures, seconds=3.2)
    (clip,) = found.clips
    assert clip.figures["word error rate"] >= 0 and clip.notes.get("word error rate") is not None
    assert not found.failures and clip.figures["character error rate"] is None


# -- transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    """A Whisper of random weights, as transformers writes one, with a tokenizer of bytes."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("whisper")
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|transcribe|>",
               "<|translate|>", "<|notimestamps|>"]  # fmt: skip
    vocabulary = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    end, start, english, chinese, transcribe, translate, plain = (vocabulary[t] for t in special)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, decoder_start_token_id=start, max_target_positions=32, **ids,
        )
    )  # fmt: skip
    settings = model.generation_config
    settings.update(
        is_multilingual=True, lang_to_id={"<|en|>": english, "<|zh|>": chinese}, max_length=16,
        task_to_id={"transcribe": transcribe, "translate": translate}, no_timestamps_token_id=plain,
        begin_suppress_tokens=[end], suppress_tokens=None, decoder_start_token_id=start, **ids,
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("language", [None, "English", "Mandarin", "Cantonese"])
def test_whisper_from_a_folder(whisper, monkeypatch, language):
    """Of random weights: what it says is no speech, and is said without an error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hear = open_recogniser(str(whisper))
    heard = hear(np.zeros(44100, np.float32), 44100, language)
    assert isinstance(heard, str) and heard == hear(np.zeros(44100, np.float32), 44100, language)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(runtime.CheckpointError, match=r"the ASR model must be .* got '"):
        open_recogniser(str(tmp_path))
