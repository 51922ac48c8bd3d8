"""What a user may say of memory."""

import re

from mmdit.errors import SettingsError


def memory_bytes(text: str) -> int | None:
    """What `memory` says, a number with its unit, in bytes; None for "auto"; SettingsError for what is neither."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise SettingsError(f"memory is {text!r}: expected a size such as 4GB or 900MB, or auto")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** (1 + "KMGT".index(match[2].upper())))
