"""Conversion: the same numbers in every layout, fp8 within its rounding, adapters as merged, whole or not at all."""

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from adapters import FC1, LAST, QKV, lora
from diffusers import AutoencoderKL, SD3Transformer2DModel
from layouts import PARTS, check_tensors, write, written_again
from manifests import SMALL, golden, manifest
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

import weights.convert
from benchmarks.random_checkpoint import write_checkpoint
from mmdit.common.paths import split_scale
from mmdit.driver.building import build
from weights import CheckpointError, fill, open_checkpoint, published
from weights.__main__ import main
from weights.adapters import Adapters
from weights.convert import FP8, _ordered, _pieces, convert, rounded
from weights.inspect import inspect
from weights.published import PREFIXES

LAYOUTS = ("diffusers", "single-file")
PROJECTION = "text_projection.weight"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/ with tokenizers and defaults, and file.safetensors with the same tensors. Not to be written to."""
    root = tmp_path_factory.mktemp("toys")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (root / "words" / name).mkdir(parents=True)
        (root / "words" / name / "vocab").write_text(name)
    write_checkpoint(root / "folder", tokenizers=root / "words", defaults={"width": 64}, **SMALL)
    write_checkpoint(root / "file.safetensors", layout="single-file", **SMALL)
    return root


@pytest.fixture
def folder(toys: Path, tmp_path: Path) -> Path:
    """A copy of the folder to write to."""
    return Path(shutil.copytree(toys / "folder", tmp_path / "copy"))


def values(path: Path, part: str) -> dict[str, Tensor]:
    component = open_checkpoint(path).component(part)
    return {name: component.read(name) for name in component.shapes}


def change_json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "file.safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_in_every_layout(toys: Path, tmp_path: Path, source: str, layout: str) -> None:
    out = convert(toys / source, tmp_path / "new" / "out", layout, "fp32")
    checkpoint = open_checkpoint(out)
    assert checkpoint.components == PARTS
    for part in PARTS:
        expected = values(toys / "folder", part)
        if part == "clip_l" and layout == "single-file":
            del expected[PROJECTION]
        check_tensors(checkpoint.component(part), expected)
        fill(build(checkpoint.component(part)), checkpoint.component(part))
    if layout == "single-file":
        assert set(load_file(out)) == set(load_file(toys / "file.safetensors"))


def test_there_and_back_is_the_same_file(toys: Path, tmp_path: Path) -> None:
    """Whatever the order of the tensors in the input."""
    first = convert(toys / "file.safetensors", tmp_path / "a", "single-file", "fp32")
    there = convert(toys / "file.safetensors", tmp_path / "b", "diffusers", "fp32")
    back = convert(there, tmp_path / "c", "single-file", "fp32")
    assert back.read_bytes() == first.read_bytes()


def test_a_folder_keeps_what_shapes_do_not_tell(folder: Path, tmp_path: Path) -> None:
    change_json(folder / "vae" / "config.json", scaling_factor=0.9)
    change_json(folder / "scheduler" / "scheduler_config.json", shift=2.0)
    out = convert(folder, tmp_path / "out", "diffusers", "fp16")
    for name in ("model_index", "mmdit", "vae/config", "scheduler/scheduler_config", "transformer/config"):
        new, old = (json.loads((root / f"{name}.json").read_text()) for root in (out, folder))
        assert new == old, name
    assert (out / "tokenizer_3" / "vocab").read_text() == "tokenizer_3"
    for name in ("text_encoder", "text_encoder_3"):
        told = json.loads((folder / name / "config.json").read_text())
        assert json.loads((out / name / "config.json").read_text()) == told | {"torch_dtype": "float16"}


def test_config_files_from_shapes_are_those_of_the_folder(toys: Path, tmp_path: Path) -> None:
    out = convert(toys / "file.safetensors", tmp_path / "out", "diffusers", "fp32")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        told = (toys / "folder" / name / "config.json").read_text()
        assert (out / name / "config.json").read_text() == told
    index = json.loads((out / "model_index.json").read_text())
    assert index["tokenizer"] == [None, None]


def test_a_single_file_must_not_lose_what_it_cannot_say(folder: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            convert(folder, tmp_path / "out", "single-file", "fp32")
        assert not (tmp_path / "out").exists()

    change_json(folder / "scheduler" / "scheduler_config.json", shift=2.0)
    refused("scheduler: shift is 2.0; readers of a single file")
    change_json(folder / "scheduler" / "scheduler_config.json", shift=3.0)
    change_json(folder / "vae" / "config.json", scaling_factor=0.9)
    refused("vae: scaling_factor is 0.9; .* take 1.5305")
    change_json(folder / "vae" / "config.json", scaling_factor=1.5305)
    written_again(folder / "text_encoder" / "model.safetensors", {PROJECTION: torch.eye(64) * 2})
    refused("text_projection.weight is not the identity")


def test_from_gguf(toys: Path, tmp_path: Path) -> None:
    """Decoded, then rounded like everything else."""
    writer = gguf.GGUFWriter(tmp_path / "in", "sd3")
    for name, tensor in values(toys / "folder", "transformer").items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else None
        array = tensor.numpy()
        writer.add_tensor(name, gguf.quants.quantize(array, kind) if kind else array, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    out = convert(tmp_path / "in", tmp_path / "out", "diffusers", "bf16")
    expected = {name: tensor.bfloat16() for name, tensor in values(tmp_path / "in", "transformer").items()}
    check_tensors(open_checkpoint(out).component("transformer"), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_separate_parts(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    """Each in the place of what the source brings, which here is its negative."""
    stored = load_file(toys / "file.safetensors")
    native = {part: {name.removeprefix(PREFIXES[part]): tensor for name, tensor in stored.items()
                     if name.startswith(PREFIXES[part])} for part in PARTS}  # fmt: skip
    files = {
        option: str(write(tmp_path / part, native[part]))
        for part, option in (("clip_l", "--clip-l"), ("clip_g", "--clip-g"), ("t5", "--t5xxl"), ("vae", "--vae"))
    }
    source = write(tmp_path / "in", {name: t if name.startswith(PREFIXES["transformer"]) else -t
                                     for name, t in stored.items()})  # fmt: skip
    words = [word for pair in files.items() for word in pair]
    assert main(["convert", str(source), str(tmp_path / "out"), "--layout", layout, "--dtype", "fp32", *words]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    whole = convert(toys / "file.safetensors", tmp_path / "whole", layout, "fp32")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.components == PARTS
    for part in PARTS:
        check_tensors(checkpoint.component(part), values(whole, part))
    wrong = ["--layout", layout, "--dtype", "fp32", "--vae", files["--t5xxl"]]
    assert main(["convert", str(source), str(tmp_path / "no"), *wrong]) == 2
    assert capsys.readouterr().err == f"error: {files['--t5xxl']}: a T5 text encoder; expected a VAE\n"


def test_from_the_hub(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts are fetched but those that are given, and tokenizers where they have a place."""
    asked = []

    def fetch(model: str, parts: Sequence[str], tokenizers: Sequence[str]) -> Path:
        asked.append((model, tuple(parts), tuple(tokenizers)))
        return toys / "folder"

    monkeypatch.setattr("weights.hub.fetch", fetch)
    out = convert("someone/model", tmp_path / "a", "diffusers", "fp32")
    convert("someone/model", tmp_path / "b", "single-file", "fp32", parts={"vae": toys / "file.safetensors"})
    words = ("tokenizer", "tokenizer_2", "tokenizer_3")
    assert asked == [("someone/model", PARTS, words), ("someone/model", (PARTS[0], *PARTS[2:]), ())]
    check_tensors(open_checkpoint(out).component("t5"), values(toys / "folder", "t5"))


def test_what_is_not_there_stays_away(tmp_path: Path) -> None:
    toy = write_checkpoint(tmp_path / "toy", clips=False, t5=False)
    out = convert(toy, tmp_path / "out", "diffusers", "bf16")
    assert open_checkpoint(out).components == ("transformer", "vae")
    assert json.loads((out / "model_index.json").read_text())["text_encoder_3"] == [None, None]


def test_shards(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight and its scale are never parted."""
    monkeypatch.setattr(published, "SHARD_BYTES", dict.fromkeys(published.SHARD_BYTES, 300_000))
    plain = convert(toys / "folder", tmp_path / "plain", "diffusers", "fp32")
    assert len(list((plain / "text_encoder_3").glob("model-*.safetensors"))) > 2
    for part in PARTS:
        check_tensors(open_checkpoint(plain).component(part), values(toys / "folder", part))
    scaled = convert(toys / "folder", tmp_path / "scaled", "diffusers", "fp8-scaled")
    index = json.loads((scaled / "text_encoder_3" / "model.safetensors.index.json").read_text())["weight_map"]
    scales = [name for name in index if name.endswith(".scale_weight")]
    assert len(scales) == 14
    assert all(index[name] == index[name.replace("scale_weight", "weight")] for name in scales)


def test_t5_is_cut_as_published() -> None:
    shapes = _ordered(dict(reversed(golden()["t5"].items())))
    pieces = list(_pieces("t5", shapes, "diffusers", "fp16"))
    shards = published.split(pieces, [piece.bytes for piece in pieces], published.SHARD_BYTES["model"])
    assert [len(shard) for shard in shards] == [113, 106]
    names = published.shard_names("model", 2)
    ours = {piece.name: name for name, shard in zip(names, shards) for piece in shard}
    assert ours == manifest("diffusers.text_encoder_3.index")["weight_map"]


def test_diffusers_and_transformers_load_it(toys: Path, tmp_path: Path) -> None:
    """No tensor missing, none left over, the same values as from the folder that was not converted."""
    out = convert(toys / "file.safetensors", tmp_path / "out", "diffusers", "fp32")
    kinds = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModelWithProjection,
             "text_encoder_2": CLIPTextModelWithProjection, "text_encoder_3": T5EncoderModel}  # fmt: skip
    for name, kind in kinds.items():
        loaded, told = kind.from_pretrained(out / name, output_loading_info=True)
        assert not any(told.values()), (name, told)
        expected = kind.from_pretrained(toys / "folder" / name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items()), name


# ---- number formats ------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_one_rounding(toys: Path, tmp_path: Path, word: str, dtype: torch.dtype) -> None:
    out = convert(toys / "folder", tmp_path / "out", "single-file", word)
    for part in PARTS[:2]:
        check_tensors(
            open_checkpoint(out).component(part), {n: t.to(dtype) for n, t in values(toys / "folder", part).items()}
        )


def test_what_float16_cannot_hold_is_refused(toys: Path, tmp_path: Path) -> None:
    big = torch.full_like(load_file(toys / "file.safetensors")["model.diffusion_model.context_embedder.bias"], 1e5)
    shutil.copy(toys / "file.safetensors", tmp_path / "in")
    source = written_again(tmp_path / "in", {"model.diffusion_model.context_embedder.bias": big})
    with pytest.raises(CheckpointError, match=r"context_embedder.bias: has numbers that float16 cannot hold"):
        convert(source, tmp_path / "out", "single-file", "fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_fp8(toys: Path, tmp_path: Path, layout: str) -> None:
    """Linear weights within half a step of e4m3 (2^-4 of the value, 2^-10 scales below 2^-6), the rest in bfloat16."""
    out = convert(toys / "folder", tmp_path / "out", layout, "fp8-scaled")
    assert inspect(out)["quantisation"] == ["float8_e4m3fn, scaled, the older style (scale_weight)"]
    for part in PARTS:
        component = open_checkpoint(out).component(part)
        fill(build(component), component, dtype=torch.bfloat16)
        for name, was in values(toys / "folder", part).items():
            if name not in component.shapes:  # CLIP-L's identity
                continue
            linear = part in ("transformer", "t5") and name.endswith("weight") and was.ndim == 2
            if linear and "shared" not in name and "relative_attention_bias" not in name:
                assert component.dtypes[name] == torch.float32, name
                allowed = torch.maximum(was.abs() / 16, was.abs().max() / 448 / 1024) * 1.0001
                assert bool(((component.read(name) - was).abs() <= allowed).all()), name
            else:
                assert torch.equal(component.read(name), was.bfloat16()), name


def test_scales_and_codes() -> None:
    codes, scale = rounded("x", torch.tensor([[-896.0, 2.0], [0.0, 448.0]]), FP8)
    assert (codes.dtype, scale.dtype, scale.shape, float(scale)) == (FP8, torch.float32, (), 2.0)
    assert codes.float().tolist() == [[-448.0, 1.0], [0.0, 224.0]]
    zeros, scale = rounded("x", torch.zeros(2, 2), FP8)
    assert (float(scale), float(zeros.float().abs().max())) == (1.0, 0.0)
    tiny, scale = rounded("x", torch.full((2, 2), 1e-44), FP8)
    assert bool((tiny.float() * scale).isfinite().all())
    with pytest.raises(CheckpointError, match="x: has NaN or infinity"):
        rounded("x", torch.tensor([[1.0, torch.inf]]), FP8)


def test_names_of_scaled_fp8_are_comfyuis(toys: Path, tmp_path: Path) -> None:
    stored = load_file(convert(toys / "file.safetensors", tmp_path / "out", "single-file", "fp8-scaled"))
    for part in ("transformer", "t5"):
        marker = stored[published.PREFIXES[part] + "scaled_fp8"]
        assert (marker.dtype, marker.shape) == (FP8, (0,))
    layer = published.PREFIXES["transformer"] + QKV
    assert stored[f"{layer}.weight"].dtype == FP8
    assert (stored[f"{layer}.scale_weight"].dtype, stored[f"{layer}.scale_weight"].shape) == (torch.float32, ())
    assert stored[published.PREFIXES["t5"] + "encoder.embed_tokens.weight"].dtype == torch.bfloat16


# ---- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def loras(tmp_path: Path) -> list[str]:
    """Fused and split projections, swapped halves, a text encoder, and on top of them another."""
    width = 128
    first = {
        **lora(f"diffusion_model.{QKV}", 3 * width, width, alpha=2.0),
        **lora(f"diffusion_model.{FC1}", 4 * width, width),
        **lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 256, 64),
    }
    second = {
        **lora("transformer.transformer_blocks.0.attn.to_k", width, width),
        **lora("transformer.transformer_blocks.1.norm1_context.linear", 2 * width, width),
    }
    return [f"{write(tmp_path / 'first.safetensors', first)}:0.5", str(write(tmp_path / "second.safetensors", second))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_are_merged_as_in_a_model(toys: Path, tmp_path: Path, loras: list[str], layout: str) -> None:
    """Bit for bit in float32; in bfloat16 the sum is rounded once."""
    names = ("transformer", "clip_l")
    checkpoint = open_checkpoint(toys / "folder")
    modules = {n: fill(build(checkpoint.component(n)), checkpoint.component(n), torch.float32) for n in names}
    transformer = modules["transformer"]
    before = [transformer.get_parameter(f"{module}.weight").clone() for module in (QKV, LAST)]
    adapters = Adapters(modules)
    for text in loras:
        adapters.add(*split_scale(text))
    after = [transformer.get_parameter(f"{module}.weight") for module in (QKV, LAST)]
    assert not any(torch.equal(old, new) for old, new in zip(before, after))
    for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = convert(toys / "folder", tmp_path / word, layout, word, loras)
        for name in names:
            expected = {key: tensor.to(dtype) for key, tensor in modules[name].state_dict().items()}
            if layout == "single-file":
                expected.pop(PROJECTION, None)
            check_tensors(open_checkpoint(out).component(name), expected)


def test_adapters_that_do_not_fit(toys: Path, tmp_path: Path) -> None:
    flux = write(tmp_path / "flux.safetensors", lora("lora_unet_double_blocks_0_img_attn_qkv", 96, 32))
    some = lora(f"lora_unet_{QKV}".replace(".", "_"), 384, 128) | lora("lora_unet_nothing", 4, 4)
    some = write(tmp_path / "some.safetensors", some)
    with pytest.raises(CheckpointError, match="an adapter for FLUX"):
        convert(toys / "folder", tmp_path / "out", "diffusers", "bf16", [str(flux)])
    with pytest.warns(UserWarning, match="1 module applied, left out: 1 that this model does not have"):
        convert(toys / "folder", tmp_path / "out", "diffusers", "bf16", [f"{some}:2"])
    for wrong in (f"{some}:x", f"{some}:nan", f"{tmp_path}/nothing:1"):
        with pytest.raises(CheckpointError):
            convert(toys / "folder", tmp_path / "two", "diffusers", "bf16", [wrong])


# ---- whole or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, failure: BaseException
) -> None:
    """In the middle of the last part; folders that were made for it go too."""
    calls = []

    def fails(where: str, tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
        calls.append(where)
        if len(calls) == 300:
            assert len(list(tmp_path.rglob(".*.partial"))) == 1
            raise failure
        return rounded(where, tensor, dtype)

    monkeypatch.setattr(weights.convert, "rounded", fails)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected, match=r"No space left|^$"):
        convert(toys / "folder", tmp_path / "new" / "deep" / "out", layout, "fp32")
    assert list(tmp_path.iterdir()) == []


def test_no_room_and_no_overwriting(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("file", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "file").write_text("mine")
        with pytest.raises(CheckpointError, match="is there already"):
            convert(toys / "folder", tmp_path / name, "diffusers", "bf16")
    assert (tmp_path / "file").read_text() == "mine"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, the disk has 0\.0 GB left"):
        convert(toys / "folder", tmp_path / "new" / "out", "diffusers", "bf16")
    assert not (tmp_path / "new").exists()


def test_command_line(toys: Path, tmp_path: Path, loras: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(toys / "folder"), str(out), "--layout", "diffusers", "--dtype", "bf16"]
    assert main([*arguments, "--lora", loras[0], "--lora", loras[1]]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert open_checkpoint(out).tokenizers == out
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {out}: is there already: expected a new name\n"
    assert main(["convert", str(toys / "words"), str(tmp_path / "x"), *arguments[3:]]) == 2
    with pytest.raises(SystemExit, match="2"):
        main([*arguments[:-1], "fp4"])
    with pytest.raises(ValueError, match="'fp4' is not one of"):
        convert(toys / "folder", tmp_path / "y", "diffusers", "fp4")
