"""`--like`: what it sets, what a user's own word leaves, how steps are counted; and noise as on a CUDA device."""

from typing import Any

import numpy as np
import pytest
import torch

from mmdit.common.errors import SettingsError
from mmdit.driver.likeness import RULES, acts
from mmdit.driver.options import LikeOptions
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS, Settings, settings_from
from mmdit.run import settings_of
from samplers import Moment, shifted_sigmas
from samplers.noise import generator_of, going_on
from samplers.philox import CudaNoise

# ---- settings --------------------------------------------------------------------------------------

CASES: list[tuple[list[str], dict[str, Any]]] = [
    (["--like", "diffusers"], {"t5": "on", "t5_length": 256, "slg_interval": "0.01:0.2", "rng": "cpu"}),
    (["--like", "comfyui"], {"t5_length": 77, "slg_interval": "0.01:0.15"}),
    (["--like", "comfyui", "--t5", "off"], {"t5": "omit"}),
    (["--like", "kohya", "--t5", "off"], {"t5": "off", "t5_length": 77}),
    (["--like", "kohya"], {"t5": "on", "t5_length": 256}),
    (["--like", "diffusers", "--t5", "off"], {"t5": "off", "t5_length": 256}),
    (["--t5-length", "154", "--like", "diffusers"], {"t5_length": 154}),
    (["--like", "sdcpp", "--slg-interval", "0.1:0.3"], {"slg_interval": "0.1:0.3", "rng": "cuda"}),
    (["--like", "focus"], {"t5_length": 77}),
    ([], {"like": None, "t5_length": None, "slg_interval": "0.01:0.2"}),
]


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_what_it_sets(words: list[str], expected: dict[str, Any]) -> None:
    """On the command line and from Python alike; what is given holds."""
    found = settings_of(["x", *words])
    keywords = {name.lstrip("-").replace("-", "_"): value for name, value in zip(words[::2], words[1::2])}
    keywords |= {"t5_length": int(keywords["t5_length"])} if "t5_length" in keywords else {}
    assert found == settings_from({"prompt": "x", **keywords})
    assert {name: getattr(found, name) for name in expected} == expected


def test_what_was_given_before_holds() -> None:
    """In a list's base or a PNG; what another program set does not; and levels written out need no schedule."""
    base = settings_of(["x", "--schedule", "karras", "--t5-length", "30"])
    found = settings_from({"like": "diffusers"}, base)
    assert (found.schedule, found.t5_length) == ("karras", 30)
    found = settings_from({"like": "diffusers"}, settings_of(["x", "--like", "comfyui"]))
    assert (found.t5_length, found.slg_interval) == (256, "0.01:0.2")
    assert settings_of(["x", "--like", "sdcpp", "--sigmas", "1,0.5"]).schedule == "normal"
    assert settings_from({"like": "sdcpp"}, settings_from({"sigmas": "1,0.5"})).schedule == "normal"


def test_every_program_has_its_rules() -> None:
    assert {None, *LikeOptions.__dataclass_fields__["like"].metadata["choices"]} == RULES.keys()
    with pytest.raises(SettingsError, match="like is 'dalle': expected one of stability, diffusers"):
        settings_from({"prompt": "x", "like": "dalle"}).resolved(SD35_MEDIUM_DEFAULTS)
    assert settings_from({"prompt": "x"}) == Settings("x")


# ---- when skip layers act --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "interval", "steps", "expected"),
    [
        ("steps", (0.01, 0.2), 28, range(1, 6)), ("steps", (0.01, 0.2), 40, range(1, 8)),
        ("noise", (0.01, 0.15), 28, range(1, 5)), ("noise", (0.01, 0.15), 40, range(1, 6)),
        ("noise", (0.01, 0.2), 28, range(1, 6)), ("noise", (0.01, 0.2), 40, range(1, 8)),
        ("steps from 1", (0.01, 0.2), 28, range(4)), ("steps from 1", (0.01, 0.2), 40, range(7)),
    ],
)  # fmt: skip
def test_when_skip_layers_act(counts: str, interval: tuple[float, float], steps: int, expected: range) -> None:
    """Against the steps that were worked out for each program, on the schedule of SD3's published pipelines."""
    sigmas = shifted_sigmas(steps)
    every = [Moment(sigmas, sigmas[i], i, steps) for i in range(steps)]
    assert [at.step for at in every if acts(counts, interval, at, 3.0)] == list(expected)


# ---- noise -----------------------------------------------------------------------------------------


def test_noise_is_that_of_a_cuda_device() -> None:
    """Against what PyTorch draws there for seed 0, as AUTOMATIC1111's web UI publishes it: `torch.randn((3, 4))`."""
    expected = [[-0.92466259, -0.42534415, -2.6438457, 0.14518388],
                [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
                [-1.07454231, -0.36314407, -1.67105067, 2.26550497]]  # fmt: skip
    assert torch.allclose(CudaNoise(0)((3, 4)), torch.tensor(expected), atol=1e-6)


def test_philox_is_the_published_function() -> None:
    """Against its authors' known answers for 4x32 with 10 rounds: counters and keys of zeros, and of ones."""
    from samplers.philox import _philox

    def words(counter: int, seed: int) -> list[int]:
        return [int(word[0]) for word in _philox(tuple(np.full(1, counter, np.uint64) for _ in range(4)), seed)]

    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(0xFFFFFFFF, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_its_noise_is_normal_and_goes_on() -> None:
    """Mean, variance and correlation of many; another draw and another seed give other numbers; seeds below 0 too."""
    source = CudaNoise(7)
    first, second = source((200, 500)), source((200, 500))
    assert abs(float(first.mean())) < 0.02 and abs(float(first.var()) - 1) < 0.02
    assert abs(float((first * second).mean())) < 0.02
    assert torch.equal(CudaNoise(7)((200, 500)), first)
    assert not torch.equal(CudaNoise(8)((200, 500)), first)
    assert torch.equal(CudaNoise(-1)((4,)), CudaNoise(2**64 - 1)((4,)))


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
def test_noise_goes_on_where_the_start_ended(rng: str) -> None:
    """The second and third draws of the seed's generator, for a start that was the first."""
    draw = generator_of(7, rng)
    start, *rest = (draw((2, 3, 4)) for _ in range(3))
    source = going_on(7, start[None], rng)
    assert all(torch.equal(source(start[None]), one[None]) for one in rest)
