"""What a user may say of ControlNets."""

from dataclasses import dataclass
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, option, wrong

TYPES = ("blur", "canny", "depth")  # those of weights.control
MAPS = ("diffusers", "stability")  # those of mmdit.control.adding


def interval_of(text: str) -> tuple[float, float]:
    """LOW:HIGH as two numbers; SettingsError where they are not, with 0 <= LOW < HIGH <= 1."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise wrong("control_interval", text, "LOW:HIGH with 0 <= LOW < HIGH <= 1, as in 0:0.8")
    return low, high


def _check_interval(_: str, value: Any) -> None:
    interval_of(value)


def _check_type(name: str, value: Any) -> None:
    if value not in TYPES:
        raise wrong(name, value, f"one of {', '.join(TYPES)}")


@dataclass(frozen=True)
class ControlOptions:
    """ControlNets; what is said of several is repeated, in one order"""

    control: tuple[str, ...] = option(
        (), "let this ControlNet, a file or a folder, control the picture", Mark.LOADED, Mark.PATH,
        metavar="FILE|FOLDER",
    )  # fmt: skip
    control_image: tuple[str, ...] = option(
        (),
        "the picture that it controls by, as it was trained to see it",
        Mark.PICTURE,
        Mark.PATH,
        Mark.OWN,
        metavar="IMAGE",
    )
    control_scale: tuple[float, ...] = option((), "how strongly (default: 1)", metavar="X")
    control_interval: tuple[str, ...] = option(
        (), "in which part of the steps, as shares of them (default: 0:1)", metavar="LOW:HIGH", check=_check_interval
    )
    control_mask: str | None = option(
        None,
        "for a ControlNet that fills in: what is filled in is white",
        Mark.PICTURE,
        Mark.PATH,
        Mark.OWN,
        metavar="MASK",
    )
    control_type: tuple[str, ...] = option(
        (),
        f"what its picture shows, {', '.join(TYPES)}: for SD3.5-Large's, where its file does not say it",
        metavar="TYPE",
        check=_check_type,
    )
    control_map: str = option(
        "auto",
        "which of its residuals a block of the transformer is given; auto: as the program that it was made for",
        choices=("auto", *MAPS),
    )
    control_pictures: str | None = option(None, "a hash of what these pictures hold", Mark.FOUND, Mark.OWN)

    def check_together(self) -> None:
        nets = len(self.control)
        for name in ("control_image", "control_scale", "control_interval", "control_type"):
            given = len(getattr(self, name))
            if given not in (0, nets):
                raise SettingsError(
                    f"{name} is there {given} times for {nets} of control: expected one for each, in the same order"
                )
        if self.control_mask is not None and not nets:
            raise wrong("control_mask", self.control_mask, "control with it, a ControlNet that fills in")

    def check_pictures(self) -> None:
        """Raise SettingsError where a picture is to be drawn and a ControlNet has none to control by."""
        if self.control and not self.control_image:
            raise SettingsError("control without control_image: each ControlNet needs the picture that it controls by")
