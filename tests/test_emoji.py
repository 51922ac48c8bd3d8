"""The demo model's scenes and the judge of its pictures."""

import itertools
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.emoji.groupnorm import speed_up
from benchmarks.emoji.judge import interval, judge
from benchmarks.emoji.optimizer import orthogonalise
from benchmarks.emoji.scenes import COLOURS, FONT, NOUNS, Scene, held_out, random_scene, render

needs_font = pytest.mark.skipif(not FONT.exists(), reason="needs the Debian package fonts-noto-color-emoji")


def test_captions() -> None:
    offsets = ((0, 0), (1, -1))
    pair = Scene(("elephant", "bear"), "orange", True, offsets)
    assert pair.caption == "an elephant and a bear on an orange background"
    assert Scene(("owl",), "red", False, offsets[:1]).caption == "an owl"


def test_a_tenth_of_the_pairs_is_held_out_and_never_drawn_for_training() -> None:
    pairs = list(itertools.permutations(NOUNS, 2))
    out = {pair for pair in pairs if held_out(*pair)}
    assert 0.08 < len(out) / len(pairs) < 0.12
    assert all((right, left) in out for left, right in out)
    for place in (0, 1):
        assert {pair[place] for pair in out} == set(NOUNS) == {p[place] for p in pairs if p not in out}
    rng = Random(0)
    drawn = [random_scene(rng) for _ in range(5000)]
    assert not any(scene.nouns in out for scene in drawn)
    assert {scene.nouns for scene in (random_scene(rng, 2, unseen=True) for _ in range(500))} <= out
    assert len(NOUNS) >= 64
    assert len(COLOURS) == 10


@needs_font
def test_the_judge_knows_rendered_scenes_and_only_those() -> None:
    rng = Random(1)
    for _ in range(60):
        scene = random_scene(rng)
        picture = render(scene)
        verdict = judge(picture, len(scene.nouns))
        assert (verdict.nouns, verdict.colour) == (scene.nouns, scene.colour)
        noisy = np.clip(picture + np.random.default_rng(0).normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        assert judge(noisy, len(scene.nouns)).nouns == scene.nouns
        # A pair is no single subject, nor a single subject a pair.
        assert None in judge(picture, 3 - len(scene.nouns)).nouns
    ground = np.full((64, 64, 3), COLOURS["blue"], np.uint8)
    assert judge(ground, 2).nouns == (None, None)
    assert judge(ground, 1).colour == "blue"


@needs_font
def test_the_judge_tells_left_from_right() -> None:
    scene = Scene(("horse", "bear"), "green", True, ((2, -1), (-2, 2)))
    assert judge(render(scene), 2).nouns == ("horse", "bear")
    assert judge(render(Scene(("bear", "horse"), "green", True, ((0, 0), (0, 0)))), 2).nouns == ("bear", "horse")


def test_interval_is_wilsons() -> None:
    """Against the roots of Wilson's quadratic |p - rate| = z sqrt(p (1 - p) / n)."""
    low, high = interval(95, 100)
    for p in (low, high):
        assert abs(p - 0.95) == pytest.approx(1.959964 * (p * (1 - p) / 100) ** 0.5)
    assert low < 0.95 < high


def test_group_norm_has_pytorchs_gradients() -> None:
    torch.manual_seed(0)
    plain = nn.GroupNorm(4, 16, eps=1e-6)
    for p in plain.parameters():
        nn.init.normal_(p)
    x, seed = torch.randn(3, 16, 5, 6, requires_grad=True), torch.randn(3, 16, 5, 6)

    def gradients() -> list[Tensor]:
        y = plain(x)
        return [y.detach(), *torch.autograd.grad(y, [x, plain.weight, plain.bias], seed)]

    expected = gradients()
    speed_up(plain)
    for ours, reference in zip(gradients(), expected):
        assert torch.allclose(ours, reference, atol=1e-5)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.3
