"""What a user may say of fine-tuning."""

from dataclasses import dataclass, fields, replace
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import Mark, check_options, from_one, from_one_to, option, same, wrong
from mmdit.driver.options import FocusOptions, ModelOptions, PictureOptions
from mmdit.memory.options import MemoryOptions
from mmdit.options import ComputeOptions
from samplers.options import SamplerOptions, between
from text_encoders.options import TextOptions

_MOST = 1_000_000  # iterations
_MOST_AT_ONCE = 1000  # trajectories, steps, rank
_MOST_SEED = 2**63 - 1


def _from_zero(name: str, value: Any) -> None:
    if not 0 <= value <= _MOST:
        raise wrong(name, value, f"a whole number from 0 to {_MOST}")


def _check_seed(name: str, value: Any) -> None:
    if not 0 <= value <= _MOST_SEED:
        raise wrong(name, value, f"a whole number from 0 to {_MOST_SEED}")


def _check_rate(name: str, value: Any) -> None:
    if not 0 < value <= 1:
        raise wrong(name, value, "a number above 0, at most 1")


def _check_alpha(name: str, value: Any) -> None:
    if not 0 < value <= 1e4:
        raise wrong(name, value, "a number above 0, at most 10000")


@dataclass(frozen=True)
class NetworkOptions:
    """The model is computed so"""

    device: str = same(ComputeOptions, "device")
    dtype: str = same(ComputeOptions, "dtype")
    attention: str = same(ComputeOptions, "attention")
    t5: str = same(TextOptions, "t5")
    t5_length: int | None = same(TextOptions, "t5_length")


@dataclass(frozen=True)
class TuningOptions:
    """The training"""

    out: str = option("", "the adapter to be, for --lora and diffusers", Mark.PATH, metavar="FILE.safetensors")
    iterations: int = option(200, "updates of the adapter", Mark.NOT_SEEN, metavar="N", check=from_one_to(_MOST))
    rate: float = option(1e-4, "learning rate", metavar="X", check=_check_rate)
    rank: int = option(16, "rank of the adapter's matrices", metavar="N", check=from_one_to(_MOST_AT_ONCE))
    alpha: float | None = option(
        None, "strength times rank while training; the file has it in its numbers (default: the rank)",
        metavar="X", check=_check_alpha,
    )  # fmt: skip
    seed: int = option(0, "of all that is drawn at random", metavar="S", check=_check_seed)
    save_every: int = option(
        25, "iterations from one saving of the adapter and of the run to the next", Mark.NOT_SEEN, metavar="N",
        check=from_one,
    )  # fmt: skip
    watch_every: int = option(
        50, "iterations from one look at the held-out prompts to the next; 0: none", Mark.NOT_SEEN, metavar="N",
        check=_from_zero,
    )  # fmt: skip

    @property
    def strength(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def check_together(self) -> None:
        if not self.out.endswith(".safetensors"):
            raise wrong("out", self.out, "a name ending in .safetensors")


@dataclass(frozen=True)
class SubjectOptions:
    """Subjects kept apart, by adjoint matching"""

    prompts: str = option(
        "", 'what to train on, JSON lines: {"prompt": "a horse and a bear", "focus": "horse; bear"}', Mark.PATH,
        metavar="FILE",
    )  # fmt: skip
    held_out: str | None = option(
        None, "lines of the same kind to watch it by (default: the first of those, with other noise)", Mark.PATH,
        metavar="FILE",
    )  # fmt: skip
    focus_loss: str = same(FocusOptions, "focus_loss")
    scale: float = option(
        1000.0, "what the cost counts beside how far the adapter leads away", metavar="X", check=between(0, 1e6)
    )  # fmt: skip
    trajectories: int = option(
        4, "pictures to be, all of one prompt, in an iteration", metavar="N", check=from_one_to(_MOST_AT_ONCE)
    )  # fmt: skip
    steps: int | None = same(SamplerOptions, "steps")
    at_steps: int = option(
        8, "steps of each, drawn at random, that the loss is taken at", metavar="N", check=from_one_to(_MOST_AT_ONCE)
    )  # fmt: skip
    width: int | None = same(PictureOptions, "width")
    height: int | None = same(PictureOptions, "height")

    def check_together(self) -> None:
        if not self.prompts:
            raise SettingsError("prompts: expected --prompts FILE, JSON lines with a prompt and its subjects each")
        if self.steps is not None and self.steps < 2:
            raise wrong("steps", self.steps, "2 or more: the last one is never learned")


# A dataclass has the fields of its last base first: read from below, this is the order of --help.
@dataclass(frozen=True)
class FocusTuning(MemoryOptions, NetworkOptions, ModelOptions, TuningOptions, SubjectOptions):
    """What `python -m mmdit.finetune focus` is told."""

    def check(self) -> None:
        """Raise SettingsError for what no model could do."""
        usual = {f.name: f.metadata["usual"] for f in fields(self) if getattr(self, f.name) is None}
        check_options(replace(self, **{name: value for name, value in usual.items() if value is not None}))
