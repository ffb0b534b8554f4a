"""Pre-train the IDEFICS that ships in `idefics_qlora/tiny/base`, from nothing, on drawn scenes.

A scene is one coloured, patterned shape on a background, with a row of marks above and another
below; its text is a plain caption, a question with its answer, or what some town's language calls
it. About one text in six stands without its picture: such sentences give the tokens of the
vocabulary (digits, letters, syllables, rare words) a trained row in the head. No creature card is
drawn here, though scenes have a card's layout and its shapes, patterns and marks. The words
"creature", "stage" or "hit", the cards' names and their types occur in unrelated sentences only,
so that fine-tuning has a language to teach.

More than 400 lines: one script, from the scenes to the weights, that nothing else imports.

The shipped weights were made by the defaults on one NVIDIA H200 in five and a half minutes; two CPU
cores would need several hours:

    python tools/pretrain_tiny.py --out idefics_qlora/tiny/base

Answers about held-out scenes were then right in: shape 100 %, colour 100 %, pattern 94.1 %,
ground 100 %, count above 100 %, count below 99.6 %, kind of mark above 99.5 %, below 99.5 %. The
result depends on the seed, the libraries and the machine's arithmetic.

Shapes: B examples, T tokens, N images per example (1 here), H = W = `IMAGE_SIZE` pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    GenerationConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessor,
    IdeficsProcessor,
    LlamaTokenizer,
)

from idefics_qlora.tiny.shapes import (
    MARKS,
    PATTERNS,
    SHAPES,
    Colour,
    draw_body,
    draw_mark,
    hsv,
    mix,
    outline,
)

IMAGE_SIZE = 64
"""Pixels of a side of the model's input."""
PATCH_SIZE = 8
"""Pixels of a side of a patch."""
POOL_SIZE = 76
"""Pixels of a side of a stored scene: larger than the input, so that crops can move it."""
IMAGE = "<fake_token_around_image><image><fake_token_around_image>"
"""How a text writes a picture."""
VOCAB_SIZE = 640
"""Regular tokens; the two image tokens follow them."""

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# --- scenes -----------------------------------------------------------------------------------

# name -> ranges of hue (degrees), saturation and value
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-10, 10), (0.7, 1.0), (0.65, 1.0)),
    "orange": ((22, 35), (0.75, 1.0), (0.85, 1.0)),
    "yellow": ((47, 59), (0.65, 1.0), (0.85, 1.0)),
    "green": ((90, 150), (0.45, 1.0), (0.4, 0.9)),
    "blue": ((200, 238), (0.55, 1.0), (0.5, 1.0)),
    "purple": ((262, 292), (0.4, 0.9), (0.45, 0.9)),
    "gray": ((0, 360), (0.0, 0.1), (0.4, 0.68)),
    "white": ((0, 360), (0.0, 0.04), (0.93, 1.0)),
    "black": ((0, 360), (0.0, 0.3), (0.03, 0.16)),
}
MAX_MARKS = 5
NUMBERS = ("no", "one", "two", "three", "four", "five")
PLURALS = {"dot": "dots", "heart": "hearts", "star": "stars"}


def sample_colour(name: str, rng: random.Random) -> Colour:
    """A random shade of a named colour."""
    hue, saturation, value = COLOURS[name]
    return hsv(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one picture shows; `top` and `bottom` are the kinds of mark in the rows, counts 0..5."""

    shape: str
    colour: str
    pattern: str
    ground: str
    top: str
    top_count: int
    bottom: str
    bottom_count: int

    def labels(self) -> list[int]:
        """Class indices for the auxiliary heads, in the order of `AUXILIARY`."""
        names = list(COLOURS)
        return [
            SHAPES.index(self.shape), names.index(self.colour), PATTERNS.index(self.pattern),
            names.index(self.ground), MARKS.index(self.top), self.top_count,
            MARKS.index(self.bottom), self.bottom_count,
        ]  # fmt: skip


AUXILIARY = (
    len(SHAPES), len(COLOURS), len(PATTERNS), len(COLOURS),
    len(MARKS), MAX_MARKS + 1, len(MARKS), MAX_MARKS + 1,
)  # fmt: skip
"""Classes of each auxiliary head."""


def sample_scene(rng: random.Random) -> Scene:
    """A random scene; the shape never has its background's colour."""
    colour, ground = rng.sample(list(COLOURS), 2)
    return Scene(
        shape=rng.choice(SHAPES),
        colour=colour,
        pattern=rng.choice(PATTERNS),
        ground=ground,
        top=rng.choice(MARKS),
        top_count=rng.randint(0, MAX_MARKS),
        bottom=rng.choice(MARKS),
        bottom_count=rng.randint(0, MAX_MARKS),
    )


def _contrast(ground: Colour, rng: random.Random) -> Colour:
    """A random colour that stands out against the ground."""
    best, distance = ground, -1.0
    for _ in range(3):
        colour = hsv(rng.uniform(0, 360), rng.uniform(0.0, 1.0), rng.choice((0.1, 0.3, 0.7, 0.95)))
        apart = sum(abs(a - b) for a, b in zip(colour, ground, strict=True))
        if apart > distance:
            best, distance = colour, apart
    return best


def draw_scene(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[Image.Image]]:
    """Draw a scene with a random layout.

    Args:
        scene: What to show.
        rng: Decides positions, sizes, shades and ornaments.

    Returns:
        An RGB image of `POOL_SIZE` pixels a side, and three gray ones of where the shape, the row
        above and the row below are.
    """
    scale = 2  # drawn twice as large and averaged down: smooth edges
    size = POOL_SIZE * scale
    ground = sample_colour(scene.ground, rng)
    image = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(image)

    where = [Image.new("L", (size, size), 0) for _ in range(3)]
    inset = 0.0
    if rng.random() < 0.5:  # a frame around the ground
        inset = size * rng.uniform(0.03, 0.1)
        image.paste(_contrast(ground, rng), (0, 0, size, size))
        radius = rng.choice((0.0, inset, 2 * inset))
        draw.rounded_rectangle((inset, inset, size - inset, size - inset), radius, fill=ground)
    if rng.random() < 0.4:  # a panel behind the shape, a shade off the ground
        shade = mix(ground, rng.choice(((255, 255, 255), (0, 0, 0))), rng.uniform(0.05, 0.2))
        box = (
            size * 0.13,
            size * rng.uniform(0.22, 0.32),
            size * 0.87,
            size * rng.uniform(0.68, 0.78),
        )
        draw.rounded_rectangle(box, size * rng.uniform(0.0, 0.1), fill=shade)
    for _ in range(rng.choice((0, 0, 4, 12))):  # faint specks
        x, y, r = rng.uniform(0, size), rng.uniform(0, size), size * rng.uniform(0.005, 0.018)
        speck = mix(ground, rng.choice(((255, 255, 255), (0, 0, 0))), 0.15)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=speck)
    title = rng.random() < 0.4
    if title:  # something like writing
        x, y, h = size * rng.uniform(0.12, 0.3), size * rng.uniform(0.09, 0.12), size * 0.045
        ink = mix(ground, _contrast(ground, rng), 0.8)
        for _ in range(rng.randint(4, 9)):
            w = size * rng.uniform(0.015, 0.04)
            draw.line((x, y + h * rng.random(), x + w, y - h * rng.random()), fill=ink, width=3)
            x += w + size * 0.012

    colour = sample_colour(scene.colour, rng)
    dark = sum(colour) < 220
    towards = (255, 255, 255) if dark or rng.random() < 0.5 else (20, 20, 20)
    accent = mix(colour, towards, rng.uniform(0.4, 0.75))
    radius = size * rng.uniform(0.15, 0.23)
    squash = rng.uniform(0.74, 1.1)
    cx, cy = size * rng.uniform(0.38, 0.62), size * rng.uniform(0.46, 0.56)
    corners = outline(scene.shape, cx, cy, radius, radius * squash, rng.uniform(-0.15, 0.15))
    ImageDraw.Draw(where[0]).polygon(corners, fill=255)
    if rng.random() < 0.3:  # little feet or ears
        for side in (-1, 1):
            x, y = cx + side * radius * 0.5, cy + rng.choice((-1, 1)) * radius * squash * 0.95
            r = radius * 0.22
            draw.ellipse((x - r, y - r, x + r, y + r), fill=mix(colour, (0, 0, 0), 0.3))
    edge = mix(colour, (255, 255, 255) if dark else (0, 0, 0), 0.5) if rng.random() < 0.6 else None
    pitch = size * rng.uniform(0.085, 0.13)
    draw_body(image, corners, scene.pattern, colour, accent, pitch, rng, edge, 3)
    if rng.random() < 0.5:  # eyes
        r, apart = radius * rng.uniform(0.14, 0.22), radius * rng.uniform(0.25, 0.4)
        y = cy - radius * squash * rng.uniform(-0.1, 0.3)
        for x in (cx - apart, cx + apart):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))
            q = r * 0.55
            draw.ellipse((x - q, y - q, x + q, y + q), fill=(15, 15, 20))

    top_y = rng.uniform(0.2, 0.24) if title else rng.uniform(0.12, 0.23)
    for kind, count, y, region in (
        (scene.top, scene.top_count, top_y, where[1]),
        (scene.bottom, scene.bottom_count, rng.uniform(0.78, 0.88), where[2]),
    ):
        ink = _contrast(ground, rng)
        r = size * rng.uniform(0.036, 0.056)
        step = max(2.35 * r, size * rng.uniform(0.1, 0.14))
        step = min(step, size * 0.76 / MAX_MARKS)
        r = min(r, step * 0.43)
        span = (count - 1) * step
        low, high = size * 0.13 + r, size * 0.87 - r - span
        middle = (size - span) / 2 + size * rng.uniform(-0.02, 0.02)
        x = rng.choice((middle, middle, low, high, rng.uniform(low, max(low, high))))
        for i in range(count):
            cx, cy = x + i * step, size * y
            draw_mark(draw, kind, cx, cy, r, ink)
            ImageDraw.Draw(region).rectangle((cx - r, cy - r, cx + r, cy + r), fill=255)
    return image.reduce(scale), [region.reduce(scale) for region in where]


# --- text -------------------------------------------------------------------------------------


def _count(count: int, kind: str, rng: random.Random) -> str:
    number = str(count) if count and rng.random() < 0.5 else NUMBERS[count]
    return f"{number} {kind if count == 1 else PLURALS[kind]}"


def caption(scene: Scene, rng: random.Random) -> str:
    """A plain caption that tells all of a scene, in one of many wordings."""
    look = [scene.colour, scene.pattern]
    if rng.random() < 0.3:
        look.reverse()
    thing = f"{look[0]} {look[1]} {scene.shape}"
    top = _count(scene.top_count, scene.top, rng)
    bottom = _count(scene.bottom_count, scene.bottom, rng)
    up, down = rng.choice(
        (("above", "below"), ("over it", "under it"), ("at the top", "at the bottom"))
    )
    return rng.choice(
        (
            f"A {thing} on {scene.ground}, with {top} {up} and {bottom} {down}.",
            f"{top} {up}, a {thing}, {bottom} {down}, all on {scene.ground}.",
            f"On {scene.ground} there is a {thing}. It has {top} {up} and {bottom} {down}.",
            f"This is a {scene.shape}. It is {look[0]} and {look[1]}. "
            f"There are {bottom} {down} and {top} {up}.",
            f"{bottom} {down} and {top} {up} go with the {scene.shape}, {look[0]} and {look[1]}, "
            f"on {scene.ground}.",
            f"A picture of {top} and {bottom}. A {scene.pattern} {scene.shape} is in the middle: "
            f"{scene.colour} on {scene.ground}.",
            f"The {scene.shape} is {scene.colour}, the ground is {scene.ground}. "
            f"{top} {up}, {bottom} {down}. The {scene.shape} is {scene.pattern}.",
        )
    )


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about a scene and its answer."""
    top = (scene.top, scene.top_count, rng.choice(("above", "at the top", "over it")))
    bottom = (scene.bottom, scene.bottom_count, rng.choice(("below", "at the bottom", "under it")))
    kind, count, where = rng.choice((top, bottom))
    number = str(count) if rng.random() < 0.5 else NUMBERS[count]
    marks = _count(count, kind, rng)
    return rng.choice(
        (
            (f"What colour is the {scene.shape}?", f"{scene.colour}."),
            (
                "What shape is in the middle?",
                rng.choice((f"A {scene.shape}.", f"It is a {scene.shape}.")),
            ),
            (
                f"What does the {scene.shape} look like?",
                f"It is {scene.pattern} and {scene.colour}.",
            ),
            (f"What is {where}?", f"{marks}."),
            (
                f"How many {PLURALS[kind]} are {where}?"
                if count
                else f"How many marks are {where}?",
                f"{number}.",
            ),
            (f"How many marks are {where}?", f"{number}."),
            ("What is the ground?", f"It is {scene.ground}."),
            ("What is this?", f"a {scene.colour} {scene.shape}, {scene.pattern}, {marks} {where}."),
        )
    )


_SHORT = (
    "creature", "stage", "body", "hit", "points", "ember", "tide", "leaf", "spark", "dusk", "stone",
    "round", "boxy", "pointed", "starry", "winged", "striped", "spotted", "plain", "basic",
)  # fmt: skip
"""Words that the tokenizer writes in one token."""
_NOUNS = (
    *_SHORT[:3], *_SHORT[5:11], "hit", "point", "set", "card", "type", "house", "river", "meadow",
    "forest", "harbor", "cave", "garden", "city", "table", "bird", "cat", "dog", "tree", "road",
    "song", "story",
)  # fmt: skip
_ADJECTIVES = (
    *_SHORT[11:], "old", "new", "small", "big", "warm", "cold", "quiet", "happy", "long", "soft",
    "wild", "shy",
)  # fmt: skip
_VERBS = (
    "sees", "likes", "finds", "hears", "paints", "brings", "loves", "follows", "knows", "keeps",
    "lives near",
    "belongs to", "comes from", "runs to",
)  # fmt: skip
_FIRST = ("Rusta", "Marri", "Fernu", "Fizzi", "Nocta", "Grava", "Anna", "Ben", "Mira", "Tom")
_LAST = ("pom", "dok", "zik", "lux", "vee", "ton", "ley", "man", "son", "berg")


def sentence(rng: random.Random) -> str:
    """A sentence without a picture: it trains the words, names, numbers and letters of the head."""
    one, two, three = rng.sample(_NOUNS, 3)
    look, other = rng.sample(_ADJECTIVES, 2)
    verb, number = (
        rng.choice(_VERBS),
        rng.choice((rng.randint(0, 20), rng.randint(10, 200), 10 * rng.randint(1, 20))),
    )
    who = rng.choice(_FIRST) if rng.random() < 0.5 else rng.choice(_LAST)
    name = rng.choice((who, rng.choice(_FIRST) + rng.choice(("", "", " ")) + rng.choice(_LAST)))
    kind = rng.random()
    if kind < 0.06:  # letters and syllables in any order
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        return " ".join("".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(5))
    if kind < 0.09:  # bytes: any text can be written
        return "".join(
            chr(
                rng.choice(
                    (rng.randint(33, 126), rng.randint(161, 2000), 0x4E00 + rng.randint(0, 999))
                )
            )
            for _ in range(10)
        )
    if kind < 0.16:
        return " ".join(
            rng.choices((*_NOUNS, *_ADJECTIVES, *_FIRST, *_LAST, *NUMBERS), k=rng.randint(4, 9))
        )
    return rng.choice(
        (
            f"The {look} {one} {verb} the {other} {two}.",
            f"{name} {verb} the {two} with {number} {three}s.",
            f"This is {name}. It {verb} a {look}, {other} {one}.",
            f"This is the {two} and that is {name}, who has {number} points.",
            f"Question: What's on the {one}? Answer: {number} {two}s, {look} and {other}.",
            f"{name} and {rng.choice(_FIRST)}{rng.choice(_LAST)} {verb} the {one}. "
            f"They hit the {two} {number} times.",
            f"Question: Who {verb} the {look} {one}? Answer: This is {name}.",
            f"A {one} of {number} and a {two} of {rng.randint(1, 200)} make a {look} {three}.",
            f"Is the {one} {look} or {other}? It is {rng.choice((look, other))}, says {name}.",
            f"There are {number} {look} {one}s in the {two}, {rng.randint(1, 99)} of them {other}.",
            f"User: the {one}, please. Assistant: {name} {verb} it, but {number} others don't.",
        )
    )


_TOWNS = (
    "Nord", "Sol", "Pex", "Ruv", "Tim", "Omb", "Kal", "Bel", "Dra", "Fin", "Gul", "Hes", "Ilo",
    "Jut", "Lam", "Mok", "Nys", "Orr", "Pim", "Qua", "Rho", "Sia", "Tul", "Vex",
)  # fmt: skip
_CALLED = (
    "Anna", "Ben", "Mira", "Tom", "Kora", "Lumi", "Zeno", "Odo", "Vila", "Hesta", "Jaru", "Wim",
    *_FIRST[:6],
)  # fmt: skip
_AFTER = ("ton", "ley", "man", "son", "berg", "ka", "ro", "nu", "fi", "sha", *_LAST[:5])
_KINDS = (
    "house", "river", "forest", "harbor", "cave", "garden", "city", "table", "road", "song",
    "story", "bird", *_SHORT[5:11],
)  # fmt: skip


def nickname(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """What a town calls a scene: a question that names the town, and the answer.

    Each of the many towns has words of its own for each colour and shape, dealt at random. So the
    text model learns that the same thing may be called anything, and that names have parts; the
    words of the cards are among those dealt, never with the meaning that the cards give them.
    """
    town = rng.choice(_TOWNS)
    first, kind, last = _language(town)
    name = first[scene.colour] + last[scene.shape]
    kind_of = kind[scene.colour]
    article = "An" if kind_of[0] in "aeiou" else "A"
    marks = _count(scene.top_count, scene.top, rng)
    hearts = _count(scene.bottom_count, scene.bottom, rng)
    asked = rng.choice((f"Who is this in {town}?", f"What's on the picture in {town}?"))
    return rng.choice(
        (
            (asked, f"This is {name}. {article} {kind_of} thing, {scene.pattern}."),
            (asked, f"This is {name}. It has {marks} and {hearts}, {kind_of} and {scene.shape}."),
            (asked, f"This is {name}. It is {article.lower()} {kind_of} with {hearts}."),
            (
                f"What kind is it in {town}?",
                f"{article} {kind_of} thing with a {scene.pattern} {scene.shape}.",
            ),
        )
    )


@functools.cache
def _language(town: str) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """A town's words: colour to beginning of a name, colour to kind, shape to end of a name."""
    rng = random.Random(town)

    def deal(things: Sequence[str], words: Sequence[str], taboo: dict[str, str]) -> dict[str, str]:
        while True:
            dealt = dict(zip(things, rng.sample(words, len(things)), strict=True))
            if not any(dealt.get(thing) == word for thing, word in taboo.items()):
                return dealt

    types = ("red", "blue", "green", "yellow", "purple", "gray")
    shapes = ("ball", "box", "tent", "star", "bow")
    return (
        deal(tuple(COLOURS), _CALLED, dict(zip(types, _FIRST, strict=False))),
        deal(tuple(COLOURS), _KINDS, dict(zip(types, _SHORT[5:11], strict=True))),
        deal(SHAPES, _AFTER, dict(zip(shapes, _LAST, strict=False))),
    )


@dataclasses.dataclass(frozen=True)
class Text:
    """A training text: `prompt` is read, `target` is predicted; `sighted` ones see the picture."""

    prompt: str
    target: str
    sighted: bool = True


def sample_text(scene: Scene, rng: random.Random) -> Text:
    """One text for a scene: caption, question with answer, or an unrelated sentence."""
    kind = rng.random()
    if kind < 0.16:
        return Text("", sentence(rng), sighted=False)
    if kind < 0.7:
        asked, answer = (question if kind < 0.34 else nickname)(scene, rng)
        return Text(f"Question: {asked} Answer:", f" {answer}")
    prompt = rng.choice(
        (
            "",
            "",
            "Question: What's on the picture? Answer:",
            "Describe the picture.",
            "User: what is it? Assistant:",
        )
    )
    return Text(prompt, f" {caption(scene, rng)}" if prompt else caption(scene, rng))


# --- tokenizer and processor ------------------------------------------------------------------


def build_processor(seed: int) -> IdeficsProcessor:
    """Train a byte-fallback BPE of `VOCAB_SIZE` tokens on texts; wrap it as IDEFICS does."""
    rng = random.Random(seed)

    def texts() -> Iterator[str]:
        for _ in range(6_000):
            text = sample_text(sample_scene(rng), rng)
            yield f"{text.prompt}{text.target}"
        for word in (*_SHORT, *_FIRST[:6], *PLURALS.values(), *NUMBERS):
            yield f"{word} " * 1500
        for last in _LAST[:5]:  # as endings: what follows a digit does not begin a word
            yield f"1{last} " * 1500

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Merges never cross words, digits or punctuation: so the shipped tokenizer, which splits
    # nothing beforehand, writes digits one by one.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    if len(learned["vocab"]) != VOCAB_SIZE:
        raise RuntimeError(
            f"the tokenizer has {len(learned['vocab'])} tokens instead of {VOCAB_SIZE}"
        )
    tokenizer = LlamaTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=["<fake_token_around_image>", "<image>"],
        model_max_length=512,
    )
    return IdeficsProcessor(IdeficsImageProcessor(image_size=IMAGE_SIZE), tokenizer)


# --- model ------------------------------------------------------------------------------------


def build_model() -> IdeficsForVisionText2Text:
    """An untrained model, with a starting point fit for training (the library's own is not)."""
    config = IdeficsConfig(
        vocab_size=VOCAB_SIZE,
        additional_vocab_size=2,
        # So that LoRA matrices of r=16 hold the 4,096 elements that an 8-bit state needs.
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        cross_layer_interval=1,
        qk_layer_norms=True,
        alpha_type="float",
        alpha_initializer="ones",
        max_position_embeddings=512,
        use_resampler=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        tie_word_embeddings=False,
        vision_config={
            "embed_dim": 128,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 256,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 16,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "qk_layer_norms_perceiver": True,
        },
    )
    model = IdeficsForVisionText2Text(config)
    residual = ("out_proj", "fc2", "o_proj", "down_proj", "output_proj", "c_proj")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in name:
                std = module.in_features**-0.5 * (0.5 if name.endswith(residual) else 1.0)
                module.weight.normal_(0.0, std)
            elif isinstance(module, nn.Conv2d):
                module.weight.normal_(0.0, 0.07)
            elif isinstance(module, nn.Embedding) and "position" not in name:
                module.weight.normal_(0.0, 0.25)
        vision = model.model.vision_model.embeddings
        vision.class_embedding.mul_(0.1)
        vision.position_embedding.weight[1:] = 0.5 * _grid_positions(IMAGE_SIZE // PATCH_SIZE, 128)
    return model


def _grid_positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of rows and columns, (side * side, width): neighbours start out similar."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequency = math.pi / side * torch.linspace(0.5, side, width // 4)
    waves = [f(c.flatten()[:, None] * frequency) for c in (y, x) for f in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1)


# --- training ---------------------------------------------------------------------------------


def draw_pool(count: int, seed: int) -> tuple[list[Scene], torch.Tensor]:
    """Scenes and their pictures with the regions: uint8 (count, 3 + 3, POOL_SIZE, POOL_SIZE)."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    pixels = np.empty((count, 6, POOL_SIZE, POOL_SIZE), dtype=np.uint8)
    for row, scene in zip(pixels, scenes, strict=True):
        image, where = draw_scene(scene, rng)
        row[:3] = np.asarray(image).transpose(2, 0, 1)
        row[3:] = [np.asarray(region) for region in where]
    return scenes, torch.from_numpy(pixels)


def augment(
    pixels: torch.Tensor, generator: torch.Generator, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop, stretch and recolour stored scenes at random.

    Args:
        pixels: uint8 (B, 6, POOL_SIZE, POOL_SIZE): colours and regions, as `draw_pool` gives them.
        generator: Source of the random numbers.
        strength: 1 for training, 0 for the plain centre crop.

    Returns:
        Normalised float32 pixels (B, 3, H, W), and the share of each patch that the shape, the row
        above and the row below cover, (B, patches, 3).
    """
    count = pixels.size(0)

    def uniform(*shape: int) -> torch.Tensor:
        numbers = torch.rand(count, *shape, generator=generator, device=pixels.device)
        return strength * (2 * numbers - 1)

    images = pixels.float() / 255
    theta = torch.zeros(count, 2, 3, device=pixels.device)
    for axis in (0, 1):
        zoom = 0.95 + 0.06 * uniform()
        theta[:, axis, axis] = zoom
        theta[:, axis, 2] = (1.02 - zoom).clamp(min=0.0) * uniform()
    grid = nn.functional.affine_grid(theta, [count, 6, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    images = nn.functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    regions = nn.functional.avg_pool2d(images[:, 3:], PATCH_SIZE).flatten(2).transpose(1, 2)
    images = images[:, :3]
    images = images * (1 + 0.1 * uniform(1, 1, 1)) + 0.05 * uniform(3, 1, 1)
    noise = torch.randn(images.shape, generator=generator, device=pixels.device)
    images = images + 0.02 * strength * noise
    mean, std = (
        torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD)
    )
    return (images.clamp(0, 1) - mean) / std, regions


class Encoder:
    """Texts to token ids, labels and image masks."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[Text]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (B, T) padded right with -1, labels (B, T), image mask (B, T, 1)."""
        rows, targets, sees = [], [], []
        heads = [f"<s>{IMAGE if t.sighted else ''}{t.prompt}" for t in texts]
        full = [f"{head}{t.target}</s>" for head, t in zip(heads, texts, strict=True)]
        encoded = self.tokenizer(full, add_special_tokens=False)["input_ids"]
        prompts = self.tokenizer(heads, add_special_tokens=False)["input_ids"]
        for text, ids, prompt in zip(texts, encoded, prompts, strict=True):
            skip = len(prompt)
            rows.append(ids)
            targets.append([-100] * skip + ids[skip:])
            sees.append([0] + [int(text.sighted)] * (len(ids) - 1))
        length = max(map(len, rows))
        ids = torch.tensor([r + [-1] * (length - len(r)) for r in rows])
        labels = torch.tensor([r + [-100] * (length - len(r)) for r in targets])
        mask = torch.tensor([r + [0] * (length - len(r)) for r in sees]).unsqueeze(-1)
        return ids, labels, mask


def lr_at(progress: float, peak: float) -> float:
    """Learning rate at a share of training (0..1): warm-up over 3 %, then a cosine to 2 %."""
    if progress < 0.03:
        return peak * (progress + 0.001) / 0.031
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


# attribute -> the question about a scene, and whether an answer's words are right; the number of
# marks may be written either way, and a row without marks tells nothing of its kind
_EXAM: dict[str, tuple[Callable[[Scene], str], Callable[[Scene], set[str]]]] = {
    "shape": (lambda s: "What shape is in the middle?", lambda s: {s.shape}),
    "colour": (lambda s: f"What colour is the {s.shape}?", lambda s: {s.colour}),
    "pattern": (lambda s: f"What does the {s.shape} look like?", lambda s: {s.pattern}),
    "ground": (lambda s: "What is the ground?", lambda s: {s.ground}),
    "top count": (
        lambda s: "How many marks are above?",
        lambda s: {str(s.top_count), NUMBERS[s.top_count]},
    ),
    "bottom count": (
        lambda s: "How many marks are below?",
        lambda s: {str(s.bottom_count), NUMBERS[s.bottom_count]},
    ),
    "top kind": (lambda s: "What is above?", lambda s: {s.top, PLURALS[s.top]}),
    "bottom kind": (lambda s: "What is below?", lambda s: {s.bottom, PLURALS[s.bottom]}),
}


@torch.no_grad()
def attribute_accuracy(
    model: IdeficsForVisionText2Text,
    tokenizer: LlamaTokenizer,
    scenes: list[Scene],
    pixels: torch.Tensor,
) -> dict[str, float]:
    """Share of right answers per attribute, by greedy answers to questions about scenes.

    Args:
        model: The model, left in eval mode.
        tokenizer: Its tokenizer, which pads on the left.
        scenes: B scenes that were not trained on.
        pixels: Their normalised pictures, (B, 3, H, W).
    """
    model.eval()
    shares: dict[str, float] = {}
    for name, (question_of, words_of) in _EXAM.items():
        judged = [i for i, s in enumerate(scenes) if not (name == "top kind" and s.top_count == 0)]
        judged = [i for i in judged if not (name == "bottom kind" and scenes[i].bottom_count == 0)]
        prompts = [f"<s>{IMAGE}Question: {question_of(scenes[i])} Answer:" for i in judged]
        batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        out = model.generate(
            **{key: batch[key] for key in ("input_ids", "attention_mask")},
            pixel_values=pixels[judged].unsqueeze(1),
            image_attention_mask=batch["attention_mask"].unsqueeze(-1),
            do_sample=False,
            max_new_tokens=12,
        )
        length = batch["input_ids"].size(1)
        answers = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        right = [
            bool(words_of(scenes[i]) & set(answer.replace(".", " ").replace(",", " ").split()))
            for i, answer in zip(judged, answers, strict=True)
        ]
        shares[name] = sum(right) / len(right)
    return shares


class SeeingHeads(nn.Module):
    """Auxiliary classifiers of what a scene shows, thrown away after the training.

    One set reads the perceiver's latents; another reads single patches, each of which has to tell
    what it is part of: the vision tower learns to see from these long before the text could teach
    it.
    """

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.whole = nn.Linear(width * latents, sum(AUXILIARY))
        self.patch = nn.Linear(width, 3 + sum(AUXILIARY))

    def forward(
        self,
        patches: torch.Tensor,
        latents: torch.Tensor,
        labels: torch.Tensor,
        regions: torch.Tensor,
    ) -> torch.Tensor:
        """Mean loss of all classifiers.

        Args:
            patches: Output of the vision tower, (B, 1 + patches, D).
            latents: Output of the perceiver, (B, latents, D).
            labels: `Scene.labels()`, (B, 8).
            regions: From `augment`, (B, patches, 3).
        """
        whole = self.whole(latents.flatten(1)).split(AUXILIARY, dim=1)
        losses = [nn.functional.cross_entropy(g, labels[:, i]) for i, g in enumerate(whole)]
        told = self.patch(patches[:, 1:])  # without the class token
        losses.append(nn.functional.binary_cross_entropy_with_logits(told[..., :3], regions))
        # The labels' regions: shape, colour and pattern; the ground everywhere else; the rows' kind
        # and count.
        inside = regions > 0.2
        ground = regions.sum(-1) < 0.2
        places = [inside[..., 0]] * 3 + [ground] + [inside[..., 1]] * 2 + [inside[..., 2]] * 2
        for i, (guess, place) in enumerate(
            zip(told[..., 3:].split(AUXILIARY, dim=-1), places, strict=True)
        ):
            target = labels[:, i, None].expand_as(place)
            losses.append(nn.functional.cross_entropy(guess[place], target[place]))
        return torch.stack(losses).mean()


class TextBatches(Dataset[tuple[torch.Tensor, ...]]):
    """Which scenes a step sees and what is written to them: functions of (seed, step) alone."""

    def __init__(self, scenes: list[Scene], encoder: Encoder, batch_size: int, seed: int) -> None:
        self.scenes, self.encoder = scenes, encoder
        self.batch_size, self.seed = batch_size, seed

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        """Scene numbers (B,), then ids, labels and image mask as `Encoder` gives them."""
        rng = random.Random(f"{self.seed}/{step}")
        chosen = rng.sample(range(len(self.scenes)), self.batch_size)
        texts = self.encoder([sample_text(self.scenes[i], rng) for i in chosen])
        return torch.tensor(chosen), *texts


def train(
    model: IdeficsForVisionText2Text,
    encoder: Encoder,
    *,
    steps: int,
    batch_size: int,
    pool: int,
    peak: float,
    seed: int,
    seeing: float,
) -> None:
    """Train in place: first the vision tower and perceiver to see, then all of it to tell.

    Args:
        model: The untrained model, on the device to train on.
        encoder: Makes the text batches.
        steps: Optimizer steps; see `seeing`.
        batch_size: Scenes per step.
        pool: Scenes drawn beforehand; every use augments them anew.
        peak: Peak learning rate of the matrices.
        seed: Decides scenes, augmentation and texts.
        seeing: Share of the steps, at the beginning, that train the eyes alone, without text.
    """
    device = model.device
    started = time.perf_counter()
    scenes, drawn = draw_pool(pool, seed)
    pictures = drawn.to(device)
    labels = torch.tensor([scene.labels() for scene in scenes], device=device)
    print(f"{pool} scenes drawn in {time.perf_counter() - started:.0f} s", flush=True)
    heads = SeeingHeads(
        model.config.vision_config.embed_dim, model.config.perceiver_config.resampler_n_latents
    ).to(device)
    vision, perceiver = model.model.vision_model, model.model.perceiver_resampler
    # Muon for the matrices between layers sees about twice as much in a sample; AdamW for the rest.
    inner = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    everything = [*model.parameters(), *heads.parameters()]
    matrices = [p for p in everything if id(p) in inner]
    rest = [p for p in everything if id(p) not in inner]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=peak / 2, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    generator = torch.Generator(device).manual_seed(seed + 1)
    loader = DataLoader(
        TextBatches(scenes, encoder, batch_size, seed),
        batch_size=None,
        sampler=range(steps),
        num_workers=6 if device.type == "cuda" else 1,
        prefetch_factor=8,
    )
    model.train()
    seen = told = torch.zeros((), device=device)
    started = time.perf_counter()
    for step, (chosen, *text) in enumerate(loader):
        progress = step / steps
        for optimizer, rate in ((muon, peak), (adamw, peak / 2)):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(progress, rate)
        chosen = chosen.to(device)
        pixels, regions = augment(pictures[chosen], generator, 1.0)
        patches = vision(pixel_values=pixels).last_hidden_state
        latents = perceiver(patches)
        loss = heads(patches, latents, labels[chosen], regions)
        seen = seen + loss.detach()
        if progress >= seeing:
            ids, targets, mask = (tensor.to(device) for tensor in text)
            logits = model(
                input_ids=ids.clamp(min=0),
                attention_mask=(ids >= 0).long(),
                perceiver_embeddings=latents.unsqueeze(1),
                image_attention_mask=mask,
                use_cache=False,
            ).logits
            text_loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100
            )
            told = told + text_loss.detach()
            # The heads fade out: in the end the text alone shapes the features.
            loss = text_loss + (1 - progress) * loss
        loss.backward()
        nn.utils.clip_grad_norm_(everything, 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 200 == 0:
            print(
                f"step {step + 1} ({progress:.0%}) seen {seen.item() / 200:.3f} "
                f"told {told.item() / 200:.3f} {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            seen = told = torch.zeros((), device=device)
    print(f"{steps} steps of {batch_size} in {time.perf_counter() - started:.0f} s", flush=True)


def save(model: IdeficsForVisionText2Text, processor: IdeficsProcessor, folder: Path) -> None:
    """Write config, fp16 weights and processor files as an idefics-9b checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().half()
    model.config.dtype = torch.float16
    model.config.freeze_text_layers = True
    model.config.freeze_vision_layers = True
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    processor.tokenizer.backend_tokenizer.no_padding()  # a padded batch left it on
    for key in ("is_local", "local_files_only"):  # tell of this loading only
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(folder)


def main() -> None:
    """Build, train, measure and write the base."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--steps", type=int, default=6_500, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=256, help="scenes per step")
    parser.add_argument("--pool", type=int, default=40_000, help="scenes drawn beforehand")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    processor = build_processor(args.seed)
    model = build_model().to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(
        model, Encoder(processor.tokenizer), steps=args.steps, batch_size=args.batch_size,
        pool=args.pool, peak=args.lr, seed=args.seed, seeing=0.2,
    )  # fmt: skip
    model.cpu()
    scenes, pictures = draw_pool(256, args.seed + 1_000_003)
    plain, _ = augment(pictures, torch.Generator(), 0.0)
    shares = attribute_accuracy(model, processor.tokenizer, scenes, plain)
    print(
        "held-out scenes:",
        ", ".join(f"{name} {share:.1%}" for name, share in shares.items()),
        flush=True,
    )
    save(model, processor, args.out)


if __name__ == "__main__":
    main()
