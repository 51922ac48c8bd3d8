"""diffusers folders: shards, variants, parts left out, and parts that other files bring."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from layout_rows import shard
from layouts import PARTS, Tensors, check_tensors, toy_parts, write
from safetensors.torch import load_file

from weights import CheckpointError, open_checkpoint

FOLDERS = {"transformer": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2",
           "t5": "text_encoder_3"}  # fmt: skip
STEMS = {part: "model" if folder.startswith("text") else "diffusion_pytorch_model" for part, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensors]]:
    """The toy's folder and tensors. Not to be written to."""
    root = tmp_path_factory.mktemp("toy") / "folder"
    parts = toy_parts(root)
    parts["clip_l"]["text_projection.weight"] = torch.eye(64)
    return root, parts


@pytest.fixture
def folder(toy: tuple[Path, dict[str, Tensors]], tmp_path: Path) -> Path:
    """A copy of the folder to write to."""
    return Path(shutil.copytree(toy[0], tmp_path / "folder"))


@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16"])
@pytest.mark.parametrize("spelling", ["whole", "{0}.safetensors.index{1}.json", "{0}{1}.safetensors.index.json"])
def test_variants_and_shards(toy: tuple[Path, dict[str, Tensors]], folder: Path, variant: str, spelling: str) -> None:
    """Every component, in one file and in three, under both spellings of an index with a variant."""
    for part in PARTS:
        place, stem = folder / FOLDERS[part], STEMS[part]
        if spelling == "whole":
            (place / f"{stem}.safetensors").rename(place / f"{stem}{variant}.safetensors")
        else:
            tensors = load_file(place / f"{stem}.safetensors")
            (place / f"{stem}.safetensors").unlink()
            shard(place, stem, variant, spelling, tensors)
    checkpoint = open_checkpoint(folder)
    for part in PARTS:
        check_tensors(checkpoint.component(part), toy[1][part])


def test_the_plain_file_comes_first(toy: tuple[Path, dict[str, Tensors]], folder: Path) -> None:
    """Published folders hold an fp16 variant beside it."""
    place = folder / "text_encoder_2"
    (place / "model.fp16.safetensors").write_bytes(b"not opened")
    (place / "model.safetensors.index.fp16.json").write_text("not read")
    check_tensors(open_checkpoint(folder).component("clip_g"), toy[1]["clip_g"])


@pytest.mark.parametrize("part", PARTS[1:])
@pytest.mark.parametrize("how", ["null", "absent"])
def test_a_separate_file_for_what_a_folder_lacks(
    toy: tuple[Path, dict[str, Tensors]], folder: Path, part: str, how: str
) -> None:
    """Left out by [null, null] or by its folder's absence; a file brings it, under its own layout."""
    source = folder.parent / "part"
    shutil.move(folder / FOLDERS[part] / f"{STEMS[part]}.safetensors", source)
    index = folder / "model_index.json"
    if how == "null":
        index.write_text(json.dumps(json.loads(index.read_text()) | {FOLDERS[part]: [None, None]}))
    else:
        shutil.rmtree(folder / FOLDERS[part])
    assert not open_checkpoint(folder).has(part)
    checkpoint = open_checkpoint(folder, {part: source})
    assert checkpoint.components == PARTS
    expected = {name: t for name, t in toy[1][part].items() if (part, name) != ("clip_l", "text_projection.weight")}
    check_tensors(checkpoint.component(part), expected)


def test_a_folder_in_scaled_fp8(toy: tuple[Path, dict[str, Tensors]], folder: Path) -> None:
    """q, k and v of diffusers have a scale each, and are one tensor here."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    for i, name in enumerate(sorted(name for name in stored if ".to_" in name and name.endswith("weight"))):
        scale = torch.tensor(0.5 + i)
        stored[name] = (stored[name] / scale).to(torch.float8_e4m3fn)
        stored[name + "_scale"] = scale
    write(file, stored)
    component = open_checkpoint(folder).component("transformer")
    parts = [f"transformer_blocks.1.attn.to_{letter}.weight" for letter in "qkv"]
    expected = torch.cat([stored[name].float() * stored[name + "_scale"] for name in parts])
    assert torch.equal(component.read("joint_blocks.1.x_block.attn.qkv.weight"), expected)
    assert set(component.shapes) == set(toy[1]["transformer"])


def test_what_bitsandbytes_wrote_is_refused(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    write(file, {**load_file(file), "transformer_blocks.0.attn.to_q.weight.absmax": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"absmax: weights quantised in a way that is not known: use an fp16"):
        open_checkpoint(folder).component("transformer")
