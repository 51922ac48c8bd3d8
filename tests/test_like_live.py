"""`--like`: whole runs against the programs' own arithmetic, with diffusers' transformer as the network."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from reference import relative_error
from test_pipeline import diffusers_pipeline
from torch import Tensor
from toys import toy_folder

from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import settings_from

PROMPT, NEGATIVE, SHIFT = "a horse and a bear", "a pig", 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    defaults = {"width": 96, "height": 64, "steps": 3, "cfg": 4.5, "t5_length": 20}
    return toy_folder(tmp_path_factory.mktemp("like"), defaults=defaults)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = diffusers_pipeline(folder).to(torch.float32)
    pipeline.tokenizer_max_length = 77  # the toy's tokenizers do not say
    return pipeline


def run(folder: Path, **keywords: Any) -> dict[str, Tensor]:
    """What a run dumps."""
    trace: dict[str, Tensor] = {}
    s = settings_from({"prompt": PROMPT, "negative": NEGATIVE, "model": str(folder), "dtype": "fp32", "device": "cpu",
                       **keywords})  # fmt: skip
    Pipeline.from_settings(s).run(s, trace)
    return trace


@torch.no_grad()
def test_stability(folder: Path, theirs: StableDiffusion3Pipeline) -> None:
    """Its sampler, levels, noise and skipped layers written out: DPM-Solver++(2M) over -log sigma, steps counted."""
    steps, scale, slg, skipped = 9, 4.0, 2.5, 1
    trace = run(folder, like="stability", sampler="dpmpp_2m", steps=steps, cfg=scale, slg=slg, slg_layers=str(skipped),
                slg_interval="0.01:0.5", seed=3)  # fmt: skip
    context, negative, pooled, negative_pooled = theirs.encode_prompt(
        PROMPT, None, None, negative_prompt=NEGATIVE, max_sequence_length=77, do_classifier_free_guidance=True
    )
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(3)).half().float()
    last = SHIFT * 0.001 / (1 + (SHIFT - 1) * 0.001)
    even = [1 + (last - 1) * i / (steps - 1) for i in range(steps)]
    sigmas = [SHIFT * t / (1 + (SHIFT - 1) * t) for t in even] + [0.0]
    network, x, old = theirs.transformer, noise, None
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        time = torch.full((2,), 1000.0 * sigma)
        both = network(torch.cat([x, x]), torch.cat([context, negative]), torch.cat([pooled, negative_pooled]), time)[0]
        velocity = both[1:] + scale * (both[:1] - both[1:])
        if 0.01 * steps < i < 0.5 * steps:
            worse = network(x, context, pooled, time[:1], skip_layers=[skipped])[0]
            velocity = velocity + slg * (both[:1] - worse)
        clean = x - sigma * velocity
        if old is None or after == 0:
            x = (after / sigma) * x + (1 - after / sigma) * clean
        else:
            h, h_last = math.log(sigma / after), math.log(sigmas[i - 1] / sigma)
            ahead = (1 + h / (2 * h_last)) * clean - h / (2 * h_last) * old
            x = (after / sigma) * x + (1 - after / sigma) * ahead
        old = clean
    assert torch.equal(trace["noise"], noise)
    assert relative_error(trace[f"latents.{steps - 1}"], x) <= 1e-4
    pixels = theirs.vae.decode(x / theirs.vae.config.scaling_factor + theirs.vae.config.shift_factor).sample
    expected = (255 * (pixels.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)
    close = (expected - expected.round()).abs() > 0.01  # where no rounding decides
    assert torch.equal(trace["image"][close], expected.floor().to(torch.uint8)[close])


@torch.no_grad()
@pytest.mark.parametrize("like", ["diffusers", "focus"])
def test_diffusers(folder: Path, theirs: StableDiffusion3Pipeline, like: str) -> None:
    """diffusers' pipeline as it is; FOCUS draws by it, with 77 tokens of T5."""
    trace = run(folder, like=like, steps=4, cfg=5.0, slg=2.8, slg_layers="1", slg_interval="0.01:0.6", seed=5)
    found = theirs(
        PROMPT, negative_prompt=NEGATIVE, height=64, width=96, num_inference_steps=4, guidance_scale=5.0,
        max_sequence_length=256 if like == "diffusers" else 77, generator=torch.Generator().manual_seed(5),
        skip_guidance_layers=[1], skip_layer_guidance_stop=0.6, output_type="latent",
    ).images  # fmt: skip
    assert isinstance(found, Tensor)
    assert relative_error(trace["latents.3"], found) <= 1e-4


def test_latents_are_rounded_as_in_diffusers(folder: Path) -> None:
    """In bfloat16 its latents are numbers of bfloat16 after every step, and so is its noise; not so without it."""
    for like, rounded in (("diffusers", True), (None, False)):
        trace = run(folder, like=like, dtype="bf16", steps=2)
        for name in ("noise", "latents.0", "latents.1"):
            assert torch.equal(trace[name], trace[name].bfloat16().float()) == rounded
