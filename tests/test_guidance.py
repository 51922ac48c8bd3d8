"""Guidance: every term against its formula or diffusers', and what may be asked for."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from reference import relative_error
from torch import Tensor

from mmdit.common.errors import SettingsError
from mmdit.driver.sampling import guidance_of
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS, Settings
from samplers import NEGATIVE, SOLVERS, Ask, Evaluation, Guidance, Moment, Step, combined, drawing, euler, guidance
from samplers.flow import answered
from samplers.options import SAMPLERS, projection_of, weighted

SHAPE = (3, 4, 6, 5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, COND, UNCOND = (noise(*SHAPE, seed=seed) for seed in range(3))


def guided_by(guide: Guidance, at: Moment, told: dict[Ask, Tensor]) -> tuple[Tensor, list[tuple[Ask, ...]]]:
    """What it makes of these predictions, and what it asked for."""
    asked: list[tuple[Ask, ...]] = []

    def predict(evaluation: Any) -> Sequence[Tensor]:
        asked.append(evaluation.asks)
        return [told[ask] for ask in evaluation.asks]

    return answered(guide(at), predict), asked


TEXTS = {Ask(): COND, Ask(NEGATIVE): UNCOND}


def moment(step: int = 3, steps: int = 10, sigma: float = 0.7, x: Tensor = X) -> Moment:
    return Moment(x, torch.tensor(sigma), step, steps)


# ---- the terms -------------------------------------------------------------------------------------


def test_terms_share_one_evaluation() -> None:
    """All that they want to know is asked for at once, each thing once, the prompt first."""
    worse = Ask(change="worse")
    terms = [guidance.classifier_free_guidance(3.0), guidance.away_from("worse", 2.0), guidance.rescaled(0.5)]
    _, asked = guided_by(combined(*terms), moment(), {**TEXTS, worse: X})
    assert asked == [(Ask(), Ask(NEGATIVE), worse)]


def test_zero_star_is_the_formula_and_diffusers() -> None:
    found, _ = guided_by(combined(guidance.zero_star_guidance(4.0)), moment(), TEXTS)
    fit = cfg_zero_star_scale(COND.flatten(1), UNCOND.flatten(1)).view(-1, 1, 1, 1)
    assert relative_error(found, UNCOND * fit + 4 * (COND - UNCOND * fit)) <= 1e-6
    for i in range(SHAPE[0]):  # of each picture: <cond, uncond> / |uncond|²
        c, u = COND[i].double(), UNCOND[i].double()
        assert relative_error(found[i], (1 - 4) * u * (c * u).sum() / (u * u).sum() + 4 * c) <= 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_rest_is_a_later_beginning(name: str) -> None:
    """Two steps that ask nothing and change nothing, then the solver from there, which knows of no step before."""
    sigmas, start, steps = torch.linspace(1, 0.1, 9), noise(1, 4, 5), list[Step]()

    def fresh() -> Any:
        source = torch.Generator().manual_seed(1)
        return lambda x: torch.randn(x.shape, generator=source)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return x.sin() * (1 + sigma)

    asked: list[Evaluation] = []
    asking = drawing(SOLVERS[name], combined(), start, sigmas, lambda s: steps.append(s) or s.x, fresh(), rest=2)
    found = answered(asking, lambda e: asked.append(e) or [velocity(e.at.x, e.at.sigma) for _ in e.asks])
    assert torch.equal(found, SOLVERS[name](velocity, start, sigmas[2:], noise=fresh()))
    assert [step.index for step in steps] == list(range(8))
    assert all(torch.equal(step.x, start) for step in steps[:2])
    assert [(e.asks, e.at.step) for e in asked[:3]] == [((), 0), ((), 1), ((Ask(),), 2)]


@pytest.mark.parametrize(("eta", "most", "momentum"), [(0.0, 15.0, -0.5), (0.3, 2.0, 0.0), (1.0, math.inf, 0.4)])
def test_projected_guidance_is_that_of_diffusers(eta: float, most: float, momentum: float) -> None:
    """On predicted clean latents, as in the paper, over three steps live against diffusers' function."""
    guide = combined(guidance.projected_guidance(5.0, eta, most, momentum))
    buffer = MomentumBuffer(momentum) if momentum else None
    for step, sigma in enumerate((0.9, 0.5, 0.2)):
        x, cond, uncond = (noise(*SHAPE, seed=10 * step + i) for i in range(3))
        found, _ = guided_by(guide, moment(step, 3, sigma, x), {Ask(): cond, Ask(NEGATIVE): uncond})
        limit = most if most < math.inf else 0.0
        clean = normalized_guidance(
            x - sigma * cond, x - sigma * uncond, 5.0 - 1.0, buffer, eta, limit, use_original_formulation=True
        )
        assert relative_error(x - sigma * found, clean) <= 1e-5


def test_projected_guidance_with_all_of_the_push_is_the_classic() -> None:
    found, _ = guided_by(combined(guidance.projected_guidance(4.5, 1.0)), moment(), TEXTS)
    assert relative_error(found, UNCOND + 4.5 * (COND - UNCOND)) <= 1e-6


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_is_the_formula(share: float) -> None:
    terms = guidance.classifier_free_guidance(6.0), guidance.rescaled(share)
    found, _ = guided_by(combined(*terms), moment(), TEXTS)
    for i in range(SHAPE[0]):
        plain = (UNCOND + 6 * (COND - UNCOND))[i].double()
        spread = COND[i].double().std() / plain.std()
        assert relative_error(found[i], share * plain * spread + (1 - share) * plain) <= 1e-6


def test_composition_is_the_formula() -> None:
    """With guidance: uncond + scale (cond - uncond + 0.5 (a - uncond) - 2 (b - uncond)); also where none is left."""
    a, b = noise(*SHAPE, seed=5), noise(*SHAPE, seed=6)
    told = {**TEXTS, Ask("a"): a, Ask("b"): b}
    mixed = guidance.composition({"a": 0.5, "b": -2.0})
    expected = COND + 0.5 * (a - UNCOND) - 2 * (b - UNCOND)
    assert relative_error(guided_by(combined(mixed), moment(), told)[0], expected) <= 1e-6
    both, asked = guided_by(combined(mixed, guidance.classifier_free_guidance(3.0)), moment(), told)
    assert relative_error(both, UNCOND + 3 * (expected - UNCOND)) <= 1e-6
    assert asked == [(Ask(), Ask(NEGATIVE), Ask("a"), Ask("b"))]


def test_it_turns_away_from_a_worse_prediction() -> None:
    """Where it acts, cond - worse is added; elsewhere it does not ask."""
    worse = Ask(change="worse")
    away = guidance.away_from("worse", 2.5, lambda at: at.step in (1, 2))
    guide = combined(guidance.classifier_free_guidance(3.0), away)
    acted = [worse in guided_by(guide, moment(i, 5), {**TEXTS, worse: X})[1][0] for i in range(5)]
    assert acted == [False, True, True, False, False]
    found, _ = guided_by(guide, moment(2, 28), {**TEXTS, worse: X})
    assert relative_error(found, UNCOND + 3 * (COND - UNCOND) + 2.5 * (COND - X)) <= 1e-6


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", [1, 2.75, 4.5, 6.25, 8]), ("cosine", [1, 2.025, 4.5, 6.975, 8])]
)
def test_a_scale_that_rises(shape: str, expected: list[float]) -> None:
    scale = guidance.rising(4.5, shape)
    found = [scale(moment(i, 5)) for i in range(5)]
    assert found == pytest.approx(expected, abs=1e-3)
    assert sum(found) / 5 == pytest.approx(4.5)


def test_the_cache_spares_what_hardly_changes() -> None:
    """A velocity that turns once, at step 5 of 10: it is evaluated around the turn, at the ends, and nowhere else.

    With velocity = 1 the latents fall by 0.1 a step; after the turn, 2, they fall by 0.2.
    """
    asked: list[int] = []

    def real(at: Moment) -> Any:
        asked.append(at.step)
        yield from ()
        return torch.full_like(at.x, 1.0 if at.step < 5 else 2.0)

    guide, x = guidance.cached(real, 0.15), torch.ones(1, 2)
    taken = []
    for step in range(10):
        velocity = answered(guide(moment(step, 10, x=x)), lambda _: ())
        taken.append(float(velocity[0, 0]))
        x = x - 0.1 * velocity
    assert asked == [0, 1, 9]  # nothing told it that there would be a turn
    assert taken == [1.0] * 9 + [2.0]


def test_the_cache_keeps_to_its_threshold() -> None:
    """On a flow that bends: a tiny threshold spares and changes nothing; a larger one spares more, at more error."""
    calls: list[float] = []

    def real(at: Moment) -> Any:
        calls.append(float(at.sigma))
        yield from ()
        return at.x * (1 - at.sigma) + COND * at.sigma

    def end(guide: Guidance) -> tuple[Tensor, int]:
        x, sigmas = X, torch.linspace(1, 0, 41)
        calls.clear()
        for i in range(40):
            x = x + (sigmas[i + 1] - sigmas[i]) * answered(guide(Moment(x, sigmas[i], i, 40)), lambda _: ())
        return x, len(calls)

    plain, all_of_them = end(real)
    same, as_many = end(guidance.cached(real, 1e-9))
    assert torch.equal(same, plain) and as_many == all_of_them == 40
    found = [end(guidance.cached(real, threshold)) for threshold in (0.05, 0.1, 0.3)]
    counts, errors = [count for _, count in found], [relative_error(x, plain) for x, _ in found]
    assert counts == sorted(counts, reverse=True) and 2 < counts[-1] < counts[0] < 40
    assert errors == sorted(errors) and 0 < errors[0] < 0.05 and errors[-1] < 0.3


# ---- what may be asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [
    ({"cfg_zero": True, "apg": "0"}, "cfg_zero and apg are two ways"),
    ({"cfg_zero": True, "cfg": 1}, "cfg_zero is True, but cfg is 1"),
    ({"cfg_rescale": 1.5}, "cfg_rescale is 1.5: expected a number from 0 to 1"),
    ({"apg": "0:-1"}, "apg is '0:-1': expected ETA"), ({"apg": "0:1:2:3"}, "apg is"), ({"apg": "0:1:1"}, "apg is"),
    ({"slg_layers": "7"}, "slg_layers without slg"), ({"slg": 1.0, "slg_layers": "7;8"}, "slg_layers is '7;8'"),
    ({"slg": 1.0, "slg_interval": "0.3"}, "slg_interval is '0.3': expected LOW:HIGH"),
    ({"pag": 1.0, "pag_layers": "-1"}, "pag_layers is '-1'"), ({"cache": -1}, "cache is -1: expected a number from 0"),
    ({"also": ("a clock at 12:30",)}, "also is 'a clock at 12:30': expected TEXT:WEIGHT with a weight from -10 to 10"),
])  # fmt: skip
def test_what_cannot_be_asked_for(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(Settings("a horse", **SD35_MEDIUM_DEFAULTS), **given).check()


def test_rescale_needs_any_guidance() -> None:
    for other in ({"slg": 2.5, "slg_layers": "7"}, {"pag": 1.0}, {"also": ("a pig",)}):
        replace(Settings("a horse", **{**SD35_MEDIUM_DEFAULTS, "cfg": 1}), cfg_rescale=0.5, **other).check()


def test_a_scale_that_rises_in_one_step() -> None:
    assert guidance.rising(4.5, "linear")(moment(0, 1)) == guidance.rising(4.5, "cosine")(moment(0, 1)) == 4.5


@pytest.mark.parametrize(("text", "expected"), [
    ("a pig", ("a pig", 1.0)), ("a pig:0.5", ("a pig", 0.5)), ("time: now", ("time: now", 1.0)),
    ("a:b:-2", ("a:b", -2)),
])  # fmt: skip
def test_texts_with_weights(text: str, expected: tuple[str, float]) -> None:
    assert weighted(text) == expected


def test_what_apg_says() -> None:
    assert projection_of("0.1") == (0.1, math.inf, 0.0)
    assert projection_of("0:15") == (0.0, 15.0, 0.0)
    assert projection_of("0:15:-0.5") == (0.0, 15.0, -0.5)


def test_what_remembers_is_new_for_each_picture() -> None:
    s = Settings("a horse", **SD35_MEDIUM_DEFAULTS, apg="0:15:-0.5", cache=0.1)
    assert guidance_of(s, 3.0) is not guidance_of(s, 3.0)
    x, sigmas = noise(1, 2), torch.linspace(1, 0, 9)

    def run() -> Tensor:
        guide = guidance_of(s, 3.0)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            at = Moment(x, sigma, round(8 * (1 - float(sigma))), 8)
            return answered(guide(at), lambda asked: [x.sin() if ask == Ask() else x.cos() for ask in asked.asks])

        return euler(velocity, x, sigmas)

    assert torch.equal(run(), run())
