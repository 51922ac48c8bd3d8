"""The README's picture, sixteen scenes by the demo model: `python -m benchmarks.emoji.gallery OUT.png`."""

import sys
from pathlib import Path

from PIL import Image

from benchmarks.emoji.evaluate import draw, sheet
from mmdit import Pipeline

CAPTIONS = """a horse and a bear on a green background
a lion on a blue background
a panda and a frog on a pink background
an owl on an orange background
a rocket on a purple background
a fox and a rabbit on a blue background
a turtle on a yellow background
a penguin and a whale on a red background
a strawberry and a lemon on a gray background
a butterfly on a white background
a robot and a ghost on a purple background
a sunflower on a black background
a crab and an octopus on a yellow background
a guitar on a pink background
a house and a tree on a white background
a watermelon on a green background""".splitlines()


def main() -> None:
    out = Path(sys.argv[1])
    pipe = Pipeline.load()
    pictures = draw(pipe, [*CAPTIONS], pipe.settings)
    sheet(pictures, out, columns=8)
    with Image.open(out) as image:
        large = image.resize((image.width * 2, image.height * 2), Image.Resampling.LANCZOS)
    large.save(out)


if __name__ == "__main__":
    main()
