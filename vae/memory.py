"""How much memory a decode or an encode takes, by arithmetic: the maps that live at the same time, of one picture.

Counted are the tensors of the code as it stands in `vae.autoencoder` and `vae.strips`; the tests compare with what it
really allocates. Not counted are the weights, a convolution library's own workspace, and the table of scores of a
backend that has no fused attention for heads as wide as the last level. h, w: rows and columns of the latent.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from vae.autoencoder import VAEConfig
from vae.maps import largest_map, strips
from vae.strips import CACHED, LAUNCHED


class Peak(NamedTuple):
    """The most bytes that a decode, or an encode, holds at once."""

    device: int  # activations where it is computed
    store: int  # whole maps; 0 for the plain path
    together: int  # both, where they are the same memory


def decode_peak(
    config: VAEConfig, h: int, w: int, rows: int | None, dtype: torch.dtype, store_apart: bool = True
) -> int:
    """Bytes on the device during the decode of one picture, in addition to the weights.

    rows: as for `decode_in_strips`; None or at least h is the plain path. store_apart: whether the store is other
    memory than the device's (`peak` tells the store's own bytes). Of several pictures, strips take the same and the
    finished pictures more, the plain path takes the multiple.
    """
    found = peak(config, h, w, rows, dtype, store_apart)
    return found.device if store_apart else found.together + library_peak(config, h, w, rows, dtype)


def encode_peak(
    config: VAEConfig, h: int, w: int, rows: int | None, dtype: torch.dtype, store_apart: bool = True
) -> int:
    """Bytes on the device during the encode of one picture, itself included; else as `decode_peak`.

    The channels of its pixels lie last in memory, as files have them, and so do those of all maps: a CPU's library then
    copies nothing.
    """
    found = peak(config, h, w, rows, dtype, store_apart, encode=True)
    return found.device if store_apart else found.together


@lru_cache(maxsize=64)  # plans are compared by the hundred
def rows_for(
    config: VAEConfig,
    h: int,
    w: int,
    dtype: torch.dtype,
    budget: int,
    store_apart: bool = True,
    peak_of: Callable[..., int] = decode_peak,
) -> int | None:
    """The largest `rows` whose peak is within `budget` bytes: h where the plain path fits; None where nothing does.

    peak_of: `decode_peak` or `encode_peak`.
    """
    fitting = (r for r in range(h, 0, -1) if peak_of(config, h, w, r, dtype, store_apart) <= budget)
    return next(fitting, None)


def library_peak(config: VAEConfig, h: int, w: int, rows: int | None, dtype: torch.dtype) -> int:
    """Bytes that a CPU's convolution library takes for itself at its largest layer.

    In float32 it copies what it reads and what it writes into a layout of its own; 16 bits lie in it (channels last).
    """
    if dtype.itemsize < 4:
        return 0
    seen = min(rows or h, h) * w
    size = max(
        layer.scale**2 * max(layer.before + layer.after, 4 * 2 * layer.after if layer.doubles else 0)
        for layer in _layers(config)
    )
    return dtype.itemsize * seen * size


def locked_places(config: VAEConfig, h: int, w: int) -> tuple[int, int]:
    """How many places of the host's memory a decode in strips page-locks, and the numbers that each is made for."""
    widens = any(layer.after > layer.before for layer in _layers(config))  # a sum does not fit into the input's place
    return 3 if widens else 2, largest_map(config, h, w)


def peak(
    config: VAEConfig, h: int, w: int, rows: int | None, dtype: torch.dtype, gpu: bool = False, encode: bool = False
) -> Peak:
    """All three peaks of `decode_peak`'s arguments, or `encode_peak`'s.

    gpu: whether that is where it is computed, and in 16 bits by norms that keep the layout (`vae.channels`).
    """
    if rows is None or rows >= h:
        moments = list((_plain_encode if encode else _plain)(config, h, w))
    else:
        stripped = _encode_in_strips if encode else _in_strips
        moments = list(stripped(config, h, w, rows, dtype.itemsize, LAUNCHED if gpu else CACHED))
    device = max(m.made + m.loaded for m in moments)
    store = max(m.store for m in moments)
    together = max(m.made + m.store for m in moments)
    return Peak(*(dtype.itemsize * numbers for numbers in (device, store, together)))


class Moment(NamedTuple):
    """Numbers held at one time."""

    made: int  # on the device, computed there
    loaded: int = 0  # on the device, copied from the store; where both are the same memory, these are no copies
    store: int = 0  # in whole maps


class Layer(NamedTuple):
    """A residual block of a level."""

    before: int  # channels
    after: int
    scale: int  # its rows per row of the latent
    doubles: bool = False  # whether the step to twice the resolution follows
    halves: bool = False  # whether the step to half the resolution follows


def _encoder_layers(config: VAEConfig) -> Iterator[Layer]:
    blocks, widths = config.layers_per_block, config.block_out_channels
    for level, width in enumerate(widths):
        last = len(widths) - 1 - level
        for i in range(blocks):
            before = widths[max(level - 1, 0)] if i == 0 else width
            yield Layer(before, width, 2**last, halves=i == blocks - 1 and last > 0)


def _layers(config: VAEConfig) -> Iterator[Layer]:
    blocks, widths = config.layers_per_block + 1, config.block_out_channels[::-1]
    for level, width in enumerate(widths):
        for i in range(blocks):
            before = widths[max(level - 1, 0)] if i == 0 else width
            yield Layer(before, width, 2**level, doubles=i == blocks - 1 and level < len(widths) - 1)


def _middle(config: VAEConfig, h: int, w: int) -> Moment:
    """conv_in's map, attention's input, norm, q, k, v, result, its projection and the sum."""
    return Moment(9 * config.block_out_channels[-1] * h * w)


def _plain(config: VAEConfig, h: int, w: int) -> Iterator[Moment]:
    yield _middle(config, h, w)
    for layer in _layers(config):
        after, size = layer.after, layer.scale**2 * h * w
        yield from _block(layer, size)
        if layer.doubles:
            yield Moment((1 + 4 + 4) * after * size)  # the map, its rows and columns doubled, the result
    width, size = config.block_out_channels[0], config.downscale**2 * h * w
    yield Moment((2 * width + config.image_channels) * size)


def _block(layer: Layer, size: int) -> Iterator[Moment]:
    """A residual block of a map of so many pixels."""
    before, after = layer.before, layer.after
    yield Moment((2 * before + after) * size)  # conv1: the block's input, its norm, the result
    yield Moment((before + 2 * after) * size)  # conv2 likewise, and the sum, the input in another width


def _plain_encode(config: VAEConfig, h: int, w: int) -> Iterator[Moment]:
    height, width = config.downscale * h, config.downscale * w
    image = config.image_channels * height * width
    for layer in _encoder_layers(config):
        rows, columns = layer.scale * h, layer.scale * w
        for moment in _block(layer, rows * columns):
            yield Moment(image + moment.made)
        if layer.halves:  # the map, once more with zeros at two edges, the result
            made = rows * columns + (rows + 1) * (columns + 1) + rows * columns // 4
            yield Moment(image + layer.after * made)
    yield Moment(image + _middle(config, h, w).made)


def _encode_in_strips(
    config: VAEConfig, h: int, w: int, rows: int, itemsize: int, many: int
) -> Iterator[Moment]:  # fmt: skip
    """many: numbers that are normalised at a time."""
    size = config.downscale**2 * h * w
    image, held = config.image_channels * size, config.block_out_channels[0] * size
    for layer in _encoder_layers(config):
        after, height, columns = layer.after, layer.scale * h, layer.scale * w
        for moment in _block_in_strips(layer, h, w, rows, held, itemsize, many):
            yield moment._replace(made=image + moment.made)
        held = max(held, after * height * columns) if after <= layer.before else after * height * columns
        if layer.halves:
            store, half = held + after * height * columns // 4, height // 2
            for strip in strips(half, layer.scale // 2 * rows):
                own = strip.bottom - strip.top
                seen, padded = after * (2 * own + strip.below) * columns, after * (2 * own + 1) * (columns + 1)
                yield Moment(image + padded, seen, store)
                yield Moment(image + padded + after * own * columns // 2, 0, store)
            held = after * height * columns // 4
    last = config.block_out_channels[-1] * h * w
    yield Moment(image + _middle(config, h, w).made - last, last, held)


def _block_in_strips(
    layer: Layer, h: int, w: int, rows: int, held: int, itemsize: int, many: int
) -> Iterator[Moment]:  # fmt: skip
    """A residual block, of whose input's place the store holds so many numbers."""
    before, after, height, columns = layer.before, layer.after, layer.scale * h, layer.scale * w
    store = held + after * height * columns
    room = after * height * columns if after > before else 0  # for a sum that does not fit into the input's place
    for own, seen, made in _extents(height, layer.scale * rows):
        result = after * made * columns
        yield from _filtered(before, seen, columns, result, store, itemsize, many)
        yield from _filtered(after, seen, columns, result, store + room, itemsize, many)
        shortcut = after * own * columns if after != before else 0
        yield Moment(result + shortcut, before * own * columns, store + room)


def _in_strips(config: VAEConfig, h: int, w: int, rows: int, itemsize: int, many: int) -> Iterator[Moment]:
    """many: numbers that are normalised at a time."""
    yield _middle(config, h, w)
    held = config.block_out_channels[-1] * h * w  # numbers of the map that a block begins with, in the store
    yield Moment(held, 0, held)
    for layer in _layers(config):
        after, scale = layer.after, layer.scale
        size, columns = scale * h * scale * w, scale * w
        yield from _block_in_strips(layer, h, w, rows, held, itemsize, many)
        held = max(held, after * size) if after <= layer.before else after * size
        if layer.doubles:
            store = held + 4 * after * size
            kernels = 16 * after**2
            yield Moment(kernels + 29 * after**2 * max(4 // itemsize, 1), 0, store)  # the sums, from float32
            for own, seen, made in _extents(scale * h, scale * rows):
                edge = 0 if made == own else (own + 2) * columns  # the strip again, with zeros beyond the edge
                work = edge + 4 * own * columns + own * (columns + 1)
                yield Moment(kernels + work * after, seen * after * columns if not edge else 0, store)
            held = 4 * after * size
    width, columns, size = config.block_out_channels[0], config.downscale * w, config.downscale**2 * h * w
    for _, seen, made in _extents(config.downscale * h, config.downscale * rows):
        for moment in _filtered(width, seen, columns, config.image_channels * made * columns, held, itemsize, many):
            yield moment._replace(made=moment.made + config.image_channels * size)  # the picture


def _filtered(
    channels: int, rows: int, columns: int, result: int, store: int, itemsize: int, many: int
) -> Iterator[Moment]:
    """Norm, SiLU and convolution of a strip; of fewer than four bytes, some rows twice in float32."""
    size, row = rows * channels * columns, channels * columns
    exact = 0 if itemsize >= 4 else 2 * (4 // itemsize) * row * min(max(many // row, 1), rows)
    yield Moment(size + exact, size, store)
    yield Moment(size + result, 0, store)


def _extents(height: int, rows: int) -> set[tuple[int, int, int]]:
    """The different strips of a map: own rows, rows with halo, rows that a convolution makes of those."""
    found = set()
    for strip in strips(height, rows):
        own = strip.bottom - strip.top
        seen = own + strip.above + strip.below
        found.add((own, seen, own if strip.above and strip.below else seen))
    return found
