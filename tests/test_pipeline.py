"""Prompt to picture: live against diffusers' StableDiffusion3Pipeline on the same small random folder."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from reference import relative_error
from sweeps import sampled
from torch import Tensor

from benchmarks.emoji.tokenizers import write_tokenizers
from benchmarks.random_checkpoint import write_checkpoint
from mmdit.common.errors import SettingsError
from mmdit.driver.pipeline import Pipeline
from mmdit.driver.settings import Settings
from samplers import shifted_sigmas
from text_encoders import TokenizerError
from text_encoders.tokenizers import read_spiece
from weights import CheckpointError

PROMPT, NEGATIVE = "a horse and a bear on a green background!", "a small pig"
VOCABULARIES = {"clip_vocab": 1024, "t5_vocab": 512}
DEFAULTS = {"width": 96, "height": 64, "steps": 3, "cfg": 4.5, "t5_length": 77}
WIDTH = 256  # of the toy's context


class Models(NamedTuple):
    """The same weights in every form."""

    folder: Path
    single: Path
    rounded: Path  # a folder whose weights are bfloat16 numbers
    tokenizers: Path


load = partial(Pipeline.load, device="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Not to be written to."""
    root = tmp_path_factory.mktemp("models")
    it = Models(root / "folder", root / "single.safetensors", root / "rounded", root / "tokenizers")
    write_tokenizers(it.tokenizers, captions=2000)
    for name in ("tokenizer", "tokenizer_2"):  # diffusers takes the length of CLIP's context from here
        path = it.tokenizers / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    write_checkpoint(it.folder, tokenizers=it.tokenizers, defaults=DEFAULTS, **VOCABULARIES)
    write_checkpoint(it.rounded, tokenizers=it.tokenizers, defaults=DEFAULTS, dtype="bf16", **VOCABULARIES)
    write_checkpoint(it.single, layout="single-file", **VOCABULARIES)
    return it


@pytest.fixture
def broken(models: Models, tmp_path: Path) -> Path:
    """A copy of the folder to write to."""
    return Path(shutil.copytree(models.folder, tmp_path / "folder"))


@pytest.fixture(scope="module")
def pipelines(models: Models) -> dict[str, Pipeline]:
    """In float32 by the mode of T5."""
    return {t5: load(models.folder, dtype="fp32", t5=t5) for t5 in ("on", "off", "omit")}


@pytest.fixture(scope="module")
def pipeline(pipelines: dict[str, Pipeline]) -> Pipeline:
    return pipelines["on"]


def diffusers_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """diffusers' pipeline of the folder, T5's tokenizer built by hand: to read spiece.model it needs protobuf."""
    pieces, table = read_spiece(folder / "tokenizer_3" / "spiece.model")
    t5 = transformers.T5TokenizerFast(vocab=pieces, _spm_precompiled_charsmap=table, extra_ids=0)
    theirs = StableDiffusion3Pipeline.from_pretrained(folder, tokenizer_3=t5)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.fixture(scope="module")
def theirs(models: Models) -> StableDiffusion3Pipeline:
    return diffusers_pipeline(models.folder).to(torch.float32)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Without the notes of the reference packages."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def traced(pipeline: Pipeline, **keywords: Any) -> dict[str, Tensor]:
    """What a run dumps."""
    trace: dict[str, Tensor] = {}
    pipeline.run(replace(pipeline.settings, **{"prompt": PROMPT, "negative": NEGATIVE, **keywords}), trace)
    return trace


@torch.no_grad()
def diffusers_trace(theirs: StableDiffusion3Pipeline, noise: Tensor, t5: str, **keywords: Any) -> dict[str, Tensor]:
    """The same of diffusers' run, under the same names. keywords: steps, cfg, t5_length."""
    if t5 != "on":
        theirs = StableDiffusion3Pipeline(**{**theirs.components, "text_encoder_3": None, "tokenizer_3": None})
        theirs.set_progress_bar_config(disable=True)
    context, negative_context, pooled, negative_pooled = theirs.encode_prompt(
        PROMPT, None, None, negative_prompt=NEGATIVE, max_sequence_length=keywords["t5_length"],
        num_images_per_prompt=len(noise), do_classifier_free_guidance=True,
    )  # fmt: skip
    if t5 == "omit":
        context, negative_context = context[:, :77], negative_context[:, :77]
    trace = {"cond.context": context, "cond.pooled": pooled}
    if keywords["cfg"] != 1:
        trace |= {"uncond.context": negative_context, "uncond.pooled": negative_pooled}
    step = theirs.scheduler.step

    def watched(velocity: Tensor, timestep: Tensor, x: Tensor, **more: Any) -> Any:
        result = step(velocity, timestep, x, **more)
        index = theirs.scheduler.step_index - 1
        trace.update({f"velocity.{index}": velocity, f"latents.{index}": result[0]})
        return result

    theirs.scheduler.step = watched
    try:
        images = theirs(
            prompt_embeds=context, negative_prompt_embeds=negative_context, pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled, latents=noise, guidance_scale=keywords["cfg"],
            height=8 * noise.shape[2], width=8 * noise.shape[3], num_inference_steps=keywords["steps"],
        ).images  # fmt: skip
    finally:
        theirs.scheduler.step = step
    trace |= {"sigmas": theirs.scheduler.sigmas, "image": torch.from_numpy(np.stack([np.asarray(i) for i in images]))}
    return trace


def levels(one: Tensor, other: Tensor) -> int:
    """By how many grey levels two pictures differ at most."""
    assert one.dtype == other.dtype == torch.uint8
    return int((one.int() - other.int()).abs().max())


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t5", "t5_length", "cfg"),
    sampled(
        [("on", 256, 4.5), ("off", 256, 7), ("omit", 77, 4.5), ("on", 77, 1), ("on", 77, 4.5), ("off", 77, 4.5)], 3
    ),
)
def test_the_whole_loop_is_that_of_diffusers(
    pipelines: dict[str, Pipeline], theirs: StableDiffusion3Pipeline, t5: str, t5_length: int, cfg: float
) -> None:
    """Text, every step's velocity and latents, and picture, in float32 from the same noise, two pictures of 96 x 64."""
    how = {"steps": 28, "cfg": cfg, "t5_length": t5_length}
    ours = traced(pipelines[t5], **how, count=2, seed=5)
    expected = diffusers_trace(theirs, ours["noise"], t5, **how)
    assert expected.keys() == {name for name in ours if "tokens" not in name and name != "noise"}
    image = expected.pop("image")
    errors = {name: relative_error(ours[name], value) for name, value in expected.items()}
    assert max(errors.values()) <= 1e-4, errors
    assert levels(ours["image"], image) <= 1


def test_the_tokens_are_those_of_transformers(pipeline: Pipeline, theirs: StableDiffusion3Pipeline) -> None:
    """Ids of both texts against the tokenizers that diffusers runs."""
    trace = traced(pipeline, steps=1, t5_length=20)
    for which, text in (("cond", PROMPT), ("uncond", NEGATIVE)):
        for name, tokenizer, length in (
            ("clip_l", theirs.tokenizer, 77), ("clip_g", theirs.tokenizer_2, 77), ("t5", theirs.tokenizer_3, 20),
        ):  # fmt: skip
            ids = tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
            assert trace[f"{which}.tokens.{name}"].tolist() == [ids]


def test_bfloat16_is_no_worse_than_diffusers(models: Models) -> None:
    """Errors of the final latents against float32 with the very same weights, over four seeds; ours to theirs."""
    how = {"steps": 8, "cfg": 4.5, "t5_length": 77}
    exact = traced(load(models.rounded, dtype="fp32"), **how, count=4)
    ours = traced(load(models.rounded, dtype="bf16"), **how, count=4)
    theirs = diffusers_trace(diffusers_pipeline(models.rounded).to(torch.bfloat16), exact["noise"], "on", **how)
    assert ours["latents.7"].dtype == torch.float32
    our_error, their_error = (relative_error(run["latents.7"], exact["latents.7"]) for run in (ours, theirs))
    assert our_error <= 1.1 * their_error
    assert their_error < 0.2  # else the comparison means nothing


# ---- noise, batches, cost ------------------------------------------------------------------------


def test_a_seed_is_a_picture(pipeline: Pipeline) -> None:
    """The same seed gives the same noise and picture, and seed + i that of picture i in a batch."""
    batch, again = (traced(pipeline, seed=40, count=3) for _ in range(2))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    for i in range(3):
        single = traced(pipeline, seed=40 + i)
        assert torch.equal(single["noise"][0], batch["noise"][i])
        assert torch.equal(single["noise"][0], torch.randn(16, 8, 12, generator=torch.Generator().manual_seed(40 + i)))
        assert relative_error(batch["latents.2"][i], single["latents.2"][0]) <= 1e-5
        assert levels(batch["image"][i], single["image"][0]) <= 1
    assert levels(batch["image"][0], batch["image"][1]) > 10


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_seeds_of_64_bits(pipeline: Pipeline, seed: int) -> None:
    assert len(pipeline(PROMPT, seed=seed, steps=1)) == 1


@pytest.mark.parametrize(("cfg", "batch"), [(1, 2), (1.0, 2), (4.5, 4), (0, 4), (-1.0, 4)])
def test_guidance_is_one_evaluation_a_step(pipeline: Pipeline, cfg: float, batch: int) -> None:
    """Of twice the batch, or without guidance of the batch; counted at the transformer."""
    sizes: list[int] = []
    hook = pipeline.transformer.x_embedder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        pipeline(PROMPT, cfg=cfg, count=2, steps=5)
    finally:
        hook.remove()
    assert sizes == [batch] * 5


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("t5", ["off", "omit"])
def test_without_t5_its_files_are_not_opened(pipelines: dict[str, Pipeline], broken: Path, t5: str) -> None:
    """With garbage in their place the picture is the same, and with T5 on it is an error."""
    for file in (broken / "text_encoder_3").iterdir():
        file.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="text_encoder_3"):
        load(broken)
    for file in (broken / "tokenizer_3").iterdir():
        file.write_bytes(b"garbage")
    with pytest.raises(TokenizerError, match="tokenizer_3"):
        load(broken)
    expected = np.asarray(pipelines[t5](PROMPT)[0])
    assert np.array_equal(np.asarray(load(broken, dtype="fp32", t5=t5)(PROMPT)[0]), expected)
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(broken / name)
    assert np.array_equal(np.asarray(load(broken, dtype="fp32", t5=t5)(PROMPT)[0]), expected)
    with pytest.raises(CheckpointError, match=r"has no t5.* --t5 off or --t5 omit"):
        load(broken)


@pytest.mark.parametrize(("t5", "tokens"), [("on", 177), ("off", 177), ("omit", 77)])
def test_the_modes_of_t5(pipelines: dict[str, Pipeline], t5: str, tokens: int) -> None:
    """Its tokens, zeros of the same number, or nothing after CLIP's 77."""
    trace = traced(pipelines[t5], t5_length=100)
    assert trace["cond.context"].shape == (1, tokens, WIDTH)
    assert ("cond.tokens.t5" in trace) == (t5 == "on")
    assert bool(trace["cond.context"][:, 77:].any()) == (t5 == "on")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("t5", ["on", "off"])
def test_both_layouts_are_one_model(models: Models, t5: str, dtype: str) -> None:
    """The folder against the single file with its tokenizers beside it: every stage bit for bit."""
    folder = load(models.folder, dtype=dtype, t5=t5)
    single = load(models.single, tokenizers=str(models.tokenizers), dtype=dtype, t5=t5)
    ours, expected = traced(single, **DEFAULTS), traced(folder)
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


def test_the_shift_is_the_folders(broken: Path) -> None:
    """Its noise levels follow scheduler_config.json."""
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 1.25}))
    assert torch.equal(traced(load(broken))["sigmas"], shifted_sigmas(3, 1.25))
    path.unlink()
    assert torch.equal(traced(load(broken))["sigmas"], shifted_sigmas(3, 3.0))


@pytest.mark.parametrize("shift", ["three", None, 0, -3.0, [3.0]])
def test_a_senseless_shift_is_refused(broken: Path, shift: object) -> None:
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"shift": shift}))
    with pytest.raises(CheckpointError, match="shift"):
        load(broken)(PROMPT)
    path.write_text(json.dumps({"shift": 3.0, "use_dynamic_shifting": True}))
    with pytest.raises(CheckpointError, match="use_dynamic_shifting is not supported"):
        load(broken)


def test_defaults_come_from_the_folder_then_sd35(pipeline: Pipeline) -> None:
    """Against mmdit.json, what a call says, and the values of SD3.5-Medium."""
    names = ("width", "height", "steps", "cfg", "t5_length")
    used = pipeline.run(replace(pipeline.settings, prompt=PROMPT, steps=1)).settings
    assert {name: getattr(used, name) for name in names} == {**DEFAULTS, "steps": 1}
    assert (used.device, used.dtype) == ("cpu", "fp32")
    published = Settings().resolved({})
    assert [getattr(published, name) for name in names] == [1024, 1024, 28, 4.5, 256]
    assert pipeline(PROMPT)[0].size == (96, 64)


@pytest.mark.parametrize("defaults", [{"seed": 1}, {"steps": True}, {"width": "64"}, {"steps": 0}, {"width": None}])
def test_senseless_defaults_are_refused(broken: Path, defaults: dict) -> None:
    (broken / "mmdit.json").write_text(json.dumps(defaults))
    with pytest.raises(SettingsError, match=next(iter(defaults))):
        load(broken)


# ---- Python --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"stepz": 3}, "no setting 'stepz': did you mean steps?"),
        ({"negative_prompt": "x"}, "did you mean negative?"),
        ({"qqq": 3}, "there are prompt, negative, width"),
        ({"t5": "off"}, "t5 is fixed when the model is loaded"),
        ({"dtype": "bf16"}, "dtype is fixed"),
        ({"device": "cuda"}, "device is fixed"),
        ({"model": "other"}, "model is fixed"),
        ({"tokenizers": "other"}, "tokenizers is fixed"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"count": True}, "count is True"),
        ({"width": 100}, "width 100 is not a multiple of 16: the nearest are 96 or 112"),
        ({"height": 528}, "height 528 is more than the model's table of positions allows: 512 at most"),
        ({"t5_length": "77"}, "t5_length is"),
        ({"t5_length": 77.5}, "t5_length is"),
        ({"seed": 1.5}, "seed is"),
        ({"seed": "1"}, "seed is"),
        ({"seed": 2**64}, "seed is"),
        ({"negative": None}, "negative is"),
    ],
)
def test_python_keywords_are_refused_by_name(pipeline: Pipeline, keywords: dict, message: str) -> None:
    """In one line that says what would be right."""
    with pytest.raises(SettingsError) as caught:
        pipeline(PROMPT, **keywords)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_keywords_of_loading(models: Models) -> None:
    with pytest.raises(SettingsError, match=r"no setting 'tokenizer': did you mean tokenizers\?"):
        load(models.folder, tokenizer="x")


@pytest.mark.parametrize("cfg", [4.5, 1])
@pytest.mark.parametrize("t5", ["on", "off", "omit"])
def test_names_shapes_and_dtypes_of_a_dump(pipelines: dict[str, Pipeline], t5: str, cfg: float) -> None:
    """Exactly these tensors, for two pictures of 96 x 64 in three steps."""
    tokens = 77 if t5 == "omit" else 177
    long, single, byte = torch.int64, torch.float32, torch.uint8
    text = {
        "tokens.clip_l": ((2, 77), long), "tokens.clip_g": ((2, 77), long),
        "context": ((2, tokens, WIDTH), single), "pooled": ((2, 192), single),
    }  # fmt: skip
    text |= {"tokens.t5": ((2, 100), long)} if t5 == "on" else {}
    expected = {
        f"{which}.{name}": what for which in ("cond", "uncond")[: 1 + (cfg != 1)] for name, what in text.items()
    }
    latents = ["noise", *(f"{name}.{i}" for name in ("latents", "velocity") for i in range(3))]
    expected |= dict.fromkeys(latents, ((2, 16, 8, 12), single))
    expected |= {"sigmas": ((4,), single), "image": ((2, 64, 96, 3), byte)}
    trace = traced(pipelines[t5], count=2, cfg=cfg, t5_length=100)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in trace.items()} == expected
    assert all(tensor.is_contiguous() for tensor in trace.values())


def test_gradients_reach_latents_outside_the_pipeline(pipeline: Pipeline) -> None:
    """After a run, through frozen weights; against a finite difference."""
    pipeline(PROMPT)
    text, latent = pipeline.encode([PROMPT], 77), pipeline.noise(96, 64, [0]).requires_grad_()
    assert not any(p.requires_grad for p in pipeline.transformer.parameters())

    velocity = pipeline.velocity(text, pipeline.encode([""], 77), cfg=3.0)

    def energy(x: Tensor) -> Tensor:
        return velocity(x, torch.tensor(0.5)).square().sum()

    energy(latent).backward()
    assert latent.grad is not None
    way = latent.grad / latent.grad.norm()
    with torch.no_grad():
        slope = (energy(latent + 0.05 * way) - energy(latent - 0.05 * way)) / 0.1
    assert float(slope) == pytest.approx(float(latent.grad.norm()), rel=0.01)
    assert all(p.grad is None for p in pipeline.transformer.parameters())
