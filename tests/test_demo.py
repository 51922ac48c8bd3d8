"""The model that comes with the repository."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.emoji.judge import judge
from benchmarks.emoji.scenes import FONT
from benchmarks.parity import Inputs, ours, relative_error, theirs
from mmdit import Pipeline
from mmdit.driver.loading import DEMO

PROMPT = "a horse and a bear on a green background"


@pytest.fixture(scope="module")
def demo() -> Pipeline:
    return Pipeline.load(device="cpu", dtype="fp32")


def test_it_is_small_and_whole() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
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
