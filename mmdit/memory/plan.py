"""What is to be drawn, as far as memory is concerned, and a plan for it: what is on the device when, and what it takes.

The words for the device's memory, here and in `costs`, `activations` and `planner`: a *budget* may be used; what a
stage takes of it has five parts, those of `Bytes`; together they are its *peak*.
"""

import math
from dataclasses import dataclass
from operator import add
from typing import NamedTuple

from mmdit.memory.residency import Mode, Role, of_role


class Job(NamedTuple):
    """What is to be drawn, as far as memory is concerned."""

    rows: int  # of the latent
    columns: int
    count: int  # pictures
    steps: int  # noise levels at which the network is asked
    texts: int  # for each picture: 2 with guidance, else 1
    t5_length: int  # tokens
    apart: bool = False  # whether each picture has texts of its own, else all have the same
    attention: str = "auto"  # who computes it, as in `mmdit.attention`
    memory: str = "auto"  # the budget, as a user gives it
    waiting: int = 0  # bytes of the host's memory for texts that are encoded and wait
    context: int | None = None  # tokens of a text's context; None: as CLIP and T5 give it
    init: bool = False  # whether it begins with a picture, which is encoded
    changed: int = 0  # evaluations for each picture, beside one for each text, by a network that is changed
    steep: bool = False  # whether gradients are wanted, of a cost of the attention
    chunks: int = 1  # of CLIP's tokens, each encoded as a text of its own
    blank: int = 0  # 1 where the empty prompt is encoded beside the texts


class Bytes(NamedTuple):
    """What a stage takes of the device's memory at its peak, by what it is for."""

    beside: int = 0  # what the process has there beside the model's own weights and what is computed with them
    staying: int = 0  # weights that are there for good
    coming: int = 0  # weights that are there as long as their network is
    passing: int = 0  # weights of two blocks, where blocks come and go
    working: int = 0  # tensors that are computed

    @property
    def peak(self) -> int:
        return sum(self)

    def plus(self, other: "Bytes") -> "Bytes":
        return Bytes(*map(add, self, other))


@dataclass(frozen=True)
class Plan:
    """What is on the device when, and what each stage is predicted to take."""

    modes: dict[str, Mode]
    batch: int  # pictures denoised at a time
    strip: int | None  # height of the strips that are decoded, in rows of the latent; None: whole
    stages: dict[str, Bytes]  # by the roles' values; and "loading", when weights come that are to stay
    kept: int = 0  # blocks that stay of a network that denoises and comes block by block
    blocks: int = 0  # of it that take memory of the device, those kept among them
    locked: int = 0  # bytes of the host's memory that strips lie in page-locked; 0: it is not, or not enough, to be had
    init_strip: int | None = None  # height of the strips that a picture is encoded in, as `strip`

    @property
    def peaks(self) -> dict[str, int]:
        """The bytes that each stage takes at its peak."""
        return {name: stage.peak for name, stage in self.stages.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def everything_stays(self) -> bool:
        return set(self.modes.values()) == {Mode.RESIDENT}

    def __str__(self) -> str:
        streamed = any(self.modes[n] is Mode.STREAMED for n in of_role(Role.ENCODES_TEXT, self.modes))
        encoders = "come block by block" if streamed else "stay"
        ways = {Mode.RESIDENT: "stays", Mode.STAGED: "is there while it runs", Mode.STREAMED: "comes block by block"}
        denoisers = ", ".join(f"{n} {ways[self.modes[n]]}" for n in of_role(Role.DENOISES, self.modes))
        kept = f", {self.kept} of {self.blocks} blocks stay" if self.kept else ""
        batch = f", {self.batch} pictures at a time" if self.batch > 1 else ""
        init = f"init {told(self.peaks['init'])}: {_cut(self.init_strip)}; " if "init" in self.stages else ""
        locked = f", {told(self.locked)} of the host page-locked" if self.locked else ""
        return (
            f"{told(self.peak)} at the peak; encode {told(self.peaks['encode'])}: text encoders {encoders}; "
            f"{init}denoise {told(self.peaks['denoise'])}: {denoisers}{kept}{batch}; "
            f"decode {told(self.peaks['decode'])}: {_cut(self.strip)}{locked}"
        )


def _cut(strip: int | None) -> str:
    return "whole" if strip is None else f"in strips of {strip} latent rows"


def told(count: float) -> str:
    """Bytes in words, rounded up."""
    return f"{math.ceil(count / 1e7) / 100:.2f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"
