"""Creature cards: small drawn trading cards with their captions, made on the fly.

Every field of a caption's first sentence can be seen on the card: `type` is the colour, `stage` the
number of stars (none, one or two), `hp` the number of hearts, `body` the creature's outline,
`pattern` what is painted on it; `name` follows from type and body. So a model that looks can be
told from one that guesses: guessing right has a chance of 1 in the number of the field's values.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from idefics_qlora.tiny.shapes import draw_body, draw_mark, hsv, mix, outline

CARD_WIDTH, CARD_HEIGHT = 160, 216
"""Pixels of a drawn card: about 3:4, upright."""

# type -> (root of the name, hue in degrees, saturation, value)
_TYPES = {
    "ember": ("Rusta", 4.0, 0.85, 0.88),
    "tide": ("Marri", 216.0, 0.80, 0.90),
    "leaf": ("Fernu", 122.0, 0.70, 0.68),
    "spark": ("Fizzi", 53.0, 0.90, 0.97),
    "dusk": ("Nocta", 276.0, 0.65, 0.70),
    "stone": ("Grava", 30.0, 0.03, 0.55),
}
# body -> (ending of the name, outline)
_BODIES = {
    "ball": ("pom", "ball"),
    "box": ("dok", "box"),
    "tent": ("zik", "tent"),
    "star": ("lux", "star"),
    "bow": ("vee", "bow"),
}
_PATTERNS = {"plain": "plain", "lined": "lined", "dotted": "dotted"}
_STAGES = ("basic", "stage 1", "stage 2")
_HIT_POINTS = (10, 20, 30, 40, 50)
_SETS = ("Meadow", "Harbor", "Summit", "Cavern")
_HABITS = (
    "It naps in the sun",
    "It collects shiny pebbles",
    "It hums when it is happy",
    "It hides behind its friends",
    "It loves long walks",
    "It dreams of the sea",
)

FIELDS: dict[str, tuple[str, ...]] = {
    "type": tuple(_TYPES),
    "stage": _STAGES,
    "hp": tuple(str(points) for points in _HIT_POINTS),
    "body": tuple(_BODIES),
    "pattern": tuple(_PATTERNS),
    "name": tuple(root + end for root, *_ in _TYPES.values() for end, _ in _BODIES.values()),
}
"""Each visible field and its possible values: a guess is right once in `len(values)` times."""

SPLITS = ("train", "held_out")


class Card(NamedTuple):
    """What makes a card; two cards with equal fields are the same card, however they are drawn."""

    type: str
    stage: str
    hp: int
    body: str
    pattern: str

    @property
    def name(self) -> str:
        """The creature's name: its type's root with its body's ending."""
        return _TYPES[self.type][0] + _BODIES[self.body][0]

    @property
    def sentence(self) -> str:
        """The caption's first sentence, which tells every field but the name."""
        return (
            f"A {self.stage} {self.type} creature with {self.hp} hit points "
            f"and a {self.pattern} {self.body} body."
        )


def _digest(*parts: object) -> int:
    """A number from a stable hash: unlike `hash`, equal in every process."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@functools.cache
def all_cards(split: str) -> tuple[Card, ...]:
    """Every card of a split, in a fixed order.

    For each type, stage and pattern a hash picks a Latin square's transversal over (hp, body): its
    five cards are held out, the other twenty are for training. So a fifth of the space is held out,
    and each single value is exactly as frequent as its neighbours in both splits.

    Raises:
        ValueError: The split is neither "train" nor "held_out".
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    cards = []
    for kind, stage, pattern in itertools.product(_TYPES, _STAGES, _PATTERNS):
        number = _digest("creature cards", kind, stage, pattern)
        slope, offset = 1 + number % 4, number // 4 % 5
        for (i, points), (j, body) in itertools.product(enumerate(_HIT_POINTS), enumerate(_BODIES)):
            held_out = (slope * j + offset) % 5 == i
            if held_out == (split == "held_out"):
                cards.append(Card(kind, stage, points, body, pattern))
    return tuple(cards)


def pick_cards(n: int, rng: random.Random, split: str) -> list[Card]:
    """`n` distinct cards of a split in random order, with every value about equally often.

    Raises:
        ValueError: `n` is negative, or the split has fewer cards.
    """
    left = list(all_cards(split))
    if not 0 <= n <= len(left):
        raise ValueError(f"asked for {n} cards; the split {split!r} has {len(left)} distinct ones")
    rng.shuffle(left)
    seen: dict[object, int] = {}
    picked: list[Card] = []
    for _ in range(n):
        # Of a few candidates the one whose values have come up least, rare fields' values weighing
        # more.
        window = range(max(0, len(left) - 40), len(left))
        best = min(window, key=lambda i: sum(seen.get(v, 0) for v in enumerate(left[i])))
        card = left.pop(best)
        picked.append(card)
        for value in enumerate(card):
            seen[value] = seen.get(value, 0) + 1
    return picked


def draw_card(card: Card, rng: random.Random) -> Image.Image:
    """Draw a card.

    Args:
        card: What to show.
        rng: Decides shade, position, size and ornaments: no two drawings of a card are alike.

    Returns:
        An RGB image of `CARD_WIDTH` by `CARD_HEIGHT` pixels.
    """
    scale = 2  # drawn twice as large and averaged down: smooth edges
    width, height = CARD_WIDTH * scale, CARD_HEIGHT * scale
    _, hue, saturation, value = _TYPES[card.type]
    gray = saturation < 0.1
    hue += rng.uniform(-5, 5)
    saturation = saturation + (rng.uniform(-0.02, 0.02) if gray else rng.uniform(-0.08, 0.08))
    value = value + rng.uniform(-0.05, 0.05)
    colour = hsv(hue, saturation, value)
    white, ink = (255, 255, 255), mix(hsv(hue, saturation, value * 0.35), (20, 18, 24), 0.4)
    paper = mix(colour, white, rng.uniform(0.74, 0.82))

    image = Image.new("RGB", (width, height), mix(colour, (0, 0, 0), 0.12))
    draw = ImageDraw.Draw(image)
    rim = rng.uniform(0.045, 0.06) * width
    draw.rounded_rectangle((rim, rim, width - rim, height - rim), 18, fill=paper)

    dx, dy = rng.uniform(-5, 5), rng.uniform(-5, 5)
    window = (0.115 * width, 0.285 * height, 0.885 * width, 0.755 * height)
    draw.rounded_rectangle(
        window, 20, fill=mix(colour, white, 0.9), outline=mix(colour, ink, 0.3), width=4
    )
    hill = 0.66 * height + dy
    draw.ellipse((0.14 * width, hill, 0.86 * width, 0.752 * height), fill=mix(colour, white, 0.66))
    for _ in range(rng.randint(6, 14)):  # pollen in the window
        x, y = rng.uniform(0.15, 0.85) * width, rng.uniform(0.31, 0.7) * height
        r = rng.uniform(2, 5)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=mix(colour, white, 0.72))

    font = _font(int(0.078 * height))
    draw.text((0.115 * width + dx / 2, 0.055 * height + dy / 2), card.name, fill=ink, font=font)

    stars = _STAGES.index(card.stage)
    star, y = rng.uniform(0.047, 0.053) * width, 0.215 * height + dy / 2
    for i in range(stars):
        x = width / 2 + dx + (i - (stars - 1) / 2) * 0.14 * width
        draw_mark(draw, "star", x, y, star, ink)

    _draw_creature(image, card, colour, ink, (width / 2 + dx, 0.53 * height + dy), rng)

    hearts = _HIT_POINTS.index(card.hp) + 1
    heart, y = rng.uniform(0.050, 0.056) * width, 0.855 * height + dy
    for i in range(hearts):
        x = width / 2 + dx + (i - (hearts - 1) / 2) * 0.136 * width
        draw_mark(draw, "heart", x, y, heart, mix(colour, ink, 0.75))
    return image.reduce(scale)


def _draw_creature(
    image: Image.Image,
    card: Card,
    colour: tuple[int, int, int],
    ink: tuple[int, int, int],
    centre: tuple[float, float],
    rng: random.Random,
) -> None:
    """The creature: feet, feelers, patterned body, face."""
    draw = ImageDraw.Draw(image)
    (cx, cy), width = centre, image.width
    rx = rng.uniform(0.215, 0.245) * width
    ry = rx * rng.uniform(1.02, 1.16)
    shade = mix(colour, ink, 0.45)
    for side in (-1, 1):
        x, y, r = cx + side * rx * 0.45, cy + ry * 0.92, rx * 0.2
        draw.ellipse((x - 1.4 * r, y - r, x + 1.4 * r, y + r), fill=shade)
        tip = (cx + side * rx * rng.uniform(0.3, 0.5), cy - ry * rng.uniform(1.15, 1.25))
        draw.line((cx + side * rx * 0.1, cy - ry * 0.5, *tip), fill=shade, width=5)
        draw.ellipse((tip[0] - 7, tip[1] - 7, tip[0] + 7, tip[1] + 7), fill=shade)
    accent = mix(colour, (255, 255, 255), rng.uniform(0.62, 0.72))
    if rng.random() < 0.5:
        accent = mix(colour, ink, rng.uniform(0.6, 0.7))
    corners = outline(_BODIES[card.body][1], cx, cy, rx, ry, rng.uniform(-0.08, 0.08))
    pitch = rng.uniform(0.105, 0.12) * width
    draw_body(image, corners, _PATTERNS[card.pattern], colour, accent, pitch, rng, shade, 5)

    look = rng.uniform(-3, 3)
    eye, y = rx * rng.uniform(0.17, 0.2), cy + ry * rng.uniform(-0.02, 0.06)
    for side in (-1, 1):
        x = cx + side * rx * 0.3
        draw.ellipse(
            (x - eye, y - eye, x + eye, y + eye), fill=(255, 255, 255), outline=shade, width=2
        )
        pupil = eye * 0.58
        draw.ellipse((x + look - pupil, y - pupil, x + look + pupil, y + pupil), fill=(20, 18, 24))
        glint = eye * 0.2
        draw.ellipse((x + look, y - 2 * glint, x + look + 2 * glint, y), fill=(255, 255, 255))
    mouth = eye * 0.9
    top = y + eye * 0.9
    draw.arc(
        (cx - mouth, top - mouth * 0.5, cx + mouth, top + mouth),
        20,
        160,
        fill=(20, 18, 24),
        width=4,
    )


@functools.cache
def _font(size: int) -> Any:
    """Pillow's own font; without FreeType there is one size only."""
    try:
        return ImageFont.load_default(size=size)
    except (ImportError, TypeError):
        return ImageFont.load_default()


def creature_cards(
    n: int, seed: int = 0, *, split: str = "train", directory: str | Path | None = None
) -> list[dict[str, Any]]:
    """Draw `n` distinct creature cards as dataset rows.

    The rows have the columns of a card data set: `id` (str), `image_url` (str), `caption` (str: the
    visible fields in the first sentence, then more), `name` (str), `hp` (int, hit points) and
    `set_name` (str). The same arguments give the same rows and pixels.

    Args:
        n: How many cards.
        seed: Decides which cards, their order, and how each is drawn.
        split: "train" or "held_out"; no card of one split is in the other, whatever the seeds.
        directory: Where to write the pictures as `<id>.png`; made when missing. Without it, each
            row carries its picture in the column `image` (RGB, 160 x 216 pixels) instead.

    Returns:
        The rows; with a `directory`, `image_url` is the path of the written file.

    Raises:
        ValueError: The split is unknown, or has fewer than `n` cards.
    """
    rng = random.Random(_digest("pick", seed, split))
    folder = None if directory is None else Path(directory).expanduser()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for card in pick_cards(n, rng, split):
        # A card's drawing depends on the seed and the card alone, not on how many are asked for.
        pen = random.Random(_digest("draw", seed, *card))
        set_name = pen.choice(_SETS)
        numbers = (tuple(values).index(v) for values, v in zip(_AXES, card, strict=True))
        card_id = f"s{seed}-" + "".join(map(str, numbers))
        row: dict[str, Any] = {
            "id": card_id,
            "image_url": f"cards/{card_id}.png",
            "caption": f"{card.sentence} {pen.choice(_HABITS)}. It belongs to the set {set_name}.",
            "name": card.name,
            "hp": card.hp,
            "set_name": set_name,
        }
        image = draw_card(card, pen)
        if folder is None:
            row["image"] = image
        else:
            path = folder / f"{card_id}.png"
            image.save(path)
            row["image_url"] = str(path)
        rows.append(row)
    return rows


_AXES: tuple[tuple[Any, ...], ...] = (
    tuple(_TYPES), _STAGES, _HIT_POINTS, tuple(_BODIES), tuple(_PATTERNS),
)  # fmt: skip


def _any(field: str) -> str:
    return "(" + "|".join(FIELDS[field]) + ")"


_SENTENCES = {
    "name": re.compile(rf"\bThis is {_any('name')}\b"),
    "stage": re.compile(rf"\b{_any('stage')} \w+ creature\b"),
    "type": re.compile(rf"\b{_any('type')} creature\b"),
    "hp": re.compile(rf"\bwith {_any('hp')} hit points\b"),
    "body": re.compile(rf"\ba \w+ {_any('body')} body\b"),
    "pattern": re.compile(rf"\ba {_any('pattern')} \w+ body\b"),
}


def card_fields(text: str) -> dict[str, str]:
    """Read the fields that a caption or a generated text states.

    Args:
        text: Such as "This is Rustapom. A basic ember creature with 30 hit points and a plain
            ball body."

    Returns:
        Field to value, both as in `FIELDS`; a field that the text does not state is absent.
    """
    found = {field: pattern.search(text) for field, pattern in _SENTENCES.items()}
    return {field: match.group(1) for field, match in found.items() if match is not None}
