"""Guidance: every term against its formula or diffusers', changed networks against ones rebuilt, and in the loop."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from reference import relative_error
from test_pipeline import diffusers_pipeline
from torch import Tensor, nn
from toys import toy_folder

from mmdit.altered import Change, altered
from mmdit.attention import attention
from mmdit.common.errors import SettingsError
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.sampling import guidance_of
from mmdit.driver.settings import SD35_MEDIUM_DEFAULTS, Settings
from mmdit.model import MMDiT, Tokens
from samplers import NEGATIVE, Ask, Guidance, Moment, combined, euler, guidance
from samplers.flow import answered
from samplers.options import projection_of, weighted

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


def test_a_still_first_step_asks_nothing() -> None:
    """The first of several changes nothing; the only one is as ever."""
    guide = guidance.stilled(combined(guidance.classifier_free_guidance(2.0)))
    assert guided_by(guide, moment(0), TEXTS)[1] == [()]
    assert not guided_by(guide, moment(0), TEXTS)[0].any()
    for at in (moment(1), moment(0, 1)):
        assert torch.equal(guided_by(guide, at, TEXTS)[0], UNCOND + 2 * (COND - UNCOND))


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


# ---- the changed network ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(pipeline: Pipeline) -> MMDiT:
    """The toy's, in float32, its weights in place."""
    return copy.deepcopy(pipeline.transformer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    defaults = {"width": 96, "height": 64, "steps": 3, "cfg": 4.5, "t5_length": 20}
    return toy_folder(tmp_path_factory.mktemp("guidance"), defaults=defaults)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.load(folder, device="cpu", dtype="fp32", editable=True)


def given(model: MMDiT, rows: int) -> tuple[Tensor, ...]:
    config = model.config
    return (
        noise(rows, config.in_channels, 8, 12),
        torch.linspace(0.9, 0.2, rows),
        noise(rows, 11, config.context_size, seed=1),
        noise(rows, config.pooled_size, seed=2),
    )


@torch.no_grad()
def test_skipped_blocks_are_left_out(model: MMDiT) -> None:
    """Rows 0 and 2 against a model that was built without these blocks; row 1 is as it was."""
    inputs = given(model, 3)
    plain = model(*inputs)
    with altered(model, {Change("skip", (1,)): [0, 2]}):
        found = model(*inputs)
    without = copy.deepcopy(model)
    without.joint_blocks = nn.ModuleList(block for i, block in enumerate(without.joint_blocks) if i != 1)
    expected = without(*inputs)
    assert relative_error(found[[0, 2]], expected[[0, 2]]) <= 1e-6
    assert torch.equal(found[1], plain[1])
    assert relative_error(plain[[0, 2]], expected[[0, 2]]) > 1e-3
    assert torch.equal(model(*inputs), plain)


@torch.no_grad()
def test_perturbed_attention_is_that_of_a_mask(model: MMDiT) -> None:
    """Row 1 against softmax over a mask: image tokens see the text and themselves, in the second themselves."""
    inputs = given(model, 2)
    plain, dual = model(*inputs), 0
    assert dual in model.config.dual_attention_blocks
    with altered(model, {Change("perturb", (dual,)): [1]}):
        found = model(*inputs)

    masked = copy.deepcopy(model)

    def masks(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        seen[-tokens.rows * tokens.columns :, tokens.text :] = torch.eye(tokens.rows * tokens.columns, dtype=torch.bool)
        return attention(q, k, v, "math", seen)

    for attn in (masked.joint_blocks[dual].x_block.attn, masked.joint_blocks[dual].x_block.attn2):
        attn.attend = masks
    expected = masked(*inputs)
    assert relative_error(found[1], expected[1]) <= 1e-5
    assert relative_error(plain[1], expected[1]) > 1e-3
    assert relative_error(found[0], plain[0]) <= 1e-6


def test_a_change_is_taken_back_after_an_error(model: MMDiT) -> None:
    """Hooks and methods are as they were, also a method that a user put there."""
    attn: Any = model.joint_blocks[0].x_block.attn
    own = attn.attend = attn.attend
    with pytest.raises(KeyError), altered(model, {Change("perturb", (0,)): [0], Change("skip", (1,)): [0]}):
        raise KeyError
    assert attn.attend is own
    del attn.attend
    assert not model.joint_blocks[1]._forward_hooks


# ---- in the loop -----------------------------------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {"slg": 2.5, "slg_layers": "1", "slg_interval": "0:1"},
    {"pag": 2.0, "pag_layers": "0,1", "cfg": 1},
    {"also": ("a pig:0.5", "a bear:-0.3"), "apg": "0:5:-0.5", "cfg_rescale": 0.5},
    {"cfg_zero": True, "cfg_schedule": "cosine", "slg": 2.0, "pag": 1.0, "slg_interval": "0:1"},
    {"cache": 1.0},
]


def end_of(pipeline: Pipeline, **keywords: Any) -> Tensor:
    trace: dict[str, Tensor] = {}
    s = replace(pipeline.settings, **{"prompt": "a horse", "negative": "a pig", "steps": 4, **keywords})
    pipeline.run(s, trace)
    return trace["latents.3"]


@pytest.fixture(scope="module")
def plain(folder: Path) -> Pipeline:
    return Pipeline.load(folder, device="cpu", dtype="fp32")


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_equals_its_singles(plain: Pipeline, way: dict[str, Any]) -> None:
    together = end_of(plain, count=3, **way)
    for i in range(3):
        assert relative_error(together[i : i + 1], end_of(plain, seed=i, **way)) <= 1e-5
    assert relative_error(together[:1], end_of(plain, cfg=way.get("cfg", 4.5))) > 1e-4  # it does something


def test_evaluations_are_one_batch_or_as_few_as_there_is_room_for(
    plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt, negative and the changed one at once; where the plan has no room for three, two passes, alike."""
    sizes: list[int] = []
    hook = plain.transformer.x_embedder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    whole = end_of(plain, **WAYS[0])
    assert sizes == [2, 3, 3, 3]
    sizes.clear()
    real = plain.planner.plan

    def narrow(job: Any, *more: Any) -> Any:
        if job.changed:
            raise SettingsError("no room")
        return real(job, *more)

    monkeypatch.setattr(plain.planner, "plan", narrow)
    parts = end_of(plain, **WAYS[0])
    hook.remove()
    assert sizes == [2, 2, 1, 2, 1, 2, 1]
    assert relative_error(parts, whole) <= 1e-5


def test_every_change_holds_where_blocks_come_and_go(plain: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same latents with the transformer streamed."""
    expected = [end_of(plain, **way) for way in WAYS[:2]]
    ladder = plain.planner.ladder
    monkeypatch.setattr(plain.planner, "ladder", lambda: ladder()[-1:])
    for way, latents in zip(WAYS, expected):
        assert relative_error(end_of(plain, **way, memory="2GB"), latents) <= 1e-5
        assert "comes block by block" in str(plain.ended_with)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> StableDiffusion3Pipeline:
    return diffusers_pipeline(folder).to(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("steps", [7, 12])
def test_skip_layers_are_those_of_diffusers(plain: Pipeline, theirs: StableDiffusion3Pipeline, steps: int) -> None:
    """A whole run, live; latents at the end."""
    trace: dict[str, Tensor] = {}
    s = replace(plain.settings, prompt="a horse", negative="a pig", steps=steps, slg=2.8, slg_layers="1")
    plain.run(replace(s, slg_interval="0.01:0.6"), trace)
    texts = {f"{kind}{name}": trace[f"{part}.{key}"] for kind, part in (("", "cond"), ("negative_", "uncond"))
             for name, key in (("prompt_embeds", "context"), ("pooled_prompt_embeds", "pooled"))}  # fmt: skip
    found = theirs(
        **texts, latents=trace["noise"], guidance_scale=4.5, height=64, width=96, num_inference_steps=steps,
        output_type="latent",
        skip_guidance_layers=[1], skip_layer_guidance_scale=2.8, skip_layer_guidance_stop=0.6,
    ).images  # fmt: skip
    assert relative_error(trace[f"latents.{steps - 1}"], found) <= 1e-5
    assert relative_error(end_of(plain), found) > 1e-3


# ---- what may be asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [
    ({"cfg_zero": True, "apg": "0"}, "cfg_zero and apg are two ways"),
    ({"cfg_zero": True, "cfg": 1}, "cfg_zero is True, but cfg is 1"),
    ({"cfg_rescale": 1.5}, "cfg_rescale is 1.5: expected a number from 0 to 1"),
    ({"apg": "0:-1"}, "apg is '0:-1': expected ETA"), ({"apg": "0:1:2:3"}, "apg is"), ({"apg": "0:1:1"}, "apg is"),
    ({"slg_layers": "7"}, "slg_layers without slg"), ({"slg": 1.0, "slg_layers": "7;8"}, "slg_layers is '7;8'"),
    ({"slg": 1.0, "slg_interval": "0.3"}, "slg_interval is '0.3': expected LOW:HIGH"),
    ({"pag": 1.0, "pag_layers": "-1"}, "pag_layers is '-1'"), ({"cache": -1}, "cache is -1: expected a number from 0"),
    ({"also": ("a pig:1e9",)}, "also is 'a pig:1e9'"),
])  # fmt: skip
def test_what_cannot_be_asked_for(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(Settings("a horse", **SD35_MEDIUM_DEFAULTS), **given).check()


def test_a_block_that_is_not_there(plain: Pipeline) -> None:
    depth = plain.transformer.config.depth
    with pytest.raises(SettingsError, match=f"slg_layers: there is no block {depth}: the model's {depth}"):
        plain("a horse", slg=1.0, slg_layers=f"0,{depth}")


def test_blocks_are_filled_in(plain: Pipeline) -> None:
    """Where none are named, those that lie as deep as SD3.5-Medium's; without the guidance none."""
    s = plain.check(replace(plain.settings, prompt="x", slg=1.0, pag=1.0))
    depth = plain.transformer.config.depth
    assert s.slg_layers == ",".join(map(str, sorted({7 * depth // 24, 8 * depth // 24, 9 * depth // 24})))
    assert s.pag_layers == str(13 * depth // 24)
    assert plain.check(replace(plain.settings, prompt="x")).slg_layers is None


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
