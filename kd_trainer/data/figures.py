"""Synthetic people, and the things that can be mistaken for them (`data/synthetic.py`)."""

from dataclasses import dataclass

import cv2
import numpy as np

from kd_trainer.data.drawing import (
    BACKGROUND,
    HAIR,
    PERSON,
    SKIN,
    Colour,
    Drawing,
    Image,
    Point,
    any_colour,
    pick,
    pixel,
    shade,
    texture,
)

VIVID = (0.45, 0.95)  # saturation of clothes; walls are muted
CLOTHES = ("plain", "plain", "stripes", "checks", "dots", "noise")


@dataclass(frozen=True)
class Body:
    """Where a person stands: `hip` in pixels, `height` in pixels, `lean` and `turn` in radians."""

    hip: Point
    height: float
    lean: float
    width: float

    def at(self, across: float, up: float) -> Point:
        """Pixel position of a point given in body heights, seen from the hip."""
        cosine, sine = float(np.cos(self.lean)), float(np.sin(self.lean))
        x, y = across * self.width * self.height, -up * self.height
        return self.hip[0] + cosine * x - sine * y, self.hip[1] + sine * x + cosine * y


@dataclass(frozen=True)
class Outfit:
    """Colours and cloth of one person."""

    skin: Colour
    hair: Colour
    shirt: Image
    sleeve: Colour
    trousers: Colour
    shoes: Colour


def draw_person(rng: np.random.Generator, drawing: Drawing, hip: Point, height: float) -> None:
    """Draw one person in a random pose, labelled PERSON.

    Args:
        rng: source of pose, build and clothes.
        drawing: changed in place.
        hip: position of the hip in pixels; it may lie outside the picture.
        height: height of the upright person in pixels.
    """
    body = Body(hip, height, float(rng.normal(0, 0.09)), float(rng.uniform(1.0, 1.35)))
    outfit = _outfit(rng, drawing.side, height)
    drawing.label = PERSON
    long_hair = rng.random() < 0.4
    head = body.at(float(rng.normal(0, 0.012)), 0.40)
    radius = height * float(rng.uniform(0.09, 0.118))
    if long_hair:
        drawing.ball((head[0], head[1] + 0.55 * radius), (1.22 * radius, 1.7 * radius), outfit.hair)
    _arm(rng, drawing, body, outfit, -1)
    _legs(rng, drawing, body, outfit)
    drawing.limb(body.at(0, 0.26), head, 0.075 * height, shade(outfit.skin, 0.9))
    _torso(rng, drawing, body, outfit)
    _head(rng, drawing, outfit, head, radius)
    _arm(rng, drawing, body, outfit, 1)
    drawing.label = BACKGROUND


def _outfit(rng: np.random.Generator, side: int, height: float) -> Outfit:
    main, other = (any_colour(rng, saturation=VIVID) for _ in range(2))
    kind = CLOTHES[rng.integers(len(CLOTHES))]
    shirt = texture(rng, side, kind, (main, other), height * rng.uniform(0.04, 0.09))
    return Outfit(
        pick(rng, SKIN),
        pick(rng, HAIR),
        shirt,
        main,
        any_colour(rng, saturation=VIVID, value=(0.2, 0.7)),
        any_colour(rng),
    )


def _torso(rng: np.random.Generator, drawing: Drawing, body: Body, outfit: Outfit) -> None:
    shoulder, waist = float(rng.uniform(0.098, 0.125)), float(rng.uniform(0.07, 0.095))
    hem = float(rng.uniform(0.085, 0.11))
    bottom = -0.03 if rng.random() < 0.7 else float(rng.uniform(-0.24, -0.14))  # shirt or dress
    flare = hem if bottom > -0.1 else hem + 0.06
    outline = [
        (-0.045, 0.305), (0.045, 0.305), (shoulder, 0.275), (shoulder, 0.2), (waist, 0.1),
        (flare, bottom), (-flare, bottom), (-waist, 0.1), (-shoulder, 0.2), (-shoulder, 0.275),
    ]  # fmt: skip
    drawing.shape([body.at(*corner) for corner in outline], outfit.shirt)


def _legs(rng: np.random.Generator, drawing: Drawing, body: Body, outfit: Outfit) -> None:
    bare = rng.random() < 0.3
    thick = body.height * float(rng.uniform(0.085, 0.115))
    stride = float(abs(rng.normal(0, 0.28)))
    for side in (-1, 1):
        thigh = side * (0.06 + stride * float(rng.uniform(0.5, 1)))
        shin = thigh * float(rng.uniform(-0.4, 1.0)) if rng.random() < 0.8 else -1.2 * thigh
        hip = (0.045 * side, 0.0)
        knee = (hip[0] + 0.25 * np.sin(thigh), hip[1] - 0.25 * np.cos(thigh))
        ankle = (knee[0] + 0.24 * np.sin(shin), knee[1] - 0.24 * np.cos(shin))
        lower = outfit.skin if bare else outfit.trousers
        drawing.limb(body.at(*knee), body.at(*ankle), 0.8 * thick, lower)
        drawing.limb(body.at(*hip), body.at(*knee), thick, outfit.trousers)
        foot = body.at(ankle[0] + 0.02 * side, ankle[1] - 0.015)
        drawing.ball(foot, (0.055 * body.height, 0.028 * body.height), outfit.shoes)


def _arm(rng: np.random.Generator, drawing: Drawing, body: Body, outfit: Outfit, side: int) -> None:
    posture = rng.random()
    upper = float(rng.uniform(0.05, 0.4)) if posture < 0.6 else float(rng.uniform(0.5, 2.6))
    bend = float(rng.uniform(-0.5, 0.3)) if posture < 0.6 else float(rng.uniform(-0.3, 1.4))
    if 0.45 < posture < 0.6:  # hand on the hip
        upper, bend = 0.75, -1.6
    thick = body.height * float(rng.uniform(0.062, 0.078))
    shoulder = (0.095 * side, 0.265)
    elbow = (shoulder[0] + side * 0.15 * np.sin(upper), shoulder[1] - 0.15 * np.cos(upper))
    angle = upper + bend
    hand = (elbow[0] + side * 0.15 * np.sin(angle), elbow[1] - 0.15 * np.cos(angle))
    lower = outfit.sleeve if rng.random() < 0.5 else outfit.skin
    drawing.limb(body.at(*elbow), body.at(*hand), 0.85 * thick, lower)
    drawing.limb(body.at(*shoulder), body.at(*elbow), thick, outfit.sleeve)
    drawing.ball(body.at(*hand), (0.55 * thick, 0.55 * thick), outfit.skin)


def _head(
    rng: np.random.Generator, drawing: Drawing, outfit: Outfit, head: Point, radius: float
) -> None:
    x, y = head
    drawing.ball(head, (0.9 * radius, 1.1 * radius), outfit.skin)
    looks = float(rng.uniform(-0.3, 0.3)) * radius
    if rng.random() < 0.8:
        for eye in (-0.33, 0.33):
            spot = (x + looks + eye * radius, y + 0.02 * radius)
            drawing.ball(spot, (0.1 * radius, 0.12 * radius), (30, 24, 24))
        mouth = (x + looks, y + 0.5 * radius)
        drawing.ball(mouth, (0.25 * radius, 0.08 * radius), (170, 70, 70))
    top, axes = pixel((x, y - 0.22 * radius)), pixel((radius, 0.95 * radius))
    hat = rng.random() < 0.2
    colour = any_colour(rng) if hat else outfit.hair
    cv2.ellipse(drawing.picture, top, axes, 0, 180, 360, colour, -1, cv2.LINE_AA)
    cv2.ellipse(drawing.mask, top, axes, 0, 180, 360, drawing.label, -1)
    if hat:
        brim = 1.35 * radius
        left, right = (x - brim, y - 0.28 * radius), (x + brim, y - 0.28 * radius)
        drawing.limb(left, right, 0.24 * radius, shade(colour, 0.8))


def draw_clutter(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    """Draw one thing that shares parts or colours with people, labelled BACKGROUND.

    Args:
        rng: chooses tree, lamp, balls in skin colours, snowman, empty shirt or box.
        drawing: changed in place.
        foot: where the thing stands, in pixels.
        height: its height in pixels.
    """
    kinds = (_tree, _lamp, _balls, _snowman, _shirt, _box)
    kinds[rng.integers(len(kinds))](rng, drawing, foot, height)


def _tree(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    drawing.limb(foot, (x, y - 0.6 * height), 0.1 * height, pick(rng, HAIR[1:3]))
    leaves = pick(rng, ((60, 120, 50), (110, 140, 50), (190, 120, 50), (40, 90, 70)), 20)
    for _ in range(4):
        centre = (x + rng.normal(0, 0.1) * height, y - rng.uniform(0.6, 0.9) * height)
        size = height * float(rng.uniform(0.13, 0.22))
        drawing.ball(centre, (size, 0.9 * size), shade(leaves, float(rng.uniform(0.8, 1.15))))


def _lamp(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    drawing.limb(
        foot, (x, y - 0.9 * height), 0.06 * height, any_colour(rng, saturation=(0.03, 0.3))
    )
    light = pick(rng, (*SKIN, (250, 240, 190)))
    drawing.ball((x, y - 0.92 * height), (0.1 * height, 0.11 * height), light)


def _balls(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    for _ in range(int(rng.integers(1, 4))):
        radius = height * float(rng.uniform(0.06, 0.14))
        centre = (x + rng.normal(0, 0.25) * height, y - radius - rng.uniform(0, 0.5) * height)
        drawing.ball(centre, (radius, radius * float(rng.uniform(0.8, 1.2))), pick(rng, SKIN))


def _snowman(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    colour = any_colour(rng, saturation=(0.03, 0.4))
    for up, size in ((0.2, 0.2), (0.52, 0.15), (0.78, 0.1)):
        drawing.ball((x, y - up * height), (size * height, size * height), colour)


def _shirt(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot[0], foot[1] - 0.75 * height
    colours = (any_colour(rng), any_colour(rng))
    kind = CLOTHES[rng.integers(len(CLOTHES))]
    cloth = texture(rng, drawing.side, kind, colours, 0.07 * height)
    drawing.limb((x, y), (x, y - 0.1 * height), 0.02 * height, (70, 70, 70))
    outline = [
        (-0.05, 0), (0.05, 0), (0.2, 0.12), (0.15, 0.19), (0.11, 0.15), (0.12, 0.42),
        (-0.12, 0.42), (-0.11, 0.15), (-0.15, 0.19), (-0.2, 0.12),
    ]  # fmt: skip
    drawing.shape([(x + across * height, y + down * height) for across, down in outline], cloth)


def _box(rng: np.random.Generator, drawing: Drawing, foot: Point, height: float) -> None:
    x, y = foot
    width, tall = height * float(rng.uniform(0.15, 0.35)), height * float(rng.uniform(0.3, 0.7))
    kind = CLOTHES[rng.integers(len(CLOTHES))]
    colours = (any_colour(rng), any_colour(rng))
    cloth = texture(rng, drawing.side, kind, colours, 0.08 * height)
    slant = float(rng.normal(0, 0.06)) * height
    top = y - tall
    corners = [(x - width / 2, y), (x - width / 2 + slant, top), (x + width / 2 + slant, top)]
    drawing.shape([*corners, (x + width / 2, y)], cloth)
