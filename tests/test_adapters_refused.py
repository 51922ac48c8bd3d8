"""Adapters that are refused, each on one line: other models', other kinds, broken files and configurations."""

import json
from pathlib import Path

import pytest
import torch
from adapters import FC1, Toy, lora, noise

from weights import CheckpointError


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


@pytest.mark.parametrize(
    ("module", "inputs", "model"),
    [
        ("lora_unet_joint_blocks_0_x_block_attn_proj", 2432, "SD3.5-Large (width 2432)"),
        ("transformer.transformer_blocks.0.attn.to_q", 2432, "SD3.5-Large (width 2432)"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 3072, "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q", 3072, "FLUX"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 2048, "SDXL"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", 768, "SD1"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024, "SD2"),
        ("lora_unet_up_blocks_0_attentions_0_proj_in", 320, "SD1, SD2 or SDXL"),
        ("diffusion_model.input_blocks.1.1.proj_in", 320, "SD1, SD2 or SDXL"),
    ],
)
def test_adapters_for_other_models(toy: Toy, module: str, inputs: int, model: str) -> None:
    """By name, although a text encoder's part would fit."""
    tensors = {**lora(module, inputs, inputs), **lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 256, 64)}
    with pytest.raises(CheckpointError) as caught:
        toy.add(tensors)
    assert f"a.safetensors: an adapter for {model}; this model is Stable Diffusion 3 or 3.5" in str(caught.value)
    assert toy.changed() == {}


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("oft_blocks", "OFT"),
        ("oft_diag", "OFT"),
        ("oft_R.default.weight", "OFT"),
        ("boft_R", "BOFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("ia3_l", "IA3"),
        ("reshape_weight", "LoRA that reshapes"),
    ],
)
def test_other_kinds(toy: Toy, ending: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{kind}.* is not supported: LoRA, LoHa, LoKr, DoRA and full diff"):
        toy.add({**lora(FC1, 512, 128), f"lora_unet_x.{ending}": noise(4)})


NORM = "text_model.encoder.layers.0.layer_norm1"  # of 64 numbers


@pytest.mark.parametrize(
    ("module", "width"),
    [(f"text_encoder.{NORM}", 64), ("diffusion_model.joint_blocks.0.x_block.attn.ln_q", 64)],
)
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "DoRA"])
def test_a_norm_is_no_matrix(toy: Toy, module: str, width: int, kind: str) -> None:
    """Left out with its reason, beside a module that applies; factors of a matrix of one column."""
    roles = {
        "LoRA": {"lora_down.weight": (1, 1), "lora_up.weight": (width, 1)},
        "LoHa": {"hada_w1_a": (width, 1), "hada_w1_b": (1, 1), "hada_w2_a": (width, 1), "hada_w2_b": (1, 1)},
        "LoKr": {"lokr_w1": (1, 1), "lokr_w2": (width, 1)},
        "DoRA": {"diff": (width,), "dora_scale": (width,)},
    }[kind]
    tensors = {**lora(FC1, 512, 128), **{f"{module}.{role}": noise(*shape) for role, shape in roles.items()}}
    with pytest.warns(UserWarning, match=rf"1 that do not fit \({module} is {kind}, which changes matrices; a norm's"):
        toy.add(tensors)
    assert list(toy.changed()) == [("transformer", "joint_blocks.0.x_block.mlp.fc1.weight")]


def test_files_that_are_no_adapters(toy: Toy) -> None:
    folder = toy.folder / "empty"
    folder.mkdir()
    cases: dict[Path, str] = {
        toy.folder / "absent.safetensors": "no such file",
        toy.folder / ("x" * 999): "ame too long",
        toy.write({"model.weight": noise(2)}, "model"): "not an adapter: none of its 1 tensors is named like one's, "
        "the first is model.weight",
        toy.write({}, "nothing"): "not an adapter",
        toy.write({f"{FC1}.lora_up.weight": torch.ones(2, 2, dtype=torch.int8)}, "int"): "is I8: expected one of F64",
        toy.write(
            {**lora(FC1, 8, 8), f"{FC1}.lora_A.x.weight": noise(4, 8)}, "double"
        ): "the same part of two adapters",
        folder: "no adapter_model.safetensors and no other safetensors file",
        toy.write({}, "two/a").parent: "not an adapter",
    }
    for path, told in cases.items():
        with pytest.raises(CheckpointError) as caught:
            toy.adapters.add(path)
        assert told in str(caught.value)
        assert str(path) in str(caught.value)
    (folder / "adapter_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match=r"only adapter_model\.bin: pickles are never opened"):
        toy.adapters.add(folder)
    with pytest.raises(CheckpointError, match="pickles are never opened"):
        toy.adapters.add(folder / "adapter_model.bin")
    toy.write({}, "two/b")
    with pytest.raises(CheckpointError, match=r"2 safetensors files: name one of them \(a\.safetensors, \.\.\.\)"):
        toy.adapters.add(toy.folder / "two")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"peft_type": "OFT"}, "peft_type OFT is not supported: expected LORA, LOHA, LOKR"),
        ({"peft_type": "LOKR", "alpha": 8, "rank_pattern": {"(": 1}}, "rank_pattern '(' is not a name"),
        ({"peft_type": "LOKR", "alpha": 8, "r": "x"}, "r is x: expected a number"),
        ({"lora_alpha": "8"}, "lora_alpha is 8: expected a number"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"lora_alpha": 8, "alpha_pattern": [1]}, "alpha_pattern is not {name: number}"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": None}}, "to_q is None: expected a number"),
        ({"lora_alpha": 8, "alpha_pattern": {"(a+)+b": 1}}, "is not a name or a simple pattern"),
        ({"lora_alpha": 8, "alpha_pattern": {"(": 1}}, "is not a name or a simple pattern"),
        ({"lora_alpha": 8, "alpha_pattern": {"a" * 300: 1}}, "is not a name or a simple pattern"),
    ],
)
def test_broken_configurations(toy: Toy, config: dict[str, object], told: str) -> None:
    path = toy.write(lora(FC1, 512, 128), "folder/adapter_model").parent
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        toy.adapters.add(path)
    assert told in str(caught.value)
    with pytest.raises(CheckpointError, match="metadata lora_adapter_metadata: not valid JSON"):
        toy.add(lora(FC1, 512, 128), lora_adapter_metadata="{")
