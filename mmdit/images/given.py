"""A picture that Python gives in the place of a path, as a value of a setting."""

import hashlib
from os import PathLike
from typing import Any


class Given(str):
    """The text `picture-HASH`, with the picture: settings are compared, copied and written as texts."""

    image: Any  # PIL.Image.Image; a copy, which nobody else changes
    content: str

    def __new__(cls, image: Any) -> "Given":
        own = image.copy()
        content = hashlib.sha256(repr((own.mode, own.size)).encode() + own.tobytes()).hexdigest()[:16]
        self = super().__new__(cls, f"picture-{content}")
        self.image, self.content = own, content
        return self

    def __deepcopy__(self, memo: object) -> "Given":
        return self


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
    from mmdit.images.read import check_image

    check_image(name, value)
    return Given(value)
