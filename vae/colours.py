"""A picture at a glance: the mean colour of every latent cell, by a linear map of its channels.

The map is fitted for the autoencoder at hand by least squares, on pictures of smooth noise that it encodes itself. For
SD3's there are published factors (Stability AI, sd3.5 `sd3_impls.py`; ComfyUI, `latent_formats.py`); a file does not
say that it holds these weights, and the fit needs a moment.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Fewer or smaller pictures gave worse colours of the demo model's own pictures, more were hardly better; the full-size
# encoder takes a second or two for these on two cores of a CPU.
_PICTURES = 4
_CELLS = 8  # of a side of such a picture: in all 256 cells, for 17 numbers per colour
_OCTAVES = (1, 4, 8, 24)  # cells of noise along a side


class Colours(NamedTuple):
    """The linear map from latents to colours."""

    weight: Tensor  # (3, C), float32
    bias: Tensor  # (3,)

    def __call__(self, latent: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` to a small picture `(B, 3, h, w)`, about [-1, 1], where the latents are."""
        weight, bias = self.weight.to(latent.device), self.bias.to(latent.device)
        return torch.einsum("kc,bchw->bkhw", weight, latent.float()) + bias[:, None, None]


def fitted_colours(encode: Callable[[Tensor], Tensor], downscale: int, channels: int = 3) -> Colours:
    """The map for an autoencoder; always the same one for the same weights.

    encode: its pictures `(1, channels, H, W)` in [-1, 1] to latents `(1, C, h, w)`, float32. downscale: pixels per
    latent cell along a side.
    """
    pictures = smooth_noise(_PICTURES, channels, _CELLS * downscale)  # (B, 3, H, W)
    # One by one: so little memory that no plan has to know of it.
    latents = torch.cat([encode(one).cpu() for one in pictures.split(1)])
    return least_squares(latents, F.avg_pool2d(pictures, downscale))


def smooth_noise(count: int, channels: int, side: int) -> Tensor:
    """Pictures `(count, channels, side, side)` within [-1, 1] of random colours, slow and faster ones."""
    random = torch.Generator().manual_seed(0)
    total = torch.zeros(count, channels, side, side)
    for cells in _OCTAVES:
        noise = torch.randn(count, channels, cells, cells, generator=random)
        total += F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
    return total.tanh()


def least_squares(latents: Tensor, colours: Tensor) -> Colours:
    """The linear map, with a bias, from latents `(B, C, h, w)` to colours `(B, 3, h, w)` that errs least."""
    known = latents.movedim(1, -1).flatten(0, 2).double()  # (N, C)
    wanted = colours.movedim(1, -1).flatten(0, 2).double()  # (N, 3)
    known = torch.cat([known, torch.ones(len(known), 1, dtype=torch.float64)], dim=1)
    # By singular values: a small autoencoder may not use all of its channels.
    found = torch.linalg.lstsq(known, wanted, driver="gelsd").solution.float()  # (C + 1, 3)
    return Colours(found[:-1].T.contiguous(), found[-1])
