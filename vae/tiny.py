"""TAESD3, a small autoencoder distilled from SD3's own: the same latents, a hundredth of the work, fewer details.

Reference: madebyollin/taesd, `taesd.py`; diffusers `AutoencoderTiny`. Parameters carry the names of the published
files (`taesd3_decoder.safetensors`: `3.conv.0.weight`), those of its two halves apart. It sees 3x3 convolutions and
ReLUs only, nothing over the whole picture: rows far away do not count, so strips with enough rows of halo are exact.

Shapes: as in `vae.autoencoder`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

DOWNSCALE = 8  # picture pixels per latent cell along each side
# Latent rows above and below that a decoded cell depends on. From the picture back to the latent: 5 convolutions at its
# own resolution, 10 at half of it (5 rows reach into 3 there: 13), 10 at the next (13 into 7: 17), 10 at the latent's
# (17 into 9: 19). A cell that is encoded depends on as many.
HALO = 19
_MAPS = 4  # of the picture's size and the network's width that a decode holds at a time


@dataclass(frozen=True)
class TinyConfig:
    """A small autoencoder in numbers. The defaults are TAESD3's."""

    width: int = 64  # channels of every layer
    latent_channels: int = 16
    image_channels: int = 3


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu_()


class Bound(nn.Module):
    """Latents held between -3 and 3, softly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class TinyEncoder(nn.Sequential):
    """A picture in [0, 1], `(B, 3, H, W)`, to latents `(B, C, h, w)`."""

    def __init__(self, config: TinyConfig) -> None:
        width = config.width

        def half() -> list[nn.Module]:
            step = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            return [step, *(TinyBlock(width) for _ in range(3))]

        first = nn.Conv2d(config.image_channels, width, 3, padding=1)
        last = nn.Conv2d(width, config.latent_channels, 3, padding=1)
        super().__init__(first, TinyBlock(width), *half(), *half(), *half(), last)


class TinyDecoder(nn.Sequential):
    """Latents `(B, C, h, w)` to a picture, about [0, 1], `(B, 3, H, W)`."""

    def __init__(self, config: TinyConfig) -> None:
        width = config.width

        def double() -> list[nn.Module]:
            step = nn.Conv2d(width, width, 3, padding=1, bias=False)
            return [*(TinyBlock(width) for _ in range(3)), nn.Upsample(scale_factor=2), step]

        first = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        last = nn.Conv2d(width, config.image_channels, 3, padding=1)
        begin = [Bound(), first, nn.ReLU(inplace=True)]
        super().__init__(*begin, *double(), *double(), *double(), TinyBlock(width), last)
        self.config = config


class Half(NamedTuple):
    """What is to be known of the encoder or the decoder, to read it from a file."""

    build: Callable[[TinyConfig], nn.Module]
    first: str  # its first tensor
    last: str


HALVES = {
    "encoder": Half(TinyEncoder, "0.weight", "14.weight"),
    "decoder": Half(TinyDecoder, "1.weight", "19.weight"),
}


def tiny_config(half: str, shapes: Mapping[str, tuple[int, ...]]) -> TinyConfig:
    """The sizes of one half of HALVES by its tensors' shapes; KeyError, ValueError for none."""
    (_, before, *_), (after, width, *_) = (shapes[name] for name in HALVES[half][1:])
    latent, image = (after, before) if half == "encoder" else (before, after)
    return TinyConfig(width, latent, image)


class TinyAutoencoder(nn.Module):
    """Pictures in [-1, 1] to the latents of SD3's transformer, and back; it has both halves, or the decoder alone.

    Its latents have scale 1 and shift 0: they are those that the transformer works on.
    """

    def __init__(self, decoder: TinyDecoder, encoder: TinyEncoder | None = None) -> None:
        super().__init__()
        self.decoder, self.encoder = decoder, encoder

    def encode(self, image: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1], H and W multiples of 8, to latents `(B, C, h, w)`; ValueError without encoder."""
        if self.encoder is None:
            raise ValueError("this TAESD has a decoder alone")
        return self.encoder((image + 1) / 2)

    def decode(self, latent: Tensor) -> Tensor:
        """`(B, C, h, w)` to a picture `(B, 3, H, W)`, about [-1, 1], not clamped."""
        return self.decoder(latent) * 2 - 1

    @torch.no_grad()
    def decode_within(self, latent: Tensor, memory: int) -> Tensor:
        """`decode` one by one, in strips that take about so many bytes, or what one latent row and its halo take."""
        return torch.cat([self._in_strips(one, memory, self.decode, 1, DOWNSCALE) for one in latent.split(1)])

    @torch.no_grad()
    def encode_within(self, image: Tensor, memory: int) -> Tensor:
        """`encode` likewise."""
        return torch.cat([self._in_strips(one, memory, self.encode, DOWNSCALE, 1) for one in image.split(1)])

    def _in_strips(
        self, x: Tensor, memory: int, compute: Callable[[Tensor], Tensor], before: int, after: int
    ) -> Tensor:  # fmt: skip
        """What `compute` makes of one x, some rows of cells and their halo at a time.

        before, after: rows of x, and of what comes of it, in a row of cells.
        """
        pixels = DOWNSCALE**2 * x.shape[3] // before  # of a row of cells
        most = memory // (_MAPS * self.decoder.config.width * pixels * x.itemsize)
        height, rows, parts = x.shape[2] // before, max(most - 2 * HALO, 1), []
        if height <= rows + 2 * HALO:
            return compute(x)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            above, below = max(top - HALO, 0), min(bottom + HALO, height)
            part = compute(x[:, :, before * above : before * below])
            parts.append(part[:, :, after * (top - above) : after * (bottom - above)].clone())
        return torch.cat(parts, dim=2)
