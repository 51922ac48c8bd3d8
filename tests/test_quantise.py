"""The transformer in 8 bits: arithmetic written out, and what becomes of the picture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import relative_error
from safetensors.torch import save_file
from sweeps import sampled
from torch import Tensor, nn
from toys import toy_folder

from mmdit.config import TOY
from mmdit.driver.pipeline import Pipeline
from mmdit.kernels.quantise import FORMATS, QuantisedLinear, quantised, rounded, scales
from mmdit.memory.empty import on_meta
from mmdit.memory.residency import Mode
from mmdit.model import MMDiT

SIZE = {"prompt": "a horse", "width": 96, "height": 64, "steps": 2, "t5_length": 20}
# Half a step of the largest number of a row over its usual size: 127 steps, or 3 bits of mantissa.
ERRORS = {"int8": 0.012, "fp8": 0.035}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("quantise"))


def velocity(pipeline: Pipeline) -> Tensor:
    trace: dict[str, Tensor] = {}
    pipeline.run(replace(pipeline.settings, **SIZE), trace)
    return trace["velocity.0"]


def test_int8_by_hand() -> None:
    """The largest of a row becomes 127; the others the nearest whole number; a row of zeros stays one."""
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [254.0, 3.0, -1.0]])
    scale = scales(weight, torch.int8)
    assert torch.allclose(scale, torch.tensor([2 / 127, 1e-12, 2.0]))
    assert rounded(weight, scale, torch.int8).tolist() == [[64, -127, 32], [0, 0, 0], [127, 2, 0]]


def test_fp8_by_hand() -> None:
    """The largest of a row becomes 448; e4m3 has three bits after the first: 224 to 448 in steps of 32."""
    weight = torch.tensor([[448.0, 300.0, -230.0, 17.0]])
    scale = scales(weight, torch.float8_e4m3fn)
    assert scale.tolist() == [1.0]
    assert rounded(weight, scale, torch.float8_e4m3fn).float().tolist() == [[448.0, 288.0, -224.0, 16.0]]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_the_layer_of_the_rounded_matrix(kind: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(37, 19).to(dtype).requires_grad_(False)
    linear.weight.mul_(0.01)  # the scales of so small a matrix are no numbers of float16
    layer = QuantisedLinear(linear, FORMATS[kind])
    layer.weight_scale.data = scales(linear.weight, FORMATS[kind])
    layer.weight.data = rounded(linear.weight, layer.weight_scale, FORMATS[kind])
    x = torch.randn(5, 37, dtype=dtype)
    matrix = layer.weight.double() * layer.weight_scale.double()[:, None]
    assert relative_error(matrix, linear.weight) <= ERRORS[kind]
    expected = x.double() @ matrix.T + linear.bias.double()
    assert relative_error(layer(x), expected) <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", FORMATS)
def test_only_the_matrices_of_the_blocks_are_in_8_bits(kind: str) -> None:
    """No modulation (adaLN), no embedding, not the final layer; of a dual block, a plain one, and a last one."""
    model = quantised(on_meta(MMDiT, replace(TOY, depth=3)), kind)
    found = {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    expected = {f"joint_blocks.0.x_block.attn2.{leaf}" for leaf in ("qkv", "proj")}
    for i in range(3):
        expected |= {f"joint_blocks.{i}.x_block.{leaf}" for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        rest = ("attn.qkv",) if i == 2 else ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        expected |= {f"joint_blocks.{i}.context_block.{leaf}" for leaf in rest}
    assert found == expected


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", sampled(["fp32", "bf16"], 2))
def test_the_velocity_is_near_in_every_plan(folder: Path, kind: str, dtype: str) -> None:
    """And the same bit for bit, whether the matrices stay or come block by block."""
    exact = velocity(Pipeline.load(folder, dtype="fp32", device="cpu"))
    pipeline = Pipeline.load(folder, dtype=dtype, device="cpu", quantise=kind)
    found = velocity(pipeline)
    assert 1e-5 < relative_error(found, exact) <= 3 * ERRORS[kind]
    for mode in Mode:
        plan = replace(pipeline.plan, modes={**pipeline.plan.modes, "transformer": mode})
        pipeline.plan_for = lambda _, plan=plan: plan
        assert torch.equal(velocity(pipeline), found)
    layer = pipeline.transformer.joint_blocks[0].x_block.mlp.fc1
    assert isinstance(layer, QuantisedLinear)
    assert layer.weight.dtype == FORMATS[kind]


def test_it_takes_half_the_memory(folder: Path) -> None:
    plain, less = (Pipeline.load(folder, dtype="bf16", device="cpu", quantise=kind) for kind in ("none", "int8"))
    large = [name for unit in plain.residency.networks["transformer"].blocks for name in unit.names]
    sizes = [sum(map(p.residency.networks["transformer"].source.nbytes, large)) for p in (plain, less)]
    assert sizes[1] == sizes[0] / 2


@pytest.mark.parametrize("mode", [Mode.RESIDENT, Mode.STREAMED])
def test_adapters_are_merged_before_the_rounding(folder: Path, tmp_path: Path, mode: Mode) -> None:
    """Added, taken out, and added again."""
    tensors = {
        "transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.randn(3, 512),
        "transformer.transformer_blocks.0.ff.net.2.lora_B.weight": torch.randn(128, 3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    pipeline = Pipeline.load(folder, dtype="fp32", device="cpu", quantise="int8")
    plan = replace(pipeline.plan, modes={**pipeline.plan.modes, "transformer": mode})
    pipeline.plan_for = lambda _: plan
    before = velocity(pipeline)
    name = pipeline.adapters.add(tmp_path / "a.safetensors", 0.1).name
    found = velocity(pipeline)
    exact = velocity(Pipeline.load(folder, dtype="fp32", device="cpu", lora=[f"{tmp_path / 'a.safetensors'}:0.1"]))
    assert relative_error(found, exact) <= 3 * ERRORS["int8"] < relative_error(before, exact)
    pipeline.adapters.remove(name)
    assert torch.equal(velocity(pipeline), before)
