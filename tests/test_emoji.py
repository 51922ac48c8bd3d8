"""The demo model's scenes, the judge of its pictures, and its training."""

import itertools
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from benchmarks.emoji.export import export
from benchmarks.emoji.groupnorm import speed_up
from benchmarks.emoji.judge import Verdict, failure, interval, judge
from benchmarks.emoji.lean import lean_attention, lean_norms
from benchmarks.emoji.optimizer import Muon, orthogonalise
from benchmarks.emoji.pool import provide_tokenizers
from benchmarks.emoji.scenes import (
    COLOURS,
    FONT,
    NOUNS,
    OWN,
    PLACES,
    Scene,
    Subject,
    held_out,
    random_scene,
    render,
    tint_held_out,
    tints_of,
)
from benchmarks.emoji.team import Team
from benchmarks.emoji.train_mmdit import Run, train
from benchmarks.emoji.train_vae import CONFIG, cropped
from mmdit import Pipeline
from mmdit.config import TOY
from mmdit.driver.loading import DEMO
from mmdit.model import SelfAttention, Tokens
from vae.autoencoder import Autoencoder

needs_font = pytest.mark.skipif(not FONT.exists(), reason="needs the Debian package fonts-noto-color-emoji")

HORSE, BEAR, FOX, OWL = Subject("horse"), Subject("bear"), Subject("fox", "blue"), Subject("owl", "red")
FOUR = Scene((HORSE, BEAR, FOX, OWL), "green", True)


@pytest.mark.parametrize(
    ("subjects", "caption"),
    [
        ((HORSE,), "a horse on a green background"),
        ((Subject("owl"),), "an owl on a green background"),
        ((Subject("owl", "gray"), Subject("horse", "orange")), "a gray owl and an orange horse on a green background"),
        ((HORSE, BEAR, FOX), "a horse, a bear and a blue fox on a green background"),
        (FOUR.subjects, "a horse, a bear, a blue fox and a red owl on a green background"),
    ],
)
def test_captions(subjects: tuple[Subject, ...], caption: str) -> None:
    assert Scene(subjects, "green", True).caption == caption
    assert Scene(subjects, "green", False).caption == caption.removesuffix(" on a green background")


def test_a_tenth_of_the_pairs_is_held_out_and_never_together_in_training() -> None:
    pairs = list(itertools.permutations(NOUNS, 2))
    out = {pair for pair in pairs if held_out(*pair)}
    assert 0.08 < len(out) / len(pairs) < 0.12
    assert all((right, left) in out for left, right in out)
    assert {noun for noun, _ in out} == set(NOUNS) == {left for left, right in pairs if (left, right) not in out}
    rng = Random(0)
    drawn = [random_scene(rng) for _ in range(3000)]
    assert {len(scene.subjects) for scene in drawn} == set(PLACES)
    assert not any(pair in out for scene in drawn for pair in itertools.combinations(scene.nouns, 2))
    assert {scene.nouns for scene in (random_scene(rng, 2, unseen_pair=True) for _ in range(300))} <= out
    assert len(NOUNS) >= 64
    assert len(COLOURS) == 10


def test_a_twentieth_of_the_tints_is_held_out_and_never_in_training() -> None:
    every = {(noun, tint) for noun in NOUNS for tint in COLOURS if tint not in OWN[noun].split()}
    out = {(noun, tint) for noun, tint in every if tint_held_out(noun, tint)}
    assert 0.04 < len(out) / len(every) < 0.06
    assert {tint for _, tint in out} == set(COLOURS)
    assert all(tints_of(noun) for noun in NOUNS)
    rng = Random(0)
    drawn = [subject for _ in range(3000) for subject in random_scene(rng).subjects]
    assert {(subject.noun, subject.tint) for subject in drawn if subject.tint} <= every - out
    for _ in range(100):
        scene = random_scene(rng, 1, tinted=1.0, unseen_tint=True)
        assert (scene.nouns[0], scene.tints[0]) in out
        assert scene.colour not in scene.tints


@needs_font
def test_the_judge_knows_rendered_scenes_and_only_those() -> None:
    rng = Random(1)
    for i in range(12):
        scene = random_scene(rng, 1 + i % 4, tinted=0.5)
        picture = render(scene)
        verdict = judge(picture, len(scene.nouns))
        assert (verdict.nouns, verdict.tints, verdict.colour) == (scene.nouns, scene.tints, scene.colour)
        noisy = np.clip(picture + np.random.default_rng(0).normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        assert judge(noisy, len(scene.nouns)).nouns == scene.nouns
    ground = np.full((128, 128, 3), COLOURS["blue"], np.uint8)
    assert judge(ground, 2).nouns == (None, None)
    assert judge(ground, 1).colour == "blue"


@needs_font
@pytest.mark.parametrize(("width", "height"), [(64, 64), (192, 128)])
def test_the_judge_reads_other_sizes(width: int, height: int) -> None:
    rng = Random(width + height)
    for count in PLACES:
        scene = random_scene(rng, count, tinted=0.5)
        verdict = judge(render(scene, width, height), count)
        assert (verdict.nouns, verdict.tints, verdict.colour) == (scene.nouns, scene.tints, scene.colour)


@needs_font
def test_the_judge_says_what_is_wrong() -> None:
    def found(*subjects: Subject, asked: Scene = FOUR) -> str | None:
        picture = render(Scene(subjects, "green", True))
        return failure(asked, judge(picture, len(asked.subjects)), picture)

    assert found(*FOUR.subjects) is None
    assert found(BEAR, HORSE, FOX, OWL) == "swapped places"
    assert found(HORSE, HORSE, FOX, OWL) == "doubled"
    assert found(HORSE, Subject("crab"), FOX, OWL) == "another"
    assert found(HORSE, BEAR, Subject("fox", "red"), Subject("owl", "blue")) == "wrong colour"  # a fox is red already
    colours = Scene((Subject("car", "blue"), Subject("horse", "pink")), "green", True)
    assert found(Subject("car", "pink"), Subject("horse", "blue"), asked=colours) == "swapped colours"
    assert found(Subject("car", "blue"), Subject("horse"), asked=colours) == "wrong colour"
    assert found(HORSE, BEAR, asked=Scene((HORSE,), "green", True)) == "other number"
    assert found(HORSE, asked=Scene((HORSE, BEAR), "green", True)) == "other number"


@needs_font
def test_the_judge_tells_empty_blurred_and_mixed_apart() -> None:
    scene = Scene((HORSE, BEAR), "green", True)
    picture = render(scene)

    def found(changed: np.ndarray) -> str | None:
        changed = np.rint(changed).astype(np.uint8)
        return failure(scene, judge(changed, 2), changed)

    empty = picture.copy()
    empty[:, 64:] = COLOURS["green"]
    assert found(empty) == "missing"
    blurred = np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(10)))
    assert found(np.concatenate([picture[:, :64], blurred[:, 64:]], axis=1)) == "blurred"
    other = render(Scene((HORSE, Subject("car")), "green", True))
    assert found(0.5 * picture + 0.5 * other.astype(np.float32)) == "mixed"


def test_interval_is_wilsons() -> None:
    """Against the roots of Wilson's quadratic |p - rate| = z sqrt(p (1 - p) / n)."""
    low, high = interval(95, 100)
    for p in (low, high):
        assert abs(p - 0.95) == pytest.approx(1.959964 * (p * (1 - p) / 100) ** 0.5)
    assert low < 0.95 < high


def test_group_norm_has_pytorchs_gradients() -> None:
    torch.manual_seed(0)
    plain = nn.GroupNorm(4, 16, eps=1e-6)
    x, seed = torch.randn(3, 16, 5, 6, requires_grad=True), torch.randn(3, 16, 5, 6)
    agree_after(speed_up, plain, x, seed)


def test_lean_norm_has_pytorchs_gradients() -> None:
    torch.manual_seed(0)
    x, seed = torch.randn(3, 5, 4, 16, requires_grad=True), torch.randn(3, 5, 4, 16)
    agree_after(lean_norms, nn.Sequential(nn.RMSNorm(16, eps=1e-6)), x, seed)


def agree_after(change, module: nn.Module, x: Tensor, seed: Tensor) -> None:
    """Values and gradients of a module stay the same under a change."""
    for p in module.parameters():
        nn.init.normal_(p)

    def gradients() -> list[Tensor]:
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], seed)]

    expected = gradients()
    change(module)
    for ours, reference in zip(gradients(), expected):
        assert torch.allclose(ours, reference, atol=1e-5)


def test_lean_attention_has_pytorchs_gradients() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, requires_grad=True) for n in (4, 6, 6))
    seed = torch.randn(2, 4, 24)

    module = SelfAttention(TOY)

    def gradients() -> list[Tensor]:
        y = module.attend(q, k, v, Tokens(0, 2, 3))
        return [y.detach(), *torch.autograd.grad(y, [q, k, v], seed)]

    expected = gradients()
    lean_attention(module)
    assert module.backend == "lean"
    for ours, reference in zip(gradients(), expected):
        assert torch.allclose(ours, reference, atol=1e-5)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(3, *shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_muon_steps_each_matrix_as_if_it_were_alone() -> None:
    """By the formula, in float32 but for the orthogonal matrix; of several shapes, and a convolution among them."""
    torch.manual_seed(0)
    shapes, (rate, momentum, decay) = ((20, 50), (50, 20), (20, 50), (20, 10, 5, 1), (8, 8)), (0.1, 0.95, 0.01)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected, means = [p.detach().clone() for p in parameters], [torch.zeros(shape) for shape in shapes]
    muon = Muon(parameters, lr=rate, momentum=momentum, decay=decay)
    for step in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape) if (step, i) != (1, 4) else None
            if p.grad is None:
                continue
            means[i] = momentum * means[i] + p.grad
            matrix = orthogonalise((p.grad + momentum * means[i]).flatten(1)[None])[0].view_as(p).float()
            expected[i] = (1 - rate * decay) * expected[i] - 0.2 * max(p.flatten(1).shape) ** 0.5 * rate * matrix
        muon.step()
        for p, one in zip(parameters, expected):
            assert torch.allclose(p, one, atol=0.02 * rate)


@needs_font
def test_crops_are_about_a_subject() -> None:
    rng = Random(0)
    for _ in range(50):
        scene = random_scene(rng)
        crop = cropped(rng, render(scene), scene, 64)
        assert crop.shape == (64, 64, 3)
        assert np.any(crop != COLOURS[scene.colour])


@needs_font
def test_training_begins_with_a_model_resumes_and_exports(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    torch.manual_seed(0)
    torch.save({"average": Autoencoder(CONFIG).state_dict()}, work / "vae.pt")
    names = {
        "minutes": 1e-9,
        "batch": 4,
        "pool": 4,
        "seldom": 24,
        "rate": 1e-3,
        "warmup": 1,
        "seed": 1,
        "device": "cpu",
    }
    args = Namespace(work=work, init=DEMO, **names)
    provide_tokenizers(work, DEMO)
    team = Team()
    run = Run(args, team)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    share, loss, stop = run.update(0.25, 1e-3)
    assert (share, stop) == (0.25, False)
    assert 0.1 < loss < 10
    assert all(not torch.equal(p, before[name]) for name, p in run.model.named_parameters() if "blocks.0.x" in name)
    copies = zip(run.flow.model.parameters(), run.model.parameters())
    assert all(torch.equal(copy, p.to(copy.dtype)) for copy, p in copies)
    team.stopped = True  # as by SIGTERM: one step, saved
    train(run, 100.0, 1.0)
    again = Run(args, Team())
    assert (again.step, again.samples, again.latent) == (2, 8, run.latent)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), run.model.parameters()))
    export(tmp_path / "demo", work, {"width": 128, "height": 128, "steps": 2, "cfg": 2.0, "t5_length": 22}, 3.0)
    pipe = Pipeline.load(tmp_path / "demo", device="cpu")
    for size in (64, 192):
        assert pipe("a horse", width=size, height=size)[0].size == (size, size)


def test_verdict_names_only_what_is_near() -> None:
    scene = replace(FOUR, subjects=(HORSE,))
    picture = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    verdict = judge(picture, 1) if FONT.exists() else Verdict((), "green")
    assert verdict.nouns != scene.nouns
