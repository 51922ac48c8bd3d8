"""The README's picture, 24 scenes by the demo model: `python -m benchmarks.emoji.gallery OUT.png`."""

import sys
from pathlib import Path

from benchmarks.emoji.evaluate import draw, sheet
from mmdit import Pipeline

CAPTIONS = """a horse, a bear and a fox on a green background
a blue lion on a white background
a panda and a frog on a pink background
an owl on an orange background
a rocket on a purple background
a fox and a rabbit on a blue background
a turtle on a yellow background
a penguin and a whale on a red background
a strawberry, a lemon, a pear and an apple on a gray background
a butterfly on a white background
a robot and a green ghost on a purple background
a sunflower on a black background
a crab and an octopus on a yellow background
a guitar, a violin and a drum on a pink background
a red house and a tree on a white background
a watermelon on a green background
a purple elephant on a yellow background
a car, a bus, a train and a tractor on a blue background
a white horse and a black cat on an orange background
a swan on a blue background
an umbrella, a crown and a key on a white background
a pink pig and a yellow duck on a green background
a bee, a ladybug, a snail and a fish on a white background
a cake on a pink background""".splitlines()


def main() -> None:
    pipe = Pipeline.load()
    sheet(draw(pipe, [*CAPTIONS], pipe.settings), Path(sys.argv[1]), columns=6)


if __name__ == "__main__":
    main()
