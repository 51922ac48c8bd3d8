"""Decoding in horizontal strips: the whole decoder layer by layer, with only a few rows on the device at a time.

The result is the plain one within rounding. Nothing is blended and no strip sees less than it needs:

- Every convolution reads one row of halo above and below; beyond the picture's edge, and only there, are the zeros that
  the plain path pads with, after normalisation and SiLU.
- Group norm takes mean and variance over the whole map. Each strip leaves its own when it is made, and they are merged
  in float32 around the common mean, so that large means cost no digits.
- The middle, with its attention over all cells, runs whole: it works at the latent's resolution.

Equal bit for bit are: `rows` of at least the latent's height and the plain path; a picture of a batch and the same
picture alone; the normalisation of a row in one strip and in its neighbour's halo. Everything else differs from the
plain path by rounding: the merged statistics, a convolution's order of summation, and in half precision one rounding
less between norm and SiLU, and one more in the kernels of the steps to twice the resolution. Together these leave the
error of half precision against float32 where it is.

Whole maps lie in a store, another device or the same one, two at a time and row by row (channels last), so that a strip
is one piece of memory. How much each device holds: `vae.memory`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.autoencoder import Autoencoder, GroupNorm, ResnetBlock, Upsample

CACHED = 2**19  # numbers that are normalised at a time on a CPU
LAUNCHED = 2**23  # elsewhere, where each time costs a launch
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


@torch.no_grad()
def decode_in_strips(vae: Autoencoder, latent: Tensor, rows: int, store: torch.device | str | None = None) -> Tensor:
    """latent `(B, latent_channels, h, w)` to a picture `(B, 3, H, W)` like `vae.decode`, in strips.

    rows: height of a strip in latent rows (8 * rows of the picture's); with `rows >= h` this is `vae.decode`.
    store: where whole maps lie, by default the latent's own device; "cpu" bounds the memory of a GPU by the strip.
    Returns a picture on the latent's device and in its dtype, about [-1, 1], not clamped. Gradients do not flow.
    The pictures of a batch are decoded one after the other. Raises ValueError for `rows` under 1.
    """
    if rows < 1:
        raise ValueError(f"a strip of {rows} rows: it needs at least 1")
    if rows >= latent.shape[2]:
        return vae.decode(latent)
    place = torch.device(store) if store is not None else latent.device
    return torch.cat([_decode(vae, one, rows, place) for one in latent.split(1)])


def _decode(vae: Autoencoder, latent: Tensor, rows: int, store: torch.device) -> Tensor:
    """One picture of `decode_in_strips`."""
    decoder, device = vae.decoder, latent.device
    x = Map.of(decoder.mid(decoder.conv_in(vae.raw(latent))), store)  # (1, C3, h, w)
    for step in decoder.steps():
        if isinstance(step, ResnetBlock):
            x = _residual(step, x, rows, device)
        elif isinstance(step, Upsample):
            x, rows = _doubled(step, x, rows, device), 2 * rows
    picture = latent.new_empty(1, vae.config.image_channels, *x.values.shape[2:])  # (1, 3, H, W)
    norm = x.norm(decoder.norm_out)
    for strip in strips(x.height, rows):
        picture[:, :, strip.top : strip.bottom] = _filtered(decoder.conv_out, norm, x, strip, device)
    return picture


def _residual(block: ResnetBlock, x: "Map", rows: int, device: torch.device) -> "Map":
    """A residual block: a map to the next of the same size, in whose place it then lies."""
    y, norm = x.new(block.conv1.out_channels), x.norm(block.norm1)
    for strip in strips(x.height, rows):
        y.keep(strip, _filtered(block.conv1, norm, x, strip, device))
    z, norm = x.successor(block.conv2.out_channels), y.norm(block.norm2)
    for strip in strips(x.height, rows):
        part = _filtered(block.conv2, norm, y, strip, device)
        part += block.nin_shortcut(x.load(strip, device, halo=False))
        z.keep(strip, part)
        del part  # before the next strip asks for memory
    return z


def _doubled(step: Upsample, x: "Map", rows: int, device: torch.device) -> "Map":
    """The step to twice the resolution, by four convolutions of the map as it is instead of one of the doubled map.

    Doubled, two of the three rows that a 3x3 kernel sees are the same row, and so are two of its columns: an output in
    an even row and column is a 2x2 kernel's, which sums the weights that meet the same number; an odd one another's.
    That is 4/9 of the multiplications. The sums are rounded once, from float32.
    """
    y, kernels = x.new(step.conv.out_channels, scale=2), _sums(step.conv.weight)
    for strip in strips(x.height, rows):
        part = x.load(strip, device)
        if not (strip.above and strip.below):
            part = F.pad(part, (0, 0, 1 - strip.above, 1 - strip.below))  # (1, C, rows + 2, w)
        part = _interleaved(part, kernels, step.conv.bias)
        y.keep(Strip(2 * strip.top, 2 * strip.bottom, 2 * strip.height), part)
        del part
    return y


def _sums(weight: Tensor) -> list[list[Tensor]]:
    """A 3x3 kernel's sums for even and odd rows, and in each for even and odd columns: 2x2 kernels."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    layout = {"dtype": weight.dtype, "memory_format": torch.channels_last}
    return [[kernel.to(**layout) for kernel in _pairs(row, dim=3)] for row in _pairs(exact, dim=2)]


def _pairs(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of three weights the first, and the sum of the others; the sum of two, and the last."""
    first, second, third = weight.unbind(dim)
    return torch.stack((first, second + third), dim), torch.stack((first + second, third), dim)


def _interleaved(x: Tensor, kernels: list[list[Tensor]], bias: Tensor | None) -> Tensor:
    """Twice the rows and columns of x `(1, C, rows + 2, w)`, which has a row of halo on both sides."""
    _, _, height, width = x.shape
    shape = (1, len(kernels[0][0]), 2 * (height - 2), 2 * width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for row, pair in enumerate(kernels):
        for column, kernel in enumerate(pair):
            part = F.conv2d(x[:, :, row : row + height - 1], kernel, bias, padding=(0, 1))  # (1, C, rows, w + 1)
            y[:, :, row::2, column::2] = part[..., column : column + width]
            del part
    return y


def _filtered(conv: nn.Conv2d, norm: "WholeNorm", x: "Map", strip: Strip, device: torch.device) -> Tensor:
    """The rows of a strip of norm, SiLU and convolution."""
    return _convolve(conv, _normalised(x.load(strip, device), norm), strip)


def _normalised(x: Tensor, norm: "WholeNorm") -> Tensor:
    """SiLU of the norm, in one new map, computed in float32 and rounded once.

    A few rows at a time: their float32 numbers then take little memory, and on a CPU they stay in its cache.
    """
    if x.dtype == norm.mean.dtype:
        return _normalised_exactly(x, norm)
    many = CACHED if x.device.type == "cpu" else LAUNCHED
    y, rows = torch.empty_like(x), max(many // (x.shape[1] * x.shape[3]), 1)
    for part, result in zip(x.split(rows, dim=2), y.split(rows, dim=2)):
        result.copy_(_normalised_exactly(part.to(norm.mean.dtype), norm))
    return y


def _normalised_exactly(x: Tensor, norm: "WholeNorm") -> Tensor:
    return F.silu(F.batch_norm(x, norm.mean, norm.variance, norm.weight, norm.bias, eps=norm.eps), inplace=True)


def _convolve(conv: nn.Conv2d, x: Tensor, strip: Strip) -> Tensor:
    """A 3x3 convolution of rows with their halo; where there is none is the edge, with zeros beyond it."""
    if strip.above and strip.below:
        return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))
    y = F.conv2d(x, conv.weight, conv.bias, padding=1)
    return y[:, :, strip.above : y.shape[2] - strip.below]  # the halo's own row saw zeros where its neighbour is


class WholeNorm(NamedTuple):
    """A group norm with the statistics of a whole map: what to do to each channel, `(C,)` in float32."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


class Map:
    """A whole feature map in the store, `(1, C, h, w)`, with mean and variance of every strip that was put in."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.pinned = values, values.is_pinned()
        self.moments: list[tuple[int, Tensor, Tensor]] = []  # rows, mean and variance of each channel `(C,)`

    @classmethod
    def of(cls, values: Tensor, store: torch.device) -> "Map":
        """A map on the device, put into the store."""
        pin = values.device.type == "cuda" and store.type == "cpu"
        x = cls(_room(values.shape, values.dtype, store, pin))
        x.keep(Strip(0, x.height, x.height), values)
        return x

    def new(self, channels: int, scale: int = 1) -> "Map":
        """Room for another map, `scale` times as high and wide."""
        _, _, height, width = self.values.shape
        shape = (1, channels, scale * height, scale * width)
        return Map(_room(shape, self.values.dtype, self.values.device, self.pinned))

    def successor(self, channels: int) -> "Map":
        """Room for a map of the same size that is written strip by strip while this one is read, in its place.

        A map with no more channels than this one's never reaches, from the front, the rows still to be read.
        """
        _, old, height, width = self.values.shape
        if channels > old:
            return self.new(channels)
        flat = self.values.permute(0, 2, 3, 1).flatten()
        return Map(flat[: height * width * channels].view(1, height, width, channels).permute(0, 3, 1, 2))

    @property
    def height(self) -> int:
        return self.values.shape[2]

    def load(self, strip: Strip, device: torch.device, halo: bool = True) -> Tensor:
        """Rows on the device, by default with their halo: `(1, C, rows, w)`."""
        top, bottom = (strip.top - strip.above, strip.bottom + strip.below) if halo else (strip.top, strip.bottom)
        return self.values[:, :, top:bottom].to(device, non_blocking=self.pinned)

    def keep(self, strip: Strip, values: Tensor) -> None:
        """Put rows into the store and their statistics into `moments`."""
        self.values[:, :, strip.top : strip.bottom].copy_(values, non_blocking=self.pinned)
        self.moments.append((strip.bottom - strip.top, *_moments(values)))

    def norm(self, norm: GroupNorm) -> WholeNorm:
        """The norm of the whole map, after its last strip."""
        mean, variance = _merged(self.moments, norm.num_groups)
        return WholeNorm(mean, variance, norm.weight.to(mean.dtype), norm.bias.to(mean.dtype), norm.eps)


def _room(shape: Sequence[int], dtype: torch.dtype, store: torch.device, pin: bool) -> Tensor:
    room = partial(torch.empty, *shape, dtype=dtype, device=store, memory_format=torch.channels_last)
    try:
        return room(pin_memory=pin)
    except RuntimeError:  # a host may page-lock little; copies then wait for one another
        if not pin:
            raise
        return room()


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
    share = torch.tensor(rows, dtype=mean.dtype, device=mean.device).view(-1, 1, 1) / sum(rows)
    common = (share * mean).sum(0).mean(-1, keepdim=True)  # (g, 1)
    spread = (share * (variance + (mean - common) ** 2)).sum(0).mean(-1, keepdim=True)  # (g, 1)
    each = mean.shape[2]
    return common.expand(-1, each).flatten(), spread.expand(-1, each).flatten()
