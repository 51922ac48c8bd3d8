"""What a file is: every kind told from its header, published sizes as sparse files, damage refused on one line."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from layouts import Tensors, write
from manifests import SMALL, golden, meta
from safetensors.torch import load_file

from benchmarks.random_checkpoint import write_checkpoint
from mmdit.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiTConfig
from mmdit.model import MMDiT
from weights import CheckpointError
from weights.__main__ import main
from weights.header import DTYPES
from weights.inspect import inspect
from weights.published import PREFIXES
from weights.report import report

Entries = dict[str, tuple[str, tuple[int, ...]]]  # {name: (dtype, shape)}
LORA = "lora_unet_joint_blocks_0_x_block_attn_qkv"


def sparse(path: Path, entries: Entries, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of published size whose tensors are a hole: whoever reads them is slow."""
    tensors = {name: torch.empty(shape, dtype=DTYPES[word], device="meta") for name, (word, shape) in entries.items()}
    return write(path, tensors, metadata)


def entries(part: str, word: str = "F16", prefix: str = "") -> Entries:
    return {prefix + name: (word, shape) for name, shape in golden()[part].items()}


def text(found: dict[str, Any]) -> str:
    lines = report(found)
    assert all(line.isprintable() for line in lines)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's folder. Not to be written to."""
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "folder", **SMALL)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "model", "billions"),
    [(SD35_MEDIUM, "SD3.5-Medium", 2.47), (SD3_MEDIUM, "SD3-Medium", 2.08), (SD35_LARGE, "SD3.5-Large", 8.15)],
)
def test_published_transformers(tmp_path: Path, config: MMDiTConfig, model: str, billions: float) -> None:
    """By shapes; up to 16 GB, with a prefix, and what a picture needs beside it."""
    shapes = {name: tuple(t.shape) for name, t in meta(MMDiT, config).state_dict().items()}
    file = sparse(tmp_path / "x.bin", {f"model.diffusion_model.{n}": ("F16", s) for n, s in shapes.items()})
    found = inspect(file)
    assert (found["kind"], found["model"], found["format"]) == ("checkpoint", model, "safetensors")
    assert found["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
    assert found["bytes"] == 2 * found["parameters"]
    assert found["missing"] == ["vae", "clip_l", "clip_g", "t5"]
    needs = ["--vae FILE", "--clip-l FILE", "--clip-g FILE", "--t5xxl FILE", "--tokenizers FOLDER"]
    assert found["load"] == {"loads": True, "options": ["--model", str(file)], "needs": needs, "reason": None}
    assert f"{file}: {model}, a single file" in text(found)
    assert ("--steps 4" in text(found)) == (model == "SD3.5-Large")


def test_a_transformer_with_a_tensor_missing(tmp_path: Path) -> None:
    some = dict(list(entries("transformer").items())[:-1])
    load = inspect(sparse(tmp_path / "x", some))["load"]
    assert (load["loads"], load["reason"]) == (False, "SD3.5-Medium has 665 tensors, this has 664")


def test_all_in_one_with_fp8(tmp_path: Path) -> None:
    parts: Entries = {}
    for part in golden():
        parts |= entries(part, "F8_E4M3" if part == "t5" else "F16", PREFIXES[part])
    found = inspect(sparse(tmp_path / "x", parts))
    assert [part["name"] for part in found["components"]] == ["transformer", "vae", "clip_l", "clip_g", "t5"]
    assert found["missing"] == []
    assert found["quantisation"] == ["float8_e4m3fn, plain"]
    t5 = next(part for part in found["components"] if part["name"] == "t5")
    assert list(t5["dtypes"]) == ["F8_E4M3"]
    assert t5["prefix"] == PREFIXES["t5"]


@pytest.mark.parametrize("style", ["older", "newer", "metadata"])
def test_scaled_fp8(tmp_path: Path, style: str) -> None:
    """With the loader's eyes: it would load, and which style it is."""
    names, metadata = entries("t5"), None
    for name in [name for name in names if ".layer." in name and "norm" not in name and "bias" not in name]:
        layer = name.removesuffix(".weight")
        names[name] = ("F8_E4M3", names[name][1])
        names[layer + (".scale_weight" if style == "older" else ".weight_scale")] = ("F32", ())
    if style == "older":
        names["scaled_fp8"] = ("F8_E4M3", (0,))
    if style == "metadata":
        metadata = {"_quantization_metadata": json.dumps({"layers": {}})}
    found = inspect(sparse(tmp_path / "x", names, metadata))
    told = {"older": "the older style (scale_weight)", "newer": "the newer style (weight_scale, bare)",
            "metadata": "the newer style (weight_scale, metadata)"}[style]  # fmt: skip
    assert found["quantisation"] == [f"float8_e4m3fn, scaled, {told}"]
    assert found["load"]["loads"]


def test_a_way_of_quantising_that_is_not_known(tmp_path: Path) -> None:
    bad = entries("transformer") | {"final_layer.linear.weight.absmax": ("F32", (4,))}
    load = inspect(sparse(tmp_path / "x", bad))["load"]
    assert not load["loads"]
    assert "quantised in a way that is not known" in load["reason"]


def test_gguf(folder: Path, tmp_path: Path) -> None:
    """Types as they lie in the file, not as they are decoded."""
    stored = load_file(folder / "text_encoder_3" / "model.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5encoder")
    for name, tensor in stored.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else None
        values = tensor.numpy()
        writer.add_tensor(name, gguf.quants.quantize(values, kind) if kind else values, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = inspect(tmp_path / "t5.gguf")
    assert (found["format"], found["kind"], found["quantisation"]) == ("gguf", "component", ["GGUF Q8_0"])
    assert found["dtypes"]["Q8_0"]["bytes"] * 32 == found["dtypes"]["Q8_0"]["parameters"] * 34
    assert found["metadata"] == {"general.architecture": "t5encoder"}


# ---- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "option"), [("clip_l", "--clip-l"), ("clip_g", "--clip-g"), ("t5", "--t5xxl"), ("vae", "--vae")]
)
def test_separate_parts(tmp_path: Path, part: str, option: str) -> None:
    file = sparse(tmp_path / "a name", entries(part))
    found = inspect(file)
    assert (found["kind"], found["model"]) == ("component", None)
    assert found["load"] == {"loads": True, "options": [option, str(file)], "needs": [], "reason": None}
    assert f"--model MODEL {option} '{file}'" in text(found)


def test_two_encoders_in_one_file(tmp_path: Path) -> None:
    clips = entries("clip_l", prefix="clip_l.") | entries("clip_g", prefix="clip_g.")
    options = inspect(sparse(tmp_path / "x", clips))["load"]["options"]
    assert sorted(options[::2]) == ["--clip-g", "--clip-l"]


def test_parts_of_other_models(tmp_path: Path) -> None:
    """By the side that differs: SD1's autoencoder, T5-XL."""
    vae = entries("vae") | {"decoder.conv_in.weight": ("F16", (512, 4, 3, 3))}
    t5 = entries("t5") | {"shared.weight": ("F16", (32128, 2048))}
    for name, parts, reason in (
        ("vae", vae, "4 latent channels; Stable Diffusion 3's has 16"),
        ("t5", t5, "2048 wide; Stable Diffusion 3's has 4096"),
    ):
        load = inspect(sparse(tmp_path / name, parts))["load"]
        assert (load["loads"], load["reason"]) == (False, reason)


OTHERS = {
    "double_blocks.0.img_attn.qkv.weight": "a FLUX model",
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.norm1.weight": "an SDXL model",
    "input_blocks.0.0.weight": "an SD1, SD2 or SDXL model",
    "controlnet_blocks.0.weight": "a ControlNet, not a checkpoint",
    "encoder.block.0.layer.1.DenseReluDense.wi.weight": "a T5 1.0",
    "who.knows": "no model that is known (its first tensor is who.knows)",
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_models_by_name(tmp_path: Path, key: str) -> None:
    found = inspect(write(tmp_path / "x", {key: torch.ones(2)}))
    assert (found["kind"], found["what"], found["load"]["loads"]) == ("other", OTHERS[key], False)
    assert found["load"]["reason"]
    assert "  format      safetensors; 1 tensor, 2 parameters, 8 B; F32" in text(found)


# ---- adapters ------------------------------------------------------------------------------------


def lora(module: str, out: int = 4608, inputs: int = 1536, rank: int = 4, ends: str = "lora_{}.weight") -> Tensors:
    down, up = ("A", "B") if module.startswith(("transformer.", "base_model.")) else ("down", "up")
    return {
        f"{module}.{ends.format(down)}": torch.ones(rank, inputs),
        f"{module}.{ends.format(up)}": torch.ones(out, rank),
    }


@pytest.mark.parametrize(
    ("module", "dialect", "model"),
    [
        (LORA, "kohya", "SD3-Medium or SD3.5-Medium"),
        ("diffusion_model.joint_blocks.0.x_block.attn2.qkv", "ComfyUI", "SD3.5-Medium"),
        ("transformer.transformer_blocks.0.attn2.to_q", "diffusers", "SD3.5-Medium"),
        ("base_model.model.transformer_blocks.0.attn.to_q", "PEFT", "SD3-Medium or SD3.5-Medium"),
        ("lycoris_transformer_blocks_0_attn_to_q", "LyCORIS (SimpleTuner)", "SD3-Medium or SD3.5-Medium"),
        ("lora_transformer_transformer_blocks_0_attn_to_q", "OneTrainer", "SD3-Medium or SD3.5-Medium"),
    ],
)
def test_dialects(tmp_path: Path, module: str, dialect: str, model: str) -> None:
    file = write(tmp_path / "x", lora(module))
    found = inspect(file)
    assert (found["kind"], found["model"], found["adapter"]["dialects"]) == ("adapter", model, [dialect])
    assert found["load"]["options"] == ["--lora", str(file)]
    assert found["load"]["loads"]


def test_kinds_ranks_and_alphas(tmp_path: Path) -> None:
    other = LORA.replace("blocks_0", "blocks_1")
    tensors = {
        **lora(LORA, rank=8),
        f"{LORA}.alpha": torch.tensor(4.0),
        f"{LORA}.dora_scale": torch.ones(4608, 1),
        f"{other}.lokr_w1": torch.ones(2, 2),
        f"{other}.lokr_w2": torch.ones(2304, 768),
        f"{other}.alpha": torch.tensor(16.0),
        **lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768),
    }
    found = inspect(write(tmp_path / "x", tensors, {"ss_network_dim": "8"}))
    facts = found["adapter"]
    assert facts["kinds"] == {"LoRA": 2, "DoRA": 1, "LoKr": 1}
    assert (facts["ranks"], facts["alphas"]) == ([4, 8], [4.0, 16.0])
    assert facts["targets"] == {"transformer": 2, "clip_l": 1}
    assert "ss_network_dim: 8" in text(found)


def test_a_peft_folder(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", lora("base_model.model.transformer_blocks.0.attn2.to_q"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 32}))
    found = inspect(tmp_path)
    assert found["load"]["options"] == ["--lora", str(tmp_path)]
    assert (found["adapter"]["alphas"], found["adapter"]["ranks"]) == ([32.0], [4])


def test_adapters_that_cannot_be_used(tmp_path: Path) -> None:
    flux = inspect(write(tmp_path / "flux", lora("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072)))
    assert (flux["kind"], flux["model"]) == ("adapter", "FLUX")
    assert flux["load"]["reason"].startswith("an adapter for FLUX")
    oft = inspect(write(tmp_path / "oft", {f"{LORA}.oft_blocks": torch.ones(2, 4, 4)}))
    assert (oft["adapter"]["kinds"], oft["load"]["loads"]) == ({"OFT": 1}, False)
    large = inspect(write(tmp_path / "large", lora(LORA, 7296, 2432)))
    assert (large["model"], large["load"]["loads"]) == ("SD3.5-Large", True)


def test_metadata_is_bounded_and_harmless(tmp_path: Path) -> None:
    told = {f"ss_{i:02}": "x" for i in range(60)}
    noise = {
        "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
        "secret": "x",
        "modelspec.title": "a\n\x1b[31m" + "b" * 9999,
    }
    found = inspect(write(tmp_path / "x", lora(LORA), told | noise))
    assert len(found["metadata"]) == 40
    assert found["metadata"]["modelspec.title"].startswith(r"a \x1b[31mbbb")
    assert len(found["metadata"]["modelspec.title"]) == 160
    assert not {"modelspec.thumbnail", "secret"} & set(found["metadata"])
    text(found)


# ---- folders -------------------------------------------------------------------------------------


def test_diffusers_folders(folder: Path, tmp_path: Path) -> None:
    found = inspect(folder)
    assert (found["kind"], found["format"], found["missing"]) == ("checkpoint", "diffusers folder", [])
    assert found["load"]["needs"] == ["--tokenizers FOLDER"]
    part = inspect(folder / "transformer")
    assert part["load"]["options"] == ["--model", str(folder / "transformer" / "diffusion_pytorch_model.safetensors")]
    other = tmp_path / "sdxl"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert inspect(other)["what"] == "a diffusers folder for StableDiffusionXLPipeline"


def test_a_folder_without_all_of_its_weights(tmp_path: Path) -> None:
    """As a download that left T5 out; and a component in several files, which nothing loads alone."""
    toy = write_checkpoint(tmp_path / "toy", max_shard_bytes=900_000, **SMALL)
    alone = inspect(toy / "transformer")
    assert (alone["kind"], alone["load"]["loads"]) == ("component", False)
    assert "give the folder above it" in alone["load"]["reason"]
    for file in (toy / "text_encoder_3").glob("model*"):
        file.unlink()
    found = inspect(toy)
    assert found["missing"] == ["t5"]
    assert "text_encoder_3/ is there without its weights" in found["notes"]


# ---- the command ---------------------------------------------------------------------------------


def test_damage_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write(tmp_path / "whole", {"x": torch.ones(4)}).read_bytes()
    for name, content in {"cut": whole[:-1], "pickle": b"\x80\x04abcdefgh", "text": b"hello", "gguf": b"GGUF1"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    for name in ("cut", "pickle", "text", "gguf", "empty", "missing", "a" * 300):
        assert main([str(tmp_path / name)]) == 2, name
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith(f"error: {tmp_path / name}: ")
        assert error.count("\n") == 1
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(tmp_path / "cut")
    with pytest.raises(SystemExit, match="2"):
        main([])


SIZES = {"tensors": int, "parameters": int, "bytes": int, "dtypes": dict, "quantisation": list}
SCHEMA: dict[str, Any] = {
    "schema": int, "path": str, "kind": str, "what": str, "format": str, "model": str | None, "components": list,
    "missing": list, **SIZES, "adapter": dict | None, "metadata": dict, "load": dict, "notes": list,
}  # fmt: skip
LOAD = {"loads": bool, "options": list, "needs": list, "reason": str | None}
ADAPTER = {"dialects": list, "kinds": dict, "ranks": list, "alphas": list, "targets": dict, "model": str | None,
           "refused": str | None}  # fmt: skip


def check(value: dict[str, Any], schema: dict[str, Any]) -> None:
    assert set(value) == set(schema)
    assert {key: value[key] for key, kind in schema.items() if not isinstance(value[key], kind)} == {}


def test_json_has_the_same_keys_for_everything(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sdxl").mkdir()
    (tmp_path / "sdxl" / "model_index.json").write_text("{}")
    sharded = write_checkpoint(tmp_path / "toy", max_shard_bytes=900_000, clips=False, **SMALL)
    paths = [folder, folder / "vae", folder / "transformer", tmp_path / "sdxl", sharded / "transformer"]
    paths += [write(tmp_path / "lora", lora(LORA)), write(tmp_path / "other", {"x": torch.ones(1)})]
    paths += [write(tmp_path / "oft", {f"{LORA}.oft_blocks": torch.ones(2, 4, 4)})]
    for path in paths:
        assert main([str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        check(found, SCHEMA)
        check(found["load"], LOAD)
        assert (found["schema"], found["path"]) == (1, str(path))
        assert found["kind"] in ("checkpoint", "component", "adapter", "other")
        for part in found["components"]:
            check(part, {"name": str, "layout": str, "prefix": str, **SIZES})
        if found["adapter"] is not None:
            check(found["adapter"], ADAPTER)
        text(found)
