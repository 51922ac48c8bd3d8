"""Where pictures attend to words, for answers: a small grey picture for each."""

import io
from base64 import b64encode
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from mmdit.driver.watch import Drawn, Encoded, Stepped, Watcher


@dataclass
class Sums:
    """Of one picture: a request may have hundreds of steps, whose maps lie where it is drawn."""

    last: int = -1  # step
    steps: int = 0
    maps: dict[str, Tensor] = field(default_factory=dict)  # by subject, the sum of the steps'


class Words(Watcher):
    """Keeps, of pictures that ask for it, the mean of all steps' maps until the picture is taken by `of`."""

    def __init__(self) -> None:
        self._seen: dict[int, Sums] = {}
        self._done: dict[int, dict[str, Tensor]] = {}

    def encoded(self, event: Encoded) -> None:
        self._seen[event.index] = Sums()  # of a picture in two passes, the second's are kept

    def step(self, event: Stepped) -> None:
        if event.stopped:
            self._seen.pop(event.index, None)
        if event.stopped or event.attention is None:
            return
        seen = self._seen[event.index]
        if event.step.index <= seen.last:  # it begins anew after an error
            seen = self._seen[event.index] = Sums()
        seen.last, seen.steps = event.step.index, seen.steps + 1
        for subject in event.attention.subjects:
            seen.maps[subject] = seen.maps.get(subject, 0) + event.attention.of(subject).mean(0)

    def picture(self, event: Drawn) -> None:
        seen = self._seen.pop(event.index)
        if seen.steps:
            self._done[event.index] = {name: (maps / seen.steps).cpu() for name, maps in seen.maps.items()}

    def of(self, index: int) -> dict[str, Tensor]:
        """A drawn picture's maps by subject, each `(rows, columns)`: the share of attention, mean of all there is."""
        return self._done.pop(index, {})


def grey(share: Tensor) -> Image.Image:
    """A map as a picture, a pixel for each place: black is nothing, white the most that this map has."""
    levels = share.float() / share.max().clamp(min=1e-12) * 255
    return Image.fromarray(levels.round().clamp(0, 255).to(torch.uint8).numpy())


def base64_of_maps(maps: dict[str, Tensor]) -> dict[str, str]:
    """Each as a PNG."""
    found: dict[str, str] = {}
    for name, share in maps.items():
        data = io.BytesIO()
        grey(share).save(data, format="PNG")
        found[name] = b64encode(data.getvalue()).decode()
    return found
