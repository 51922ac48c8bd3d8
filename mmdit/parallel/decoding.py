"""The strips that a picture is decoded in, shared between processes: each has some that lie side by side.

Every map is made strip by strip by whoever has them. Then neighbours give each other the row beside the border, which
the next convolution reads, and all tell the mean and variance of their strips, which the next norm merges. So the
picture is the one that these strips give in one process, bit for bit where convolutions are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmdit.parallel.ranks import Line
from vae.maps import Map, Strip
from vae.strips import Share


class StripsOf(Share):
    """The strips of one of the processes of a line."""

    def __init__(self, line: Line, agree: Callable[[], None], device: torch.device) -> None:
        """agree: called before every exchange; raises where another process has failed."""
        self._line, self._agree, self._device = line, agree, device

    def own(self, every: list[Strip]) -> list[Strip]:
        return self._of(every, self._line.place)

    def _of(self, every: list[Strip], place: int) -> list[Strip]:
        size = self._line.size
        return every[len(every) * place // size : len(every) * (place + 1) // size]

    def complete(self, x: Map, every: list[Strip]) -> None:
        self._agree()
        places = range(self._line.size)
        beside = [self._beside(every, place) for place in places]
        owner = {row: place for place in places for s in self._of(every, place) for row in (s.top, s.bottom - 1)}
        _, channels, _, width = x.values.shape

        # To each the rows that it lacks and this process has; from each those that this one lacks.
        mine = self._line.place
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # rows may still be on their way into the store
        given = [[row for row in rows if owner[row] == mine] for rows in beside]
        taken = [[row for row in beside[mine] if owner[row] == place] for place in places]
        sent = [x.values[:, :, rows].to(self._device).contiguous() for rows in given]
        for rows, found in zip(taken, self._line.exchange(sent, [(1, channels, len(r), width) for r in taken])):
            x.values[:, :, rows] = found.to(x.values.device)

        counts = [len(self._of(every, place)) for place in places]
        like = torch.zeros(
            0, 2, channels, dtype=torch.promote_types(x.values.dtype, torch.float32), device=self._device
        )
        own = torch.stack([torch.stack(told[1:]) for told in x.moments]) if x.moments else like  # (strips, 2, C)
        told = torch.cat(self._line.gather(own, [(count, 2, channels) for count in counts]))
        x.moments[:] = [(s.bottom - s.top, mean, variance) for s, (mean, variance) in zip(every, told)]

    def _beside(self, every: list[Strip], place: int) -> list[int]:
        """The rows beside the strips that a process has."""
        some = self._of(every, place)
        return [row for row in (some[0].top - 1, some[-1].bottom) if 0 <= row < every[-1].bottom] if some else []

    def whole(self, picture: Tensor, every: list[Strip]) -> Tensor:
        self._agree()
        places = range(self._line.size)
        rows = [sum(s.bottom - s.top for s in self._of(every, place)) for place in places]
        tops = [sum(rows[:place]) for place in places]
        mine = self._line.place
        own = picture[:, :, tops[mine] : tops[mine] + rows[mine]].contiguous()
        shapes = [(*picture.shape[:2], count, picture.shape[3]) for count in rows]
        return torch.cat(self._line.gather(own, shapes), dim=2)
