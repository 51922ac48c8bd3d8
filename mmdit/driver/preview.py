"""Previews: the picture that is to come, from the clean latents that each step predicts."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from mmdit.driver.loading import part_dtype
from mmdit.driver.output import save_dump
from mmdit.driver.stages import Stages, as_pixels
from mmdit.driver.watch import Drawn, Stepped, Watcher
from vae import fitted_colours


class Glance:
    """Latents to a picture, in no time: by the small autoencoder if there is one, else by the colours of the cells."""

    def __init__(self, stages: Stages) -> None:
        """Without a small autoencoder the map to colours is fitted here, by the model's own (`vae.colours`)."""
        self._stages = stages
        if stages.tiny is None:
            config = stages.vae.config
            with torch.no_grad(), stages.computing():
                self._colours = fitted_colours(self._encoded, config.downscale, config.image_channels)
            stages.let_go()

    def __call__(self, latents: Tensor) -> Image.Image:
        """latents: `(1, C, h, w)`. The picture has their full size."""
        stages = self._stages
        latents = latents.detach().nan_to_num()
        if stages.tiny is None:
            height, width = (side * stages.vae.config.downscale for side in latents.shape[2:])
            small = Image.fromarray(as_pixels(self._colours(latents.cpu()))[0].numpy())
            return small.resize((width, height), Image.Resampling.BICUBIC)
        with stages.computing():
            latents = latents.to(stages.device, part_dtype("vae", stages.dtype))
            # What a step computes with is free between two steps.
            pictures = stages.tiny.decode_within(latents, stages.plan.stages["denoise"].working)
        return Image.fromarray(as_pixels(pictures.float())[0].numpy())

    def _encoded(self, image: Tensor) -> Tensor:
        stages = self._stages
        stages.residency.use("vae")
        return stages.vae.encode(image.to(stages.device, part_dtype("vae", stages.dtype)))[0].float()


class Previews(Watcher):
    """Writes previews beside the results, each in the place of the last, whole or not at all; used as a context.

    A preview is there until its picture is drawn, or the drawing ends in another way.
    """

    def __init__(self, every: int, paths: Sequence[Path], look: Callable[[Tensor], Image.Image]) -> None:
        """every: so many steps. paths: of the previews, in the order of the pictures. look: see Glance."""
        self._every, self._paths, self._look = every, paths, look
        self._written: set[int] = set()
        self._made = {folder for path in paths for folder in path.parents if not folder.exists()}

    def step(self, event: Stepped) -> None:
        """Raises SettingsError where the disk does not take it."""
        if (event.step.index + 1) % self._every:
            return
        image = self._look(event.denoised)
        self._written.add(event.index)
        save_dump(lambda path: image.save(path, format="PNG", compress_level=1), self._paths[event.index])

    def picture(self, event: Drawn) -> None:
        self._remove(event.index)

    def _remove(self, index: int) -> None:
        if index in self._written:
            self._written.remove(index)
            with suppress(OSError):
                self._paths[index].unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for index in [*self._written]:
            self._remove(index)
        for folder in sorted(self._made, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):
                folder.rmdir()  # those that hold something stay
