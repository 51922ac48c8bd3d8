"""What a user may say of the texts."""

from dataclasses import dataclass
from typing import Any

from mmdit.common.options import Mark, option, wrong


def _check_length(name: str, value: Any) -> None:
    if not 2 <= value <= 512:
        raise wrong(name, value, "2 to 512; 77, 154, 256 and 512 are usual")


@dataclass(frozen=True)
class TextOptions:
    """How the prompt is read"""

    t5: str = option(
        "on",
        "off: zeros in place of T5's tokens (as diffusers); omit: no such tokens (as ComfyUI)",
        Mark.LOADED,
        choices=("on", "off", "omit"),
    )
    t5_length: int | None = option(None, "tokens that T5 reads, 2 to 512", usual=256, metavar="N", check=_check_length)
