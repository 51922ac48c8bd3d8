"""Every spelling of an adapter reaches the weight it was trained on, with the scale it was trained with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import FC1, LAST, QKV, WIDTH, Toy, close, delta, lora, noise
from manifests import manifest, meta
from torch import Tensor

from mmdit.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiTConfig
from mmdit.model import MMDiT
from text_encoders.clip import CLIP_G, CLIP_L, CLIPTextEncoder
from text_encoders.t5 import T5_XXL, T5Encoder
from weights.adapters.groups import split_key
from weights.adapters.targets import Lookup, Target, owner

DOTTED = ("", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
TO_K = "transformer_blocks.0.attn.to_k"
K_ROWS = slice(WIDTH, 2 * WIDTH)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path, "transformer")


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def peft(module: str, out: int = WIDTH, inputs: int = WIDTH, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA as PEFT writes it; `up_down` multiplies its factors."""
    return {f"{module}.lora_A.weight": noise(rank, inputs, seed=module), f"{module}.lora_B.weight": noise(out, rank)}


def up_down(tensors: dict[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "config"),
    [("sd35_medium", SD35_MEDIUM), ("sd3_medium", SD3_MEDIUM), ("sd35_large", SD35_LARGE)],
)
def test_every_published_target_is_found_under_every_prefix(model: str, config: MMDiTConfig) -> None:
    """With its rows, its swap and its shape."""
    lookup = Lookup({"transformer": shapes(meta(MMDiT, config))})
    for row in manifest(f"lora_targets.{model}"):
        rows = tuple(row["rows"]) if row["rows"] else None
        whole = Target("transformer", row["native"], tuple(row["native_shape"]), True)
        part = whole._replace(shape=tuple(row["diffusers_shape"]), rows=rows, swap=row["swap"])
        for name, expected in ((row["native"], whole), (row["diffusers"], part)):
            spelled = [p + name for p in DOTTED] + [p + name.replace(".", "_") for p in FLAT]
            assert {lookup.find(alias) for alias in spelled} == {expected}, name


def test_published_targets_of_text_encoders() -> None:
    """As kohya, OneTrainer, diffusers and ComfyUI write them."""
    encoders = {"clip_l": meta(CLIPTextEncoder, CLIP_L), "clip_g": meta(CLIPTextEncoder, CLIP_G),
                "t5": meta(T5Encoder, T5_XXL)}  # fmt: skip
    lookup = Lookup({name: shapes(module) for name, module in encoders.items()})
    layer, block = "text_model.encoder.layers.3.self_attn.q_proj", "encoder.block.23.layer.1.DenseReluDense.wi_1"
    spelled = {
        ("clip_l", layer): ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.transformer.",
                            "clip_l.transformer."),
        ("clip_g", layer): ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."),
        ("t5", block): ("lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.transformer."),
        ("clip_g", "text_projection"): ("lora_te2_", "text_encoder_2."),
    }  # fmt: skip
    for (part, name), prefixes in spelled.items():
        for prefix in prefixes:
            alias = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
            found = lookup.find(alias)
            assert (owner(alias), found and (found.component, found.module)) == (part, (part, name)), alias
    new = lookup.find("text_encoder.encoder.layers.3.self_attn.q_proj")
    assert new is not None
    assert new.module == layer, "transformers dropped the text_model"


@pytest.mark.parametrize(
    ("ending", "role"),
    [
        *((e, "down") for e in (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A.x.weight",
                                ".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight", ".lora_A")),
        *((e, "up") for e in (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora_B.x.weight",
                              ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight", ".lora_B")),
        *((e, "alpha") for e in (".alpha", ".lora_alpha")),
        *((e, "up_bias") for e in (".lora_B.bias", ".lora_B.default.bias")),
        *((e, "magnitude") for e in (".lora_magnitude_vector", ".lora_magnitude_vector.weight",
                                     ".lora_magnitude_vector.default.weight", ".magnitude")),
        (".lora_mid.weight", "mid"),
        (".dora_scale", "dora_scale"),
        *((f".hada_{n}", f"hada_{n}") for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *((f".lokr_{n}", f"lokr_{n}") for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *((e, "diff") for e in (".diff", ".w_norm")),
        *((e, "diff_b") for e in (".diff_b", ".b_norm")),
        (".set_weight", "set_weight"),
    ],
)  # fmt: skip
def test_every_ending_is_known(ending: str, role: str) -> None:
    assert split_key(f"a.b.to_q{ending}") == ("a.b.to_q", role)


def test_names_that_are_no_adapters() -> None:
    for key in ("a.weight", "a.bias", "lora_A", "a.lora_A.x.y.weight", "a.lora_A.bias", "a.lora_C.x.weight"):
        assert split_key(key) is None, key


# ---- one file of every dialect -------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "lora_unet_joint_blocks_0_x_block_attn_qkv",  # kohya, OneTrainer
        "diffusion_model.joint_blocks.0.x_block.attn.qkv",  # ComfyUI, OneTrainer
        "joint_blocks.0.x_block.attn.qkv",  # OneTrainer "original"
        "lycoris_joint_blocks_0_x_block_attn_qkv",
        "lycoris_transformer_blocks_0_attn_to_qkv",  # SimpleTuner with fused projections
        "lora.diffusion_model.joint_blocks.0.x_block.attn.qkv",
    ],
)
def test_fused_projections(toy: Toy, module: str) -> None:
    tensors = lora(module, 3 * WIDTH, WIDTH, 4, alpha=1.0)
    toy.add(tensors)
    assert list(toy.changed()) == [("transformer", f"{QKV}.weight")]
    assert close(toy.changed()["transformer", f"{QKV}.weight"], delta(tensors, module) / 4)


@pytest.mark.parametrize(
    "module",
    [
        f"transformer.{TO_K}",  # diffusers, PEFT, SimpleTuner, ai-toolkit, OneTrainer
        TO_K,  # save_lora_adapter, OneTrainer "internal"
        "lora_transformer_transformer_blocks_0_attn_to_k",  # OneTrainer, older
        "lycoris_transformer_blocks_0_attn_to_k",  # SimpleTuner, ai-toolkit
        f"diffusion_model.{TO_K}",
        "lora_unet_transformer_blocks_0_attn_to_k",
        f"unet.{TO_K}",
    ],
)
def test_split_projections(toy: Toy, module: str) -> None:
    tensors = lora(module, WIDTH, WIDTH, 4, alpha=1.0)
    toy.add(tensors)
    assert list(toy.changed()) == [("transformer", f"{QKV}.weight")]
    change = toy.changed()["transformer", f"{QKV}.weight"]
    assert close(change[K_ROWS], delta(tensors, module) / 4)
    assert not change[:WIDTH].any()
    assert not change[2 * WIDTH :].any()


def test_split_and_fused_are_the_same_adapter(toy: Toy) -> None:
    """kohya saves split_qkv fused: downs stacked, ups on the diagonal, alpha as it was over three times the rank."""
    parts = {n: lora(f"transformer.transformer_blocks.0.attn.to_{n}", WIDTH, WIDTH, 4, alpha=2.0) for n in "qkv"}
    toy.add({key: t for tensors in parts.values() for key, t in tensors.items()}, name="split")
    split = toy.changed()["transformer", f"{QKV}.weight"]
    toy.adapters.remove()
    module = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    down, up = (
        [t for tensors in parts.values() for key, t in tensors.items() if f"lora_{which}" in key]
        for which in ("down", "up")
    )
    fused = {f"{module}.lora_down.weight": torch.cat(down), f"{module}.lora_up.weight": torch.block_diag(*up)}
    toy.add({**fused, f"{module}.alpha": torch.tensor(2.0)}, name="fused")
    assert close(toy.changed()["transformer", f"{QKV}.weight"], split / 3)


@pytest.mark.parametrize(
    ("alias", "native"),
    [("norm_out.linear", "final_layer.adaLN_modulation.1"), ("transformer_blocks.1.norm1_context.linear", LAST)],
)
def test_last_modulations_change_halves(toy: Toy, alias: str, native: str) -> None:
    """diffusers has (scale, shift), Stability (shift, scale); an adapter in native names is not touched."""
    module, half = f"transformer.{alias}", WIDTH
    tensors, bias = lora(module, 2 * half, WIDTH), noise(2 * half)
    toy.add({**tensors, f"{module}.diff_b": bias})
    change = delta(tensors, module)
    assert close(toy.changed()["transformer", f"{native}.weight"], torch.cat([change[half:], change[:half]]))
    assert close(toy.changed()["transformer", f"{native}.bias"], torch.cat([bias[half:], bias[:half]]))
    toy.adapters.remove()
    flat = f"lora_unet_{native.replace('.', '_')}"
    tensors = lora(flat, 2 * half, WIDTH)
    toy.add(tensors, name="native")
    assert close(toy.changed()["transformer", f"{native}.weight"], delta(tensors, flat))


def test_first_context_modulation_keeps_its_order(toy: Toy) -> None:
    module = "transformer.transformer_blocks.0.norm1_context.linear"
    tensors = lora(module, 6 * WIDTH, WIDTH)
    toy.add(tensors)
    change = toy.changed()["transformer", "joint_blocks.0.context_block.adaLN_modulation.1.weight"]
    assert close(change, delta(tensors, module))


def test_bias_of_a_split_projection(toy: Toy) -> None:
    bias = noise(WIDTH)
    toy.add({**peft(f"transformer.{TO_K}"), f"transformer.{TO_K}.lora_B.bias": bias})
    change = toy.changed()["transformer", f"{QKV}.bias"]
    assert close(change[K_ROWS], bias)
    assert int(change.count_nonzero()) == WIDTH


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_lycoris_names(toy: Toy, kind: str) -> None:
    """SimpleTuner's and kohya's LyCORIS files, split and fused."""
    if kind == "LoKr":
        factors = {"lokr_w1": noise(8, 8), "lokr_w2": noise(16, 16), "alpha": torch.tensor(1.0)}
        expected = torch.kron(factors["lokr_w1"].double(), factors["lokr_w2"].double())
    else:
        sizes = {"w1_a": (WIDTH, 2), "w1_b": (2, WIDTH), "w2_a": (WIDTH, 2), "w2_b": (2, WIDTH)}
        factors = {f"hada_{n}": noise(*size, seed=n) for n, size in sizes.items()}
        a1, b1, a2, b2 = (t.double() for t in factors.values())
        expected = (a1 @ b1) * (a2 @ b2)
    toy.add({f"lycoris_transformer_blocks_0_attn_to_k.{role}": t for role, t in factors.items()}, name="split")
    assert close(toy.changed()["transformer", f"{QKV}.weight"][K_ROWS], expected)
    toy.adapters.remove()
    proj = "joint_blocks.0.x_block.attn.proj"
    toy.add({f"lora_unet_{proj.replace('.', '_')}.{role}": t for role, t in factors.items()}, name="kohya")
    assert close(toy.changed()["transformer", f"{proj}.weight"], expected)


@pytest.mark.parametrize(
    ("part", "prefix", "name", "size"),
    [
        ("clip_l", "lora_te1_", "text_model.encoder.layers.1.mlp.fc1", (256, 64)),
        ("clip_l", "text_encoder.", "text_model.encoder.layers.1.self_attn.q_proj", (64, 64)),
        ("clip_g", "lora_te2_", "text_model.encoder.layers.0.self_attn.out_proj", (128, 128)),
        ("clip_g", "text_encoder_2.", "text_projection", (128, 128)),
        ("t5", "lora_te3_", "encoder.block.1.layer.0.SelfAttention.k", (64, 256)),
        ("t5", "text_encoders.t5xxl.transformer.", "encoder.block.0.layer.1.DenseReluDense.wo", (256, 512)),
    ],
)
def test_text_encoders(tmp_path: Path, part: str, prefix: str, name: str, size: tuple[int, int]) -> None:
    toy = Toy(tmp_path)
    module = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
    tensors = lora(module, *size, alpha=2.0)
    toy.add(tensors, 0.5)
    assert list(toy.changed()) == [(part, f"{name}.weight")]
    assert close(toy.changed()[part, f"{name}.weight"], delta(tensors, module) / 4)


def test_old_clip_names(tmp_path: Path) -> None:
    toy, name = Toy(tmp_path, "clip_l"), "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    down, up = noise(4, 64), noise(64, 4)
    toy.add({f"{name}.down.weight": down, f"{name}.up.weight": up})
    change = toy.changed()["clip_l", "text_model.encoder.layers.0.self_attn.q_proj.weight"]
    assert close(change, up.double() @ down.double())


# ---- where alpha stands --------------------------------------------------------------------------


def folder(toy: Toy, config: dict[str, Any] | None, tensors: dict[str, Tensor], name: str = "folder") -> Path:
    """A folder as PEFT's save_pretrained leaves it."""
    path = toy.write(tensors, f"{name}/adapter_model")
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    return path.parent


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"lora_alpha": 16, "alpha_pattern": {"attn.to_k": 2}}, 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"k": 2, "attn2.to_k": 2, "0.attn": 2}}, 4.0),  # none is a name's end
        ({"lora_alpha": 16, "alpha_pattern": {r".*\.0\.attn\.to_.": 2}}, 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"^attn.to_k": 2}}, 4.0),
        ({"lora_alpha": 16, "alpha_pattern": {f"^{TO_K}": 2, "to_k": 8}}, 0.5),  # the first that matches
        ({"lora_alpha": 16, "r": 8, "rank_pattern": {"to_k": 4}}, 4.0),
        ({}, 1.0),
    ],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_peft_folder(toy: Toy, config: dict[str, Any], factor: float, by_file: bool) -> None:
    tensors = peft(f"base_model.model.{TO_K}")
    path = folder(toy, config, tensors)
    if config:
        report = toy.adapters.add(path / "adapter_model.safetensors" if by_file else path)
    else:
        with pytest.warns(UserWarning, match="no alpha and no adapter_config"):
            report = toy.adapters.add(path)
    assert report.name == "folder"
    change = toy.changed()["transformer", f"{QKV}.weight"][K_ROWS]
    assert close(change, factor * up_down(tensors, f"base_model.model.{TO_K}"))


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"peft_type": "LOHA", "alpha": 8}, 2.0),
        ({"peft_type": "LOHA", "alpha": 8, "alpha_pattern": {"attn.to_k": 2}, "r": 9}, 0.5),
        ({"peft_type": "LOKR", "alpha": 8, "r": 16}, 0.5),  # the rank of two whole factors stands here alone
        ({"peft_type": "LOKR", "alpha": 8, "r": 16, "rank_pattern": {"to_k": 2}}, 4.0),
        ({"peft_type": "LOKR", "alpha": 8}, 1.0),
    ],
)
def test_peft_folder_of_lycoris_kinds(toy: Toy, config: dict[str, Any], factor: float) -> None:
    if config["peft_type"] == "LOKR":
        factors = {"lokr_w1": noise(8, 8), "lokr_w2": noise(16, 16)}
        expected = torch.kron(factors["lokr_w1"].double(), factors["lokr_w2"].double())
    else:
        sizes = {"w1_a": (WIDTH, 4), "w1_b": (4, WIDTH), "w2_a": (WIDTH, 4), "w2_b": (4, WIDTH)}
        factors = {f"hada_{n}": noise(*size, seed=n) for n, size in sizes.items()}
        a1, b1, a2, b2 = (t.double() for t in factors.values())
        expected = (a1 @ b1) * (a2 @ b2)
    path = toy.write({f"base_model.model.{TO_K}.{role}": t for role, t in factors.items()}, "folder/adapter_model")
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    toy.adapters.add(path.parent)
    assert close(toy.changed()["transformer", f"{QKV}.weight"][K_ROWS], factor * expected)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_diffusers_metadata(toy: Toy, prefix: str) -> None:
    """Its alpha counts before one beside the tensors; another part's does not count here."""
    tensors, module = peft(f"{prefix}{TO_K}"), f"{prefix}{TO_K}"
    flat = {f"{prefix}r": 4, f"{prefix}lora_alpha": 8, f"{prefix}alpha_pattern": {"to_q": 100}}
    text = json.dumps({**flat, "text_encoder.lora_alpha": 64})
    toy.add({**tensors, f"{module}.alpha": torch.tensor(1.0)}, lora_adapter_metadata=text)
    assert close(toy.changed()["transformer", f"{QKV}.weight"][K_ROWS], 2 * up_down(tensors, module))


def test_metadata_of_one_part_leaves_the_others(tmp_path: Path) -> None:
    toy, module = Toy(tmp_path), "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors = {**peft(module, 256, 64), f"transformer.{FC1}.alpha": torch.tensor(2.0),
               **peft(f"transformer.{FC1}", 4 * WIDTH)}  # fmt: skip
    toy.add(tensors, lora_adapter_metadata=json.dumps({"text_encoder.lora_alpha": 12, "text_encoder.r": 4}))
    clip = toy.changed()["clip_l", "text_model.encoder.layers.0.mlp.fc1.weight"]
    assert close(clip, 3 * up_down(tensors, module))
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 0.5 * up_down(tensors, f"transformer.{FC1}"))
