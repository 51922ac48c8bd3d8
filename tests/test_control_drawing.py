"""ControlNets in a drawing: live against diffusers' pipelines, under every plan, in batches, and what is refused."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as huggingface
from controls import MEDIUM35, TRANSFORMERS, control_folder, control_for, nets, stability_tensors
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from layouts import write
from PIL import Image
from reference import relative_error, transformer_json, transformers
from safetensors.torch import save_file
from sweeps import sampled
from torch import Tensor
from toys import Ran, toy_folder

from mmdit.control.network import ControlConfig
from mmdit.driver.pipeline import Pipeline
from mmdit.memory.plan import Job
from mmdit.memory.residency import Mode
from mmdit.run import main
from weights.keymap import TRANSFORMER, revert, to_diffusers
from weights.published import write_json

PROMPT, NEGATIVE = "a horse and a bear", "a small pig"
SIZE = {"width": 96, "height": 64}
DRAWN = {**SIZE, "steps": 4, "cfg": 4.5, "t5_length": 20}

NETS = {
    "sd3": control_for(MEDIUM35, depth=2),
    "other": control_for(MEDIUM35, depth=2, dual_attention_blocks=()),
    "sd3.5": control_for(MEDIUM35, depth=3, pooled_zeros=False),
    "inpainting": control_for(MEDIUM35, depth=2, extra_channels=1),
    "large": control_for(MEDIUM35, depth=2, context_size=0, pos_embed_max_size=0, qk_norm=False,
                         dual_attention_blocks=(), pooled_zeros=False),
}  # fmt: skip


class Place(NamedTuple):
    """A model, ControlNets for it, pictures and a mask."""

    model: Path
    nets: Path
    pictures: Path

    def net(self, name: str) -> str:
        return str(self.nets / name)

    def picture(self, name: str) -> str:
        return str(self.pictures / f"{name}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Not to be written to."""
    root = tmp_path_factory.mktemp("controls")
    found = Place(toy_folder(root, clips=True), root / "nets", root / "pictures")
    ours = transformers(MEDIUM35).ours.state_dict()
    entries = to_diffusers(ours, TRANSFORMER)
    folder = found.model / "transformer"
    tensors = {name: revert(entry, ours[entry.sources[0]]).contiguous() for name, entry in entries.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    write_json(folder / "config.json", {"_class_name": "SD3Transformer2DModel", **transformer_json(MEDIUM35)})
    for name, config in NETS.items():
        control_folder(found.nets / name, nets(config)[0])
    for number, name in enumerate(("blur", "canny", "depth")):
        write(found.nets / f"{name}.safetensors", stability_tensors(nets(NETS["large"])[0], number))
    found.pictures.mkdir()
    for i, name in enumerate(("one", "two")):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(found.picture(name))
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[8:40, 16:56] = 255
    Image.fromarray(mask).save(found.picture("mask"))
    return found


@pytest.fixture(scope="module")
def theirs(place: Place) -> Iterator[StableDiffusion3Pipeline]:
    """Without T5."""
    before = huggingface.logging.get_verbosity()
    huggingface.logging.set_verbosity_error()
    yield StableDiffusion3Pipeline.from_pretrained(place.model, text_encoder_3=None, tokenizer_3=None).to(torch.float32)
    huggingface.logging.set_verbosity(before)


def load(place: Place, *names: str) -> Pipeline:
    """The model with these ControlNets, anew."""
    control = [place.net(name) for name in names]
    return Pipeline.load(place.model, control=control, dtype="fp32", device="cpu", t5="off")


loaded = cache(load)  # for tests that change nothing of it


def latents(pipeline: Pipeline, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The last latents of one picture, and all that a run dumps."""
    trace: dict[str, Tensor] = {}
    settings = replace(pipeline.settings, **{"prompt": PROMPT, "negative": NEGATIVE, "seed": 3, **DRAWN, **keywords})
    pipeline.run(settings, trace)
    return trace[f"latents.{DRAWN['steps'] - 1}"], trace


@torch.no_grad()
def diffusers_latents(
    theirs: StableDiffusion3Pipeline, trace: dict[str, Tensor], configs: Sequence[ControlConfig], **more: Any
) -> Tensor:
    """Those of its pipeline, from the same noise and the same encoded texts, by the mean of encoded pictures."""
    sample = DiagonalGaussianDistribution.sample
    DiagonalGaussianDistribution.sample = DiagonalGaussianDistribution.mode
    kind: Any = StableDiffusion3ControlNetPipeline
    if "control_mask" in more:
        kind = StableDiffusion3ControlNetInpaintingPipeline
    own: list[SD3ControlNetModel] = [nets(config)[1] for config in configs]
    shared = own[0].pos_embed  # the pipeline puts one there where the net has none
    try:
        pipe = kind(**{name: part for name, part in theirs.components.items() if name != "image_encoder"},
                    controlnet=own if len(own) > 1 else own[0])  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt_embeds=trace["cond.context"], negative_prompt_embeds=trace["uncond.context"],
            pooled_prompt_embeds=trace["cond.pooled"], negative_pooled_prompt_embeds=trace["uncond.pooled"],
            latents=trace["noise"], num_inference_steps=DRAWN["steps"], guidance_scale=DRAWN["cfg"], **SIZE,
            output_type="latent", **more,
        ).images  # fmt: skip
    finally:
        DiagonalGaussianDistribution.sample = sample
        own[0].pos_embed = shared


def opened(place: Place, name: str) -> Image.Image:
    return Image.open(place.picture(name))


# ---- live ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale", "low", "high"),
    sampled([("sd3", 0.6, 0.0, 1.0), ("sd3.5", 0.8, 0.0, 0.5), ("sd3", 1.0, 0.2, 0.75), ("large", 0.5, 0.3, 1.0)], 2),
)
def test_one_net_is_as_in_diffusers(
    place: Place, theirs: StableDiffusion3Pipeline, name: str, scale: float, low: float, high: float
) -> None:
    pipeline = loaded(place, name)
    keywords = {"control_image": (place.picture("one"),), "control_map": "diffusers"}
    found, trace = latents(pipeline, control_scale=scale, control_interval=(f"{low}:{high}",), **keywords)
    expected = diffusers_latents(
        theirs, trace, [NETS[name]], control_image=opened(place, "one"), controlnet_conditioning_scale=scale,
        control_guidance_start=low, control_guidance_end=high,
    )  # fmt: skip
    assert relative_error(found, expected) <= 1e-4
    assert relative_error(latents(pipeline, control_scale=(0,), **keywords)[0], found) > 0.01


def test_several_nets_add_up(place: Place, theirs: StableDiffusion3Pipeline) -> None:
    names, pictures, scales, ends = ("sd3", "other"), ("one", "two"), (0.4, 0.7), (1.0, 0.6)
    found, trace = latents(
        load(place, *names), control_image=tuple(map(place.picture, pictures)), control_scale=scales,
        control_interval=tuple(f"0:{end}" for end in ends),
    )  # fmt: skip
    expected = diffusers_latents(
        theirs, trace, [NETS[name] for name in names], control_image=[opened(place, name) for name in pictures],
        controlnet_conditioning_scale=list(scales), control_guidance_start=[0.0, 0.0],
        control_guidance_end=list(ends),
    )  # fmt: skip
    assert relative_error(found, expected) <= 1e-4


def test_filling_in_is_as_in_diffusers(place: Place, theirs: StableDiffusion3Pipeline) -> None:
    pipeline = load(place, "inpainting")
    one, mask = place.picture("one"), place.picture("mask")
    found, trace = latents(pipeline, control_image=(one,), control_mask=mask)
    expected = diffusers_latents(
        theirs, trace, [NETS["inpainting"]], control_image=opened(place, "one"), control_mask=opened(place, "mask")
    )
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("told", ["file", "option"])
def test_canny_edges_of_stability_have_numbers_of_their_own(
    place: Place, theirs: StableDiffusion3Pipeline, told: str
) -> None:
    """By a tensor, as on diffusers' page of the net: a picture from 0 to 1, times 255 / 2, plus 1 / 2."""
    pipeline = loaded(place, "canny.safetensors" if told == "file" else "large")
    more = {} if told == "file" else {"control_type": ("canny",)}
    found, trace = latents(pipeline, control_image=(place.picture("one"),), control_map="diffusers", **more)
    pixels = torch.from_numpy(np.array(opened(place, "one"))).permute(2, 0, 1)[None].float() / 255
    expected = diffusers_latents(theirs, trace, [NETS["large"]], control_image=pixels * 255 * 0.5 + 0.5)
    assert relative_error(found, expected) <= 1e-4
    for other in ("depth.safetensors", "large"):
        plain = latents(loaded(place, other), control_image=(place.picture("one"),), control_map="diffusers")[0]
        assert relative_error(plain, found) > 1e-3


def test_stability_nets_have_their_own_map(place: Place) -> None:
    pipeline, keywords = loaded(place, "large"), {"control_image": (place.picture("one"),)}
    own, told, other = (latents(pipeline, control_map=way, **keywords)[0] for way in ("auto", "stability", "diffusers"))
    assert torch.equal(own, told)
    assert relative_error(own, other) > 1e-3


# ---- plans and batches ---------------------------------------------------------------------------


def test_every_plan_draws_the_same(place: Place) -> None:
    pipeline = load(place, "sd3", "large")
    keywords = {"control_image": (place.picture("one"), place.picture("two")), "control_interval": ("0:0.5", "0:1")}
    expected, networks = latents(pipeline, **keywords)[0], pipeline.residency.networks
    assert [*networks][-2:] == ["control", "control 2"]
    for way in (Mode.STAGED, Mode.STREAMED):
        modes = {
            **dict.fromkeys(networks, Mode.STAGED),
            **dict.fromkeys(("transformer", *pipeline.parts.controls), way),
        }
        for kept in (0, 1) if way is Mode.STREAMED else (0,):
            pipeline.plan_for = lambda _, m=modes, k=kept: replace(pipeline.plan, modes=m, kept=k)
            assert relative_error(latents(pipeline, **keywords)[0], expected) <= 1e-6
            assert all(t.is_meta for name in modes for t in networks[name].module.state_dict().values())


def test_pictures_drawn_together_have_pictures_of_their_own(place: Place) -> None:
    """Prompts and control pictures differ; each is as it is alone, and all of them go through one batch."""
    pipeline = loaded(place, "sd3")
    pairs = [("a horse", "one"), ("a bear", "two"), ("a pig", "one")]
    wanted = [
        {"prompt": prompt, "control_image": [place.picture(name)], "seed": i, **DRAWN, "cfg": 1}
        for i, (prompt, name) in enumerate(pairs)
    ]
    batches: list[int] = []
    handle = pipeline.parts.networks["control"].module.register_forward_pre_hook(
        lambda _, given: batches.append(len(given[0]))
    )
    together = {settings.prompt: np.asarray(image).astype(int) for settings, image in pipeline.draw_many(wanted)}
    handle.remove()
    assert batches == [3] * DRAWN["steps"]
    for one in wanted:
        alone = np.asarray(pipeline(**one)[0]).astype(int)
        assert np.abs(alone - together[one["prompt"]]).max() <= 1
    images = [
        np.asarray(pipeline(**{**wanted[0], "control_image": i})[0])
        for i in (opened(place, "one"), opened(place, "two"))
    ]
    assert np.abs(images[0].astype(int) - together["a horse"]).max() <= 1
    assert (images[0] != images[1]).any()


def test_a_plan_counts_the_nets(place: Place) -> None:
    plain, controlled = loaded(place), load(place, "sd3", "large")
    job = Job(48, 64, 1, 4, 2, 20, context=97)
    for name in ("control", "control 2"):
        costs = controlled.planner.costs
        exact = costs.activations.denoising(name, job, 1)
        tokens = 2 * 24 * 32 * 128 * 4  # of both texts, in float32
        assert 2 * tokens < exact <= costs.activations.denoising_bound(name, job, 1)
        assert 0 < costs.activations.table(name, job, 1) <= costs.activations.table_bound(name, job, 1)
    modes = dict.fromkeys(plain.residency.networks, Mode.STAGED)
    more = {**modes, "control": Mode.STAGED, "control 2": Mode.STAGED}
    peaks = [p.planner.predict(m, job, 1, 10**12).peaks["denoise"] for p, m in ((plain, modes), (controlled, more))]
    assert peaks[1] - peaks[0] > 4 * tokens


# ---- what is told and refused --------------------------------------------------------------------


def test_a_picture_says_what_it_was_controlled_by(place: Place) -> None:
    """And is another where the control's picture or the net is; not where the same lie elsewhere."""
    pipeline = loaded(place, "sd3")
    asked = [pipeline.check(replace(pipeline.settings, prompt=PROMPT, control_image=(place.picture(name),), **SIZE))
             for name in ("one", "two")]  # fmt: skip
    assert asked[0].control_pictures != asked[1].control_pictures
    given = pipeline.check(replace(pipeline.settings, prompt=PROMPT, control_image=(opened(place, "one"),), **SIZE))
    assert given.control_image[0].startswith("picture-")
    assert pipeline.parts.fingerprint not in (loaded(place, "sd3.5").parts.fingerprint, loaded(place).parts.fingerprint)


def test_other_pictures_than_it_was_controlled_by_are_told(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture repeated after the one that controls it was replaced; not where another is given, or none was."""
    moved, first = tmp_path / "edges.png", tmp_path / "first.png"
    copy(place.picture("one"), moved)
    base = [PROMPT, "--model", str(place.model), "--t5", "off", "--width", "96", "--height", "64", "--steps", "1"]
    assert main([*base, "--control", place.net("sd3"), "--control-image", str(moved), "--out", str(first)]) == 0
    again = ["--from-png", str(first), "--out", str(tmp_path / "out")]
    for picture, more, told in (("one", [], False), ("two", [], True), ("two", ["--control-image", str(moved)], False)):
        copy(place.picture(picture), moved)
        capsys.readouterr()
        assert main([*again, *more]) == 0
        assert ("was controlled by other pictures" in capsys.readouterr().err) == told


OTHERS = {
    "wide": control_for(MEDIUM35, hidden_size=192, num_heads=3),
    "plain": control_for(TRANSFORMERS["sd3"]),
    "deep": control_for(MEDIUM35, depth=5),
    "layers": control_for(MEDIUM35, extra_channels=2),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--control sd3", "control without control_image"),
        ("--control sd3 --control-image one --control-image two", "control_image is there 2 times for 1"),
        ("--control-image one", "control_image is there 1 times for 0 of control"),
        ("--control sd3 --control-image nothing", "control_image: "),
        (
            "--control sd3 --control-image one --control-scale much",
            "--control-scale: invalid float value",
        ),
        ("--control sd3 --control-image one --control-scale nan", "control_scale is nan: expected a number"),
        ("--control sd3 --control-image one --control-interval 0.5", "control_interval is '0.5': expected LOW:HIGH"),
        ("--control sd3 --control-image one --control-interval 0.5:0.5", "control_interval is '0.5:0.5'"),
        ("--control sd3 --control-image one --control-interval 0:1.5", "control_interval is '0:1.5'"),
        ("--control sd3 --control-image one --control-type tile", "control_type is 'tile': expected one of"),
        ("--control sd3 --control-image one --control-mask mask", "control_mask: none of the ControlNets"),
        (
            "--control sd3 --control-image one --control-type canny",
            "control_type: none of the ControlNets is of a type",
        ),
        ("--control inpainting --control-image one", "control_mask is missing"),
        ("--control-mask mask", "control_mask is"),
        ("--control wide --control-image one", "a ControlNet for another model: tokens of 192, expected 128"),
        ("--control plain --control-image one", "no norm of queries and keys, unlike the model"),
        ("--control deep --control-image one", "5 blocks, expected at most 4"),
        ("--control layers --control-image one", "2 channels beside a latent's"),
        ("--control none --control-image one", "no such file"),
    ],
)
def test_one_line_and_exit_code_2(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    words = options.split()
    for k, (option, value) in enumerate(zip(words[::2], words[1::2])):
        if option == "--control":
            own = value in OTHERS
            words[2 * k + 1] = (
                str(control_folder(tmp_path / "net", nets(OTHERS[value])[0])) if own else place.net(value)
            )
        elif option in ("--control-image", "--control-mask"):
            words[2 * k + 1] = place.picture(value)
    size = ["--width", "96", "--height", "64"]
    try:
        code = main([PROMPT, "--model", str(place.model), "--t5", "off", "--out", str(tmp_path / "out"), *size, *words])
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    ran = Ran(code, said.out.splitlines(), said.err.splitlines())
    assert (ran.code, ran.lines, len(ran.errors)) == (2, [], 1), ran
    assert message in ran.errors[0]
    assert not (tmp_path / "out").exists()
