"""Chinese, Japanese and Korean characters apart from each other, as the model was trained."""

from __future__ import annotations

import re

# Ideographs, kana, Bopomofo and Hangul, with the half-width and the rare ones.
_IDEOGRAPHS = "々-〇〡-〩〸-〼⺀-⿕㐀-䶿一-鿿豈-﫿\U00020000-\U0003fffd"
_KANA = "ぁ-ゖゝ-ゟァ-ヺー-ヿㇰ-ㇿｦ-ﾝ\U0001aff0-\U0001b16f"
_BOPOMOFO = "ㄅ-ㄯㆠ-ㆿ"
_SYLLABLES = "가-힣ㄱ-ㆎ"  # of Hangul, and its letters by themselves
_LETTERS = _IDEOGRAPHS + _KANA + _BOPOMOFO + _SYLLABLES
# Marks that belong to the character before them: voicing, variants, joiners.
_MARKS = "\u3099-\u309c\uff9e\uff9f\u0300-\u036f\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef"
# A Hangul syllable may be written by its letters, of which one leads.
_JAMO = "[\u1100-\u115f\ua960-\ua97c]+[\u1160-\u11ff\ud7b0-\ud7fb]*"
CHARACTER = re.compile(f"(?:[{_LETTERS}]|{_JAMO})[{_MARKS}]*")
HANGUL = re.compile(f"[{_SYLLABLES}]|{_JAMO}")
KANA = re.compile(f"[{_KANA}]")
IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")

_WORD = rf"(?:(?![{_LETTERS}{_MARKS}\u1100-\u11ff\ua960-\ua97c\ud7b0-\ud7fb])[^\W_])"
# Full-width punctuation has its space within it.
_PUNCTUATION = (
    r"[\u3001-\u3003\u3008-\u3011\u3014-\u301f\u30a0\u30fb"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_GAP = r"[^\S\n]*"  # a line's end stays
_BEFORE = re.compile(f"({CHARACTER.pattern}){_GAP}(?={CHARACTER.pattern}|{_WORD})")
_AFTER = re.compile(f"({_WORD}){_GAP}(?={CHARACTER.pattern})")
_CLOSED = re.compile(f"({CHARACTER.pattern}){_GAP}(?={_PUNCTUATION})")
_OPENED = re.compile(f"({_PUNCTUATION}){_GAP}(?={CHARACTER.pattern})")


def spaced(text: str) -> str:
    """The text with one space on either side of each Chinese, Japanese or Korean character.

    Full-width punctuation stays close to the characters beside it. Runs of letters and digits of
    other scripts stay whole. Doing it again changes nothing.
    """
    text = _BEFORE.sub(r"\1 ", text)
    text = _AFTER.sub(r"\1 ", text)
    text = _CLOSED.sub(r"\1", text)
    return _OPENED.sub(r"\1", text)
