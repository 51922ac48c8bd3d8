"""What a user may say of several subjects."""

from dataclasses import dataclass, fields
from typing import Any

from mmdit.common.errors import SettingsError
from mmdit.common.options import option, shown, wrong
from samplers.options import between

LOSSES = ("focus", "conform", "attend-and-excite", "divide-and-bind", "jedi")  # those of samplers.focus.costs
GAINS = ("code", "memoryless", "unit", "step", "relative")  # those of samplers.focus.gains
_STRONGEST = 1000


def subjects_of(text: str) -> tuple[str, ...]:
    """What `focus` names, `horse; bear`, without the blanks around them; SettingsError where one is empty."""
    subjects = tuple(part.strip() for part in text.split(";"))
    if not all(subjects):
        raise wrong("focus", text, "subjects of the prompt with ; between them, as in horse; bear")
    return subjects


def _subjects(_: str, value: Any) -> None:
    subjects_of(value)


@dataclass(frozen=True)
class FocusOptions:
    """Several subjects"""

    focus: str | None = option(
        None, "keep these subjects apart, as they stand in the prompt", metavar="TEXT;TEXT", check=_subjects
    )
    focus_scale: float = option(1.0, "how strongly", metavar="X", check=between(0, _STRONGEST))
    focus_loss: str = option("focus", "what it costs that subjects mix", choices=LOSSES)
    focus_until: float = option(
        0.9, "rest where the share of noise is below this; 0: never", metavar="X", check=between(0, 1)
    )
    focus_gain: str = option("code", "how the strength goes over the steps", choices=GAINS)

    def check_together(self) -> None:
        for f in fields(FocusOptions):
            if self.focus is None and getattr(self, f.name) != f.default:
                raise SettingsError(
                    f"{f.name} is {shown(getattr(self, f.name))}, but focus is not given: "
                    "expected the subjects to keep apart, as in horse; bear"
                )
