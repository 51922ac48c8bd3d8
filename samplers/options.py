"""What a user may say of sampling."""

from dataclasses import dataclass
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import from_one_to, option

_MOST_STEPS = 100_000


def interval_of(text: str | None) -> tuple[float, float]:
    """What `cfg_interval` names, LOW:HIGH, as two shares of noise; SettingsError for what is none, None for all."""
    if text is None:
        return 0.0, 1.0
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise SettingsError(f"cfg_interval is {text!r}: expected LOW:HIGH, shares of noise from 0 to 1, as in 0.2:0.9")
    return low, high


def _check_interval(_: str, value: Any) -> None:
    interval_of(value)


@dataclass(frozen=True)
class SamplerOptions:
    """How it is denoised"""

    steps: int | None = option(None, "denoising steps", usual=28, metavar="N", check=from_one_to(_MOST_STEPS))
    cfg: float | None = option(
        None, "guidance scale; 1 is without guidance, at half the cost", usual=4.5, metavar="X"
    )  # fmt: skip
    cfg_interval: str | None = option(
        None,
        "guide only where the share of noise lies between these, as 0.2:0.9; the other steps cost half",
        metavar="LOW:HIGH",
        check=_check_interval,
    )
