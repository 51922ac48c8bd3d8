"""Image to image and masks, live against diffusers' pipelines on the same small random folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from reference import relative_error
from test_pipeline import diffusers_pipeline
from torch import Tensor
from toys import toy_folder

from mmdit.driver.pipeline import Pipeline
from mmdit.images.options import steps_left_out

SIDES = {"width": 96, "height": 64}
PHOTO = Image.fromarray(np.random.default_rng(3).integers(0, 256, (4, 6, 3), np.uint8)).resize((96, 64))
MASK = Image.new("L", (96, 64))
MASK.paste(255, (24, 16, 72, 40))  # whole cells: diffusers looks at one pixel of each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return toy_folder(tmp_path_factory.mktemp("images"), defaults={**SIDES, "cfg": 4.5, "t5_length": 20})


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.load(folder, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> StableDiffusion3Pipeline:
    return diffusers_pipeline(folder).to(torch.float32)


def ours(pipeline: Pipeline, **keywords: Any) -> dict[str, Tensor]:
    trace: dict[str, Tensor] = {}
    pipeline.run(pipeline.asked({"prompt": "a horse", "negative": "a pig", "seed": 7, **keywords}), trace)
    return trace


@torch.no_grad()
def latents_of(pipe: Any, trace: dict[str, Tensor], **keywords: Any) -> list[Tensor]:
    """After each step of diffusers' pipeline, on our texts, from the same seed."""
    seen: list[Tensor] = []

    def look(_: Any, __: int, ___: Any, told: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(told["latents"].clone())
        return told

    pipe.set_progress_bar_config(disable=True)
    pipe(
        prompt_embeds=trace["cond.context"], negative_prompt_embeds=trace["uncond.context"],
        pooled_prompt_embeds=trace["cond.pooled"], negative_pooled_prompt_embeds=trace["uncond.pooled"],
        image=PHOTO, guidance_scale=4.5, generator=torch.Generator().manual_seed(7), output_type="latent",
        callback_on_step_end=look, **keywords,
    )  # fmt: skip
    return seen


@pytest.mark.parametrize(("way", "steps", "strength"), [
    (StableDiffusion3Img2ImgPipeline, 5, 0.6), (StableDiffusion3Img2ImgPipeline, 4, 1.0),
    (StableDiffusion3Img2ImgPipeline, 7, 0.35), (StableDiffusion3InpaintPipeline, 5, 0.6),
    (StableDiffusion3InpaintPipeline, 4, 1.0),
])  # fmt: skip
def test_every_step_is_that_of_diffusers(
    pipeline: Pipeline, theirs: Any, monkeypatch: pytest.MonkeyPatch, way: Any, steps: int, strength: float
) -> None:
    """Latents after each step, and the number of steps.

    diffusers samples the picture's latents; it is given their mean here, so that the seed's numbers are the noise.
    """
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda told, generator=None: told.mode())  # noqa: ARG005
    inpaint = way is StableDiffusion3InpaintPipeline
    trace = ours(pipeline, init=PHOTO, strength=strength, steps=steps, **({"mask": MASK} if inpaint else {}))
    more = {"mask_image": MASK, **SIDES} if inpaint else SIDES
    expected = latents_of(way(**theirs.components), trace, strength=strength, num_inference_steps=steps, **more)
    assert len(expected) == steps - steps_left_out(steps, strength) == len(trace["sigmas"]) - 1
    for i, latents in enumerate(expected):
        assert relative_error(trace[f"latents.{i}"], latents) <= 1e-4, i
    assert f"latents.{len(expected)}" not in trace
    assert inpaint == ("mask" in trace)


def test_the_pictures_latents_are_those_of_diffusers(pipeline: Pipeline, theirs: Any) -> None:
    """The mean, scaled and shifted by hand, of pixels brought to -1 to 1 by diffusers."""
    with torch.no_grad():
        told = theirs.vae.encode(theirs.image_processor.preprocess(PHOTO)).latent_dist.mode()
    expected = (told - theirs.vae.config.shift_factor) * theirs.vae.config.scaling_factor
    assert relative_error(ours(pipeline, init=PHOTO, steps=1)["init"], expected) <= 1e-5


def test_steps_left_out_are_those_of_diffusers() -> None:
    class Fake:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    for steps in (1, 3, 10, 28):
        Fake.scheduler.set_timesteps(steps)
        for strength in (0.0, 0.01, 0.1, 0.3, 0.6, 0.999, 1.0):
            left, count = StableDiffusion3Img2ImgPipeline.get_timesteps(Fake, steps, strength, "cpu")
            assert steps - steps_left_out(steps, strength) == count == len(left)
