"""What other programs call things, and what of it exists here."""

from dataclasses import Field, fields
from typing import Any

from mmdit.common.options import kind
from mmdit.driver.settings import Settings
from samplers import options

_SHORT = 100  # bytes of a text that fills no more than 75 tokens, whatever its language


def plain(name: str) -> str:
    """A solver's or schedule's name without what programs spell in different ways."""
    return "".join(c for c in name.lower().replace("+", "p") if c.isalnum())


# {a solver's or schedule's name in another program, `plain`: the name here}. Those of AUTOMATIC1111's web UI, ComfyUI
# and stable-diffusion.cpp; the first counts its `uniform` levels as ComfyUI its `normal` ones.
SAMPLERS = {plain(name): ours for ours, theirs in options.SAMPLERS.items() for name in (ours, theirs)} | {
    "dpmpp2msdegpu": "dpmpp_2m_sde",
    "dpmpp3msdegpu": "dpmpp_3m_sde",
    "unipcbh2": "unipc",
}
SCHEDULES = {plain(name): ours for ours, theirs in options.SPACINGS.items() for name in (ours, theirs)} | {
    "uniform": "normal",
}


class Reading:
    """What was read of a picture: settings of this program, and what of the file is not among them."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._known: dict[str, Field] = {f.name: f for f in fields(Settings)}

    def take(self, name: str, value: Any, told: str) -> None:
        """Keep a setting where it, and the value, exist here, else leave it out as `told`; numbers may be texts."""
        if name not in self._known:
            self.leave(told)
            return
        of = kind(Settings, name)
        if of in (int, float) and isinstance(value, str):
            value = number(value)
            value = int(value) if of is int and isinstance(value, float) and value.is_integer() else value
        elif of is str and isinstance(value, int | float):
            value = str(value)
        choices = self._known[name].metadata["choices"]
        if value is None or (choices and value not in choices):
            self.leave(told)
        else:
            self.settings[name] = value

    def as_by(self, program: str) -> None:
        """Have it drawn as that program would: a value of `like`."""
        self.settings["like"] = program

    def text(self, name: str, text: str, told: str) -> None:
        """A prompt, with what these programs do with brackets and with long texts."""
        self.take(name, text, told)
        if "(" in text or ("[" in text and self.settings.get("like") is None):
            self.take("emphasis", True, "weights of words")
        if len(text.encode(errors="replace")) > _SHORT:
            self.take("long_prompts", True, "long prompts")

    def sampler(self, name: str, told: str) -> None:
        self.take("sampler", SAMPLERS.get(plain(name)), told)

    def schedule(self, name: str, told: str) -> None:
        self.take("schedule", SCHEDULES.get(plain(name)), told)

    def leave(self, told: str) -> None:
        if told not in self.left_out:
            self.left_out.append(told)


def number(text: str) -> int | float | None:
    """The number that a text is, or None."""
    if len(text) > 40:  # longer than any setting
        return None
    for of in (int, float):
        try:
            return of(text)
        except ValueError:
            continue
    return None
