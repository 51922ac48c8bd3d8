"""Where a picture attended to words, as a sheet of pictures; and the same as numbers, for Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mmdit.driver.watch import Drawn, Encoded, Stepped, Watcher
from mmdit.images.shape import Box

_STRIP, _GAP, _LINE = 8, 8, 16  # steps shown; pixels
_LEAST, _MOST = 256, 512  # pixels of the picture's longer side
_HEAT = ((0, 0, 0), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))  # least to most


@dataclass
class AttentionMaps:
    """A picture, and where it attended to while it was drawn."""

    image: Image.Image
    maps: dict[str, Tensor]  # of each subject, (steps, blocks, rows, columns): the mean of its tokens and of the heads
    steps: tuple[int, ...]  # which these are, counted from 0: a step that asks nothing of the network has none
    region: Box | None = None  # of the picture that the maps are of, if not all (`mask_crop`)

    def sheet(self) -> Image.Image:
        """As `--attention-maps` writes it: of that region."""
        maps = {name: [step.mean(0) for step in steps] for name, steps in self.maps.items()}
        return sheet(self.image if self.region is None else self.image.crop(self.region), maps, self.steps)


@dataclass
class Place:
    """What one place of a picture attended to: the means of all blocks and heads, whose sum is 1 at each step."""

    image: Image.Image
    words: dict[str, list[tuple[str, float]]]  # by encoder, its tokens: the text of each, and the mean of all steps
    text: Tensor  # (steps, tokens of the text), padding and all; both CLIPs have the same
    picture: Tensor  # (steps, rows, columns)


class Attention(Watcher):
    """Keeps what steps attended to, until the picture is drawn; `done` has it then, by the picture's index."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[str, dict[int, Tensor]]] = {}  # by picture, subject and step
        self.done: dict[int, AttentionMaps] = {}

    def encoded(self, event: Encoded) -> None:
        self._seen[event.index] = {}  # of a picture in two passes, the second's are kept

    def step(self, event: Stepped) -> None:
        if event.attention is None:
            return
        for subject in event.attention.subjects:  # a picture that begins anew after an error takes its steps again
            steps = self._seen[event.index].setdefault(subject, {})
            steps[event.step.index] = event.attention.of(subject)

    def picture(self, event: Drawn) -> None:
        seen = self._seen.pop(event.index)
        if seen:
            maps = {name: torch.stack([*steps.values()]).cpu() for name, steps in seen.items()}
            steps = tuple(next(iter(seen.values())))
            self.done[event.index] = AttentionMaps(event.image, maps, steps, event.region)


def sheet(image: Image.Image, maps: Mapping[str, Sequence[Tensor]], numbers: Sequence[int]) -> Image.Image:
    """A row for each subject: the picture under its mean map, then maps of some steps, from the first to the last.

    maps: `(rows, columns)` of each step. numbers: of these steps, from 0. Within a row a colour stands for the same
    share of attention.
    """
    scale = min(max(max(image.size), _LEAST), _MOST) / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    count = max((min(_STRIP, len(steps)) for steps in maps.values()), default=0)
    w, h = max(1, width // 2), max(1, height // 2)
    row = height + _LINE + _GAP
    whole = Image.new("RGB", (width + count * (w + _GAP) + 2 * _GAP, row * len(maps) + _GAP), "white")
    pen, picture = ImageDraw.Draw(whole), image.convert("L").resize((width, height)).convert("RGB")
    for y, (name, steps) in zip(range(_GAP, whole.height, row), maps.items()):
        mean = torch.stack(list(steps)).mean(0)
        pen.text((_GAP, y), name.encode("ascii", "replace").decode(), fill="black")
        whole.paste(Image.blend(picture, heat(mean, float(mean.max()), (width, height)), 0.6), (_GAP, y + _LINE))
        most = max(float(step.max()) for step in steps)
        shown = dict.fromkeys(round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count))
        for k, i in enumerate(shown):
            x = width + 2 * _GAP + k * (w + _GAP)
            pen.text((x, y), f"step {numbers[i] + 1}", fill="black")
            whole.paste(heat(steps[i], most, (w, h)), (x, y + _LINE))
    return whole


def heat(values: Tensor, most: float, size: tuple[int, int]) -> Image.Image:
    """Shares `(rows, columns)` as colours from black, 0, to yellow, `most`."""
    share = (values.float().numpy() / max(most, 1e-12)).clip(0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(share, stops, channel) for channel in zip(*_HEAT)], axis=-1)
    return Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
