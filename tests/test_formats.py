"""Single files: whichever parts they hold, under whichever names, the tensors are the same, the file recognised."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from layout_rows import both_embeddings
from layouts import PARTS, Tensors, check_tensors, joined, small, small_tensors, toy_parts, write
from manifests import golden, manifest, meta, shapes
from safetensors.torch import load_file
from sweeps import sampled

from mmdit.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiTConfig
from mmdit.driver.defaults import default_settings
from mmdit.model import MMDiT
from weights import CheckpointError, open_checkpoint, published
from weights.kinds import networks
from weights.published import PREFIXES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy") / "folder"


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[str, Tensors]:
    """The toy's tensors, native names. Not to be written to."""
    return toy_parts(folder)


# ---- the same tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "", "diffusion_model.", "model.", "transformer."])
def test_a_transformer_alone(parts: dict[str, Tensors], tmp_path: Path, prefix: str) -> None:
    """Under any prefix; and what is missing is said with the parts that are there."""
    tensors = {prefix + name: tensor for name, tensor in parts["transformer"].items()}
    checkpoint = open_checkpoint(write(tmp_path / "any name", tensors))
    assert checkpoint.components == ("transformer",)
    check_tensors(checkpoint.component("transformer"), parts["transformer"])
    with pytest.raises(CheckpointError, match=r"has no vae \(has transformer\)"):
        checkpoint.component("vae")


def test_a_transformer_of_diffusers_names_alone(parts: dict[str, Tensors], folder: Path, tmp_path: Path) -> None:
    """The file out of a diffusers folder, as it is and behind a prefix."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    check_tensors(open_checkpoint(file).component("transformer"), parts["transformer"])
    tensors = {"transformer." + name: tensor for name, tensor in load_file(file).items()}
    behind = open_checkpoint(write(tmp_path / "file", tensors))
    check_tensors(behind.component("transformer"), parts["transformer"])


@pytest.mark.parametrize("count", range(len(PARTS)))
def test_a_transformer_with_other_parts(parts: dict[str, Tensors], tmp_path: Path, count: int) -> None:
    """Every choice of `count` other parts."""
    for others in itertools.combinations(PARTS[1:], count):
        there = ("transformer", *others)
        file = write(tmp_path / "file", joined({part: parts[part] for part in there}))
        checkpoint = open_checkpoint(file)
        assert checkpoint.components == there
        for part in there:
            check_tensors(checkpoint.component(part), parts[part])


def test_a_position_table_without_its_leading_one(parts: dict[str, Tensors], tmp_path: Path) -> None:
    tensors = {**parts["transformer"], "pos_embed": parts["transformer"]["pos_embed"][0]}
    file = write(tmp_path / "file", tensors)
    check_tensors(open_checkpoint(file).component("transformer"), parts["transformer"])


def test_half_precision_is_kept_as_it_is(parts: dict[str, Tensors], tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        tensors = {name: tensor.to(dtype) for name, tensor in parts["transformer"].items()}
        component = open_checkpoint(write(tmp_path / "file", tensors)).component("transformer")
        assert set(component.dtypes.values()) == {dtype}
        check_tensors(component, tensors)


def test_diffusers_single_file_loader_reads_the_same(folder: Path, parts: dict[str, Tensors], tmp_path: Path) -> None:
    """Every network out of our single file, against the folder's own."""
    from diffusers import StableDiffusion3Pipeline

    # The embedding twice, as published.
    file = write(tmp_path / "file.safetensors", joined({**parts, "t5": both_embeddings(parts["t5"])}))
    none = {"tokenizer": None, "tokenizer_2": None, "tokenizer_3": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusion3Pipeline.from_single_file(str(file), config=str(folder), local_files_only=True, **none)
    for part, place in published.FOLDERS.items():
        stored = load_file(folder / place / f"{published.STEMS[part]}.safetensors")
        state = getattr(theirs, place).state_dict()
        assert set(state) - {"encoder.embed_tokens.weight"} == set(stored)
        assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


# ---- published names -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sd35_medium", "sd3_medium", "sd35_large"])
@pytest.mark.parametrize("suffix", sampled(["", "_incl_clips", "_incl_clips_t5xxl"], 3))
def test_published_single_files(tmp_path: Path, model: str, suffix: str) -> None:
    """All names of the published file, nothing ignored, nothing left over."""
    tensors = small_tensors(shapes(f"{model}.single_file{suffix}"))
    checkpoint = open_checkpoint(write(tmp_path / "file", tensors))
    assert checkpoint.components == PARTS[: {"": 2, "_incl_clips": 4, "_incl_clips_t5xxl": 5}[suffix]]
    expected = {**golden(), "transformer": shapes(f"{model}.stability.mmdit")}
    for part in checkpoint.components:
        component = checkpoint.component(part)
        assert component.shapes == {name: small(shape) for name, shape in expected[part].items()}
        assert all(torch.equal(component.read(name), tensors[PREFIXES[part] + name]) for name in component.shapes)


def test_comfyui_all_in_one(tmp_path: Path) -> None:
    """2014 tensors: T5 in scaled fp8, an identity projection and logit scales that no network reads."""
    words = {"F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    listed = manifest("sd35_medium.comfy_aio_incl_clips_t5xxlfp8scaled.dtypes")
    tensors = small_tensors({name: tuple(it["shape"]) for name, it in listed.items()})
    tensors = {name: tensor.to(words[listed[name]["dtype"]]) for name, tensor in tensors.items()}
    assert len(tensors) == 2014
    checkpoint = open_checkpoint(write(tmp_path / "file", tensors))
    assert checkpoint.components == PARTS
    for part, names in golden().items():
        component = checkpoint.component(part)
        assert component.shapes == {name: small(shape) for name, shape in names.items()}
        for name in names:
            key = PREFIXES[part] + name
            scale = tensors.get(key.removesuffix("weight") + "scale_weight", torch.ones(()))
            assert torch.equal(component.read(name).float(), tensors[key].float() * scale), key


@pytest.mark.parametrize(
    ("config", "steps", "cfg"),
    [(SD3_MEDIUM, 28, 7.0), (SD35_MEDIUM, 28, 4.5), (SD35_LARGE, 40, 4.5)],
    ids=["sd3", "medium", "large"],
)
def test_models_are_told_from_shapes(config: MMDiTConfig, steps: int, cfg: float) -> None:
    """The whole architecture, and with it the settings that the model is best run with."""
    module = meta(MMDiT, config)
    found = MMDiTConfig.from_shapes({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    assert found == config
    expected = {"width": 1024, "height": 1024, "steps": steps, "cfg": cfg, "t5_length": 256}
    assert default_settings(found) == expected


# ---- recognition ---------------------------------------------------------------------------------

OTHERS = {
    "double_blocks.0.img_attn.qkv.weight": "a FLUX model; this engine runs Stable Diffusion 3",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a FLUX model",
    "single_transformer_blocks.0.attn.to_q.weight": "a FLUX model",
    "model.diffusion_model.input_blocks.0.0.weight": "an SD1, SD2 or SDXL model",
    "add_embedding.linear_1.weight": "an SD1, SD2 or SDXL model",
    "mid_block.attentions.0.transformer_blocks.0.norm1.weight": "an SD1, SD2 or SDXL model",
    "controlnet_blocks.0.weight": "a ControlNet",
    "transformer.x.lora_A.weight": "an adapter (LoRA)",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": "an adapter (LoRA)",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lokr_w1": "an adapter (LoRA)",
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": "a T5 1.0; Stable Diffusion 3 reads T5 1.1 XXL",
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": "a UMT5",
    "decoder.mid.block_1.conv1.weight": "a VAE alone; give a file or folder with the transformer",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder alone",
    "who.knows": "no model that is known (its first tensor is who.knows)",
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_is_no_model_is_named(tmp_path: Path, key: str) -> None:
    """Also where it has a Stable Diffusion 3 transformer's mark: other models share names with it."""
    file = write(tmp_path / "file", {key: torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(file)
    assert str(caught.value).startswith(f"{file}: {OTHERS[key]}")
    if "alone" not in OTHERS[key] and "no model" not in OTHERS[key]:
        marked = {key: torch.zeros(1), "transformer_blocks.0.attn.add_q_proj.weight": torch.zeros(1)}
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(write(file, marked))
        assert OTHERS[key] in str(caught.value)
    with pytest.raises(CheckpointError, match="empty"):
        open_checkpoint(write(file, {}))


def test_every_published_part_is_told_by_its_names() -> None:
    """Each alone, without a prefix, and the two CLIPs by their depth."""
    for part, names in golden().items():
        assert {name: network.prefix for name, network in networks(names).items()} == {part: ""}
    clip_h = {name.replace(".layers.31.", ".layers.0."): 0 for name in golden()["clip_g"]}
    clip_h = {name: 0 for name in clip_h if not any(f".layers.{i}." in name for i in range(24, 31))}
    assert set(networks(clip_h)) == {"clip_h"}


def test_the_picture_half_of_a_clip_is_no_text_encoder(tmp_path: Path, parts: dict[str, Tensors]) -> None:
    """A whole CLIP-L holds both; its text half is taken."""
    vision = {name.replace("text_model.", "vision_model."): tensor for name, tensor in parts["clip_l"].items()}
    assert networks(vision) == {}
    whole = {**parts["clip_l"], **vision, "visual_projection.weight": torch.zeros(2, 2), "logit_scale": torch.ones(())}
    transformer = write(tmp_path / "transformer", parts["transformer"])
    checkpoint = open_checkpoint(transformer, {"clip_l": write(tmp_path / "whole", whole)})
    check_tensors(checkpoint.component("clip_l"), parts["clip_l"])
