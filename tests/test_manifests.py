"""The golden lists: a file of every published manifest, all names at full size, is all that its networks have.

The files are as large as the published ones and hold no values: their tensors are holes, so that reading anything but
a header would show.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import write_gguf_holes
from gguf import GGMLQuantizationType as Type
from layouts import PARTS, Tensors, on_meta, write
from manifests import golden, manifest, manifests, shapes
from sweeps import sampled
from torch import Tensor

from mmdit.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from mmdit.driver.building import build
from text_encoders.clip import CLIP_G, CLIP_L
from text_encoders.t5 import T5_XXL
from vae.autoencoder import SD3_VAE
from weights import Checkpoint, open_checkpoint, published
from weights.inspect import inspect
from weights.published import PREFIXES

MODELS = {"sd35_medium": SD35_MEDIUM, "sd3_medium": SD3_MEDIUM, "sd35_large": SD35_LARGE}
NAMES = {"sd35_medium": "SD3.5-Medium", "sd3_medium": "SD3-Medium", "sd35_large": "SD3.5-Large"}
CONFIGS = {"vae": SD3_VAE, "clip_l": CLIP_L, "clip_g": CLIP_G, "t5": T5_XXL}
SUFFIXES = {"": 2, "_incl_clips": 4, "_incl_clips_t5xxl": 5}  # of single files: how many of PARTS they have
ALONE = {
    "clip_l.file": "clip_l",
    "clip_g.file": "clip_g",
    "vae.stability": "vae",
    "t5xxl.file_with_embed_alias_220": "t5",
    "t5xxl.hf_sharded_219": "t5",
    "diffusers.vae": "vae",
    "diffusers.text_encoder": "clip_l",
    "diffusers.text_encoder_2": "clip_g",
    "diffusers.text_encoder_3": "t5",
}
WITH_DTYPES = {
    "t5xxl.fp8_e4m3fn_scaled_389": "t5",
    "t5xxl.fp8_comfy_quant_style": "t5",
    "sd35_medium.comfy_aio_incl_clips_t5xxlfp8scaled": "all",
}
GGUF = "gguf.sd35_medium"
ALIAS = "encoder.embed_tokens.weight"

# Name maps and targets of adapters (tests/test_weights.py, tests/test_adapters_dialects.py), values, shards.
NO_FILES = ("map.", "lora_targets.", "configs", "diffusers.text_encoder_3.index")


def test_no_manifest_is_forgotten() -> None:
    listed = {name for name in manifests() if not name.startswith(NO_FILES)}
    here = {f"{model}.{kind}" for model in MODELS for kind in ("stability.mmdit", "diffusers.transformer")}
    here |= {f"{model}.single_file{suffix}" for model in MODELS for suffix in SUFFIXES}
    here |= {*ALONE, GGUF, *(f"{name}.dtypes" for name in WITH_DTYPES)}
    assert listed == here


def fits(checkpoint: Checkpoint, parts: dict[str, Any]) -> None:
    """The networks are these, each of its published configuration, no tensor missing and none left over."""
    assert checkpoint.components == tuple(parts)
    for name, config in parts.items():
        component = checkpoint.component(name)
        module = build(component)
        assert module.config == config, name
        assert {key: tuple(t.shape) for key, t in module.state_dict().items()} == component.shapes, name


def described(path: Path, model: str | None) -> dict[str, Any]:
    found = inspect(path)
    assert (found["model"], found["load"]["loads"], found["load"]["reason"]) == (model, True, None)
    return found


def left_over(keys: Any, parts: tuple[str, ...], prefixes: dict[str, str] = PREFIXES) -> set[str]:
    """Keys that are no tensor of these networks under their published names."""
    return set(keys) - {prefixes[part] + name for part in parts for name in golden()[part]}


# ---- single files --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("suffix", sampled(SUFFIXES, 3))
def test_single_files(tmp_path: Path, model: str, suffix: str) -> None:
    listed, parts = shapes(f"{model}.single_file{suffix}"), PARTS[: SUFFIXES[suffix]]
    file = write(tmp_path / "file", on_meta(listed))
    configs = {"transformer": MODELS[model], **CONFIGS}
    fits(open_checkpoint(file), {part: configs[part] for part in parts})
    assert described(file, NAMES[model])["missing"] == list(PARTS[len(parts) :])
    others = {key for key in listed if not key.startswith(PREFIXES["transformer"])}
    assert left_over(others, parts[1:]) == ({PREFIXES["t5"] + ALIAS} if "t5" in parts else set())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["stability.mmdit", "diffusers.transformer"])
def test_transformers_alone(tmp_path: Path, model: str, kind: str) -> None:
    listed = shapes(f"{model}.{kind}")
    file = write(tmp_path / "file", on_meta(listed, torch.bfloat16))
    fits(open_checkpoint(file), {"transformer": MODELS[model]})
    assert described(file, NAMES[model])["tensors"] == len(listed)


def with_dtypes(name: str) -> Tensors:
    """The tensors of a manifest that names dtypes; its notes of a format have their content."""
    words = {"F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
    note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)

    def tensor(entry: dict[str, Any]) -> Tensor:
        return (
            note if entry["dtype"] == "U8" else torch.empty(entry["shape"], dtype=words[entry["dtype"]], device="meta")
        )

    return {key: tensor(entry) for key, entry in manifest(f"{name}.dtypes").items()}


def test_comfyui_all_in_one(tmp_path: Path) -> None:
    tensors = with_dtypes("sd35_medium.comfy_aio_incl_clips_t5xxlfp8scaled")
    file = write(tmp_path / "file", tensors)
    fits(open_checkpoint(file), {"transformer": SD35_MEDIUM, **CONFIGS})
    assert described(file, "SD3.5-Medium")["quantisation"] == ["float8_e4m3fn, scaled, the older style (scale_weight)"]
    others = {key for key in left_over(tensors, PARTS) if not key.endswith(".scale_weight")}
    assert others == {
        "text_encoders.clip_l.transformer.text_projection.weight",
        "text_encoders.t5xxl.transformer.scaled_fp8",
        *(f"text_encoders.{part}.logit_scale" for part in ("clip_l", "clip_g", "t5xxl")),
    }


# ---- separate files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled([*ALONE, *(name for name, part in WITH_DTYPES.items() if part == "t5")], 3))
def test_parts_alone(tmp_path: Path, name: str) -> None:
    part = ALONE.get(name, "t5")
    tensors = with_dtypes(name) if name in WITH_DTYPES else on_meta(shapes(name))
    file = write(tmp_path / "file", tensors)
    base = write(tmp_path / "base", on_meta(golden()["transformer"]))
    fits(open_checkpoint(base, {part: file}), {"transformer": SD35_MEDIUM, part: CONFIGS[part]})
    found = described(file, None)
    assert [entry["name"] for entry in found["components"]] == [part]
    if name == "diffusers.vae":
        return  # of diffusers' names, which tests/test_weights.py maps
    others = left_over(tensors, (part,), {part: ""})
    leaves = {key.rpartition(".")[2] for key in others if key not in (ALIAS, "text_projection.weight")}
    assert leaves <= {"scale_weight", "scaled_fp8", "weight_scale", "comfy_quant"}


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_folders(tmp_path: Path, model: str) -> None:
    """With the published config.json of every part, T5 in its two shards."""
    configs, index = manifest("configs"), manifest("diffusers.text_encoder_3.index")
    transformer = configs[f"transformer/config.json@{NAMES[model].lower()}"]
    for part, folder in published.FOLDERS.items():
        (tmp_path / folder).mkdir()
        config = transformer if part == "transformer" else configs[f"{folder}/config.json"]
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        name = f"{model}.diffusers.transformer" if part == "transformer" else f"diffusers.{folder}"
        tensors, stem = on_meta(shapes(name)), published.STEMS[part]
        if part == "t5":
            for shard in set(index["weight_map"].values()):
                own = {key: t for key, t in tensors.items() if index["weight_map"][key] == shard}
                write(tmp_path / folder / shard, own)
            (tmp_path / folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        else:
            write(tmp_path / folder / f"{stem}.safetensors", tensors)
    (tmp_path / "model_index.json").write_text(json.dumps(configs["model_index.json"]))
    checkpoint = open_checkpoint(tmp_path)
    clip_l = replace(CLIP_L, projection_dim=768)
    fits(checkpoint, {"transformer": MODELS[model], **CONFIGS, "clip_l": clip_l})
    assert described(tmp_path, NAMES[model])["missing"] == []


# ---- GGUF ----------------------------------------------------------------------------------------

FILES = [
    "F16",
    "Q3_K_M",
    "Q3_K_S",
    "Q4_0",
    "Q4_1",
    "Q4_K_M",
    "Q4_K_S",
    "Q5_0",
    "Q5_1",
    "Q5_K_M",
    "Q5_K_S",
    "Q6_K",
    "Q8_0",
]


@pytest.mark.parametrize("name", sampled(FILES, 3))
def test_gguf(tmp_path: Path, name: str) -> None:
    """Every published file: which of the 665 tensors are of which type."""
    listed = manifest(GGUF)
    assert set(listed["types_per_file"]) == set(FILES)
    words = listed["types_per_file"][name]

    def kind(key: str) -> Type:
        if key not in listed["quantised_tensors"]:
            return Type[words["everything_else_402"]]
        return Type[words["attn.qkv.weight_48" if key in listed["bumped_in_K_M"] else "other_2d_joint_block_weights"]]

    stored = {key: (shape, kind(key)) for key, shape in shapes("sd35_medium.stability.mmdit").items()}
    file = write_gguf_holes(tmp_path / "file", stored)
    fits(open_checkpoint(file), {"transformer": SD35_MEDIUM})
    found = described(file, "SD3.5-Medium")
    assert set(found["dtypes"]) == set(words.values())
    assert {word: it["tensors"] for word, it in found["dtypes"].items()}.get("F16") == (665 if name == "F16" else 402)
