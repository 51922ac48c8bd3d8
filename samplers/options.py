"""What a user may say of sampling."""

from dataclasses import dataclass
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import Check, from_one_to, option, shown, wrong

# Names only: what they stand for loads PyTorch (`samplers.SOLVERS`, `samplers.SCHEDULES`).
SAMPLERS = ("euler",)
SPACINGS = ("normal",)

_MOST_STEPS = 100_000


# ---- what texts stand for --------------------------------------------------------------------------


def interval_of(text: str | None, name: str = "cfg_interval") -> tuple[float, float]:
    """What LOW:HIGH names, as two shares from 0 to 1; SettingsError for what is none, None for all."""
    if text is None:
        return 0.0, 1.0
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise SettingsError(f"{name} is {text!r}: expected LOW:HIGH, shares from 0 to 1, as in 0.2:0.9")
    return low, high


def layers_of(text: str, name: str = "slg_layers") -> tuple[int, ...]:
    """What `7,8,9` names, in order, each once; SettingsError for what is none."""
    try:
        layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        layers = (-1,)
    if layers[0] < 0:
        raise SettingsError(f"{name} is {text!r}: expected numbers of blocks from 0, as in 7,8,9")
    return layers


def projection_of(text: str) -> tuple[float, float, float]:
    """What `apg` names, ETA[:NORM[:MOMENTUM]]; SettingsError for what is none."""
    usual = [0.0, float("inf"), 0.0]
    try:
        given = [float(part) for part in text.split(":")]
        eta, most, momentum = given + usual[len(given) :]
    except ValueError:
        eta, most, momentum = 0.0, 0.0, 0.0
    if not (abs(eta) < 1e6 and most > 0 and abs(momentum) < 1):
        raise SettingsError(f"apg is {text!r}: expected ETA[:NORM[:MOMENTUM]], as in 0:15:-0.5")
    return eta, most, momentum


def weighted(text: str) -> tuple[str, float]:
    """What TEXT[:WEIGHT] names; the weight is 1 where none is given."""
    rest, colon, weight = text.rpartition(":")
    try:
        return (rest, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


# ---- checks ----------------------------------------------------------------------------------------


def _interval(name: str, value: Any) -> None:
    interval_of(value, name)


def _layers(name: str, value: Any) -> None:
    layers_of(value, name)


def _projection(_: str, value: Any) -> None:
    projection_of(value)


def _weighted(name: str, value: Any) -> None:
    if not abs(weighted(value)[1]) < 1e6:
        raise wrong(name, value, "TEXT:WEIGHT with a weight that is a number")


def between(least: float, most: float) -> Check:
    """The check for a number in a range."""

    def check(name: str, value: Any) -> None:
        if not least <= value <= most:
            raise wrong(name, value, f"a number from {least:g} to {most:g}")

    return check


# ---- options ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplerOptions:
    """How it is denoised"""

    sampler: str = option("euler", "the solver of the flow", choices=SAMPLERS)
    schedule: str = option("normal", "how noise levels are spaced", choices=SPACINGS)
    steps: int | None = option(None, "denoising steps", usual=28, metavar="N", check=from_one_to(_MOST_STEPS))


@dataclass(frozen=True)
class GuidanceOptions:
    """How it is guided"""

    cfg: float | None = option(
        None, "guidance scale; 1 is without guidance, at half the cost", usual=4.5, metavar="X"
    )  # fmt: skip
    cfg_interval: str | None = option(
        None,
        "guide only where the share of noise lies between these, as 0.2:0.9; the other steps cost half",
        metavar="LOW:HIGH",
        check=_interval,
    )
    cfg_schedule: str = option(
        "constant", "the scale rises from 1, with --cfg as its mean", choices=("constant", "linear", "cosine")
    )
    cfg_rescale: float = option(
        0.0, "bring contrast back to the unguided one's, by this share, 0 to 1", metavar="X", check=between(0, 1)
    )
    cfg_zero: bool = option(False, "CFG-Zero*: fit the negative's prediction to the prompt's; the first step rests")
    apg: str | None = option(
        None,
        "adaptive projected guidance: share of the parallel part, largest norm, momentum, as 0:15:-0.5",
        metavar="ETA[:NORM[:MOMENTUM]]",
        check=_projection,
    )
    also: tuple[str, ...] = option(
        (),
        "a further text, with its weight beside the prompt's 1; repeat it for more",
        metavar="TEXT[:WEIGHT]",
        check=_weighted,
    )
    slg: float = option(0.0, "skip-layer guidance: its scale; SD3.5-Medium's is 2.5", metavar="X")
    slg_layers: str | None = option(
        None, "blocks that it leaves out (default: 7,8,9 of 24)", metavar="N,N,...", check=_layers
    )
    slg_interval: str = option(
        "0.01:0.2", "the share of the steps done between which it acts", metavar="LOW:HIGH", check=_interval
    )
    pag: float = option(0.0, "perturbed-attention guidance: its scale", metavar="X")
    pag_layers: str | None = option(
        None, "blocks whose attention it perturbs (default: 13 of 24)", metavar="N,N,...", check=_layers
    )
    cache: float = option(
        0.0,
        "take a velocity again where the next is predicted to differ by less, as 0.05",
        metavar="X",
        check=between(0, 1),
    )

    def check_together(self) -> None:
        if self.cfg_zero and self.apg is not None:
            raise SettingsError("cfg_zero and apg are two ways of guidance: expected one of them")
        for name in ("cfg_zero", "apg", "cfg_rescale") if self.cfg == 1 else ():
            if getattr(self, name) not in (None, False, 0.0):
                raise SettingsError(
                    f"{name} is {shown(getattr(self, name))}, but cfg is 1: expected guidance to change"
                )
        for name in ("slg", "pag"):
            if getattr(self, f"{name}_layers") is not None and not getattr(self, name):
                raise SettingsError(f"{name}_layers without {name}: expected its scale too")
