"""The scenes that the demo model draws: one or two colour emoji on a coloured ground, with a caption.

The glyphs are those of Noto Color Emoji (Debian package fonts-noto-color-emoji, licence OFL 1.1), rendered by Pillow.
A scene is a pure function of its fields, so a picture can be rendered again for comparison.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
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

SINGLE_SIZE, PAIR_SIZE = 44 / 64, 28 / 64  # height of a glyph's cell as a fraction of the picture's side
SINGLE_JITTER, PAIR_JITTER = 3 / 64, 2 / 64  # how far a glyph may stand from its place, along each axis
HELD_OUT_PERIOD = 10


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `offsets` are in pixels of a 64-pixel picture, one (x, y) per noun."""

    nouns: tuple[str, ...]
    colour: str
    named_colour: bool  # whether the caption says the colour
    offsets: tuple[tuple[int, int], ...]

    @property
    def caption(self) -> str:
        subjects = " and ".join(f"{article(noun)} {noun}" for noun in self.nouns)
        return f"{subjects} on {article(self.colour)} {self.colour} background" if self.named_colour else subjects


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def held_out(left: str, right: str) -> bool:
    """Whether a pair of nouns never occurs in training, in either order.

    The rule: number the nouns in the order of `NOUNS`; a pair {i, j} is held out when (i + j) % 10 == 3. That is a
    tenth of the pairs, every noun is in some of them, and each noun still stands on both sides in training.
    """
    i, j = _INDEX[left], _INDEX[right]
    return (i + j) % HELD_OUT_PERIOD == 3


_INDEX = {noun: i for i, noun in enumerate(NOUNS)}


def random_scene(rng: Random, subjects: int | None = None, unseen: bool = False) -> Scene:
    """Draw a scene. `subjects` 1 or 2 (default: half of the scenes are pairs); `unseen` draws held-out pairs only."""
    count = subjects or (1 if rng.random() < 1 / 2 else 2)
    names = list(NOUNS)
    nouns = tuple(rng.sample(names, count))
    while count == 2 and held_out(*nouns) != unseen:
        nouns = tuple(rng.sample(names, count))
    reach = round((SINGLE_JITTER if count == 1 else PAIR_JITTER) * 64)
    offsets = tuple((rng.randint(-reach, reach), rng.randint(-reach, reach)) for _ in nouns)
    return Scene(nouns, rng.choice(list(COLOURS)), rng.random() < 0.7, offsets)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """The scene as uint8 `(size, size, 3)`."""
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = COLOURS[scene.colour]
    for i, noun in enumerate(scene.nouns):
        place(picture, noun, slot(i, len(scene.nouns)), scene.offsets[i])
    return np.rint(picture).astype(np.uint8)


def slot(index: int, count: int) -> tuple[float, float]:
    """Centre (as a fraction of the side) and cell size of subject `index` of `count`."""
    return (0.5, SINGLE_SIZE) if count == 1 else (0.25 + 0.5 * index, PAIR_SIZE)


def place(picture: np.ndarray, noun: str, where: tuple[float, float], offset: tuple[int, int]) -> None:
    """Draw a glyph into a float picture `(S, S, 3)`, in place, centred at `where` plus `offset`."""
    size = picture.shape[0]
    centre, cell = where
    patch = glyph(noun, round(cell * size))  # (s, s, 4)
    side = patch.shape[0]
    left = round(centre * size + offset[0] * size / 64 - side / 2)
    top = round(0.5 * size + offset[1] * size / 64 - side / 2)
    alpha = patch[..., 3:] / 255.0
    window = picture[top : top + side, left : left + side]
    window *= 1.0 - alpha
    window += patch[..., :3] * alpha


@lru_cache(maxsize=4096)
def glyph(noun: str, side: int) -> np.ndarray:
    """A noun's emoji as float32 `(side, side, 4)`, red green blue alpha in 0..255, cropped to its ink and centred."""
    if not FONT.exists():
        raise FileNotFoundError(f"{FONT} is missing: install the Debian package fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), NOUNS[noun].rstrip("\ufe0f"), font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    square = Image.new("RGBA", (max(ink.size), max(ink.size)), (0, 0, 0, 0))
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    # Resampled with premultiplied alpha, or dark fringes of transparent pixels would bleed in.
    return np.asarray(square.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA"), np.float32)
