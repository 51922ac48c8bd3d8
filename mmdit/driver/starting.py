"""What a picture starts from: noise, or a picture under noise, some of which is kept."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmdit.driver.likeness import RULES
from mmdit.driver.pictures import Beginning, beginning
from mmdit.driver.settings import Settings
from mmdit.driver.stages import Stages
from mmdit.images.masks import cells, values
from samplers import Step, keeping, noised, spherical


class Start(NamedTuple):
    """A picture to begin with, on the device."""

    beginning: Beginning
    latents: Tensor  # (1, C, h, w), float32
    mask: Tensor | None  # (1, 1, h, w), float32: how free each cell is, 0 to 1


def started(stages: Stages, s: Settings) -> Start:
    """Read and encode the init of a settled Settings."""
    given = beginning(s)
    latents = stages.encode_picture(torch.from_numpy(np.array(given.picture))[None])
    if given.mask is None:
        return Start(given, latents, None)
    mask = torch.from_numpy(cells(values(given.mask), stages.vae.config.downscale))
    return Start(given, latents, mask[None, None].to(latents.device))


def noise_of(stages: Stages, s: Settings) -> Tensor:
    """The noise of one picture, `(1, C, h, w)`, float32, where it is denoised: of its seed, or between two seeds."""
    assert s.width and s.height
    noise = stages.noise(s.width, s.height, [s.seed], s.rng)
    if s.variation_seed is not None and s.variation_strength is not None:
        other = stages.noise(s.width, s.height, [s.variation_seed], s.rng)
        noise = spherical(noise, other, s.variation_strength)
    narrow = {"float32": torch.float32, "float16": torch.float16, "model": stages.dtype}[RULES[s.like].noise]
    return noise.to(narrow).float().to(stages.device)


def way_of(
    start: Start | None, noise: Tensor, sigmas: Tensor, rounded: torch.dtype | None = None
) -> tuple[Tensor, Callable[[Step], Tensor] | None]:
    """The latents at the first noise level, and what is to be done to those after each step, if anything.

    rounded: the number format that latents are rounded to after each step.
    """
    keep = None if start is None or start.mask is None else keeping(start.latents, noise, start.mask, sigmas)

    def round_too(step: Step) -> Tensor:
        x = step.x if keep is None else keep(step)
        return x.to(rounded).to(x)

    clean = torch.zeros_like(noise) if start is None else start.latents  # nothing is known of it: 0
    return noised(clean, noise, sigmas[0]), keep if rounded in (None, torch.float32) else round_too
