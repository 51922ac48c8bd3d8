"""Parts from separate files: every layout of each, what overrides what, and the wrong kind refused for what it is."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from forms import open_clip
from layout_rows import old_vae
from layouts import PARTS, Tensors, check_tensors, joined, small_tensors, toy_parts, write
from manifests import golden, shapes
from safetensors.torch import load_file

from benchmarks.emoji.tokenizers import write_tokenizers
from benchmarks.random_checkpoint import write_checkpoint
from mmdit import Pipeline
from mmdit.common.errors import SettingsError
from mmdit.run import main
from weights import CheckpointError, open_checkpoint

OPTIONS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl", "vae": "vae"}


class Toy(NamedTuple):
    folder: Path
    files: dict[str, Path]  # each part alone
    parts: dict[str, Tensors]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy's parts, each in a file whose name tells nothing. Not to be written to."""
    root = tmp_path_factory.mktemp("toy")
    parts = toy_parts(root / "folder")
    return Toy(root / "folder", {part: write(root / f"{i}.bin", parts[part]) for i, part in enumerate(PARTS)}, parts)


def part_of(toy: Toy, part: str, file: Path) -> Tensors:
    """The part's tensors where this file is given for it."""
    component = open_checkpoint(toy.files["transformer"], {part: file}).component(part)
    return {name: component.read(name) for name in component.shapes}


# ---- layouts -------------------------------------------------------------------------------------


def test_separate_files_give_the_tensors_of_the_whole(toy: Toy) -> None:
    checkpoint = open_checkpoint(toy.files["transformer"], {part: toy.files[part] for part in PARTS[1:]})
    assert checkpoint.components == PARTS
    for part in PARTS:
        check_tensors(checkpoint.component(part), toy.parts[part])
        assert checkpoint.config(part) is None


def test_a_separate_file_overrides_and_may_hold_more(toy: Toy, tmp_path: Path) -> None:
    """Every part of a folder exchanged for that of an all-in-one file with other values."""
    other = {part: {name: -tensor for name, tensor in tensors.items()} for part, tensors in toy.parts.items()}
    file = write(tmp_path / "all", joined(other))
    for part in PARTS[1:]:
        checkpoint = open_checkpoint(toy.folder, {part: file})
        check_tensors(checkpoint.component(part), other[part])
        assert checkpoint.config(part) is None
        rest = next(name for name in PARTS if name not in (part, "clip_l"))
        check_tensors(checkpoint.component(rest), toy.parts[rest])


def test_an_autoencoder_of_diffusers_names(toy: Toy, tmp_path: Path) -> None:
    """Of today's and of the oldest, with weights of the attention as matrices or as convolutions."""
    file = toy.folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert len(load_file(file)) == len(toy.parts["vae"])
    check_tensors(open_checkpoint(toy.files["transformer"], {"vae": file}).component("vae"), toy.parts["vae"])
    component = open_checkpoint(
        toy.files["transformer"], {"vae": write(tmp_path / "old", old_vae(toy.parts["vae"]))}
    ).component("vae")
    check_tensors(component, toy.parts["vae"])
    flat = {
        name: tensor.flatten(1) if ".attn_1." in name and tensor.ndim == 4 else tensor
        for name, tensor in toy.parts["vae"].items()
    }
    component = open_checkpoint(toy.files["transformer"], {"vae": write(tmp_path / "flat", flat)}).component("vae")
    check_tensors(component, toy.parts["vae"])


@pytest.mark.parametrize("part", ["clip_l", "clip_g"])
def test_a_clip_in_openclip_layout(toy: Toy, tmp_path: Path, part: str) -> None:
    component = open_checkpoint(
        toy.files["transformer"], {part: write(tmp_path / "clip", open_clip(toy.parts[part]))}
    ).component(part)
    check_tensors(component, toy.parts[part])


def test_openclip_conversion_agrees_with_diffusers(toy: Toy, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tensors = open_clip(toy.parts["clip_g"])
    width = tensors["text_projection"].shape[0]
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 2}
    model = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, num_hidden_layers=2, projection_dim=width))
    theirs = convert_open_clip_checkpoint(model, dict(tensors), prefix="")
    ours = part_of(toy, "clip_g", write(tmp_path / "clip", tensors))
    for name, tensor in theirs.items():
        if "position_ids" not in name:
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("part", ["clip_l", "clip_g"])
def test_a_clip_without_text_model_and_with_a_bare_projection(toy: Toy, tmp_path: Path, part: str) -> None:
    """As transformers 5.6 and ComfyUI write it; CLIP-L's projection has no effect in a file that is not a folder."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in toy.parts[part].items()}
    projection = tensors.pop("text_projection.weight", torch.eye(64) * 2)
    extra = {"text_projection": projection.T, "embeddings.position_ids": torch.arange(77)[None]}
    file = write(tmp_path / "clip", {**tensors, **extra})
    check_tensors(open_checkpoint(toy.folder, {part: file}).component(part), toy.parts[part])


@pytest.mark.parametrize("alias", ["encoder.embed_tokens.weight", "both"])
def test_a_t5_with_its_embedding_elsewhere(toy: Toy, tmp_path: Path, alias: str) -> None:
    tensors = dict(toy.parts["t5"])
    tensors["encoder.embed_tokens.weight"] = (
        tensors["shared.weight"] if alias == "both" else tensors.pop("shared.weight")
    )
    tensors |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    file = write(tmp_path / "t5", tensors)
    check_tensors(open_checkpoint(toy.folder, {"t5": file}).component("t5"), toy.parts["t5"])


@pytest.mark.parametrize(
    ("part", "name"),
    [("clip_l", "clip_l.file"), ("clip_g", "clip_g.file"), ("vae", "vae.stability"), ("vae", "diffusers.vae"),
     ("t5", "t5xxl.file_with_embed_alias_220"), ("t5", "t5xxl.hf_sharded_219")],
)  # fmt: skip
def test_published_separate_files(toy: Toy, tmp_path: Path, part: str, name: str) -> None:
    """All names of the published file, and nothing left over."""
    file = write(tmp_path / "file", small_tensors(shapes(name)))
    assert set(part_of(toy, part, file)) == set(golden()[part])


# ---- the wrong kind ------------------------------------------------------------------------------

WORDS = {"transformer": "a Stable Diffusion 3 transformer", "vae": "a VAE", "clip_l": "a CLIP-L text encoder",
         "clip_g": "a CLIP-G text encoder", "t5": "a T5 text encoder"}  # fmt: skip


@pytest.mark.parametrize("wanted", PARTS[1:])
def test_the_wrong_kind_is_refused_for_what_it_is(toy: Toy, tmp_path: Path, wanted: str) -> None:
    """Every published part in the place of every other; told by its content under a misleading name."""
    for given, names in golden().items():
        file = write(tmp_path / f"{wanted}.safetensors", small_tensors(names))
        checkpoint = open_checkpoint(toy.files["transformer"], {wanted: file})
        if given == wanted:
            assert set(checkpoint.component(wanted).shapes) == set(names)
            continue
        with pytest.raises(CheckpointError) as caught:
            checkpoint.component(wanted)
        assert str(caught.value) == f"{file}: {WORDS[given]}; expected {WORDS[wanted]}"


def test_a_model_out_of_a_lone_encoder_is_refused(tmp_path: Path) -> None:
    for part in ("clip_l", "clip_g", "t5", "vae"):
        file = write(tmp_path / "model.safetensors", small_tensors(golden()[part]))
        with pytest.raises(CheckpointError, match=f"{WORDS[part]} alone; give a file or folder with the transformer"):
            open_checkpoint(file)


def test_separate_files_are_opened_when_they_are_needed(toy: Toy, tmp_path: Path) -> None:
    """A broken, an absent and a strange one cost nothing until asked for."""
    (tmp_path / "broken").write_bytes(b"garbage garbage")
    strange = write(tmp_path / "flux", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)})
    expected = {tmp_path / "broken": "not a safetensors file", tmp_path / "none": "no such file",
                strange: "a FLUX model", tmp_path: "a folder; expected a file with a T5 text encoder"}  # fmt: skip
    for file, message in expected.items():
        checkpoint = open_checkpoint(toy.folder, {"t5": file})
        check_tensors(checkpoint.component("vae"), toy.parts["vae"])
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.component("t5")
        assert str(file) in str(caught.value)


# ---- through the driver --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("words")
    write_tokenizers(root, captions=500)
    return root


def test_a_picture_from_pieces_is_the_same_picture(words: Path, tmp_path: Path) -> None:
    """Transformer, CLIPs, T5 and autoencoder each from a file of its own, against the folder: every pixel."""
    whole = write_checkpoint(tmp_path / "folder", tokenizers=words, clip_vocab=1024, t5_vocab=512)
    stems = {"transformer": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2",
             "t5": "text_encoder_3"}  # fmt: skip
    files = {part: next((whole / folder).glob("*.safetensors")) for part, folder in stems.items()}
    separate = {option: files[part] for part, option in OPTIONS.items()}
    size = {"width": 64, "height": 64, "steps": 2, "cfg": 4.5}
    load = {"tokenizers": words, "dtype": "fp32", "device": "cpu"}
    first = Pipeline.load(whole, **load)("a horse", **size)[0]
    pieces = Pipeline.load(files["transformer"], **load, **separate)
    second = pieces("a horse", **size)[0]
    assert first.tobytes() == second.tobytes()
    with pytest.raises(SettingsError, match="vae is fixed when the model is loaded"):
        pieces("a horse", vae="other")


def test_missing_parts_name_their_option(toy: Toy, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[str] = []
    for part in ("clip_l", "clip_g", "t5", "vae"):
        option = "--" + OPTIONS[part].replace("_", "-")
        told = ["a horse", "--model", str(toy.files["transformer"]), "--tokenizers", str(words), *given]
        assert main(told) == 2
        error = capsys.readouterr().err
        assert f"has no {part}, which a picture needs; {option} FILE brings one" in error
        assert ("--t5 off or --t5 omit runs without it" in error) == (part == "t5")
        given += [option, str(toy.files[part])]


def test_an_autoencoder_of_another_model(toy: Toy, words: Path, tmp_path: Path) -> None:
    """SD1's and SDXL's have the same names and four channels."""
    tensors = dict(toy.parts["vae"])
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:, :4]
    files = {option: toy.files[part] for part, option in OPTIONS.items()}
    files["vae"] = write(tmp_path / "vae", tensors)
    with pytest.raises(CheckpointError, match="latents of 4 channels, expected 16") as caught:
        Pipeline.load(toy.files["transformer"], tokenizers=words, **files)
    assert str(files["vae"]) in str(caught.value)
