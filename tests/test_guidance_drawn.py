"""Guidance in whole drawings: changed networks against ones rebuilt, batches, plans, live against diffusers."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from reference import relative_error
from sweeps import sampled
from test_pipeline import diffusers_pipeline
from torch import Tensor, nn
from toys import toy_folder

from mmdit.altered import Change, altered
from mmdit.attention import attention
from mmdit.common.errors import SettingsError
from mmdit.driver.pipeline import Pipeline
from mmdit.model import MMDiT, Tokens

SHAPE = (3, 4, 6, 5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("way", sampled(WAYS, 2))
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


def test_the_first_step_rests(plain: Pipeline) -> None:
    """With CFG-Zero* it asks nothing and changes nothing; the only step of a run is one as ever."""
    sizes: list[int] = []
    hook = plain.transformer.x_embedder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    trace: dict[str, Tensor] = {}
    plain.run(replace(plain.settings, prompt="a horse", steps=3, cfg_zero=True), trace)
    assert sizes == [2, 2]
    assert torch.equal(trace["latents.0"], trace["noise"]) and not torch.equal(trace["latents.1"], trace["noise"])
    plain.run(replace(plain.settings, prompt="a horse", steps=1, cfg_zero=True))
    hook.remove()
    assert sizes == [2, 2, 2]


def test_every_change_holds_where_blocks_come_and_go(plain: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same latents with the transformer streamed."""
    expected = [end_of(plain, **way) for way in WAYS[:2]]
    ladder = plain.planner.ladder
    monkeypatch.setattr(plain.planner, "ladder", lambda: ladder()[-1:])
    for way, latents in zip(WAYS, expected):
        assert relative_error(end_of(plain, **way, memory="3GB"), latents) <= 1e-5
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
