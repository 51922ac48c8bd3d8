"""Masks as numbers: how free each pixel, and each cell of a latent, is to change."""

from typing import TYPE_CHECKING

from PIL import Image, ImageFilter

from mmdit.images.shape import Margins

if TYPE_CHECKING:
    import numpy as np


def blurred(mask: Image.Image, radius: float) -> Image.Image:
    """A mask, "L", with soft edges: a Gaussian of this standard deviation in pixels."""
    return mask.filter(ImageFilter.GaussianBlur(radius)) if radius else mask


def new_margins(size: tuple[int, int], margins: Margins) -> Image.Image:
    """The mask of a picture that was extended: white in the margins, black where the picture, of this size, is."""
    width, height = size
    whole = (width + margins.left + margins.right, height + margins.top + margins.bottom)
    mask = Image.new("L", whole, 255)
    mask.paste(0, (margins.left, margins.top, margins.left + width, margins.top + height))
    return mask


def values(mask: Image.Image) -> "np.ndarray":
    """A mask as float32 `(H, W)` from 0, which stays, to 1, which is painted anew."""
    import numpy as np  # a tenth of a second that --help and mistakes do without

    return np.asarray(mask, dtype=np.float32) / 255


def cells(mask: "np.ndarray", downscale: int) -> "np.ndarray":
    """A mask `(H, W)` for the cells of a latent, `(H / downscale, W / downscale)`: each as free as its freest pixel.

    What is painted anew is then free as a whole; the pixels of such a cell that were to stay are put back afterwards.
    """
    height, width = mask.shape
    return mask.reshape(height // downscale, downscale, width // downscale, downscale).max(axis=(1, 3))
