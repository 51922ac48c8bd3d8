"""The scenes that the demo model draws: one to four colour emoji on a coloured ground, with a caption.

An emoji may be tinted in a colour that is not its own. Two stand left and right, three left, middle and right, the
middle one lower, so that all are as large as two are, and four in the corners in reading order.

The glyphs are those of Noto Color Emoji (Debian package fonts-noto-color-emoji, licence OFL 1.1), rendered by Pillow.
A scene is a pure function of its fields, so a picture can be rendered again for comparison.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path(os.environ.get("EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
FONT_SIZE = 109  # the only size of the font's bitmaps, 136 by 128 pixels

NOUNS: dict[str, str] = {
    "horse": "🐎", "bear": "🐻", "lion": "🦁", "tiger": "🐅", "dog": "🐕", "cat": "🐈", "fox": "🦊", "panda": "🐼",
    "frog": "🐸", "rabbit": "🐇", "duck": "🦆", "swan": "🦢", "owl": "🦉", "penguin": "🐧", "dolphin": "🐬",
    "whale": "🐳", "fish": "🐟", "crab": "🦀", "turtle": "🐢", "snail": "🐌", "butterfly": "🦋", "bee": "🐝",
    "elephant": "🐘", "apple": "🍎", "pear": "🍐", "lemon": "🍋", "banana": "🍌", "strawberry": "🍓",
    "cherries": "🍒", "watermelon": "🍉", "mushroom": "🍄", "cactus": "🌵", "tree": "🌳", "rose": "🌹",
    "sunflower": "🌻", "house": "🏠", "car": "🚗", "bus": "🚌", "bicycle": "🚲", "train": "🚂", "rocket": "🚀",
    "airplane": "🛩️", "sailboat": "⛵", "guitar": "🎸", "violin": "🎻", "drum": "🥁", "balloon": "🎈",
    "umbrella": "☂️", "crown": "👑", "key": "🔑", "clock": "⏰", "book": "📕", "robot": "🤖", "ghost": "👻",
    "cow": "🐄", "pig": "🐷", "octopus": "🐙", "ladybug": "🐞", "snowman": "⛄", "pineapple": "🍍", "carrot": "🥕",
    "pizza": "🍕", "cake": "🎂", "tractor": "🚜",
}  # fmt: skip

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49), "blue": (52, 101, 219), "green": (46, 160, 67), "yellow": (248, 214, 72),
    "white": (250, 250, 250), "black": (20, 20, 22), "pink": (250, 160, 196), "purple": (130, 66, 168),
    "orange": (243, 134, 38), "gray": (136, 138, 142),
}  # fmt: skip

# The colours that a noun has already, or nearly: it is never tinted in these.
OWN: dict[str, str] = {
    "horse": "orange yellow", "bear": "orange gray", "lion": "orange yellow", "tiger": "orange yellow",
    "dog": "orange yellow pink", "cat": "orange yellow", "fox": "orange red", "panda": "black white gray pink",
    "frog": "green yellow", "rabbit": "white gray pink", "duck": "gray green", "swan": "white gray",
    "owl": "orange gray", "penguin": "black gray", "dolphin": "blue", "whale": "blue gray", "fish": "blue",
    "crab": "red orange", "turtle": "green", "snail": "orange gray", "butterfly": "orange yellow",
    "bee": "yellow black orange", "elephant": "gray pink", "apple": "red", "pear": "green yellow",
    "lemon": "yellow orange", "banana": "yellow", "strawberry": "red", "cherries": "red", "watermelon": "red green",
    "mushroom": "red orange", "cactus": "green", "tree": "green", "rose": "red", "sunflower": "yellow orange",
    "house": "red gray", "car": "red", "bus": "blue gray", "bicycle": "blue gray", "train": "green red",
    "rocket": "gray red", "airplane": "blue", "sailboat": "white red orange", "guitar": "red", "violin": "orange",
    "drum": "orange red", "balloon": "red orange", "umbrella": "blue purple", "crown": "yellow orange",
    "key": "yellow orange", "clock": "red white", "book": "red", "robot": "gray blue", "ghost": "white pink gray",
    "cow": "white black gray", "pig": "pink yellow", "octopus": "red orange", "ladybug": "red black",
    "snowman": "white pink gray", "pineapple": "yellow orange", "carrot": "orange", "pizza": "yellow orange",
    "cake": "pink yellow", "tractor": "green blue",
}  # fmt: skip

CELL = {1: 44 / 64, 2: 28 / 64, 3: 28 / 64, 4: 28 / 64}  # a glyph's cell, as a fraction of the picture's side
JITTER = {1: 1, 2: 1, 3: 1, 4: 1}  # how far a glyph may stand from its place along each axis, in 64ths of the side
PLACES = {
    1: ((1 / 2, 1 / 2),),
    2: ((1 / 4, 1 / 2), (3 / 4, 1 / 2)),
    3: ((1 / 4, 1 / 4), (1 / 2, 3 / 4), (3 / 4, 1 / 4)),
    4: ((1 / 4, 1 / 4), (3 / 4, 1 / 4), (1 / 4, 3 / 4), (3 / 4, 3 / 4)),
}  # centres as fractions of width and height, in the order of the caption
SHARES = {1: 0.4, 2: 0.2, 3: 0.2, 4: 0.2}  # of the training scenes
TINTED = 0.3  # of the subjects
PAIRS_HELD_OUT, TINTS_HELD_OUT = 10, 20  # one of so many


@dataclass(frozen=True)
class Subject:
    """One emoji. `offset` is its distance from its place, right and down, in 64ths of the picture's side."""

    noun: str
    tint: str | None = None
    offset: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        words = f"{self.tint} {self.noun}" if self.tint else self.noun
        return f"{article(words)} {words}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture."""

    subjects: tuple[Subject, ...]
    colour: str
    named_colour: bool  # whether the caption says the colour of the ground

    @property
    def caption(self) -> str:
        *others, last = [subject.name for subject in self.subjects]
        words = f"{', '.join(others)} and {last}" if others else last
        return f"{words} on {article(self.colour)} {self.colour} background" if self.named_colour else words

    @property
    def nouns(self) -> tuple[str, ...]:
        return tuple(subject.noun for subject in self.subjects)

    @property
    def tints(self) -> tuple[str | None, ...]:
        return tuple(subject.tint for subject in self.subjects)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def held_out(one: str, other: str) -> bool:
    """Whether two nouns never occur together in training: in no order, as no pair, and among no three or four.

    The rule: number the nouns in the order of `NOUNS`; a pair {i, j} is held out when (i + j) % 10 == 3. That is a
    tenth of the pairs, every noun is in some of them, and each noun still stands at every place in training.
    """
    return (_NOUN[one] + _NOUN[other]) % PAIRS_HELD_OUT == 3


def tint_held_out(noun: str, tint: str) -> bool:
    """Whether a noun never occurs in this colour in training.

    The rule: number nouns and colours; noun i in colour j is held out when (3 i + 7 j) % 20 == 7.
    """
    return (3 * _NOUN[noun] + 7 * _COLOUR[tint]) % TINTS_HELD_OUT == 7


_NOUN = {noun: i for i, noun in enumerate(NOUNS)}
_COLOUR = {colour: j for j, colour in enumerate(COLOURS)}


def tints_of(noun: str, unseen: bool = False) -> list[str]:
    """The colours in which a noun may be tinted: those of training, or those held out."""
    return [c for c in COLOURS if c not in OWN[noun].split() and tint_held_out(noun, c) == unseen]


def random_scene(
    rng: Random,
    count: int | None = None,
    unseen_pair: bool = False,
    tinted: float = TINTED,
    unseen_tint: bool = False,
) -> Scene:
    """Draw a scene of `count` subjects, by default as training does.

    `unseen_pair`: two nouns that training never has together. `tinted`: chance of each subject to be in a colour not
    its own; `unseen_tint`: one that training never has this noun in.
    """
    count = count or rng.choices(list(SHARES), list(SHARES.values()))[0]
    nouns = _nouns(rng, count, unseen_pair)
    if unseen_tint:
        while not all(tints_of(noun, True) for noun in nouns):
            nouns = _nouns(rng, count, unseen_pair)
    tints = [rng.choice(tints_of(noun, unseen_tint)) if rng.random() < tinted else None for noun in nouns]
    reach = JITTER[count]
    subjects = tuple(
        Subject(noun, tint, (rng.randint(-reach, reach), rng.randint(-reach, reach)))
        for noun, tint in zip(nouns, tints)
    )
    ground = rng.choice([colour for colour in COLOURS if colour not in tints])  # a red horse on red would be lost
    return Scene(subjects, ground, rng.random() < 0.7)


def _nouns(rng: Random, count: int, unseen_pair: bool) -> tuple[str, ...]:
    while True:
        nouns = tuple(rng.sample(list(NOUNS), count))
        if all(held_out(*pair) == unseen_pair for pair in combinations(nouns, 2)):
            return nouns


def render(scene: Scene, width: int = 128, height: int | None = None) -> np.ndarray:
    """The scene as uint8 `(height, width, 3)`; what is a fraction of the side is one of the shorter side."""
    height = height or width
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = COLOURS[scene.colour]
    count = len(scene.subjects)
    for subject, place in zip(scene.subjects, PLACES[count]):
        put(picture, subject, place, CELL[count])
    return np.rint(picture).astype(np.uint8)


def put(picture: np.ndarray, subject: Subject, place: tuple[float, float], cell: float) -> None:
    """Draw a glyph into a float picture `(H, W, 3)`, in place."""
    height, width, _ = picture.shape
    short = min(height, width)
    patch = glyph(subject.noun, round(cell * short), subject.tint)  # (s, s, 4)
    side = patch.shape[0]
    left = round(place[0] * width + subject.offset[0] * short / 64 - side / 2)
    top = round(place[1] * height + subject.offset[1] * short / 64 - side / 2)
    alpha = patch[..., 3:] / 255.0
    window = picture[top : top + side, left : left + side]
    window *= 1.0 - alpha
    window += patch[..., :3] * alpha


@lru_cache(maxsize=4096)
def glyph(noun: str, side: int, tint: str | None = None) -> np.ndarray:
    """A noun's emoji as float32 `(side, side, 4)`, red green blue alpha in 0..255, cropped to its ink and centred."""
    if tint:
        return tinted_as(glyph(noun, side), COLOURS[tint])
    if not FONT.exists():
        raise FileNotFoundError(
            f"{FONT} is missing: install the Debian package fonts-noto-color-emoji, or name the file in EMOJI_FONT"
        )
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), NOUNS[noun].rstrip("\ufe0f"), font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    square = Image.new("RGBA", (max(ink.size), max(ink.size)), (0, 0, 0, 0))
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    # Resampled with premultiplied alpha, or dark fringes of transparent pixels would bleed in.
    return np.asarray(square.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA"), np.float32)


def tinted_as(patch: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """A glyph `(s, s, 4)` in shades of one colour: mean brightness becomes the colour, less is darker, more paler."""
    rgb, alpha = patch[..., :3] / 255.0, patch[..., 3:]
    light = rgb @ np.array([[0.299], [0.587], [0.114]], np.float32)  # (s, s, 1)
    mean = (light * alpha).sum() / alpha.sum()
    below, above = np.clip(light / mean, 0, 1), np.clip((light - mean) / (1.001 - mean), 0, 1)
    shade = np.array(colour, np.float32) / 255.0 * (0.3 + 0.7 * below)
    shade += (1.0 - shade) * 0.6 * above
    return np.concatenate([shade * 255.0, alpha], axis=-1).astype(np.float32)
