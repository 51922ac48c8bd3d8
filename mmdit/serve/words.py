"""Where pictures attend to words, for answers: a small grey picture for each."""

import io
from base64 import b64encode

import torch
from PIL import Image
from torch import Tensor

from mmdit.driver.watch import Drawn, Encoded, Stepped, Watcher


class Words(Watcher):
    """Keeps, of pictures that ask for it, the mean of each step's maps until the picture is taken by `of`."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[str, dict[int, Tensor]]] = {}  # by picture, subject and step
        self._done: dict[int, dict[str, Tensor]] = {}

    def encoded(self, event: Encoded) -> None:
        self._seen[event.index] = {}  # of a picture in two passes, the second's are kept

    def step(self, event: Stepped) -> None:
        if event.stopped:
            self._seen.pop(event.index, None)
        if event.stopped or event.attention is None:
            return
        for subject in event.attention.subjects:  # a picture that begins anew after an error takes its steps again
            self._seen[event.index].setdefault(subject, {})[event.step.index] = event.attention.of(subject).mean(0)

    def picture(self, event: Drawn) -> None:
        seen = self._seen.pop(event.index)
        if seen:
            self._done[event.index] = {name: torch.stack([*maps.values()]).mean(0).cpu() for name, maps in seen.items()}

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
