"""What other programs call things, and what of it exists here."""

from dataclasses import Field, fields
from typing import Any

from mmdit.common.options import kind
from mmdit.driver.settings import Settings

# {a solver's or schedule's name, as `plain` has it: the name here}. AUTOMATIC1111's web UI, ComfyUI and
# stable-diffusion.cpp; the first counts its `uniform` levels as ComfyUI its `normal` ones.
SAMPLERS = {
    "euler": "euler",
    "eulera": "euler_ancestral",
    "eulerancestral": "euler_ancestral",
    "heun": "heun",
    "dpmpp2m": "dpmpp_2m",
    "dpmpp2msde": "dpmpp_2m_sde",
    "dpmpp2msdegpu": "dpmpp_2m_sde",
    "dpmpp3msde": "dpmpp_3m_sde",
    "dpmpp3msdegpu": "dpmpp_3m_sde",
    "unipc": "unipc",
    "unipcbh2": "unipc",
    "deis": "deis",
    "lms": "lms",
    "resmultistep": "res_multistep",
}
SCHEDULES = {
    "normal": "normal",
    "uniform": "normal",
    "discrete": "discrete",
    "karras": "karras",
    "exponential": "exponential",
    "sgmuniform": "sgm_uniform",
    "simple": "simple",
    "beta": "beta",
    "linear": "linear",
}
_SHORT = 100  # bytes of a text that fills no more than 75 tokens, whatever its language
# What is done here where there is no such setting.
_DONE = {"sampler": "euler", "schedule": "normal"}


def plain(name: str) -> str:
    """A solver's or schedule's name without what programs spell in different ways."""
    return "".join(c for c in name.lower().replace("+", "p") if c.isalnum())


class Reading:
    """What was read of a picture: settings of this program, and what of the file is not among them."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._known: dict[str, Field] = {f.name: f for f in fields(Settings)}

    def take(self, name: str, value: Any, told: str) -> None:
        """Keep a setting where it, and the value, exist here, else leave it out as `told`; numbers may come as text."""
        if name not in self._known:
            if value is None or _DONE.get(name) != value:
                self.leave(told)
            return
        if isinstance(value, str) and (of := kind(Settings, name)) in (int, float):
            value = number(value)
            value = int(value) if of is int and isinstance(value, float) and value.is_integer() else value
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
        if len(text.encode()) > _SHORT:
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
