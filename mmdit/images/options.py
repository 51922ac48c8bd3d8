"""What a user may say of pictures that a picture begins with."""

import math
import re
from dataclasses import dataclass
from os import PathLike
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, option, shown, wrong

FITS = ("crop", "pad", "stretch")  # those of mmdit.images.shape
EDGES = ("pixels", "latent")
STRENGTH = 0.6  # of a picture as a whole; diffusers' default
_FARTHEST = 8192  # pixels of a margin, a blur
_LARGEST = 8.0  # times the size


def margins_of(text: str | None) -> tuple[int, int, int, int]:
    """What `outpaint` names: pixels beyond the left, upper, right and lower edge; SettingsError, None for none."""
    if text is None:
        return 0, 0, 0, 0
    numbers = text.split(",")
    if len(numbers) != 4 or not all(re.fullmatch(r"\s*[0-9]{1,5}\s*", number) for number in numbers):
        raise wrong("outpaint", text, "LEFT,TOP,RIGHT,BOTTOM in pixels, as in 0,0,128,0")
    left, top, right, bottom = map(int, numbers)
    if not 0 < max(left, top, right, bottom) <= _FARTHEST:
        raise wrong("outpaint", text, f"at least one margin that is not 0, and none above {_FARTHEST}")
    return left, top, right, bottom


def _check_outpaint(_: str, value: Any) -> None:
    margins_of(value)


def _share(name: str, value: Any) -> None:
    if not 0 <= value <= 1:
        raise wrong(name, value, "a number from 0 to 1")


def _pixels(name: str, value: Any) -> None:
    if not 0 <= value <= _FARTHEST:
        raise wrong(name, value, f"pixels, from 0 to {_FARTHEST}")


def _times(name: str, value: Any) -> None:
    if not 1 < value <= _LARGEST:
        raise wrong(name, value, f"a number above 1, at most {_LARGEST:g}")


def _check_variation(name: str, value: Any) -> None:
    if not -(2**63) <= value < 2**63:  # some are added, one for each picture
        raise wrong(name, value, "a whole number of at most 63 bits")


def _check_size(name: str, value: Any) -> None:
    if not re.fullmatch("[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", value):
        raise wrong(name, value, "WxH in pixels")


@dataclass(frozen=True)
class ImageOptions:
    """Pictures to begin with"""

    init: str | None = option(
        None, "begin with this picture and paint over it", Mark.PICTURE, Mark.PATH, metavar="IMAGE"
    )
    strength: float | None = option(
        None,
        f"how much of init is painted over, 0 to 1 (default: {STRENGTH}; with mask or outpaint 1)",
        metavar="X",
        check=_share,
    )
    fit: str = option("crop", "how init is brought to width and height, where these are given", choices=FITS)
    mask: str | None = option(
        None,
        "what of init is painted over: white; black stays, a grey is a strength",
        Mark.PICTURE,
        Mark.PATH,
        metavar="IMAGE",
    )
    mask_blur: float = option(0.0, "soften the edges of the mask by so many pixels", metavar="N", check=_pixels)
    mask_crop: int | None = option(
        None,
        "draw only the part of init around the mask, with a margin of so many pixels, at width and height",
        metavar="MARGIN",
        check=_pixels,
    )
    mask_edges: str = option(
        "pixels",
        "pixels: where the mask is black, init's own pixels; latent: the autoencoder's picture of them",
        choices=EDGES,
    )
    outpaint: str | None = option(
        None,
        "draw beyond the edges of init, by so many pixels",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        check=_check_outpaint,
    )
    upscale: float | None = option(
        None, "draw, then draw over it at so many times the size", metavar="X", check=_times
    )  # fmt: skip
    upscale_strength: float = option(
        0.4, "how much the second time of upscale paints over", metavar="X", check=_share
    )  # fmt: skip
    variation_seed: int | None = option(
        None, "mix this seed's noise in; picture i of them has seed V + i", Mark.OWN, metavar="V",
        check=_check_variation,
    )  # fmt: skip
    variation_strength: float | None = option(
        None, "how much of it: 0 is none, 1 is that noise alone", Mark.OWN, metavar="X", check=_share
    )
    images: str | None = option(None, "a hash of what these pictures hold", Mark.FOUND)
    size: str | None = option(
        None, "size of the result, where it is not what is drawn", Mark.FOUND, check=_check_size
    )  # fmt: skip

    def check_together(self) -> None:
        needs = {
            "strength": "init", "mask": "init", "outpaint": "init", "mask_crop": "mask",
            "variation_seed": "variation_strength", "variation_strength": "variation_seed",
        }  # fmt: skip
        for name, needed in needs.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise _lonely(self, name, needed)
        masked = self.mask is not None or self.outpaint is not None
        if self.mask_blur and not masked:
            raise _lonely(self, "mask_blur", "mask")
        if self.mask_crop is not None and self.outpaint is not None:
            raise SettingsError(f"mask_crop is {self.mask_crop}, but outpaint is given too: expected one of them")
        if self.upscale is not None and masked:
            raise SettingsError(
                f"upscale is {self.upscale}, but mask or outpaint is given too: draw first, then enlarge the result"
            )


def _lonely(settings: Any, name: str, needed: str) -> SettingsError:
    value = shown(getattr(settings, name))
    return SettingsError(f"{name} is {value}, but {needed} is not given: expected both or neither")


def full_strength(settings: Any) -> float:
    """The strength of settings that have an init, the default filled in."""
    if settings.strength is not None:
        return settings.strength
    return STRENGTH if settings.mask is None and settings.outpaint is None else 1.0


def steps_of(settings: Any) -> int:
    """How many steps a picture takes, its strength taken into account."""
    left_out = 0 if settings.init is None else steps_left_out(settings.steps, full_strength(settings))
    return settings.steps - left_out


def steps_left_out(steps: int, strength: float) -> int:
    """How many of so many steps image to image leaves out at the beginning, all of them for strength 0.

    As diffusers counts (`StableDiffusion3Img2ImgPipeline.get_timesteps`).
    """
    return math.floor(max(steps - min(steps * strength, steps), 0))


def as_text(name: str, value: Any) -> Any:
    """A picture or a path as the text that stands for it in a setting of this name; anything else as it is.

    Raises SettingsError for a picture that is too large or, since Pillow reads late, cannot be read.
    """
    if isinstance(value, PathLike):
        return str(value)
    if value is None or isinstance(value, str):
        return value
    from PIL import Image  # not loaded for a path's sake

    if not isinstance(value, Image.Image):
        return value
    from mmdit.images.given import Given
    from mmdit.images.read import check_image

    check_image(name, value)
    return Given(value)
