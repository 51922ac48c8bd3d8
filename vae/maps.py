"""Whole feature maps of what is computed in strips: where they lie, and the statistics that norms need.

Row by row (channels last), so that a strip is one piece of memory. Each strip leaves its own mean and variance when it
is made, and they are merged in float32 around the common mean, so that large means cost no digits.
"""

import weakref
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from vae.autoencoder import GroupNorm, VAEConfig

UPDATE_STATS = ("cpu", "cuda")  # devices on which PyTorch has batch_norm_update_stats


class Strip(NamedTuple):
    """Rows `top` to `bottom` of a map of `height` rows."""

    top: int
    bottom: int
    height: int

    @property
    def above(self) -> int:
        """Rows of halo above: 1, at the upper edge 0."""
        return min(self.top, 1)

    @property
    def below(self) -> int:
        return min(self.height - self.bottom, 1)


def strips(height: int, rows: int) -> list[Strip]:
    """A map of `height` rows in strips of `rows`, of which the last may be lower."""
    return [Strip(top, min(top + rows, height), height) for top in range(0, height, rows)]


class Place:
    """Memory of the store for one map at a time, flat."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.pinned = memory, memory.is_pinned()


class Store:
    """Where whole maps lie: each in memory of its own, or, page-locked, in few places that are used again.

    A page-locked place is free as soon as no map has it, though copies into it and out of it may be on their way still:
    they are all in one queue of the device, one after another.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, largest: int | None = None) -> None:
        """largest: numbers of the largest map, where the memory is to be page-locked."""
        self._device, self._dtype, self._largest = device, dtype, largest
        self._free: list[Tensor] = []

    def place(self, numbers: int) -> Place:
        if not self._free and self._largest is not None:
            self._lock(self._largest)
        if not self._free:
            return Place(torch.empty(numbers, dtype=self._dtype, device=self._device))
        place = Place(self._free.pop())
        weakref.finalize(place, self._free.append, place.memory)
        return place

    def _lock(self, numbers: int) -> None:
        """One more place, if it can be had: a host may page-lock little; copies then wait for one another."""
        with suppress(RuntimeError):
            self._free.append(torch.empty(numbers, dtype=self._dtype, device=self._device, pin_memory=True))


class WholeNorm(NamedTuple):
    """A group norm with the statistics of a whole map: what to do to each channel, `(C,)` in float32."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


class Map:
    """A whole feature map in the store, `(1, C, h, w)`, with mean and variance of every strip that was put in."""

    def __init__(self, store: Store, place: Place, channels: int, height: int, width: int) -> None:
        self._store, self._place = store, place
        flat = place.memory[: height * width * channels]
        self.values = flat.view(1, height, width, channels).permute(0, 3, 1, 2)
        self.moments: list[tuple[int, Tensor, Tensor]] = []  # rows, mean and variance of each channel `(C,)`

    @classmethod
    def of(cls, values: Tensor, store: Store) -> "Map":
        """A map `(1, C, h, w)` on the device, put into the store."""
        x = cls.empty(store, *values.shape[1:])
        x.keep(Strip(0, x.height, x.height), values)
        return x

    @classmethod
    def empty(cls, store: Store, channels: int, height: int, width: int) -> "Map":
        """Room for a map."""
        return cls(store, store.place(channels * height * width), channels, height, width)

    def new(self, channels: int, scale: float = 1) -> "Map":
        """Room for another map, `scale` times as high and wide."""
        _, _, height, width = self.values.shape
        return Map.empty(self._store, channels, int(scale * height), int(scale * width))

    def successor(self, channels: int) -> "Map":
        """Room for a map of the same size that is written strip by strip while this one is read, in its place.

        A map with no more channels than this one's never reaches, from the front, the rows still to be read.
        """
        _, old, height, width = self.values.shape
        return self.new(channels) if channels > old else Map(self._store, self._place, channels, height, width)

    @property
    def height(self) -> int:
        return self.values.shape[2]

    def load(self, strip: Strip, device: torch.device, halo: bool = True) -> Tensor:
        """Rows on the device, by default with their halo: `(1, C, rows, w)`."""
        top, bottom = (strip.top - strip.above, strip.bottom + strip.below) if halo else (strip.top, strip.bottom)
        return self.rows(top, bottom, device)

    def rows(self, top: int, bottom: int, device: torch.device) -> Tensor:
        """Rows on the device, as many of them as there are."""
        return self.values[:, :, top:bottom].to(device, non_blocking=self._place.pinned)

    def keep(self, strip: Strip, values: Tensor) -> None:
        """Put rows into the store and their statistics into `moments`."""
        self.values[:, :, strip.top : strip.bottom].copy_(values, non_blocking=self._place.pinned)
        self.moments.append((strip.bottom - strip.top, *_moments(values)))

    def norm(self, norm: GroupNorm) -> WholeNorm:
        """The norm of the whole map, after its last strip."""
        return _whole(self.moments, norm)


def largest_map(config: VAEConfig, h: int, w: int) -> int:
    """Numbers of the largest map of a decode; h, w: rows and columns of the latent."""
    widths = config.block_out_channels[::-1]
    made = [width * 4**level for level, width in enumerate(widths)]
    doubled = [4 * numbers for numbers in made[:-1]]
    return h * w * max(made + doubled)


def whole_norm(x: Tensor, norm: GroupNorm) -> WholeNorm:
    """That of a map `(1, C, h, w)` that is all there."""
    return _whole([(x.shape[2], *_moments(x))], norm)


def _whole(moments: list[tuple[int, Tensor, Tensor]], norm: GroupNorm) -> WholeNorm:
    mean, variance = _merged(moments, norm.num_groups)
    return WholeNorm(mean, variance, norm.weight.to(mean.dtype), norm.bias.to(mean.dtype), norm.eps)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel `(C,)`, in float32 (of float64 in float64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type not in UPDATE_STATS:
        variance, mean = torch.var_mean(x.to(dtype), dim=(0, 2, 3), correction=0)
        return mean, variance
    # Batch norm's own, because it needs no copy in float32. The running statistics only choose the dtype.
    zeros = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    return torch.batch_norm_update_stats(x, zeros[0], zeros[1], momentum=0.0)


def _merged(moments: list[tuple[int, Tensor, Tensor]], groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of a map's groups, repeated for each channel `(C,)`, from those of strips and channels.

    The variance is the mean of the variances plus the variance of the means, both around the common mean (Chan,
    Golub, LeVeque 1983): sums of squares would lose their digits where means are large.
    """
    rows, means, variances = zip(*moments)
    mean, variance = (torch.stack(part).unflatten(1, (groups, -1)) for part in (means, variances))  # (strips, g, C/g)
    # All strips but the last are equally high. A copy of the shares would wait for all that the device has still to do.
    share = mean.new_full((len(rows), 1, 1), rows[0] / sum(rows))
    share[-1:].fill_(rows[-1] / sum(rows))
    common = (share * mean).sum(0).mean(-1, keepdim=True)  # (g, 1)
    spread = (share * (variance + (mean - common) ** 2)).sum(0).mean(-1, keepdim=True)  # (g, 1)
    each = mean.shape[2]
    return common.expand(-1, each).flatten(), spread.expand(-1, each).flatten()
