from __future__ import annotations

import random
import unicodedata

import pytest
from prompt_texts import body

from magihuman.runtime import InvalidRequestError, Line, Prompt
from magihuman.runtime.prompts import spaced
from magihuman.runtime.prompts.form import NO_SOUND
from magihuman.runtime.request import Request, request_of

WORDS = {
    "English": 'Good morning, "everybody"!',
    "Mandarin": "有的人在一起生活一辈子，还带着假面具呢",
    "Cantonese": "你食咗飯未呀？我食咗3碗",
    "Japanese": "「はい」、ジョン・スミスです。2026年もよろしく",
    "Korean": "안녕하세요, 만나서 반갑습니다!",
    "German": "Schönen guten Tag, wie geht's?",
    "French": "Bonjour à tous : ça va bien ?",
}


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("sound", [None, "Rain on a tin roof"])
def test_what_is_written_is_read_again(language, sound):
    words = WORDS[language]
    lines = [Line("Woman in green sweater", language, words), Line("She, again", language, words)]
    prompt = Prompt(body=body(words), lines=lines, sound=sound)
    text = str(prompt)
    assert Prompt.parse(text) == prompt and str(Prompt.parse(text)) == text
    assert text == prompt.text and spaced(text) == text
    assert prompt.warnings == ()
    assert "".join(prompt.lines[0].words.split()) == "".join(words.split())


def test_the_form_to_the_letter():
    prompt = Prompt(
        body="  A man sits.\n",
        lines=[Line("Young man in yellow polo", "Mandarin", "有的人，还带")],
    )
    assert str(prompt) == (
        "A man sits.\n\nDialogue:\n<Young man in yellow polo, Mandarin>: "
        '"有 的 人，还 带"\n\nBackground Sound:\n<No prominent background sound>\n'
    )
    assert str(Prompt("A man sits.", sound="Wind")) == (
        "A man sits.\n\nBackground Sound:\n<Wind>\n"
    )


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        ("你好", "你 好"),
        ("你  好\u3000吗", "你 好 吗"),
        ("我有3个iPhone。好 ， 的", "我 有 3 个 iPhone。好，的"),
        ("Ａ１と２０２６年", "Ａ１ と ２０２６ 年"),
        ("他说“好”。", "他 说“好”。"),
        ("안녕, 친구야 2명", "안 녕, 친 구 야 2 명"),
        ("ｶﾞｷﾞ", "ｶﾞ ｷﾞ"),
        ("ラーメン々〆", "ラ ー メ ン 々 〆"),
        ("か\u3099き", "か\u3099 き"),
        ("葛\U000e0100城", "葛\U000e0100 城"),
        ("𠮷野家", "𠮷 野 家"),
        ("5%的人", "5%的 人"),
        ("one\nline 你\n好", "one\nline 你\n好"),
        ("Latin only, été 12 %", "Latin only, été 12 %"),
        ("", ""),
    ],
)
def test_characters_are_put_apart(text, apart):
    assert spaced(text) == apart and spaced(apart) == apart


def test_syllables_written_by_their_letters_stay_whole():
    letters = unicodedata.normalize("NFD", "한글말")
    apart = spaced(letters)
    assert unicodedata.normalize("NFC", apart) == "한 글 말" and spaced(apart) == apart


def test_spacing_anything_twice_changes_nothing_more():
    random.seed(1)
    letters = "你好あアｶﾞ한ᄒ\u1161\u11abA1 ，。、「」(\u3000\n\t-é\u3099\u0301😀ー々“”・"
    for _ in range(3000):
        text = "".join(random.choices(letters, k=random.randrange(1, 12)))
        once = spaced(text)
        assert spaced(once) == once, ascii(text)
        assert "".join(once.split()) == "".join(text.split()), ascii(text)


def test_no_sound_by_its_name_is_none():
    assert Prompt("A man.", sound=f"{NO_SOUND.lower()}.") == Prompt("A man.")
    assert Prompt.parse(f"A man.\r\n\r\nBackground Sound:\r\n<{NO_SOUND}>").sound is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Line("", "English", "hi"), "who must be text"),
        (lambda: Line("a", " ", "hi"), "language must be text"),
        (lambda: Line("a", "English", "\n"), "words must be text"),
        (lambda: Line("a", "English", None), "words must be text"),
        (lambda: Line("a>b", "English", "hi"), "none of < >"),
        (lambda: Line("a", "English, really", "hi"), "none of < > ,"),
        (lambda: Prompt(" "), "body must be text"),
        (lambda: Prompt("a\nDialogue:\nb"), "Dialogue"),
        (lambda: Prompt("a\u2028Background Sound:"), "Background Sound"),
        (lambda: Prompt("a", ["hi"]), "list of Line"),
        (lambda: Prompt("a", None), "list of Line"),
        (lambda: Prompt("a", sound="<x>"), "none of < >"),
        (lambda: Prompt.parse("A woman smiles."), "Background Sound"),
        (lambda: Prompt.parse(None), "must be text"),
        (lambda: Prompt.parse('a\n\nDialogue:\n<a, b>: "c"'), "Background Sound"),
        (lambda: Prompt.parse("a\n\nDialogue:\nhello\n\nBackground Sound:\n<x>"), "a line below"),
        (
            lambda: Prompt.parse('a\n\nDialogue:\n<a>: "c"\n\nBackground Sound:\n<x>'),
            "a line below",
        ),
        (lambda: Prompt.parse("a\n\nBackground Sound:\nrain"), "one line"),
        (lambda: Prompt.parse("a\n\nBackground Sound:\n<x>\n<y>"), "one line"),
        (lambda: Prompt.parse("Dialogue:\n\nBackground Sound:\n<x>"), "body must be"),
        (lambda: Prompt.parse("a\nBackground Sound:\n<x>\nDialogue:\n"), "on a line of its own"),
    ],
)
def test_what_the_form_cannot_hold(make, message):
    with pytest.raises(InvalidRequestError, match=message):
        make()


def test_a_prompt_is_requested_as_it_is_written_and_text_as_it_is():
    prompt = Prompt("A man says 你好", [Line("Man", "Mandarin", "你好")])
    assert request_of(prompt, {"seed": 3}) == Request(str(prompt), seed=3)
    assert request_of("A man  says 你好 \n", {}).prompt == "A man  says 你好 \n"


def test_an_engine_takes_a_prompt(engine):
    prompt = Prompt("A man says 你好", [Line("Man", "Mandarin", "你好")])
    small = {"seconds": 0.2, "width": 64, "height": 64, "steps": 1}
    video, same = engine.generate(prompt, **small), engine.generate(str(prompt), **small)
    assert (video.frames == same.frames).all()
