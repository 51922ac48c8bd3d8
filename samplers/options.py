"""What a user may say of sampling."""

from array import array
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from mmdit.common.errors import SettingsError
from mmdit.common.options import Check, from_one_to, option, shown, wrong
from mmdit.common.paths import user_path

# The names of solvers and schedules, with those that other programs write into pictures. What they stand for loads
# PyTorch: `samplers.SOLVERS`, `samplers.SCHEDULES`.
SAMPLERS = {
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "euler_ancestral": "Euler a",
    "unipc": "UniPC",
    "deis": "DEIS",
    "lms": "LMS",
    "res_multistep": "Res Multistep",
}
SPACINGS = {
    "normal": "Normal",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "beta": "Beta",
    "karras": "Karras",
    "exponential": "Exponential",
    "linear": "Linear",
    "discrete": "Discrete",
}

_MOST_STEPS = 100_000
_HEAVIEST = 10  # weight of a text: a text may end in numbers, as "at 12:30"
_MOST_BYTES = 10_000_000  # of a file of noise levels


# ---- what texts stand for --------------------------------------------------------------------------


def shift_of(text: str) -> float | None:
    """What `shift` names, None for auto; SettingsError for what is neither."""
    if text == "auto":
        return None
    try:
        shift = float(text)
    except ValueError:
        shift = 0.0
    if not 1e-3 <= shift <= 1e3:
        raise wrong("shift", text, "a number from 0.001 to 1000, or auto")
    return shift


def sigmas_in(text: str) -> list[float]:
    """The noise levels that `sigmas` names, written out or in a file, without a 0 at the end; SettingsError."""
    numbers = _numbers(text)
    where = "sigmas is"
    if numbers is None:
        numbers, where = _numbers(_read(text)), f"sigmas: {text} has"
        if numbers is None:
            raise SettingsError(f"{where} what is no number: expected numbers between commas or blanks")
    levels = numbers[:-1] if numbers[-1:] == [0.0] else numbers
    short = array(
        "f", [level if abs(level) <= 2 else 2.0 for level in levels]
    ).tolist()  # as they will be computed with
    if not short or not all(0 < level <= 1 for level in short):
        raise SettingsError(f"{where} {shown(text)}: expected noise levels above 0, up to 1")
    for before, after in pairwise(short):
        if not after < before:
            raise SettingsError(f"{where} {after:g} after {before:g}: expected levels that fall")
    if len(levels) > _MOST_STEPS:
        raise SettingsError(f"{where} {len(levels)} levels: expected at most {_MOST_STEPS}")
    return levels


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        return None


def _read(text: str) -> str:
    if "\0" in text:
        raise wrong("sigmas", text, "falling numbers, as in 1,0.6,0.2, or a file of them")
    path = user_path("sigmas", text)
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) <= _MOST_BYTES:
            return data.decode()
        raise SettingsError(f"sigmas: {path}: more than {_MOST_BYTES} bytes, which are no noise levels")
    except UnicodeDecodeError:
        raise SettingsError(f"sigmas: {path}: no text: expected numbers between commas or blanks") from None
    except OSError as error:
        hint = f"{error.strerror or error}: expected falling numbers, as in 1,0.6,0.2, or a file of them"
        raise SettingsError(f"sigmas is {shown(text)}: {hint}") from None


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


def _shift(_: str, value: Any) -> None:
    shift_of(value)


def _sigmas(_: str, value: Any) -> None:
    sigmas_in(value)


def _interval(name: str, value: Any) -> None:
    interval_of(value, name)


def _layers(name: str, value: Any) -> None:
    layers_of(value, name)


def _projection(_: str, value: Any) -> None:
    projection_of(value)


def _weighted(name: str, value: Any) -> None:
    if not abs(weighted(value)[1]) <= _HEAVIEST:
        raise wrong(
            name, value, f"TEXT:WEIGHT with a weight from -{_HEAVIEST} to {_HEAVIEST}; TEXT:1 ends a text as it is"
        )


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

    sampler: str = option("euler", "the solver of the flow", choices=tuple(SAMPLERS))
    schedule: str = option("normal", "how noise levels are spaced", choices=tuple(SPACINGS))
    steps: int | None = option(None, "denoising steps", usual=28, metavar="N", check=from_one_to(_MOST_STEPS))
    shift: str | None = option(
        None,
        "move noise levels towards noise, 1: not at all; auto: by the picture's size (default: the model's own)",
        metavar="X|auto",
        check=_shift,
    )
    sigmas: str | None = option(
        None, "the noise levels at which steps begin, as 1,0.6,0.2", metavar="X,X,...|FILE", check=_sigmas
    )

    def written(self) -> Self:
        """With shift and noise levels as text, the levels of a file in its place, and so many steps; SettingsError."""
        told, numbers = self, (int, float)
        if isinstance(self.shift, numbers) and not isinstance(self.shift, bool):
            told = replace(told, shift=repr(self.shift))
        if isinstance(self.sigmas, list | tuple) and all(isinstance(level, numbers) for level in self.sigmas):
            told = replace(told, sigmas=",".join(map(repr, self.sigmas)))
        if not isinstance(told.sigmas, str):
            return told
        levels = sigmas_in(told.sigmas)
        steps = len(levels) if self.steps is None else self.steps
        return replace(told, sigmas=",".join(map(repr, levels)), steps=steps)

    def check_together(self) -> None:
        if self.sigmas is None:
            return
        count = len(sigmas_in(self.sigmas))
        if self.steps is not None and self.steps != count:
            raise SettingsError(f"steps is {self.steps}, but sigmas has {count}: expected one of them, or the same")
        if self.schedule != "normal":
            raise SettingsError(f"schedule is {self.schedule}, but sigmas says all levels: expected one of them")
        if self.shift is not None:
            raise SettingsError(f"shift is {self.shift}, but sigmas are taken as they are: expected one of them")


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
        others = self.also or self.slg or self.pag
        for name in ("cfg_zero", "apg", *(() if others else ("cfg_rescale",))) if self.cfg == 1 else ():
            if getattr(self, name) not in (None, False, 0.0):
                raise SettingsError(
                    f"{name} is {shown(getattr(self, name))}, but cfg is 1: expected guidance to change"
                )
        for name in ("slg", "pag"):
            if getattr(self, f"{name}_layers") is not None and not getattr(self, name):
                raise SettingsError(f"{name}_layers without {name}: expected its scale too")
