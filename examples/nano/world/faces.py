"""The picture of the nano world: a head and shoulders in flat colours, anti-aliased, batched.

Shapes are signed distances in pixels, so that an edge covers a pixel by halves; layers are laid
over one another from back to front. Coordinates: y from -1 at the top to 1, x to the right from the
middle, in the same unit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from magihuman.runtime.evaluate.clip_score import COLOURS, MOUTH, Colour
from world.captions import BACKGROUNDS, HAIR, SHIRTS

# Colours as sRGB in 0 .. 255; those of captions are where the score knows them too.
SKINS = ((250, 216, 190), (238, 190, 152), (206, 148, 106), (150, 98, 66), (104, 66, 46))
IRISES = ((92, 58, 36), (64, 110, 74), (66, 118, 176), (50, 40, 36), (110, 112, 118))
MAN, CHILD = 1, 2
MIDDLE = (-0.52, 0.52, -0.5, 0.55)  # left, right, top and bottom of where features lie


class Motion(NamedTuple):
    """Of the head, [B, T]: place, roll in radians, turn to the right, and eyes shut, 0 to 1."""

    x: Tensor
    y: Tensor
    roll: Tensor
    turn: Tensor
    shut: Tensor


class Area:
    """A part of the canvas [B, 3, T, h, w], with its coordinates x [w] and y [h, 1].

    left, top: coordinates of its first pixel's centre.
    """

    def __init__(self, pixels: Tensor, pixel: float, left: float, top: float) -> None:
        self.pixels, self.pixel, self.left, self.top = pixels, pixel, left, top
        height, width = pixels.shape[-2:]
        self.x = left + pixel * torch.arange(width, device=pixels.device)
        self.y = (top + pixel * torch.arange(height, device=pixels.device))[:, None]

    def part(self, left: float, right: float, top: float, bottom: float) -> Area:
        """The pixels within; what is drawn there changes the whole."""
        pixels = self.of(self.pixels, left, right, top, bottom)
        rows, columns = self._first(top, self.top), self._first(left, self.left)
        return Area(
            pixels, self.pixel, self.left + columns * self.pixel, self.top + rows * self.pixel
        )

    def of(self, values: Tensor, left: float, right: float, top: float, bottom: float) -> Tensor:
        """That part of values [..., h, w] for all of this area's pixels."""
        rows = slice(self._first(top, self.top), self._first(bottom, self.top))
        columns = slice(self._first(left, self.left), self._first(right, self.left))
        return values[..., rows, columns]

    def _first(self, limit: float, start: float) -> int:
        if math.isinf(limit):
            return 0 if limit < 0 else 1 << 30
        return max(0, math.ceil((limit - start) / self.pixel - 1e-6))

    def cover(self, distance: Tensor) -> Tensor:
        """How much of each pixel lies within a shape. distance: [B, T, h, w], negative inside."""
        return (0.5 - distance / self.pixel).clamp(0, 1)

    def lay(self, colour: Tensor, cover: Tensor) -> None:
        """colour: [B, 3], or [B, 3, T, h, w]; cover: [B or 1, T or 1, h, w]."""
        if colour.ndim == 2:
            colour = colour[:, :, None, None, None]
        self.pixels.lerp_(colour.expand_as(self.pixels), cover[:, None].expand_as(self.pixels))


def render(
    looks: dict[str, Tensor],
    motion: Motion,
    opening: Tensor,
    rounding: Tensor,
    spread: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Frames [B, 3, T, H, W] fp32 in 0 .. 1, and how much each pixel matters, [B, 1, T, H, W].

    looks: the fields of a clip, "skin" and "iris", each [B]. opening, rounding and spread of the
    mouth: [B, T], 0 to 1.
    """
    device, (batch, frames) = opening.device, opening.shape
    pixel = 2 / height
    corner = (pixel / 2 - width / height, pixel / 2 - 1)
    colours = _colours(looks, device)
    person, style = looks["person"], looks["style"]
    is_man, is_child = (_column((person == kind).float()) for kind in (MAN, CHILD))

    area = Area(torch.empty(batch, 3, frames, height, width, device=device), pixel, *corner)
    sheen = 1.05 - 0.13 * (area.x.square() * 0.8 + (area.y + 0.2).square())
    ground = colours["background"][:, :, None, None, None] * sheen
    area.pixels.copy_(ground.clamp(0, 1).expand_as(area.pixels))

    # The head's own coordinates: u to its left and v down from its centre; features turn with it.
    head_x, head_y = _column(motion.x), _column(motion.y) - 0.12 + 0.03 * is_child
    size = 1.0 - 0.06 * is_child + 0.02 * is_man
    head = _Frame(head_x, head_y, _column(motion.roll), size)
    u, v = head(area)
    hair = [_column((style == kind).float()) for kind in range(4)]
    _draw_hair_behind(area, u, v, hair, colours)
    _draw_body(area, head_x, head_y, is_man, is_child, colours)

    jaw = 0.035 * _column(opening)
    narrow = 1 + (0.20 - 0.08 * is_man) * v.clamp(min=0).square() / 0.25
    ears = _ellipse(u.abs() - 0.415, v - 0.02, 0.065, 0.1)
    area.lay(colours["skin_dark"], area.cover(ears))
    face = _ellipse(u * narrow, v, 0.42, torch.where(v > 0, 0.50 + jaw, 0.5))
    face_cover = area.cover(face)
    shade = (1.0 - 0.10 * (u * 1.4).clamp(0, 1).square() - 0.05 * v.clamp(min=0))[:, None]
    area.lay(colours["skin"][:, :, None, None, None] * shade, face_cover)
    turn = _column(motion.turn)
    cheeks = torch.exp(-(((u - turn).abs() - 0.25).square() / 0.008 + (v - 0.15).square() / 0.006))
    area.lay(colours["cheek"], 0.35 * cheeks * face_cover)
    _draw_hair_in_front(area, u, v, hair, colours, is_man)

    middle = area.part(*MIDDLE)
    u, v = head(middle)
    u = u - turn
    _draw_eyes(middle, u, v, looks["gaze"], motion.shut, colours, is_man)
    _draw_nose(middle, u, v, colours)
    smile = _column(looks["mood"].float())
    _draw_mouth(middle, u, v, smile, opening, rounding, spread, colours)

    matters = torch.ones(batch, 1, frames, height, width, device=device)
    near = 5 * torch.exp(-(u.square() / 0.05 + (v - 0.27).square() / 0.02))
    near = near + 3 * torch.exp(-((u.abs() - 0.18).square() / 0.015 + (v + 0.06).square() / 0.01))
    area.of(matters, *MIDDLE).add_(near[:, None])
    return area.pixels.clamp_(0, 1), matters


class _Frame:
    """Coordinates of the head at each pixel, in units of its size."""

    def __init__(self, x: Tensor, y: Tensor, roll: Tensor, size: Tensor) -> None:
        self.x, self.y, self.size = x, y, size
        self.cos, self.sin = roll.cos(), roll.sin()

    def __call__(self, area: Area) -> tuple[Tensor, Tensor]:
        dx, dy = (area.x - self.x) / self.size, (area.y - self.y) / self.size
        return dx * self.cos + dy * self.sin, dy * self.cos - dx * self.sin


def _draw_hair_behind(
    area: Area, u: Tensor, v: Tensor, hair: list[Tensor], colours: dict[str, Tensor]
) -> None:
    short, long, curly, bun = hair
    # One shape for each style, in one distance: radii and the centre differ.
    across = 0.43 * short + 0.52 * long + 0.56 * curly + 0.43 * bun
    down = 0.44 * short + 0.56 * long + 0.52 * curly + 0.44 * bun
    centre = -0.07 * short + 0.0 * long - 0.10 * curly - 0.05 * bun
    ripple = curly * 0.028 * torch.sin(11 * torch.atan2(v + 0.1, u))
    crown = _ellipse(u, v - centre, across + ripple, down + ripple)
    fall = _box(u, v - 0.42, 0.50 + 0.02 * torch.sin(9 * v), 0.44, 0.16) + 9 * (1 - long)
    knot = _ellipse(u, v + 0.62, 0.19, 0.16) + 9 * (1 - bun)
    shape = torch.minimum(torch.minimum(crown, fall), knot)
    area.lay(colours["hair_dark"], area.cover(shape))


def _draw_body(
    area: Area,
    head_x: Tensor,
    head_y: Tensor,
    is_man: Tensor,
    is_child: Tensor,
    colours: dict[str, Tensor],
) -> None:
    bottom = area.part(-math.inf, math.inf, 0.1, 1.0)
    x, y = bottom.x - 0.35 * head_x, bottom.y
    broad = 0.80 + 0.10 * is_man - 0.12 * is_child
    shoulders = _ellipse(x, y - 1.12, broad, 0.56)
    shade = (1.04 - 0.22 * (y - 0.55).clamp(min=0) - 0.06 * x.abs())[:, None]
    shirt = (colours["shirt"][:, :, None, None, None] * shade).clamp(0, 1)
    bottom.lay(shirt, bottom.cover(shoulders))
    thick = 0.15 + 0.03 * is_man - 0.015 * is_child
    neckline = _ellipse(x, y - 0.56, thick + 0.09, 0.17)
    bottom.lay(colours["shirt_dark"], bottom.cover(neckline - 0.022) * bottom.cover(shoulders))
    inside = torch.maximum(neckline, shoulders - 0.02)
    throat = _box(bottom.x - 0.65 * head_x, y - head_y - 0.36, thick, 0.34, 0.06)
    neck = torch.minimum(torch.maximum(throat, y - 0.66), inside)
    under = (y - head_y - 0.42).clamp(0, 0.2) / 0.2  # the chin's shadow
    skin = colours["skin_dark"][:, :, None, None, None] * (0.86 + 0.14 * under)[:, None]
    bottom.lay(skin, bottom.cover(neck))


def _draw_hair_in_front(
    area: Area,
    u: Tensor,
    v: Tensor,
    hair: list[Tensor],
    colours: dict[str, Tensor],
    is_man: Tensor,
) -> None:
    where = (-0.75, 0.75, -1.0, 0.35)
    top = area.part(*where)
    u, v = (area.of(z, *where) for z in (u, v))
    short, long, curly, bun = hair
    ripple = curly * 0.022 * torch.sin(13 * torch.atan2(v + 0.1, u) + 1)
    cap = _ellipse(u, v + 0.06, 0.455 + 0.05 * curly + ripple, 0.475 + 0.05 * curly + ripple)
    # What of the face stays free: an ellipse whose top is the hairline.
    parting = 0.10 * short * (u + 0.1) - 0.12 * long * u.abs()
    line = -0.27 * short - 0.36 * long - 0.25 * curly - 0.30 * bun + parting
    wide = 0.40 * short + 0.355 * long + 0.375 * curly + 0.395 * bun
    free = _ellipse(u, v - (line + 0.52), wide, 0.52 + curly * ripple)
    locks = torch.maximum(cap, -free)
    limit = 0.02 * short + 0.34 * long + 0.08 * curly - 0.04 * bun
    locks = torch.maximum(locks, v - limit)
    light = 1.0 + 0.16 * torch.exp(-((u + 0.15).square() / 0.03 + (v + 0.40).square() / 0.006))
    colour = (colours["hair"][:, :, None, None, None] * light[:, None]).clamp(0, 1)
    top.lay(colour, top.cover(locks))


def _draw_eyes(
    area: Area,
    u: Tensor,
    v: Tensor,
    gaze: Tensor,
    shut: Tensor,
    colours: dict[str, Tensor],
    is_man: Tensor,
) -> None:
    where = (-0.5, 0.5, -0.5, 0.15)
    eyes = area.part(*where)
    u, v = (area.of(z, *where) for z in (u, v))
    side = u.abs() - 0.18
    open_ = 1 - _column(shut)
    white = _ellipse(side, v + 0.06, 0.086, 0.054 * open_ + 0.002)
    cover = eyes.cover(white)
    eyes.lay(colours["eye"], cover)
    aside = _column((gaze == 2).float() - (gaze == 1).float()) * 0.036
    across = torch.where(u < 0, u + 0.18, u - 0.18) - aside
    iris = (across.square() + (v + 0.06).square()).sqrt()
    eyes.lay(colours["iris"], eyes.cover(iris - 0.047) * cover)
    eyes.lay(colours["pupil"], eyes.cover(iris - 0.024) * cover)
    glint = ((across + 0.016).square() + (v + 0.078).square()).sqrt()
    eyes.lay(colours["eye"], eyes.cover(glint - 0.013) * cover)
    lid = _ellipse(side, v + 0.06, 0.096, 0.062 * open_ + 0.012)
    above = torch.maximum(lid, v + 0.052 + 0.016 * open_)
    eyes.lay(colours["lash"], (eyes.cover(above) - cover).clamp(min=0))
    brow = _ellipse(side, v + 0.175 + 0.9 * side.square(), 0.105, 0.017 + 0.008 * is_man)
    eyes.lay(colours["brow"], eyes.cover(brow))


def _draw_nose(area: Area, u: Tensor, v: Tensor, colours: dict[str, Tensor]) -> None:
    tip = torch.exp(-(u.square() / 0.0035 + (v - 0.115).square() / 0.0009))
    area.lay(colours["skin_dark"], 0.75 * tip)
    bridge = torch.exp(-((u - 0.05).square() / 0.0012 + (v - 0.02).square() / 0.012))
    area.lay(colours["skin_dark"], 0.35 * bridge)


def _draw_mouth(
    area: Area,
    u: Tensor,
    v: Tensor,
    smile: Tensor,
    opening: Tensor,
    rounding: Tensor,
    spread: Tensor,
    colours: dict[str, Tensor],
) -> None:
    where = (-0.5, 0.5, 0.0, 0.55)
    mouth = area.part(*where)
    u, v = (area.of(z, *where) for z in (u, v))
    open_, rounded = _column(opening), _column(rounding)
    wide = 0.135 + 0.025 * smile + 0.02 * _column(spread) - 0.065 * rounded
    high = 0.006 + (0.105 - 0.015 * rounded) * open_
    v = v - 0.285 - 0.035 * open_ + smile * 1.3 * u.square() - 0.012 * smile
    inner = _ellipse(u, v, wide - 0.012, high)
    lips = _ellipse(u, v, wide + 0.014, high + 0.026 + 0.008 * rounded)
    mouth.lay(colours["lips"], mouth.cover(lips))
    cover = mouth.cover(inner)
    mouth.lay(colours["mouth"], cover)
    tongue = _ellipse(u, v - high - 0.02, 0.085, 0.055)
    mouth.lay(colours["tongue"], mouth.cover(tongue) * cover)
    teeth = v + high * 0.45 + 0.004
    mouth.lay(colours["teeth"], mouth.cover(teeth) * cover * (open_ * 4).clamp(max=1))


def _colours(looks: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """[B, 3] in 0 .. 1 for each part."""

    def table(rows: Sequence[Colour]) -> Tensor:
        return _table(tuple(rows), device)

    skin = table(SKINS)[looks["skin"]]
    hair = table([COLOURS["hair"][name] for name in HAIR])[looks["hair"]]
    shirt = table([COLOURS["shirt"][name] for name in SHIRTS])[looks["shirt"]]
    rosy = table([(214, 96, 100)])
    dark = table([(40, 26, 26)])
    return {
        "background": table([COLOURS["background"][name] for name in BACKGROUNDS])[
            looks["background"]
        ],
        "skin": skin,
        "skin_dark": skin * table([(222, 205, 198)]),
        "cheek": skin * 0.6 + rosy * 0.4,
        "lips": skin * 0.35 + table([(190, 70, 84)]) * 0.65,
        "hair": hair,
        "hair_dark": hair * 0.80,
        "brow": hair * 0.55 + dark * 0.3,
        "shirt": shirt,
        "shirt_dark": shirt * 0.80,
        "iris": table(IRISES)[looks["iris"]],
        "eye": table([(252, 252, 252)]).expand_as(skin),
        "pupil": table([(20, 16, 18)]).expand_as(skin),
        "lash": dark.expand_as(skin),
        "mouth": table([MOUTH]).expand_as(skin),
        "tongue": table([(196, 86, 92)]).expand_as(skin),
        "teeth": table([(250, 248, 242)]).expand_as(skin),
    }


@functools.cache
def _table(rows: tuple[Colour, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=device) / 255


def _column(x: Tensor) -> Tensor:
    """[B] or [B, T] beside pixels: [B, T or 1, 1, 1]."""
    return x.view(len(x), -1, 1, 1)


def _ellipse(x: Tensor, y: Tensor, across: Tensor | float, down: Tensor | float) -> Tensor:
    """About the signed distance to an ellipse of these radii around 0."""
    p, q = x / across, y / down
    r = (p.square() + q.square()).sqrt()
    slope = ((p / across).square() + (q / down).square()).sqrt().clamp(min=1e-4)
    return r * (r - 1) / slope


def _box(
    x: Tensor, y: Tensor, across: Tensor | float, down: Tensor | float, corner: float
) -> Tensor:
    """Signed distance to a box of these half sides around 0, its corners rounded."""
    dx, dy = x.abs() - across + corner, y.abs() - down + corner
    outside = (dx.clamp(min=0).square() + dy.clamp(min=0).square()).sqrt()
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def sway(loudness: Tensor, gaze: Tensor, generator: torch.Generator) -> Motion:
    """How a head moves: slowly about its place, with its speech, towards what it looks at.

    loudness: [B, T]; the eyes shut for a fifth of a second now and then.
    """
    device, (batch, frames) = loudness.device, loudness.shape
    phase = 2 * math.pi * torch.rand(batch, 1, device=device, generator=generator)
    at = torch.rand(batch, 1, device=device, generator=generator)
    time = torch.arange(frames, device=device) / 25
    slow = phase + 2 * math.pi * 0.35 * time
    aside = ((gaze == 2).float() - (gaze == 1).float())[:, None]
    since = (time - 0.5 - 2.2 * at) % 2.4 * 25  # frames
    shut = (1 - (since - 2).abs() / 2).clamp(0, 1) * (since < 5)
    return Motion(
        x=0.045 * slow.sin() + 0.03 * aside,
        y=0.012 * (2 * slow).cos() + 0.022 * loudness,
        roll=0.05 * (slow + 0.6).sin(),
        turn=0.028 * (slow + 0.3).sin() + 0.05 * aside,
        shut=shut,
    )
