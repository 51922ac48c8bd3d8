"""Pictures that a picture begins with: what a Settings makes of them, and how what is drawn becomes the result.

What is drawn has whole patches. The result may be smaller by a few rows and columns, or be a larger picture of which a
part was drawn (`mask_crop`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageChops

from mmdit.common.errors import SettingsError
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS, Settings
from mmdit.images import masks, shape
from mmdit.images.given import Given
from mmdit.images.options import full_strength, margins_of
from mmdit.images.read import Seen, look, read_mask, read_picture
from mmdit.images.shape import Box, Margins

Size = tuple[int, int]


@dataclass(frozen=True)
class Beginning:
    """What a picture begins with."""

    picture: Image.Image  # "RGB", of the size that is drawn
    mask: Image.Image | None  # "L", likewise
    original: Image.Image  # "RGB", of the result's size
    stays: Image.Image | None  # the mask, "L", of the result's size: where it is black the original stays
    region: Box | None  # where in the result what is drawn belongs; None: all of it

    def finish(self, drawn: Image.Image, edges: str) -> Image.Image:
        """The result. edges: "pixels" or "latent", as in the options."""
        if self.region is None:
            drawn = drawn.crop((0, 0, *self.original.size))
        if self.stays is None or (self.region is None and edges == "latent"):
            return drawn
        free = Image.new("L", self.original.size, 255) if edges == "latent" else self.stays
        return shape.put_back(self.original, drawn, free, self.region)


# ---- before anything is loaded -------------------------------------------------------------------


def check_pictures(s: Settings) -> tuple[Seen, ...]:
    """Read init and mask; what they are. Raises SettingsError for what cannot be read or does not fit together."""
    if s.init is None:
        return ()
    init = look("init", s.init)
    if s.mask is None:
        return (init,)
    mask = look("mask", s.mask)
    if mask[:2] != init[:2]:
        raise SettingsError(
            f"mask: {s.mask}: is {mask.width}x{mask.height}, but init is {init.width}x{init.height}: "
            "expected the same size"
        )
    return init, mask


def settled(s: Settings, defaults: Mapping[str, Any], multiple: int) -> Settings:
    """Settings that pass their checks, with all that follows from their pictures: strength, sizes, the hash.

    Where neither width nor height is given, a picture keeps its size, or is scaled down to the number of pixels of
    the model's default; of one of them the other follows. A region (`mask_crop`) is drawn with that number of pixels.
    With `outpaint`, width and height are those of the result. What comes out stays as it is when it is settled again.
    defaults: the model's own. multiple: pixels of a patch. Raises SettingsError.
    """
    if s.init is None:
        return s if s.images is s.size is None else replace(s, images=None, size=None)
    seen = check_pictures(s)
    known = {**SD35_MEDIUM_DEFAULTS, **defaults}
    s = replace(s, strength=full_strength(s), images="-".join(one.content for one in seen))
    own, area = (seen[0].width, seen[0].height), int(known["width"] * known["height"])
    if s.mask_crop is not None:
        found = region_of(s, (s.width, s.height) if s.width and s.height else None).size
        width, height = _sized(s, found, multiple) or shape.area_size(found, area, multiple)
        return replace(s, width=width, height=height, size=_told(own))
    if s.size is not None and (s.width, s.height) == shape.whole(_size(s.size), multiple):
        return s
    margins = Margins(*margins_of(s.outpaint))
    given = _sized(s, _grown(own, margins), multiple)
    result = given or _grown(shape.own_size(own, area), margins)
    width, height = given or shape.whole(result, multiple)
    if min(_grown(result, margins, -1)) < 1:
        raise SettingsError(f"outpaint is {s.outpaint!r}: expected margins that leave room within {width}x{height}")
    return replace(s, width=width, height=height, size=None if (width, height) == result else _told(result))


def _sized(s: Settings, own: Size, multiple: int) -> Size | None:
    """Width and height as far as they are given, the other following from a shape; None where neither is."""
    if s.width is None and s.height is None:
        return None
    width = s.width or shape.other_side(s.height or 0, own[1], own[0], multiple)
    return width, s.height or shape.other_side(width, own[0], own[1], multiple)


def result_size(s: Settings) -> Size:
    """The size of what a settled Settings gives; 0 for a side that is not known yet."""
    width, height = (s.width or 0, s.height or 0) if s.size is None else _size(s.size)
    return (width, height) if s.upscale is None else (round(s.upscale * width), round(s.upscale * height))


def _size(text: str) -> Size:
    width, height = map(int, text.split("x"))
    return width, height


def _told(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _grown(size: Size, margins: Margins, times: int = 1) -> Size:
    return (
        size[0] + times * (margins.left + margins.right),
        size[1] + times * (margins.top + margins.bottom),
    )


# ---- what is drawn from --------------------------------------------------------------------------


def beginning(s: Settings) -> Beginning:
    """What a settled Settings with an init begins with; raises SettingsError where it cannot be read any more."""
    assert s.init is not None and s.width and s.height
    drawn, init = (s.width, s.height), read_picture("init", s.init)
    if s.mask_crop is not None:
        mask, box = _soft_mask(s), region_of(s, drawn)
        return Beginning(shape.resized(init.crop(box), drawn), shape.resized(mask.crop(box), drawn), init, mask, box)
    margins = Margins(*margins_of(s.outpaint))
    result = drawn if s.size is None else _size(s.size)
    inner = _grown(result, margins, -1)
    original, mask = shape.extended(shape.fitted(init, inner, s.fit), margins), None
    if s.mask is not None:
        mask = shape.extended(shape.fitted(read_mask("mask", s.mask), inner, s.fit), margins)
    if s.outpaint is not None:
        new = masks.new_margins(inner, margins)
        mask = new if mask is None else ImageChops.lighter(mask, new)
    mask = None if mask is None else masks.blurred(mask, s.mask_blur)
    whole = None if mask is None else shape.completed(mask, drawn)
    return Beginning(shape.completed(original, drawn), whole, original, mask, None)


def _soft_mask(s: Settings) -> Image.Image:
    assert s.mask is not None
    return masks.blurred(read_mask("mask", s.mask), s.mask_blur)


def region_of(s: Settings, drawn: Size | None) -> Box:
    """What `mask_crop` cuts out; SettingsError where the mask is black."""
    assert s.mask_crop is not None
    box = shape.region(_soft_mask(s), s.mask_crop, drawn)
    if box is None:
        raise SettingsError(f"mask: {s.mask}: is black: there is no region for mask_crop")
    return box


# ---- twice ---------------------------------------------------------------------------------------


def enlarged(s: Settings, multiple: int, first: Image.Image | None = None) -> Settings:
    """The second pass of a settled Settings with `upscale`: image to image on the first, enlarged.

    first: what the first pass gave; without it the settings do for plans and checks.
    """
    result = result_size(s)
    width, height = shape.whole(result, multiple)
    init = "first pass" if first is None else Given(shape.resized(first, result))
    size = None if (width, height) == result else _told(result)
    return replace(s, init=init, strength=s.upscale_strength, width=width, height=height, size=size, upscale=None)
