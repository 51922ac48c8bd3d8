"""Adapters put on, rescaled and taken out again, and what does not apply."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def rested(toy: Toy) -> dict[tuple[str, str], nn.Parameter]:
    """The originals of the weights that are replaced."""
    networks = {part: n for part, n in toy.adapters._networks.items() if isinstance(n, FilledModule)}
    return {(part, name): p for part, network in networks.items() for name, p in network._originals.items()}


# ---- on and off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_taken_out_leaves_the_same_parameters(tmp_path: Path, dtype: torch.dtype) -> None:
    """The objects themselves, and the same numbers in them."""
    toy = Toy(tmp_path, dtype=dtype)
    before = {(part, n): p for part, m in toy.modules.items() for n, p in m.named_parameters()}
    report = toy.add(many(), 0.7)
    assert len(toy.changed()) == 7
    assert set(toy.changed()) == rested(toy).keys()
    toy.adapters.remove(report.name)
    after = {(part, n): p for part, m in toy.modules.items() for n, p in m.named_parameters()}
    assert all(after[place] is before[place] for place in before)
    assert toy.changed() == {}
    assert toy.adapters.scales == {}
    assert rested(toy) == {}


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


@pytest.mark.gpu
def test_originals_take_no_memory_of_the_device(tmp_path: Path) -> None:
    """They come back bit for bit, as the same parameters, on the device; merged there, and after a move."""
    toy = Toy(tmp_path, "transformer", dtype=torch.bfloat16)
    module = toy.modules["transformer"].cuda()
    parameters = dict(module.named_parameters())
    tensors = {key: t for key, t in many().items() if "lora_te" not in key}
    toy.add(tensors)
    toy.adapters.remove()  # from now on libraries have their workspaces
    before = torch.cuda.memory_allocated()
    toy.add(tensors, 0.7)
    assert {p.device.type for p in rested(toy).values()} == {"cpu"}
    assert {p.device.type for p in module.parameters()} == {"cuda"}
    assert torch.cuda.memory_allocated() <= before
    toy.adapters.rescale("a", 0.3)
    module.cpu()
    module.cuda()
    toy.adapters.remove()
    assert all(p is parameters[name] and p.is_cuda for name, p in module.named_parameters())
    assert all(torch.equal(t.cpu(), toy.before[place]) for place, t in toy.now().items())


def test_a_failure_in_the_middle_puts_everything_back(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether an adapter is put in, changed or taken out."""
    toy.add(many(), 0.7)
    merged, originals = {place: t.clone() for place, t in toy.now().items()}, rested(toy)
    second, whole = toy.write(many(), "second"), FilledModule.put
    for action in (lambda: toy.adapters.add(second), lambda: toy.adapters.rescale("a", 2.0), toy.adapters.remove):
        calls = iter(range(3))

        def fails(*arguments: Any, calls: Iterator[int] = calls) -> None:
            if next(calls, 3) == 2:
                raise KeyboardInterrupt
            whole(*arguments)

        monkeypatch.setattr(FilledModule, "put", fails)
        with pytest.raises(KeyboardInterrupt):
            action()
        assert toy.adapters.scales == {"a": 0.7}
        assert rested(toy) == originals
        assert all(torch.equal(t, merged[place]) for place, t in toy.now().items())
    monkeypatch.undo()
    toy.adapters.remove()
    assert toy.changed() == {}


def test_weights_are_left_alone_when_a_merge_fails(toy: Toy) -> None:
    """A number that is not finite, in the last of many tensors or in an alpha."""
    for bad in ({f"{LAST}.diff": torch.full((256, 128), float("nan"))}, {f"{FC1}.alpha": torch.tensor(float("inf"))}):
        with pytest.raises(CheckpointError, match=r"NaN or infinity in float32|alpha is inf: expected a number"):
            toy.add({**many(), **bad})
        assert toy.changed() == {}
        assert toy.adapters.scales == {}


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
