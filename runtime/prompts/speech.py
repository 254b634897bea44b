"""The languages that the model speaks, and how long words take to say in each."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from magihuman.runtime.prompts.spacing import CHARACTER, HANGUL, IDEOGRAPH, KANA


@dataclass(frozen=True)
class Language:
    """A language, with how it is written and how fast it is read aloud.

    Attributes:
        name: in English, as the form has it.
        script: what its words are written in: "Latin", "Han", "Japanese" or "Hangul".
        syllables_per_s: mean rate of ten readers, pauses left out.
    """

    name: str
    script: str
    syllables_per_s: float


# Means over all recordings of Coupé, Oh, Dediu, Pellegrino: Different languages, similar encoding
# efficiency, Science Advances 5 (2019), eaaw2594: NS / Duration of its InfoRateData.csv.
LANGUAGES = {
    language.name: language
    for language in (
        Language("English", "Latin", 6.34),
        Language("Mandarin", "Han", 5.86),
        Language("Cantonese", "Han", 5.57),
        Language("Japanese", "Japanese", 8.03),
        Language("Korean", "Hangul", 7.12),
        Language("German", "Latin", 6.09),
        Language("French", "Latin", 6.88),
    )
}
_SMALL_KANA = re.compile("[ぁぃぅぇぉゃゅょゎァィゥェォャュョヮ]")
_VOWELS = re.compile("[aeiouyàáâãäåæèéêëìíîïòóôõöøœùúûüýÿ]+")
# e that is not said: at the end in English and French, as in "smile", not as in "table" or "be".
_MUTE = {"English": re.compile("[^aeiouyl]e$|[^aeiouytd]ed$"), "French": re.compile("e(s|nt)?$")}
IDEOGRAPH_MORAE = 2  # of an ideograph in Japanese, nearly always
DIGIT_SYLLABLES = 1.3  # of a digit, said by itself


def language_of(name: str) -> Language | None:
    """The language of this name, in whatever case; None where the model has not learnt it."""
    return LANGUAGES.get(name.strip().title())


def guessed_language(words: str) -> str:
    """The language that words look like by their letters: English where these are Latin."""
    if KANA.search(words):
        return "Japanese"
    if HANGUL.search(words):
        return "Korean"
    return "Mandarin" if IDEOGRAPH.search(words) else "English"


def syllables(words: str, language: Language) -> float:
    """About how many syllables words have; in Japanese morae."""
    text = unicodedata.normalize("NFC", words)
    count = DIGIT_SYLLABLES * len(re.findall(r"\d", text))
    count += sum(_latin(word, language.name) for word in re.findall(r"[^\W\d_]+", _other(text)))
    if language.script == "Japanese":
        kana = len(KANA.findall(text)) - len(_SMALL_KANA.findall(text))
        return count + kana + IDEOGRAPH_MORAE * len(IDEOGRAPH.findall(text))
    return count + len(CHARACTER.findall(text))


def spoken_s(words: str, language: Language) -> float:
    """Seconds that words take to say at the language's usual rate, without pauses."""
    return syllables(words, language) / language.syllables_per_s


def fits_script(words: str, language: Language) -> bool:
    """Whether words are written as their language is; those without letters are."""
    has_kana, has_hangul = KANA.search(words), HANGUL.search(words)
    has_han = IDEOGRAPH.search(words)
    if not any(letter.isalpha() for letter in words):
        return True
    match language.script:
        case "Han":
            return bool(has_han) and not has_kana and not has_hangul
        case "Japanese":
            return bool(has_kana or has_han) and not has_hangul
        case "Hangul":
            return bool(has_hangul) and not has_kana
    return not (has_kana or has_hangul or has_han) and _is_latin(words)


def _other(text: str) -> str:
    return CHARACTER.sub(" ", text)


def _is_latin(words: str) -> bool:
    letters = [letter for letter in words if letter.isalpha()]
    return sum("LATIN" in unicodedata.name(letter, "") for letter in letters) * 2 > len(letters)


def _latin(word: str, language: str) -> int:
    """Syllables of a word in Latin letters: its groups of vowels, of which one may be mute."""
    lower = word.lower()
    groups = len(_VOWELS.findall(lower))
    mute = _MUTE.get(language)
    if groups > 1 and mute is not None and mute.search(lower):
        groups -= 1
    return max(1, groups)
