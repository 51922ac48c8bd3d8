"""Paths as users write them."""

import math
from pathlib import Path

from mmdit.common.errors import SettingsError


def user_path(name: str, text: str) -> Path:
    """The path that a setting of this name gives, `~` filled in; SettingsError where it cannot be looked at."""
    if "\0" in text:
        raise SettingsError(f"{name}: {text}: no path has the character NUL")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise SettingsError(f"{name}: {text}: {getattr(error, 'strerror', None) or error}") from None
    return path


def split_scale(text: str, name: str = "lora") -> tuple[str, float]:
    """FILE_OR_FOLDER[:SCALE] as path and scale, 1 where there is none; SettingsError for one that is no number.

    A path that exists as it stands has no scale at its end. name: of the setting, for messages.
    """
    path, colon, number = text.rpartition(":")
    if not colon or user_path(name, text).exists():
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        if not user_path(name, path).exists():
            return text, 1.0  # a colon inside the path, not before a scale
        scale = math.nan
    if not path or not math.isfinite(scale):
        raise SettingsError(
            f"{name} is {text!r}: expected FILE_OR_FOLDER:SCALE with a number, as in style.safetensors:0.8"
        )
    return path, scale
