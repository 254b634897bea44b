"""What a prompt in the form lacks, or has that the model was not trained on, as data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from magihuman.runtime.prompts.form import Line
from magihuman.runtime.prompts.spacing import CHARACTER
from magihuman.runtime.prompts.speech import LANGUAGES, fits_script, language_of, spoken_s

MIN_WORDS, MAX_WORDS = 150, 200
MAX_WHO_WORDS = 5
QUOTED = re.compile(r'"[^"\n]*"|“[^”\n]*”|「[^」\n]*」')
_LETTERS = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
# Words of which English text has about every third.
_ENGLISH = frozenset(
    """
    a an and are as at be but by for from has have he her his in into is it its not of on or she
    that the their then they this to was while who with
    """.split()  # noqa: SIM905
)
ENGLISH_SHARE = 0.15


@dataclass(frozen=True)
class PromptWarning:
    """One way in which a prompt is not as the model was trained.

    Attributes:
        code: which it is, in a word that stays the same.
        sentence: what was found.
        remedy: what to do.
    """

    code: str
    sentence: str
    remedy: str

    def __str__(self) -> str:
        """Both in one line."""
        return f"{self.sentence}; {self.remedy}"


# What a body tells, by the code of its absence: words of which one should be there.
_TOLD = {
    "no-appearance": (
        "who is seen",
        "begin with age, hair and clothes",
        r"hair|wear\w*|dress\w*|shirt|suit|jacket|sweater|coat|blouse|glasses|beard|bald|skin|clothes",
    ),
    "no-mood": (
        "the mood",
        "say in a word or two how the person feels, as in: her mood is calm",
        r"mood|dispositions?|emotion\w*|calm\w*|happ\w+|joy\w*|sad\w*|ang(?:ry|er)|serious\w*|earnest\w*"
        r"|warm\w*|cheer\w*|nervous\w*|tense|confident\w*|gentl[ey]|excited\w*|thoughtful\w*"
        r"|relaxed|agitated|composed|friendly|expression|attentive",
    ),
    "no-face": (
        "the face's movements",
        "say what brows, eyes, cheeks and lips do while the person speaks",
        r"(?:eye)?brows?|forehead|cheeks?|lips?|mouth|jaw|muscles?|nostrils?|chin|eyelids?|blinks?",
    ),
    "no-voice": (
        "the voice",
        "say how it sounds and how fast it goes, as in: in a low and even voice",
        r"voice|tone|pitch|pace|tempo|speak\w*|timbre|volume|whisper\w*|deliver\w*|intonation",
    ),
    "no-camera": (
        "the camera",
        "say that it stands still and how near it is, as in: a static medium close-up",
        r"camera|shot|fram(?:e|ed|ing)|close-up|lens",
    ),
}
_MOVES = re.compile(
    r"\b(?:camera|shot|frame|view|lens)\b[^.;]{0,40}\b(?:pan(?:s|ning)?|zoom(?:s|ing)?|tilt(?:s|ing)?"
    r"|dolly|dollies|track(?:s|ing)|orbit(?:s|ing)?|circl(?:es|ing)|moves|push(?:es|ing)|pulls)\b"
    r"|\b(?:tracking|panning|dolly|crane|handheld|drone|zoom(?:ing)?|orbiting)"
    r" (?:shot|camera|in|out)\b",
    re.IGNORECASE,
)
_ACTIONS = re.compile(
    r"\b(walk(?:s|ing)?|run(?:s|ning)|jump(?:s|ing)?|danc(?:es|ing)|climb(?:s|ing)?|leap(?:s|ing)?"
    r"|sprint(?:s|ing)?|jog(?:s|ging)|swim(?:s|ming)|spin(?:s|ning)|kick(?:s|ing)|crawl(?:s|ing)"
    r"|stands up|standing up|gets up|turns around|lies down|fights?|fighting)\b",
    re.IGNORECASE,
)


def warnings_of(
    body: str, lines: Sequence[Line], seconds: float | None = None
) -> Iterator[PromptWarning]:
    """All that is to say of a prompt's parts. seconds: of the clip, where that is known."""
    prose = QUOTED.sub(" ", body)
    yield from _length(prose, body)
    yield from _told(prose)
    yield from _movement(prose)
    if not lines:
        yield PromptWarning(
            "no-dialogue",
            "nobody says anything",
            'add a line, <who in five words, language>: "words", or expect a silent face',
        )
    for line in lines:
        yield from _line(line, body)
    yield from time_warnings(lines, seconds)


def count_words(text: str) -> int:
    """Words of a text; of Chinese, Japanese and Korean each character counts as one."""
    return len(CHARACTER.findall(text)) + len(_LETTERS.findall(CHARACTER.sub(" ", text)))


def _length(prose: str, body: str) -> Iterator[PromptWarning]:
    words = count_words(body)
    for code, is_so, remedy in (
        ("body-short", words < MIN_WORDS, "describe appearance, face, voice and camera further"),
        ("body-long", words > MAX_WORDS, "leave out what is not seen or heard"),
    ):
        if is_so:
            yield PromptWarning(
                code, f"the body has {words} words, of {MIN_WORDS} to {MAX_WORDS}", remedy
            )
    found = [word.lower() for word in _LETTERS.findall(CHARACTER.sub(" ", prose))]
    others = len(CHARACTER.findall(prose))
    english = sum(word in _ENGLISH for word in found)
    if others > len(found) or (len(found) >= 10 and english < ENGLISH_SHARE * len(found)):
        yield PromptWarning(
            "body-language",
            "the body is not in English",
            "write it in English; only what is said is in another language",
        )


def _told(prose: str) -> Iterator[PromptWarning]:
    for code, (what, remedy, words) in _TOLD.items():
        if re.search(rf"\b(?:{words})\b", prose, re.IGNORECASE) is None:
            yield PromptWarning(code, f"the body does not tell of {what}", remedy)


def _movement(prose: str) -> Iterator[PromptWarning]:
    moving = _MOVES.search(prose)
    if moving is not None and not re.search(r"\b(?:no|not|never|without)\b", moving[0]):
        yield PromptWarning(
            "camera-moves",
            f'the camera moves: "{moving[0]}"',
            "have it stand still; the model was trained on that",
        )
    action = _ACTIONS.search(prose)
    if action is not None:
        yield PromptWarning(
            "action-large",
            f'"{action[0]}" is more than a seated person does',
            "bring it down to the head, the face and the hands",
        )


def _line(line: Line, body: str) -> Iterator[PromptWarning]:
    who = line.who.split()
    if len(who) > MAX_WHO_WORDS:
        yield PromptWarning(
            "who-long",
            f'"{line.who}" has {len(who)} words, of {MAX_WHO_WORDS} at most',
            "name the speaker in fewer",
        )
    language = language_of(line.language)
    if language is None:
        yield PromptWarning(
            "language-unknown",
            f'"{line.language}" is no language that the model has learnt',
            f"name one of {', '.join(LANGUAGES)}",
        )
    elif not fits_script(line.words, language):
        yield PromptWarning(
            "language-script",
            f'"{line.words}" is not written as {language.name} is',
            "name the language that it is in, or write it as that is written",
        )
    if letters(line.words) not in letters(body):
        yield PromptWarning(
            "words-not-in-body",
            f'the body does not have the words "{line.words}"',
            "say them there too, where the person says them",
        )


def time_warnings(lines: Sequence[Line], seconds: float | None) -> Iterator[PromptWarning]:
    """Whether lines do not fit a clip. seconds: None where its length is not known."""
    if seconds is None:
        return
    needed_s = said_s(lines)
    if needed_s is not None and needed_s > seconds:
        yield PromptWarning(
            "words-too-many",
            f"the words take about {needed_s:.1f} s to say, and the clip has {seconds:g}",
            "say less, or ask for a longer clip",
        )


def said_s(lines: Sequence[Line]) -> float | None:
    """Seconds that the lines in known languages take to say, without pauses; None without any."""
    known = [(line, language) for line in lines if (language := language_of(line.language))]
    return sum(spoken_s(line.words, language) for line, language in known) if known else None


def letters(text: str) -> str:
    """Letters and digits alone, for comparison."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())
