"""Adapters put on, rescaled and taken out again; what does not apply, and what is refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from adapters import FC1, LAST, QKV, WIDTH, Toy, close, delta, lora, noise
from safetensors.torch import save_file
from torch import Tensor, nn

from weights import CheckpointError
from weights.adapters import Adapters
from weights.adapters.merge import FilledModule

FC2 = "joint_blocks.0.x_block.mlp.fc2"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def many() -> dict[str, Tensor]:
    """On several weights, of several kinds, in several parts."""
    return {
        **lora(QKV, 3 * WIDTH, WIDTH),
        **lora(TO_Q, WIDTH, WIDTH),
        **lora("transformer.norm_out.linear", 2 * WIDTH, WIDTH),
        **lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 256, 64),
        **lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 64, 256),
        **lora(FC1, 4 * WIDTH, WIDTH),
        f"{FC1}.dora_scale": noise(1, WIDTH).abs() + 1,
        f"{FC2}.diff": noise(WIDTH, 4 * WIDTH),
        f"{FC2}.diff_b": noise(WIDTH),
    }


def kept(toy: Toy) -> set[tuple[str, str]]:
    """The weights whose originals are kept."""
    networks = {part: n for part, n in toy.adapters._networks.items() if isinstance(n, FilledModule)}
    return {(part, name) for part, network in networks.items() for name in network._originals}


# ---- on and off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_taken_out_leaves_the_same_parameters(tmp_path: Path, dtype: torch.dtype) -> None:
    """The objects themselves, and the same numbers in them."""
    toy = Toy(tmp_path, dtype=dtype)
    before = {(part, n): p for part, m in toy.modules.items() for n, p in m.named_parameters()}
    report = toy.add(many(), 0.7)
    assert len(toy.changed()) == 7
    assert set(toy.changed()) == kept(toy)
    toy.adapters.remove(report.name)
    after = {(part, n): p for part, m in toy.modules.items() for n, p in m.named_parameters()}
    assert all(after[place] is before[place] for place in before)
    assert toy.changed() == {}
    assert toy.adapters.scales == {}
    assert kept(toy) == set()


def test_a_mapped_file_is_not_written_to(tmp_path: Path) -> None:
    from safetensors import safe_open

    save_file({"context_embedder.weight": noise(8, 16)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        weight = file.get_tensor("context_embedder.weight")
    with torch.device("meta"):
        module = nn.ModuleDict({"context_embedder": nn.Linear(16, 8, bias=False)})
    module["context_embedder"].weight = nn.Parameter(weight, requires_grad=False)
    content, kept = (tmp_path / "model.safetensors").read_bytes(), weight.clone()
    save_file(lora("context_embedder", 8, 16), tmp_path / "a.safetensors")
    adapters = Adapters({"transformer": module})
    adapters.add(tmp_path / "a.safetensors")
    assert torch.equal(weight, kept)
    assert not torch.equal(module["context_embedder"].weight, kept)
    adapters.remove()
    assert module["context_embedder"].weight.data_ptr() == weight.data_ptr()
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_two_adapters_add_up_in_either_order(toy: Toy) -> None:
    one, two = lora(QKV, 3 * WIDTH, WIDTH, 4, seed="1"), lora(TO_Q, WIDTH, WIDTH, 8, 2.0, seed="2")
    toy.add(one, 0.5, name="one")
    toy.add(two, -1.0, name="two")
    assert toy.adapters.scales == {"one": 0.5, "two": -1.0}
    assert toy.adapters.settings == (f"{toy.folder}/one.safetensors:0.5", f"{toy.folder}/two.safetensors:-1.0")
    expected = toy.original(f"{QKV}.weight") + 0.5 * delta(one, QKV)
    expected[:WIDTH] -= 0.25 * delta(two, TO_Q)
    assert close(toy.weight(f"{QKV}.weight"), expected)
    toy.adapters.remove("one")
    assert close(toy.changed()["transformer", f"{QKV}.weight"][:WIDTH], -0.25 * delta(two, TO_Q))
    toy.add(one, 0.5, name="one")
    assert close(toy.weight(f"{QKV}.weight"), expected)


def test_the_same_file_twice_has_two_names(toy: Toy) -> None:
    tensors = lora(FC1, 4 * WIDTH, WIDTH)
    names = [toy.add(tensors, scale).name for scale in (1.0, 2.0, 3.0)]
    assert names == ["a", "a-2", "a-3"]
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 6 * delta(tensors, FC1))
    toy.adapters.remove("a-2")
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 4 * delta(tensors, FC1))


def test_dora_is_applied_in_order(toy: Toy) -> None:
    dora = {**lora(FC1, 4 * WIDTH, WIDTH, seed="1"), f"{FC1}.dora_scale": noise(4 * WIDTH, 1).abs() + 1}
    plain = lora(FC1, 4 * WIDTH, WIDTH, seed="2")

    def decomposed(weight: Tensor) -> Tensor:
        merged = weight + delta(dora, FC1)
        return dora[f"{FC1}.dora_scale"].double() * merged / merged.norm(dim=1, keepdim=True)

    old = toy.original(f"{FC1}.weight")
    toy.add(dora, name="dora")
    toy.add(plain, name="plain")
    assert close(toy.weight(f"{FC1}.weight"), decomposed(old) + delta(plain, FC1))
    toy.adapters.remove("dora")
    toy.add(dora, name="dora")
    assert close(toy.weight(f"{FC1}.weight"), decomposed(old + delta(plain, FC1)))


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_rescaling_is_like_adding_so(toy: Toy, start: float) -> None:
    toy.add(many(), 0.3, name="a")
    expected = {place: t.clone() for place, t in toy.now().items()}
    toy.adapters.remove()
    toy.add(many(), start, name="a")
    assert bool(toy.changed()) == bool(start)
    toy.adapters.rescale("a", 0.3)
    assert all(torch.equal(t, expected[place]) for place, t in toy.now().items())
    toy.adapters.rescale("a", 0.0)
    assert toy.changed() == {}
    assert toy.adapters.scales == {"a": 0.0}


def test_the_file_may_go(toy: Toy) -> None:
    tensors = lora(FC1, 4 * WIDTH, WIDTH)
    toy.add(tensors)
    path = toy.folder / "a.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    toy.adapters.rescale("a", 2.0)
    assert close(toy.changed()["transformer", f"{FC1}.weight"], 2 * delta(tensors, FC1))


def test_names_and_scales_that_are_wrong(toy: Toy) -> None:
    toy.add(lora(FC1, 4 * WIDTH, WIDTH))
    with pytest.raises(CheckpointError, match="no adapter 'b': there are a"):
        toy.adapters.remove("b")
    for scale in (float("nan"), float("inf"), True, "1"):
        with pytest.raises(CheckpointError, match=r"an adapter's scale is .*: expected a number"):
            toy.adapters.rescale("a", scale)  # type: ignore[arg-type]
    assert toy.adapters.scales == {"a": 1.0}


# ---- what does not apply -------------------------------------------------------------------------


def test_a_part_that_does_not_apply_is_told_on_one_line(tmp_path: Path) -> None:
    """The rest applies: an adapter for SD3-Medium, say, on SD3.5-Medium, or one with a part for T5 without T5."""
    toy = Toy(tmp_path, "transformer", "clip_g")
    good = lora(FC1, 4 * WIDTH, WIDTH)
    tensors = {
        **good,
        **lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 256, 64),
        **lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 64, 256),
        **lora("lora_te3_encoder_block_1_layer_0_SelfAttention_q", 64, 256),
        **lora("lora_unet_joint_blocks_0_x_block_adaLN_modulation_1", 6 * WIDTH, WIDTH),
        **lora("lora_unet_joint_blocks_7_x_block_attn_qkv", 3 * WIDTH, WIDTH),
        f"{QKV}.lora_down.weight": noise(4, WIDTH),
        "some.weight": noise(1),
    }
    with pytest.warns(UserWarning, match="left out") as caught:
        report = toy.add(tensors)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text == report.warning()
    assert "\n" not in text
    for part in (
        "a.safetensors: 1 module applied, left out: ",
        "1 module of clip_l, which is not loaded; 2 modules of t5, which is not loaded",
        "2 that this model does not have (some.weight, lora_unet_joint_blocks_7_x_block_attn_qkv)",
        "2 that do not fit (",
        "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1 is [768, 128], should be [1152, 128]",
        f"{QKV} has no up beside down",
    ):
        assert part in text, part
    assert list(toy.changed()) == [("transformer", f"{FC1}.weight")]
    assert close(toy.changed()["transformer", f"{FC1}.weight"], delta(good, FC1))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (lora("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 64, 256), "1 module of t5, which is not loaded"),
        (lora("lora_unet_blocks_0_attn", 8, 8), "1 that this model does not have (lora_unet_blocks_0_attn)"),
        (lora(FC1, 6144, 1536), f"1 that do not fit ({FC1} is [6144, 1536], should be [512, 128])"),
        ({f"{FC1}.alpha": torch.tensor(1.0)}, f"({FC1} has only alpha)"),
        ({**lora(FC1, 512, 128), f"{FC1}.alpha": torch.ones(2)}, f"({FC1} has an alpha of shape [2])"),
        ({**lora(FC1, 512, 128), f"{FC1}.diff": noise(512, 128)}, "is LoRA and diff at once"),
        ({**lora(FC1, 512, 128), f"{FC1}.dora_scale": noise(512, 2)}, "a DoRA magnitude [512, 2] for a weight"),
        ({**lora(FC1, 512, 128), f"{FC1}.diff_b": noise(5)}, "has a bias of [5], should be [512]"),
        ({f"{FC1}.lora_down.weight": noise(3, 128), f"{FC1}.lora_up.weight": noise(512, 4)},
         "factors that do not multiply: down [3, 128], up [512, 4]"),
        ({f"{FC1}.lora_down.weight": noise(0, 128), f"{FC1}.lora_up.weight": noise(512, 0)}, "has an empty tensor"),
        ({f"{FC1}.lokr_w1": noise(8, 4), f"{FC1}.lokr_w2_a": noise(64, 2)}, "has no lokr_w2_b beside"),
        ({f"{FC1}.hada_w1_a": noise(512, 2), f"{FC1}.hada_w1_b": noise(2, 128)}, "has no hada_w2_a beside"),
        ({f"{LAST}.diff": noise(1)}, "is [1], should be [256, 128]"),
        ({f"{FC1}.lokr_w{i}": noise(1 << 10, 1 << 10) for i in (1, 2)}, "is [1048576, 1048576]"),
    ],
)  # fmt: skip
def test_nothing_applies(tmp_path: Path, tensors: dict[str, Tensor], told: str) -> None:
    toy = Toy(tmp_path, "transformer")
    with pytest.raises(CheckpointError) as caught:
        toy.add(tensors)
    assert str(caught.value).startswith(f"{tmp_path}/a.safetensors: nothing of it applies to this model: ")
    assert told in str(caught.value)
    assert toy.changed() == {}


def test_names_from_a_file_cannot_forge_lines(toy: Toy) -> None:
    tensors = {**lora(FC1, 4 * WIDTH, WIDTH), **lora("x\nerror: \x1b[31m" + "y" * 500, 8, 8)}
    with pytest.warns(UserWarning, match=r"x\\nerror: \\x1b\[31my{100,150}\.\.\.\)"):
        toy.add(tensors)


def test_two_spellings_of_a_module_count_once(toy: Toy) -> None:
    tensors, kohya = lora(FC1, 4 * WIDTH, WIDTH), "lora_unet_joint_blocks_0_x_block_mlp_fc1"
    again = {key.replace(FC1, kohya): t for key, t in tensors.items()}
    with pytest.warns(UserWarning, match=rf"1 that do not fit \({kohya} is {FC1} again\)"):
        toy.add({**tensors, **again, f"diffusion_model.{FC1}.diff_b": noise(4 * WIDTH)})
    assert close(toy.changed()["transformer", f"{FC1}.weight"], delta(tensors, FC1))
    assert close(toy.changed()["transformer", f"{FC1}.bias"], noise(4 * WIDTH))


def test_a_bias_without_a_place_is_told(toy: Toy) -> None:
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    with pytest.warns(UserWarning, match=rf"1 that do not fit \({name} \(bias\) has no place in the model\)"):
        toy.add({**lora(name, 64, 256), f"{name}.diff_b": noise(64)})
    assert len(toy.changed()) == 1


def test_clip_l_without_projection_ignores_its_adapter(tmp_path: Path) -> None:
    """Stability's files have none and OneTrainer trains one; the rest applies, nothing is warned of."""
    toy = Toy(tmp_path, "clip_l")
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.add({**lora(name, 256, 64), **lora("lora_te1_text_projection", 64, 64), "bundle_emb.x.clip_l": noise(2)})
    assert len(toy.changed()) == 1


# ---- what is refused -----------------------------------------------------------------------------


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


def test_weights_are_left_alone_when_a_merge_fails(toy: Toy) -> None:
    """A number that is not finite, in the last of many tensors or in an alpha."""
    for bad in ({f"{LAST}.diff": torch.full((256, 128), float("nan"))}, {f"{FC1}.alpha": torch.tensor(float("inf"))}):
        with pytest.raises(CheckpointError, match=r"NaN or infinity in float32|alpha is inf: expected a number"):
            toy.add({**many(), **bad})
        assert toy.changed() == {}
        assert toy.adapters.scales == {}


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
        ({"peft_type": "OFT"}, "peft_type OFT is not supported: expected LORA"),
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
