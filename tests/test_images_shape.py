"""Pictures as input: fitted, masked, cut out and put back, against arithmetic."""

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_images import DRAW, SMOOTH

from mmdit.images.masks import blurred, cells, new_margins, values
from mmdit.images.shape import (
    Box,
    Margins,
    area_size,
    completed,
    extended,
    fitted,
    other_side,
    own_size,
    put_back,
    region,
    whole,
)

# ---- sizes ---------------------------------------------------------------------------------------


def test_sizes_by_hand() -> None:
    assert own_size((1000, 700), 1024**2) == (1000, 700)
    assert own_size((4000, 3000), 1024**2) == (1182, 887)
    assert own_size((1, 2**24), 1024**2) == (1, 4194304)
    assert whole((1000, 704), 16) == (1008, 704)
    assert area_size((300, 100), 1024**2, 16) == (1776, 592)
    assert other_side(512, 1000, 700, 16) == 352  # of 358.4
    assert other_side(16, 1000, 1, 16) == 16


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 96), (40, 24), (16, 16)])
def test_fitting(size: tuple[int, int]) -> None:
    """On a picture whose colour is its place, so that one sees which part of it is where."""
    x, y = np.meshgrid(np.arange(40) * 6, np.arange(24) * 6)
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    wide, high = size
    for fit in ("crop", "pad", "stretch"):
        assert fitted(image, size, fit).size == size
    assert fitted(image, image.size, "crop") is image
    stretched = np.asarray(fitted(image, size, "stretch"), float)
    middle = [(40 / 2 - 0.5) * 6, (24 / 2 - 0.5) * 6]
    for fit in ("crop", "pad", "stretch"):  # the middle stays the middle
        found = np.asarray(fitted(image, size, fit), float)[..., :2]
        assert (
            np.abs(found[high // 2 - 1 : high // 2 + 1, wide // 2 - 1 : wide // 2 + 1].mean((0, 1)) - middle).max() < 5
        )
    assert stretched[..., 0].min() < 12 and stretched[..., 0].max() > 222
    cropped, padded = (np.asarray(fitted(image, size, fit), float) for fit in ("crop", "pad"))
    slope = 6 / max(wide / 40, high / 24)  # levels from pixel to pixel
    if wide >= 32:
        assert np.diff(cropped[high // 2, 4:-4, 0]).mean() == pytest.approx(slope, abs=0.15)
    inner = min(wide / 40, high / 24)
    if wide / 40 > high / 24:
        bar = (wide - round(40 * inner)) // 2
        assert (padded[:, :bar] == padded[:, bar : bar + 1]).all()
    elif high / 24 > wide / 40:
        bar = (high - round(24 * inner)) // 2
        assert (padded[:bar] == padded[bar]).all()


def test_extended() -> None:
    """A picture's edge is repeated, a mask's surroundings are black."""
    image, mask = Image.fromarray(SMOOTH), Image.fromarray(SMOOTH[..., 0])
    margins = Margins(3, 0, 5, 2)
    found = np.asarray(extended(image, margins))
    assert found.shape == (26, 48, 3) and np.array_equal(found[:24, 3:43], SMOOTH)
    assert (found[:24, :3] == SMOOTH[:, :1]).all() and (found[24:, 43:] == SMOOTH[-1, -1]).all()
    assert np.asarray(extended(mask, margins)).sum() == np.asarray(mask).sum()
    found = np.asarray(completed(mask, (43, 26)))
    assert np.array_equal(found[:24, :40], np.asarray(mask)) and (found[:, 40:] == found[:, 39:40]).all()
    assert (found[24:] == found[23]).all() and completed(image, (43, 26)).size == (43, 26)
    new = np.asarray(new_margins((40, 24), margins))
    assert new.shape == (26, 48) and (new[:24, 3:43] == 0).all() and (new == 255).sum() == 26 * 48 - 24 * 40


def masked(box: tuple[int, int, int, int], size: tuple[int, int] = (100, 60)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(200, box)
    return mask


@pytest.mark.parametrize(("box", "margin", "size", "expected"), [
    ((40, 20, 60, 30), 0, None, (40, 20, 60, 30)), ((40, 20, 60, 30), 5, None, (35, 15, 65, 35)),
    ((0, 50, 9, 60), 5, None, (0, 45, 14, 60)), ((40, 20, 60, 30), 0, (64, 64), (40, 15, 60, 35)),
    ((0, 20, 10, 50), 0, (64, 64), (0, 20, 30, 50)), ((95, 0, 100, 40), 0, (64, 32), (20, 0, 100, 40)),
    ((10, 0, 90, 60), 0, (64, 64), (10, 0, 90, 60)), ((10, 10, 90, 20), 0, (64, 64), (10, 0, 90, 60)),
])  # fmt: skip
def test_regions(box: Any, margin: int, size: Any, expected: Any) -> None:
    """With a margin, within the picture, and of the shape that is drawn as far as there is room."""
    assert region(masked(box), margin, size) == expected


def test_a_black_mask_has_no_region() -> None:
    assert region(Image.new("L", (8, 8)), 3) is None


def test_what_is_put_back_is_exact() -> None:
    """Where the mask is black every bit is the original's; elsewhere what was drawn, brought to the box's size."""
    original = Image.fromarray(DRAW.integers(0, 256, (60, 100, 3), np.uint8))
    mask, box = masked((40, 20, 60, 30)), Box(30, 15, 70, 35)
    drawn = Image.new("RGB", (64, 32), (1, 2, 3))
    found, inside = np.asarray(put_back(original, drawn, mask, box)), np.asarray(mask) > 0
    assert np.array_equal(found[~inside], np.asarray(original)[~inside]) and (found[inside] == [1, 2, 3]).all()
    other = Image.fromarray(DRAW.integers(0, 256, (60, 100, 3), np.uint8))
    found = np.asarray(put_back(original, other, mask))
    assert np.array_equal(found[inside], np.asarray(other)[inside])


# ---- masks ---------------------------------------------------------------------------------------


def test_masks_as_numbers() -> None:
    mask = Image.fromarray(np.array([[0, 51, 102, 255]], np.uint8))
    assert values(mask).dtype == np.float32 and values(mask).tolist() == [[0.0, np.float32(0.2), np.float32(0.4), 1.0]]
    grid = np.zeros((16, 24), np.float32)
    grid[7, 8], grid[15, 23], grid[0, 23] = 1.0, 0.25, 0.5
    assert cells(grid, 8).tolist() == [[0, 1, 0.5], [0, 0, 0.25]]


def test_blur_is_that_of_pillow_and_leaves_black_what_is_far() -> None:
    mask = masked((40, 20, 60, 30))
    assert blurred(mask, 0) is mask
    found = np.asarray(blurred(mask, 3))
    assert np.array_equal(found, np.asarray(mask.filter(ImageFilter.GaussianBlur(3))))
    assert 0 < found[25, 39] < 200 and found[:, :20].sum() == 0
