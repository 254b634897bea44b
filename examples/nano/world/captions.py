"""What a clip of the nano world shows, as small integers, and the captions that say so."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

PEOPLE = ("woman", "man", "child")
STYLES = ("short", "long", "curly", "bun")
HAIR = ("black", "brown", "blond", "red", "white", "blue")
SHIRTS = ("red", "green", "blue", "yellow", "white", "black")
BACKGROUNDS = ("green", "blue", "yellow", "pink", "grey", "purple")
GAZES = ("camera", "left", "right")  # as the viewer sees it
MOODS = ("neutral", "smiling")
CONSONANTS = ("b", "d", "g", "k", "l", "m", "n", "p", "s", "t", "w", "h")
VOWELS = ("a", "e", "i", "o", "u")
SYLLABLES = tuple(c + v for c in CONSONANTS for v in VOWELS)
MAX_SYLLABLES = 15
FIELDS = {
    "person": PEOPLE,
    "style": STYLES,
    "hair": HAIR,
    "shirt": SHIRTS,
    "background": BACKGROUNDS,
    "gaze": GAZES,
    "mood": MOODS,
}
NAMED_CHANCE = 0.85  # of each clause of a caption; what is not named is still drawn
LANGUAGES = ("en", "de", "fr", "es", "zh")


@dataclass(frozen=True)
class Clip:
    """One clip: an index into each of `FIELDS`, and indices into `SYLLABLES`."""

    person: int
    style: int
    hair: int
    shirt: int
    background: int
    gaze: int
    mood: int
    syllables: tuple[int, ...]

    @property
    def is_held_out(self) -> bool:
        """Whether its colours are kept from the training: one combination in eight."""
        return (self.hair * 36 + self.shirt * 6 + self.background) % 8 == 5

    def names(self) -> dict[str, str]:
        """The words for what is seen."""
        return {field: words[getattr(self, field)] for field, words in FIELDS.items()}


def draw(rng: random.Random, longest: int = MAX_SYLLABLES, held_out: bool = False) -> Clip:
    """A clip of 1 to `longest` syllables, all else uniform; every other one looks at the camera.

    held_out: one of those that the training never sees.
    """
    while True:
        picked = {field: rng.randrange(len(words)) for field, words in FIELDS.items()}
        if rng.random() < 0.5:
            picked["gaze"] = 0
        count = rng.randint(1, longest)
        clip = Clip(**picked, syllables=tuple(rng.randrange(len(SYLLABLES)) for _ in range(count)))
        if clip.is_held_out == held_out:
            return clip


def attributes(clips: list[Clip], device: torch.device) -> dict[str, Tensor]:
    """The fields as tensors [B], and "syllables" [B, MAX_SYLLABLES], filled up with -1."""
    table = {field: torch.tensor([getattr(c, field) for c in clips]) for field in FIELDS}
    rows = [(*c.syllables, *[-1] * (MAX_SYLLABLES - len(c.syllables))) for c in clips]
    table["syllables"] = torch.tensor(rows)
    return {name: values.to(device, non_blocking=True) for name, values in table.items()}


def caption(clip: Clip, rng: random.Random, language: str | None = None, full: bool = False) -> str:
    """One sentence in one of `LANGUAGES`; clauses are left out at random unless `full`."""
    language = language or rng.choices(LANGUAGES, (6, 2, 2, 2, 1))[0]
    named = {field: full or rng.random() < NAMED_CHANCE for field in FIELDS}
    said = " ".join(SYLLABLES[i] for i in clip.syllables)
    return _SENTENCES[language](clip, named, rng, said)


def _english(clip: Clip, named: dict[str, bool], rng: random.Random, said: str) -> str:
    words = clip.names()
    who = f"a {words['person']}" if named["person"] else "a person"
    hair = _joined(words["style"] if named["style"] else "", words["hair"] if named["hair"] else "")
    if words["style"] == "bun" and named["style"]:
        hair = f" with {words['hair'] + ' ' if named['hair'] else ''}hair in a bun"
    elif hair:
        hair = f" with {hair} hair"
    shirt = f" in a {words['shirt']} shirt" if named["shirt"] else ""
    if rng.random() < 0.3:
        hair, shirt = shirt, hair
    place = f" on a {words['background']} background" if named["background"] else ""
    looks = ""
    if named["gaze"]:
        looks = " looks into the camera" if clip.gaze == 0 else f" looks to the {words['gaze']}"
    acts = _joined(looks, " smiles" if clip.mood == 1 and named["mood"] else "", glue=",")
    acts = f"{acts} and says" if acts else " says"
    if place and rng.random() < 0.3:
        text = f"{place.strip()}, {who}{hair}{shirt}{acts}: {said}"
    else:
        text = f"{who}{hair}{shirt}{place}{acts}: {said}"
    return text[0].upper() + text[1:]


_GERMAN = {
    "woman": "Eine Frau", "man": "Ein Mann", "child": "Ein Kind", "short": "kurzen",
    "long": "langen", "curly": "lockigen", "bun": "hochgesteckten", "black": "schwarz",
    "brown": "braun", "blond": "blond", "red": "rot", "white": "weiß", "blue": "blau",
    "green": "grün", "yellow": "gelb", "pink": "rosa", "grey": "grau", "purple": "lila",
    "camera": "in die Kamera", "left": "nach links", "right": "nach rechts",
}  # fmt: skip


def _german(clip: Clip, named: dict[str, bool], rng: random.Random, said: str) -> str:
    words = {field: _GERMAN.get(word, word) for field, word in clip.names().items()}
    who = words["person"] if named["person"] else "Eine Person"
    hair = _joined(
        words["style"] if named["style"] else "", words["hair"] + "en" if named["hair"] else ""
    )
    hair = f" mit {hair} Haaren" if hair else ""
    shirt = f" im {words['shirt']}en Hemd" if named["shirt"] else ""
    plain = words["background"] in ("rosa", "lila")
    ground = words["background"] + ("" if plain else "em")
    place = f" vor {ground} Hintergrund" if named["background"] else ""
    looks = f" blickt {words['gaze']}" if named["gaze"] else ""
    acts = _joined(looks, " lächelt" if clip.mood == 1 and named["mood"] else "", glue=",")
    return f"{who}{hair}{shirt}{place}{acts + ' und' if acts else ''} sagt: {said}"


class _Romance(NamedTuple):
    """A language whose adjectives follow their nouns."""

    words: dict[str, str]  # for the names of the rest
    hair: tuple[str, ...]
    shirt: tuple[str, ...]
    background: tuple[str, ...]
    person: str
    of_hair: str  # what stands before each
    of_shirt: str
    of_background: str
    looks: str
    smiles: str
    and_says: tuple[str, str]


_FRENCH = _Romance(
    words={
        "woman": "Une femme", "man": "Un homme", "child": "Un enfant", "short": "courts",
        "long": "longs", "curly": "bouclés", "bun": "attachés", "camera": "la caméra",
        "left": "à gauche", "right": "à droite",
    },
    hair=("noirs", "bruns", "blonds", "roux", "blancs", "bleus"),
    shirt=("rouge", "verte", "bleue", "jaune", "blanche", "noire"),
    background=("vert", "bleu", "jaune", "rose", "gris", "violet"),
    person="Une personne",
    of_hair="aux cheveux",
    of_shirt="en chemise",
    of_background="sur fond",
    looks="regarde",
    smiles="sourit",
    and_says=("et", "dit :"),
)  # fmt: skip
_SPANISH = _Romance(
    words={
        "woman": "Una mujer", "man": "Un hombre", "child": "Un niño", "short": "corto",
        "long": "largo", "curly": "rizado", "bun": "recogido", "camera": "a la cámara",
        "left": "a la izquierda", "right": "a la derecha",
    },
    hair=("negro", "castaño", "rubio", "pelirrojo", "blanco", "azul"),
    shirt=("roja", "verde", "azul", "amarilla", "blanca", "negra"),
    background=("verde", "azul", "amarillo", "rosa", "gris", "morado"),
    person="Una persona",
    of_hair="con pelo",
    of_shirt="con camisa",
    of_background="sobre fondo",
    looks="mira",
    smiles="sonríe",
    and_says=("y", "dice:"),
)  # fmt: skip


def _romance(
    language: _Romance, clip: Clip, named: dict[str, bool], rng: random.Random, said: str
) -> str:
    words = {field: language.words.get(word, word) for field, word in clip.names().items()}
    who = words["person"] if named["person"] else language.person
    hair = _joined(
        language.hair[clip.hair] if named["hair"] else "", words["style"] if named["style"] else ""
    )
    hair = f" {language.of_hair} {hair}" if hair else ""
    shirt = f" {language.of_shirt} {language.shirt[clip.shirt]}" if named["shirt"] else ""
    ground = language.background[clip.background]
    place = f" {language.of_background} {ground}" if named["background"] else ""
    looks = f" {language.looks} {words['gaze']}" if named["gaze"] else ""
    smiles = f" {language.smiles}" if clip.mood == 1 and named["mood"] else ""
    acts = _joined(looks, smiles, glue=",")
    also, says = language.and_says
    return f"{who}{hair}{shirt}{place}{acts + ' ' + also if acts else ''} {says} {said}"


_CHINESE = {
    "woman": "女人", "man": "男人", "child": "孩子", "short": "短", "long": "长", "curly": "卷",
    "bun": "盘起的", "black": "黑", "brown": "棕", "blond": "金", "red": "红", "white": "白",
    "blue": "蓝", "green": "绿", "yellow": "黄", "pink": "粉", "grey": "灰", "purple": "紫",
    "camera": "看着镜头", "left": "看向左边", "right": "看向右边",
}  # fmt: skip


def _chinese(clip: Clip, named: dict[str, bool], rng: random.Random, said: str) -> str:
    words = {field: _CHINESE.get(word, word) for field, word in clip.names().items()}
    hair = (words["style"] if named["style"] else "") + (
        words["hair"] + "色" if named["hair"] else ""
    )
    hair = f"{hair}头发的" if hair else ""
    shirt = f"穿{words['shirt']}色衬衫的" if named["shirt"] else ""
    who = words["person"] if named["person"] else "人"
    place = f"在{words['background']}色背景前" if named["background"] else ""
    acts = words["gaze"] if named["gaze"] else ""
    acts += "微笑着" if clip.mood == 1 and named["mood"] else ""
    return f"一个{shirt}{hair}{who}{place}{acts}说： {said}"  # noqa: RUF001 - as Chinese writes it


_SENTENCES = {
    "en": _english,
    "de": _german,
    "fr": partial(_romance, _FRENCH),
    "es": partial(_romance, _SPANISH),
    "zh": _chinese,
}


def _joined(first: str, second: str, glue: str = " ") -> str:
    return f"{first}{glue if first and second else ''}{second}"
