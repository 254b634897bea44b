"""What is heard in a sound, and how far that is from what should be said.

Before they are compared, texts are normalised: compatibility forms (NFKC) and case folded,
apostrophes left out, and all else that is neither letter, mark nor digit made a space. Numbers
stay as they are written: "2" is not "two".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from math import gcd
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.signal import resample_poly

from magihuman.runtime.errors import CheckpointError, shown
from magihuman.runtime.evaluate.plugged import plugged
from magihuman.runtime.prompts import CHARACTER

GROUP = "magihuman.recognisers"
WINDOW_S = 30.0  # that Whisper hears at once; it goes on by time stamps
Wave = npt.NDArray[np.float32]
_APOSTROPHES = re.compile("['\u2018\u2019\u02bc\uff07]")


class Recogniser(Protocol):
    """What hears words in a sound. Any callable of this form will do."""

    def __call__(self, wave: Wave, sample_rate_hz: int, language: str | None) -> str:
        """The words.

        Args:
            wave: float32 [samples], mono, about [-1, 1].
            sample_rate_hz: of `wave`.
            language: its name in English, such as "Mandarin"; None where it is not known.
        """
        ...


def open_recogniser(name: str) -> Recogniser:
    """The recogniser of a name.

    name: an entry point of the group `magihuman.recognisers`, else what transformers takes for a
        speech recognition model, such as Whisper: a folder or a hub id.

    Raises:
        CheckpointError: transformers cannot load it.
        InvalidRequestError: the entry point cannot be used.
    """
    others = plugged(GROUP, name)
    return others[0] if others else TransformersRecogniser(name)


class TransformersRecogniser:
    """A pipeline for speech recognition, on the CPU and in fp32. No code of the model is run."""

    def __init__(self, model: str) -> None:
        try:
            from transformers import pipeline

            self._pipeline: Any = pipeline(
                "automatic-speech-recognition",
                model=model,
                device="cpu",
                dtype=torch.float32,
                trust_remote_code=False,
            )
            self._rate_hz = int(self._pipeline.feature_extractor.sampling_rate)
        except Exception as error:  # transformers documents none of what it raises
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                "the ASR model must be a speech recognition model that transformers can load, as a"
                f" folder or a hub id, got {shown(model)}: {reason}"
            ) from error

    def __call__(self, wave: Wave, sample_rate_hz: int, language: str | None) -> str:
        """As of `Recogniser`; where no sound is left, no words."""
        heard = resampled(wave, sample_rate_hz, self._rate_hz)
        options: dict[str, Any] = {}
        if self._pipeline.type == "seq2seq_whisper":
            options["return_timestamps"] = len(heard) > WINDOW_S * self._rate_hz
            if language is not None and self._knows(language):
                options["generate_kwargs"] = {
                    "language": language.lower(),
                    "task": "transcribe",
                }
        result = self._pipeline({"raw": heard, "sampling_rate": self._rate_hz}, **options)
        return str(result["text"])

    def _knows(self, language: str) -> bool:
        """Whether this model takes the language as an option: smaller ones know English alone."""
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        settings = self._pipeline.model.generation_config
        code = TO_LANGUAGE_CODE.get(language.lower())
        known = getattr(settings, "lang_to_id", None) or {}
        return bool(getattr(settings, "is_multilingual", False)) and f"<|{code}|>" in known


def resampled(wave: Wave, rate_hz: int, to_hz: int) -> Wave:
    """Mono sound at another rate: float32 [samples]."""
    factor = gcd(rate_hz, to_hz)
    result: Wave = resample_poly(wave, to_hz // factor, rate_hz // factor).astype(np.float32)
    return result


def word_error_rate(heard: str, expected: str) -> float | None:
    """Words to replace, leave out and add, as a share of those expected; None where these are none.

    Above 1 where more is heard than was to be said.
    """
    return _rate(normalised(heard).split(), normalised(expected).split())


def character_error_rate(heard: str, expected: str) -> float | None:
    """As `word_error_rate`, of characters without spaces."""
    return _rate("".join(normalised(heard).split()), "".join(normalised(expected).split()))


def is_by_characters(text: str) -> bool:
    """Whether a text is compared by characters: it has Chinese, Japanese or Korean ones."""
    return CHARACTER.search(text) is not None


def normalised(text: str) -> str:
    """The text as it is compared, see above."""
    folded = unicodedata.normalize("NFKC", _APOSTROPHES.sub("", text)).casefold()
    folded = unicodedata.normalize("NFC", folded)
    kept = (letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    return " ".join("".join(kept).split())


def edit_distance(heard: Sequence[str], expected: Sequence[str]) -> int:
    """The fewest items to replace, leave out and add that make one sequence the other."""
    row = list(range(len(expected) + 1))
    for i, item in enumerate(heard, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(expected, 1):
            cost = min(diagonal + (item != other), row[j] + 1, row[j - 1] + 1)
            diagonal, row[j] = row[j], cost
    return row[-1]


def _rate(heard: Sequence[str], expected: Sequence[str]) -> float | None:
    return edit_distance(heard, expected) / len(expected) if expected else None
