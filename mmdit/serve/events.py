"""What the studio tells whoever asked for pictures, and why it does not draw."""

from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from mmdit.driver.settings import Settings


@dataclass(frozen=True)
class Stepped:
    """A picture was denoised by one step."""

    index: int  # of the picture in its request
    step: int  # steps done, from 1
    steps: int
    look: Callable[[], Image.Image]  # makes the picture that is to come; only while this is told


@dataclass(frozen=True)
class Drawn:
    index: int
    settings: Settings  # all filled in
    image: Image.Image
    maps: dict[str, Tensor] = field(default_factory=dict)  # of `attention_maps`, by subject (`words.Words.of`)


@dataclass(frozen=True)
class Ended:
    """Nothing more comes; what was drawn before an error holds."""

    error: Exception | None = None


Event = Stepped | Drawn | Ended
Tell = Callable[[Event], None]


class FullError(Exception):
    """There is no place in the queue; `seconds` until there should be."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class ClosedError(Exception):
    """No requests are taken: the model is not loaded yet, or the server stops."""


class LetGoError(Exception):
    """Whoever asked let it go; the text says why, in a word."""


class DiedError(Exception):
    """The thread that drew it ended."""
