from __future__ import annotations

import pytest
from prompt_texts import AFTER, BEFORE, body

from magihuman.runtime import InvalidRequestError, Line, Prompt, check_prompt
from magihuman.runtime.prompts.rules import count_words
from magihuman.runtime.prompts.speech import LANGUAGES, spoken_s, syllables

GOOD = body("good morning")


def said(words: str, language: str = "English", who: str = "Woman") -> Line:
    return Line(who, language, words)


def text(main: str = GOOD, line: Line | None = None, **options) -> str:
    return str(Prompt(main, [line or said("good morning")], **options))


def without(*words: str) -> str:
    """The good body with these words gone, by a neutral one each."""
    made = GOOD
    for word in words:
        assert word in made
        made = made.replace(word, "that")
    return made


NO_APPEARANCE = without("hair", "glasses", "wears", "sweater", "shirt")
NO_FACE = without("lips", "mouth", "brows", "cheeks", "jaw", "muscles", "blinks")
NO_VOICE = without("voice", "pace")
NO_CAMERA = without("lens", "shot", "close-up")
NO_MOOD = without("disposition", "calm")
GERMAN = " ".join(["Eine Frau sitzt vor einer Wand und lächelt ruhig in die Kamera."] * 14)
CASES = {
    "no-form": "A woman smiles.",
    "no-sound": 'A woman.\n\nDialogue:\n<Woman, English>: "hi"',
    "form-broken": "A woman.\n\nDialogue:\nhi\n\nBackground Sound:\n<Wind>",
    "no-dialogue": str(Prompt(GOOD)),
    "body-short": text("A woman with grey hair says: good morning"),
    "body-long": text(f"{GOOD} {GOOD}"),
    "body-language": text(f"{GERMAN} good morning"),
    "no-appearance": text(NO_APPEARANCE),
    "no-mood": text(NO_MOOD),
    "no-face": text(NO_FACE),
    "no-voice": text(NO_VOICE),
    "no-camera": text(NO_CAMERA),
    "camera-moves": text(GOOD.replace("The shot is a static", "The camera pans left in a")),
    "action-large": text(GOOD.replace("She breathes in", "She walks in")),
    "who-long": text(line=said("good morning", who="One of the two older women")),
    "language-unknown": text(line=said("good morning", "Klingon")),
    "language-script": text(line=said("good morning", "Korean")),
    "words-not-in-body": text(line=said("good evening")),
    "words-too-many": text(body("good morning " * 8), said("good morning " * 8)),
    "spacing": text(body("你好"), said("你好", "Mandarin")).replace("你 好", "你好"),
    "tokens-over": "word " * 700,
}


@pytest.mark.parametrize("code", CASES)
def test_each_warning(code):
    """And for each a text without, which is the same but for what is wrong."""
    report = check_prompt(CASES[code], seconds=3)
    found = {warning.code: warning for warning in report.warnings}
    assert code in found
    assert found[code].sentence and found[code].remedy and str(found[code]).count("\n") == 0
    assert not found[code].sentence.endswith(".")
    assert check_prompt(text(), seconds=3).warnings == ()
    others = set(found) - {code}
    allowed = {
        "body-short": {"no-mood", "no-face", "no-voice", "no-camera", "no-appearance"},
        "body-language": {"no-mood", "no-face", "no-voice", "no-camera", "no-appearance"},
        "tokens-over": {"no-form"},
        "words-too-many": {"body-long"},
    }
    assert others <= allowed.get(code, set()), others


def test_a_camera_that_does_not_move_is_none_that_moves():
    still = GOOD.replace("The shot is", "The camera never pans or zooms. It is")
    assert check_prompt(text(still)).warnings == ()


def test_a_report():
    report = check_prompt(text(), seconds=3, count=len)
    assert report.is_in_form and report.languages == ("English",)
    assert report.words == count_words(BEFORE) + 2 + count_words(AFTER)
    assert (report.tokens.used, report.tokens.left) == (len(text()), 640 - len(text()))
    assert not report.tokens.is_estimate
    assert check_prompt(text()).tokens.is_estimate
    assert report.said_s == pytest.approx(spoken_s("good morning", LANGUAGES["English"]))
    free = check_prompt('Er sagt "안녕하세요" und "hi"', seconds=0.2)
    assert free.languages == ("Korean", "English")
    assert {warning.code for warning in free.warnings} == {"no-form", "words-too-many", "spacing"}


@pytest.mark.parametrize("blank", ["", " \n", None, 3])
def test_what_is_no_prompt(blank):
    with pytest.raises(InvalidRequestError, match="not blank"):
        check_prompt(blank)


@pytest.mark.parametrize(
    ("language", "words", "count"),
    [
        ("English", "hello there, the smile of a table jumped and wanted more", 15),
        ("German", "Guten Tag, wie geht es Ihnen heute", 10),
        ("French", "bonjour, une petite table", 6),  # the e at the end is not said
        ("Mandarin", "你好，世界", 4),
        ("Cantonese", "你食咗飯未呀", 6),
        ("Korean", "안녕 하세요", 5),
        ("Japanese", "きょうは", 3),  # kyo-u-wa
        ("Japanese", "東京", 4),
        ("English", "", 0),
    ],
)
def test_syllables(language, words, count):
    assert syllables(words, LANGUAGES[language]) == pytest.approx(count, abs=0.5)


def test_a_rate_for_every_language_that_the_model_speaks():
    assert set(LANGUAGES) == {
        "English", "Mandarin", "Cantonese", "Japanese", "Korean", "German", "French",
    }  # fmt: skip
    assert all(5 < language.syllables_per_s < 9 for language in LANGUAGES.values())
