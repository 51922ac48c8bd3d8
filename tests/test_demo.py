"""The model that comes with the repository."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from benchmarks.emoji.follow import drawn, followed
from benchmarks.emoji.judge import judge
from benchmarks.emoji.scenes import FONT, random_scene, render
from benchmarks.emoji.train_control import edges
from benchmarks.parity import Inputs, ours, relative_error, theirs
from mmdit import Pipeline
from mmdit.driver.loading import DEMO

PROMPT = "a horse and a bear on a green background"


@pytest.fixture(scope="module")
def demo() -> Pipeline:
    return Pipeline.load(device="cpu", dtype="fp32")


def test_it_is_small_and_whole() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    net = sum(path.stat().st_size for path in files if "controlnet" in path.parts)
    assert net <= 10e6 and sum(path.stat().st_size for path in files) - net <= 40e6
    known = (".json", ".safetensors", ".txt", ".model")
    assert not [path for path in files if path.suffix not in known and path.name != "NOTICE"]


def test_it_has_the_architecture(demo: Pipeline) -> None:
    config = demo.transformer.config
    assert config.qk_norm
    assert 0 < len(config.dual_attention_blocks) < config.depth
    assert demo.vae.config.latent_channels == 16
    assert demo.vae.config.downscale == 8
    assert demo.text.t5 is not None


@pytest.mark.skipif(not FONT.exists(), reason="needs the Debian package fonts-noto-color-emoji")
def test_it_draws_what_the_prompt_says(demo: Pipeline) -> None:
    pictures = demo(PROMPT, count=4, seed=11)
    verdicts = [judge(np.array(picture), 2) for picture in pictures]
    assert sum(v.nouns == ("horse", "bear") and v.colour == "green" for v in verdicts) >= 3


@pytest.mark.skipif(not FONT.exists(), reason="needs the Debian package fonts-noto-color-emoji")
def test_its_controlnet_follows_edges() -> None:
    """Edges of drawings lie nearer to those given with the net than without, in the mean of four scenes."""
    pipe, random = Pipeline.load(device="cpu", control=[str(DEMO / "controlnet")]), Random(5)
    scenes = [random_scene(random, count=2) for _ in range(4)]
    plans = [edges(render(scene, 128)) for scene in scenes]
    without, with_it = (
        np.mean([followed(*pair) for pair in zip(drawn(pipe, scenes, plans, scale, 8), plans)]) for scale in (0.0, 1.0)
    )
    assert with_it > without + 0.03


def test_it_is_the_same_model_in_diffusers(demo: Pipeline) -> None:
    """Tokens, every component and four guided steps to the image, from one folder by both."""
    settings = demo.check(demo.settings.__class__(device="cpu", dtype="fp32", steps=4, seed=3))
    inputs = Inputs(demo, settings)
    mine, reference = ours(demo, inputs), theirs(Path(DEMO), torch.float32, "cpu", inputs)
    assert mine.keys() == reference.keys()
    for name, value in mine.items():
        if name.startswith("tokens"):
            assert torch.equal(value, reference[name]), name
        elif name == "image":
            assert (value.int() - reference[name].int()).abs().max() <= 1
        else:
            limit = 1e-4 if name == "loop latents" else 1e-5
            assert relative_error(value, reference[name]) <= limit, name
