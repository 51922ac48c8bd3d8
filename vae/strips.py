"""Decoding and encoding in horizontal strips: layer by layer, with only a few rows on the device at a time.

The result is the plain one within rounding. Nothing is blended and no strip sees less than it needs:

- Every convolution reads one row of halo above and below, the encoder's steps to half the resolution one below; beyond
  the picture's edge, and only there, are the zeros that the plain path pads with, after normalisation and SiLU.
- Group norm takes mean and variance over the whole map. Each strip leaves its own when it is made, and they are merged
  in float32 around the common mean, so that large means cost no digits.
- The middle, with its attention over all cells, runs whole: it works at the latent's resolution.

Equal bit for bit are: `rows` of at least the latent's height and the plain path; a picture of a batch and the same
alone; the normalisation of a row in one strip and in its neighbour's halo. Everything else differs from the
plain path by rounding: the merged statistics, a convolution's order of summation, and in half precision one rounding
less between norm and SiLU, and one more in the kernels of the steps to twice the resolution. Together these leave the
error of half precision against float32 where it is.

Whole maps lie in a store, another device or the same one, two at a time (`vae.maps`). How much each device holds:
`vae.memory`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.autoencoder import Autoencoder, Downsample, ResnetBlock, Upsample
from vae.maps import Map, Store, Strip, WholeNorm, largest_map, strips


class Share:
    """Which strips of each map are made here; whoever is alone makes all of them.

    Others are in other processes (`mmdit.parallel.decoding`): what they make is known by `complete` alone.
    """

    def own(self, every: list[Strip]) -> list[Strip]:
        return every

    def complete(self, x: Map, every: list[Strip]) -> None:
        """Have in a map, whose own strips are made, the rows beside them and the moments of every strip, in order."""

    def whole(self, picture: Tensor, every: list[Strip]) -> Tensor:  # noqa: ARG002
        """The picture of which the own strips are made."""
        return picture


ALONE = Share()

CACHED = 2**19  # numbers that are normalised at a time on a CPU
LAUNCHED = 2**23  # elsewhere, where each time costs a launch


@torch.no_grad()
def decode_in_strips(
    vae: Autoencoder,
    latent: Tensor,
    rows: int,
    store: torch.device | str | None = None,
    pin: bool = True,
    share: Share = ALONE,
) -> Tensor:
    """latent `(B, latent_channels, h, w)` to a picture `(B, 3, H, W)` like `vae.decode`, in strips.

    rows: height of a strip in latent rows (8 * rows of the picture's); with `rows >= h` this is `vae.decode`.
    store: where whole maps lie, by default the latent's own device; "cpu" bounds the memory of a GPU by the strip.
    pin: whether the host's memory is page-locked for a GPU, so that copies do not wait for one another; how much that
    takes: `vae.memory.locked_places`. PyTorch keeps it until its cache of such memory is emptied.
    share: which strips are made here, of a picture that several processes decode; all are given the whole.
    Returns a picture on the latent's device and in its dtype, about [-1, 1], not clamped. Gradients do not flow.
    The pictures of a batch are decoded one after the other. Raises ValueError for `rows` under 1.
    """
    if rows < 1:
        raise ValueError(f"a strip of {rows} rows: it needs at least 1")
    if rows >= latent.shape[2]:
        return vae.decode(latent)
    where = torch.device(store) if store is not None else latent.device
    pin = pin and latent.device.type == "cuda" and where.type == "cpu"
    places = Store(where, latent.dtype, largest_map(vae.config, *latent.shape[2:]) if pin else None)
    return torch.cat([_decode(vae, one, rows, places, share) for one in latent.split(1)])


def _decode(vae: Autoencoder, latent: Tensor, rows: int, store: Store, share: Share = ALONE) -> Tensor:
    """One picture of `decode_in_strips`."""
    decoder, device = vae.decoder, latent.device
    x = Map.of(decoder.mid(decoder.conv_in(vae.raw(latent))), store)  # (1, C3, h, w)
    for step in decoder.steps():
        if isinstance(step, ResnetBlock):
            x = _residual(step, x, rows, device, share)
        elif isinstance(step, Upsample):
            x, rows = _doubled(step, x, rows, device, share), 2 * rows
    picture = latent.new_empty(1, vae.config.image_channels, *x.values.shape[2:])  # (1, 3, H, W)
    norm = x.norm(decoder.norm_out)
    every = strips(x.height, rows)
    for strip in share.own(every):
        picture[:, :, strip.top : strip.bottom] = _filtered(decoder.conv_out, norm, x, strip, device)
    return share.whole(picture, every)


@torch.no_grad()
def encode_in_strips(
    vae: Autoencoder, image: Tensor, rows: int, store: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """image `(B, 3, H, W)` in [-1, 1] to mean and deviation `(B, latent_channels, h, w)` like `vae.encode`, in strips.

    rows, store: as for `decode_in_strips`, rows in those of the latent; nothing is page-locked, since a picture is
    encoded once. Gradients do not flow. Raises ValueError for `rows` under 1.
    """
    if rows < 1:
        raise ValueError(f"a strip of {rows} rows: it needs at least 1")
    if rows * vae.config.downscale >= image.shape[2]:
        return vae.encode(image)
    places = Store(torch.device(store) if store is not None else image.device, image.dtype)
    return vae.gaussian(torch.cat([_encode(vae, one, rows, places) for one in image.split(1)]))


def _encode(vae: Autoencoder, image: Tensor, rows: int, store: Store) -> Tensor:
    """What the encoder tells of one picture."""
    encoder, device, rows = vae.encoder, image.device, rows * vae.config.downscale
    x = Map.empty(store, encoder.conv_in.out_channels, *image.shape[2:])  # (1, C0, H, W)
    for strip in strips(x.height, rows):
        part = image[:, :, strip.top - strip.above : strip.bottom + strip.below]
        x.keep(strip, _convolve(encoder.conv_in, part, strip))
    for step in encoder.steps():
        if isinstance(step, ResnetBlock):
            x = _residual(step, x, rows, device, ALONE)
        elif isinstance(step, Downsample):
            x, rows = _halved(step, x, rows // 2, device), rows // 2
    return encoder.told(x.rows(0, x.height, device))


def _halved(step: Downsample, x: Map, rows: int, device: torch.device) -> Map:
    """The step to half the resolution; rows: of a strip of the result."""
    y = x.new(step.conv.out_channels, scale=0.5)
    for strip in strips(y.height, rows):
        part = x.rows(2 * strip.top, 2 * strip.bottom + 1, device)
        part = F.pad(part, (0, 1, 0, 1 - strip.below))  # right, and below only beyond the picture's edge
        y.keep(strip, F.conv2d(part, step.conv.weight, step.conv.bias, stride=2))
        del part
    return y


def _residual(block: ResnetBlock, x: Map, rows: int, device: torch.device, share: Share) -> Map:
    """A residual block: a map to the next of the same size, in whose place it then lies."""
    every = strips(x.height, rows)
    y, norm = x.new(block.conv1.out_channels), x.norm(block.norm1)
    for strip in share.own(every):
        y.keep(strip, _filtered(block.conv1, norm, x, strip, device))
    share.complete(y, every)
    z, norm = x.successor(block.conv2.out_channels), y.norm(block.norm2)
    for strip in share.own(every):
        part = _filtered(block.conv2, norm, y, strip, device)
        part += block.nin_shortcut(x.load(strip, device, halo=False))
        z.keep(strip, part)
        del part  # before the next strip asks for memory
    share.complete(z, every)
    return z


def _doubled(step: Upsample, x: Map, rows: int, device: torch.device, share: Share) -> Map:
    """The step to twice the resolution, by four convolutions of the map as it is instead of one of the doubled map.

    Doubled, two of the three rows that a 3x3 kernel sees are the same row, and so are two of its columns: an output in
    an even row and column is a 2x2 kernel's, which sums the weights that meet the same number; an odd one another's.
    That is 4/9 of the multiplications. The sums are rounded once, from float32.
    """
    y, kernels = x.new(step.conv.out_channels, scale=2), _sums(step.conv.weight)
    for strip in share.own(strips(x.height, rows)):
        part = x.load(strip, device)
        if not (strip.above and strip.below):
            part = F.pad(part, (0, 0, 1 - strip.above, 1 - strip.below))  # (1, C, rows + 2, w)
        part = _interleaved(part, kernels, step.conv.bias)
        y.keep(Strip(2 * strip.top, 2 * strip.bottom, 2 * strip.height), part)
        del part
    share.complete(y, strips(y.height, 2 * rows))
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


def _filtered(conv: nn.Conv2d, norm: WholeNorm, x: Map, strip: Strip, device: torch.device) -> Tensor:
    """The rows of a strip of norm, SiLU and convolution."""
    return _convolve(conv, _normalised(x.load(strip, device), norm), strip)


def _normalised(x: Tensor, norm: WholeNorm) -> Tensor:
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


def _normalised_exactly(x: Tensor, norm: WholeNorm) -> Tensor:
    return F.silu(F.batch_norm(x, norm.mean, norm.variance, norm.weight, norm.bias, eps=norm.eps), inplace=True)


def _convolve(conv: nn.Conv2d, x: Tensor, strip: Strip) -> Tensor:
    """A 3x3 convolution of rows with their halo; where there is none is the edge, with zeros beyond it."""
    if strip.above and strip.below:
        return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))
    y = F.conv2d(x, conv.weight, conv.bias, padding=1)
    return y[:, :, strip.above : y.shape[2] - strip.below]  # the halo's own row saw zeros where its neighbour is
