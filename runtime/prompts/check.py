"""What is to say of any prompt, in the form or not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from magihuman.runtime.config import MAX_TEXT_TOKENS
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.prompts import rules
from magihuman.runtime.prompts.form import DIALOGUE, NO_SOUND, SOUND, Line
from magihuman.runtime.prompts.prompt import Prompt
from magihuman.runtime.prompts.rules import PromptWarning
from magihuman.runtime.prompts.spacing import CHARACTER, spaced
from magihuman.runtime.prompts.speech import guessed_language

# Of tokenizers with large vocabularies, on the form's own text; rounded up.
TOKENS_A_WORD, TOKENS_A_CHARACTER = 1.4, 1.5


@dataclass(frozen=True)
class TokenCount:
    """How much of what the model reads a prompt takes.

    Attributes:
        used: tokens of the prompt.
        left: of the 640 that the model reads; below 0 where it is cut.
        is_estimate: whether no tokenizer has counted them.
    """

    used: int
    left: int
    is_estimate: bool


@dataclass(frozen=True)
class PromptReport:
    """What was found of a prompt.

    Attributes:
        is_in_form: whether it has body, dialogue and sound as the model was trained.
        words: of the body, or of the whole where it is not in the form.
        languages: of the lines, as they are named, each once; where the text is not in the
            form, those that what is in quotation marks looks like.
        tokens: how many it takes.
        said_s: seconds that what is said takes, without pauses; None where that is not known.
        warnings: what is missing or will not fit.
    """

    is_in_form: bool
    words: int
    languages: tuple[str, ...]
    tokens: TokenCount
    said_s: float | None
    warnings: tuple[PromptWarning, ...]


def check(
    prompt: str | Prompt,
    *,
    seconds: float | None = None,
    count: Callable[[str], int] | None = None,
) -> PromptReport:
    """Look at a prompt, and change nothing.

    Args:
        prompt: any text.
        seconds: of the clip, for whether what is said fits.
        count: gives a text's tokens, as the model's tokenizer has them; else they are estimated.

    Raises `InvalidRequestError` for what is no text, or blank.
    """
    text = str(prompt) if isinstance(prompt, Prompt) else prompt
    if not isinstance(text, str) or not text.strip():
        raise InvalidRequestError(f"prompt must be text that is not blank, got {prompt!r}")
    reason = None
    parsed = None
    try:
        parsed = Prompt.parse(text)
    except InvalidRequestError as error:
        reason = str(error)
    tokens = count_tokens(text, count)
    body, lines = (text, guessed_lines(text)) if parsed is None else (parsed.body, parsed.lines)
    return PromptReport(
        is_in_form=parsed is not None,
        words=rules.count_words(body),
        languages=tuple(dict.fromkeys(line.language for line in lines)),
        tokens=tokens,
        said_s=rules.said_s(lines),
        warnings=(
            *_of_form(text, reason),
            *(
                rules.time_warnings(lines, seconds)
                if parsed is None
                else rules.warnings_of(body, lines, seconds)
            ),
            *_of_text(text, tokens),
        ),
    )


def count_tokens(text: str, count: Callable[[str], int] | None) -> TokenCount:
    """The tokens of a text, counted or estimated."""
    used = estimated_tokens(text) if count is None else count(text)
    return TokenCount(used, MAX_TEXT_TOKENS - used, count is None)


def estimated_tokens(text: str) -> int:
    """About how many tokens a text takes: those of words, of characters and of punctuation."""
    characters = len(CHARACTER.findall(text))
    rest = CHARACTER.sub(" ", text)
    words, marks = len(re.findall(r"\w+", rest)), len(re.findall(r"[^\w\s]", rest))
    return math.ceil(TOKENS_A_CHARACTER * characters + TOKENS_A_WORD * words + marks)


def guessed_lines(text: str) -> list[Line]:
    """What a text has in quotation marks, in the language that its letters look like."""
    return [
        Line("speaker", guessed_language(words), words)
        for match in rules.QUOTED.finditer(text)
        if (words := match[0][1:-1].strip())
    ]


def _of_form(text: str, reason: str | None) -> Iterator[PromptWarning]:
    if reason is None:
        return
    if DIALOGUE not in text and SOUND not in text:
        yield PromptWarning(
            "no-form",
            f"the text has neither {DIALOGUE!r} nor {SOUND!r}, which the model was trained with",
            "write it as runtime.Prompt does, or have it rewritten by --enhance",
        )
    elif SOUND not in text:
        yield PromptWarning(
            "no-sound",
            f"the text has no {SOUND!r}",
            f"end it with {SOUND!r} and <{NO_SOUND}>, or the sound, on the next line",
        )
    else:
        yield PromptWarning("form-broken", reason, "write it as runtime.Prompt does")


def _of_text(text: str, tokens: TokenCount) -> Iterator[PromptWarning]:
    if spaced(text) != text:
        yield PromptWarning(
            "spacing",
            "Chinese, Japanese or Korean characters are not put apart by single spaces",
            "put them apart, as runtime.Prompt does",
        )
    if tokens.left < 0:
        about = "about " if tokens.is_estimate else ""
        yield PromptWarning(
            "tokens-over",
            f"the prompt takes {about}{tokens.used} tokens, of which the model reads"
            f" {MAX_TEXT_TOKENS}",
            "shorten it; the end is cut, and that is what is said",
        )
