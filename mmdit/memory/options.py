"""What a user may say of memory."""

import re
from dataclasses import dataclass
from typing import Any

from mmdit.common.options import Mark, option, wrong


def memory_bytes(text: str) -> int | None:
    """What `memory` says, a number with its unit, in bytes; None for "auto"; SettingsError for what is neither."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?|\.\d+)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise wrong("memory", text, "a size such as 4GB or 900MB, or auto")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** (1 + "KMGT".index(match[2].upper())))


def _check_memory(_: str, value: Any) -> None:
    memory_bytes(value)


@dataclass(frozen=True)
class MemoryOptions:
    """Memory"""

    memory: str = option(
        "auto",
        "what tensors may take on the device, as 4GB; auto: most of what is free",
        Mark.OF_THE_RUN,
        Mark.NOT_SEEN,
        metavar="SIZE",
        check=_check_memory,
    )
