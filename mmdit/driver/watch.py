"""Whoever looks on while pictures are drawn: progress, dumps, checks, and what a user passes.

A watcher is told the same few events of every picture, and may stop a picture, or all of them, at each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mmdit.common.command import silent
from mmdit.driver.focusing import Sheet
from mmdit.driver.settings import Settings
from mmdit.driver.stages import Stages
from mmdit.images.options import steps_of
from mmdit.images.shape import Box
from samplers import NEGATIVE, PROMPT, Step
from text_encoders import Conditioning

_ASKED = 8  # steps of a GPU that are asked about at a time


@dataclass(kw_only=True)
class Event:
    """Something that happened to one picture."""

    settings: Settings  # of this picture alone, all filled in
    index: int  # of this picture among all that are drawn together
    stopped: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)

    def stop(self) -> None:
        """Let this picture go: it is not finished and not given."""
        self.stopped = True

    def stop_all(self) -> None:
        """Let all pictures go that are not finished: the drawing ends here, without an error."""
        self.stopped = self.ended = True

    def tell(self, watcher: "Watcher") -> None:
        raise NotImplementedError


@dataclass(kw_only=True)
class Encoded(Event):
    """Its texts are encoded, and the picture that it begins with; its noise is drawn; nothing is denoised yet."""

    texts: dict[str, Conditioning]  # "prompt" and, with guidance, "negative", each a batch of 1
    noise: Tensor  # (1, C, h, w), float32
    sigmas: Tensor  # (steps + 1,), on the CPU
    init: Tensor | None = None  # (1, C, h, w), float32: latents of the picture that it begins with
    mask: Tensor | None = None  # (1, 1, h, w), float32: how free each cell is, 0 to 1

    def tell(self, watcher: "Watcher") -> None:
        watcher.encoded(self)


@dataclass(kw_only=True)
class Stepped(Event):
    """It was denoised by one step."""

    step: Step
    attention: Sheet | None = None  # where it attended to as the step began, if that was asked for and evaluated

    @property
    def sigma(self) -> float:
        """The noise level that the step began at."""
        return float(self.step.sigma)

    @property
    def latents(self) -> Tensor:
        """`(1, C, h, w)` after the step, float32."""
        return self.step.x

    @property
    def velocity(self) -> Tensor:
        """`(1, C, h, w)`, after guidance, at the point where the step began."""
        return self.step.velocity

    @property
    def denoised(self) -> Tensor:
        """The predicted clean latents, `(1, C, h, w)`."""
        return self.step.denoised

    @property
    def last(self) -> bool:
        return self.step.index + 1 == steps_of(self.settings)

    def tell(self, watcher: "Watcher") -> None:
        watcher.step(self)


@dataclass(kw_only=True)
class Drawn(Event):
    """It is done, and about to be given."""

    image: Image.Image
    region: Box | None = None  # that was drawn of it, if not all (`mask_crop`)

    def tell(self, watcher: "Watcher") -> None:
        watcher.picture(self)


class Watcher:
    """Is told what happens, in the thread that draws; what it raises ends the drawing."""

    def encoded(self, event: Encoded) -> None: ...

    def step(self, event: Stepped) -> None: ...

    def picture(self, event: Drawn) -> None: ...


class OnStep(Watcher):
    """A function that is called after each step of each picture."""

    def __init__(self, function: Callable[[Stepped], object]) -> None:
        self._function = function

    def step(self, event: Stepped) -> None:
        self._function(event)


class Progress(Watcher):
    """A bar of all steps, on a terminal; used as a context."""

    def __init__(self, steps: int, pictures: int) -> None:
        self._steps, self._pictures, self._done = steps, pictures, 0

    def __enter__(self) -> "Progress":
        self._bar = tqdm(total=self._steps, unit="step", disable=silent() or None, leave=False)
        self._tell("encode")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _tell(self, what: str) -> None:
        self._bar.set_description_str(f"{what} ({self._done} of {self._pictures})")

    def encoded(self, event: Encoded) -> None:  # noqa: ARG002
        self._tell("draw")

    def step(self, event: Stepped) -> None:  # noqa: ARG002
        self._bar.update()

    def picture(self, event: Drawn) -> None:  # noqa: ARG002
        self._done += 1
        self._tell("draw")


class Verbose(Watcher):
    """Says what every step does, a line each."""

    def __init__(self, told: Callable[[str], object]) -> None:
        self._told = told

    def step(self, event: Stepped) -> None:
        line = f"seed {event.settings.seed}, step {event.step.index + 1} of {steps_of(event.settings)}"
        line += f": noise {event.sigma:.3f}, velocity {float(event.velocity.square().mean().sqrt()):.4f}"
        seen = None if event.attention is None else event.attention.attended
        if seen is not None and seen.cost is not None and seen.slope is not None and seen.push is not None:
            line += f", cost {float(seen.cost):.4f}, gradient {float(seen.slope):.3g}, push {float(seen.push):.2%}"
        self._told(line)


class Finite(Watcher):
    """Raises NotFiniteError that names the first step whose latents are not finite.

    A GPU is asked about several steps at a time: waiting for an answer leaves it without work.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages, self._flags = stages, dict[int, list[Tensor]]()

    def step(self, event: Stepped) -> None:
        flags = self._flags.setdefault(event.index, [])
        flags.append(torch.isfinite(event.latents).all())
        if len(flags) == (1 if self._stages.device.type == "cpu" else _ASKED) or event.last:
            finite = torch.stack(self._flags.pop(event.index)).tolist()
            if not all(finite):
                first = event.step.index + 2 - len(finite) + finite.index(False)
                raise self._stages.not_finite(f"the latents after step {first} of {steps_of(event.settings)}")


class Trace(Watcher):
    """Every stage's tensors of some pictures, under the names of `--dump`, each with a row for every picture."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[str, Tensor]] = {}
        self._sigmas = torch.zeros(0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        done = [self._seen[index] for index in sorted(self._seen) if "image" in self._seen[index]]
        rows = {name: torch.cat([seen[name] for seen in done]) for name in (done[0] if done else ())}
        return {"sigmas": self._sigmas, **rows}

    def encoded(self, event: Encoded) -> None:
        seen = self._seen[event.index] = {"noise": event.noise.cpu()}
        seen |= {name: x.cpu() for name in ("init", "mask") if (x := getattr(event, name)) is not None}
        self._sigmas = event.sigmas
        for role, name in ((PROMPT, "cond"), (NEGATIVE, "uncond")):
            if role in event.texts:
                seen |= {f"{name}.{key}": tensor for key, tensor in named(event.texts[role]).items()}

    def step(self, event: Stepped) -> None:
        seen, i = self._seen[event.index], event.step.index
        seen |= {f"velocity.{i}": event.velocity.cpu(), f"latents.{i}": event.latents.cpu()}
        if event.attention is not None:
            seen[f"attention.{i}"] = event.attention.attended.maps[None].cpu()

    def picture(self, event: Drawn) -> None:
        self._seen[event.index]["image"] = torch.from_numpy(np.array(event.image))[None]  # (1, H, W, 3)


def named(text: Conditioning) -> dict[str, Tensor]:
    """A conditioning's tensors under their names in a dump, on the CPU."""
    found = {f"tokens.{encoder}": ids for encoder, ids in text.tokens.items()}
    found |= {"context": text.context.float(), "pooled": text.pooled.float()}
    return {name: tensor.cpu() for name, tensor in found.items()}
