"""Sizes of pictures: fitted to another, extended, a region cut out and put back.

Pictures are "RGB", masks "L": white is painted anew, black stays, a grey is a strength. A picture that has the right
size already is not resampled.
"""

import math
from typing import NamedTuple

from PIL import Image


class Box(NamedTuple):
    """A part of a picture in pixels; right and bottom are the first that do not belong to it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top


class Margins(NamedTuple):
    """Pixels beyond each edge."""

    left: int
    top: int
    right: int
    bottom: int


# ---- sizes ---------------------------------------------------------------------------------------


def own_size(size: tuple[int, int], most: int) -> tuple[int, int]:
    """The size at which a picture is drawn whose size nobody said: its own, or scaled down to so many pixels."""
    scale = min(1.0, math.sqrt(most / (size[0] * size[1])))
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def whole(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The least multiples that are not below the sides."""
    width, height = (-(-side // multiple) * multiple for side in size)
    return width, height


def area_size(size: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """The size with this shape and about so many pixels, each side the nearest multiple."""
    scale = math.sqrt(area / (size[0] * size[1]))
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    return width, height


def other_side(side: int, of: int, to: int, multiple: int) -> int:
    """The side that keeps the shape where another, `of` pixels in the picture, becomes `side`: the nearest multiple."""
    return max(multiple, round(to * side / of / multiple) * multiple)


# ---- fitting -------------------------------------------------------------------------------------


def fitted(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """The picture, "RGB" or "L", in another size.

    crop: scaled until it covers the size, and what sticks out cut off, equally at both ends. pad: scaled until it lies
    within, in the middle; a picture's own edge is repeated around it, and around a mask is black. stretch: each side
    scaled by itself.
    """
    if image.size == size:
        return image
    if fit == "stretch":
        return resized(image, size)
    (width, height), (wide, high) = image.size, size
    scale = (max if fit == "crop" else min)(wide / width, high / height)
    if fit == "crop":
        part = min(wide / scale, width), min(high / scale, height)  # of the picture that is to be seen
        left, top = (width - part[0]) / 2, (height - part[1]) / 2
        return image.resize(size, _filter(image), box=(left, top, left + part[0], top + part[1]))
    inner = min(wide, max(1, round(width * scale))), min(high, max(1, round(height * scale)))
    left, top = (wide - inner[0]) // 2, (high - inner[1]) // 2
    margins = Margins(left, top, wide - inner[0] - left, high - inner[1] - top)
    return extended(resized(image, inner), margins)


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, _filter(image))


def _filter(image: Image.Image) -> Image.Resampling:
    """Lanczos's filter makes masks ring: what is black would not be."""
    return Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS


def extended(image: Image.Image, margins: Margins) -> Image.Image:
    """With more pixels on each side: of a picture its edge repeated, of a mask black."""
    import numpy as np

    if margins == (0, 0, 0, 0):
        return image
    rows, columns = (margins.top, margins.bottom), (margins.left, margins.right)
    if image.mode == "L":
        return Image.fromarray(np.pad(np.asarray(image), (rows, columns)))
    return Image.fromarray(np.pad(np.asarray(image), (rows, columns, (0, 0)), mode="edge"))


def completed(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """With rows and columns more, below and to the right, up to a size; its edge is repeated, of masks too."""
    import numpy as np

    if image.size == size:
        return image
    more = [(0, size[1] - image.height), (0, size[0] - image.width), (0, 0)]
    return Image.fromarray(np.pad(np.asarray(image), more[: np.asarray(image).ndim], mode="edge"))


# ---- regions -------------------------------------------------------------------------------------


def region(mask: Image.Image, margin: int, size: tuple[int, int] | None = None) -> Box | None:
    """What is to be cut out so that all of a mask that is not black is in it, with a margin; None where all is black.

    size: what it is going to be drawn at; the region grows, within the picture, until it has that shape. Where the
    picture is too small for that, it has as much of it as there is.
    """
    found = mask.getbbox()
    if found is None:
        return None
    box = Box(*found)
    box = Box(max(0, box.left - margin), max(0, box.top - margin),
              min(mask.width, box.right + margin), min(mask.height, box.bottom + margin))  # fmt: skip
    if size is None:
        return box
    width, height = box.size
    wide, high = max(width, round(height * size[0] / size[1])), max(height, round(width * size[1] / size[0]))
    left, right = _grown(box.left, box.right, wide, mask.width)
    top, bottom = _grown(box.top, box.bottom, high, mask.height)
    return Box(left, top, right, bottom)


def _grown(low: int, high: int, wanted: int, most: int) -> tuple[int, int]:
    """The stretch from low to high, grown to `wanted` around its middle, moved to lie within 0 and `most`."""
    wanted = min(wanted, most)
    start = min(max(0, low - (wanted - (high - low)) // 2), most - wanted)
    return start, start + wanted


def put_back(original: Image.Image, drawn: Image.Image, mask: Image.Image, box: Box | None = None) -> Image.Image:
    """The original, with what was drawn wherever the mask is not black; all else is the original, to the bit.

    mask: of the original's size. box: where in the original the drawn picture belongs; None: all of it.
    """
    import numpy as np

    box = box or Box(0, 0, *original.size)
    result = np.array(original)
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    free = np.asarray(mask)[rows, columns, None] > 0
    result[rows, columns] = np.where(free, np.asarray(resized(drawn, box.size)), result[rows, columns])
    return Image.fromarray(result)
