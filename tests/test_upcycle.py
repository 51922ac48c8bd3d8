"""Weights of one architecture in another: what is taken, by which rule, and that what is new begins silent."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdit import variants
from mmdit.config import TOY, MMDiTConfig
from mmdit.model import MMDiT
from mmdit.upcycle import Taken, summary, upcycle
from mmdit.variants import PLAIN, Variant

BASE = replace(TOY, depth=3, dual_attention_blocks=(0,))


def filled(config: MMDiTConfig = BASE, variant: Variant = PLAIN, seed: int = 0) -> MMDiT:
    torch.manual_seed(seed)
    model = variant.build(variant.config(**{f.name: getattr(config, f.name) for f in fields(config)}))
    for tensor in model.state_dict().values():
        nn.init.normal_(tensor, std=0.1)
    return model.eval()


@torch.no_grad()
def evaluated(model: MMDiT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 16, 8, 6), (2, 5, BASE.context_size), (2, BASE.pooled_size))
    latent, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return model(latent, torch.tensor([0.9, 0.2]), context, pooled)


def how(told: list[Taken]) -> dict[str, str]:
    return {each.name: each.how for each in told}


def test_the_same_architecture_is_taken_whole() -> None:
    one, other = filled(), filled(seed=1)
    assert set(how(upcycle(other, one.state_dict())).values()) == {"taken"}
    assert torch.equal(evaluated(one), evaluated(other))


def test_second_attentions_everywhere_begin_as_none_were_there() -> None:
    """All of the new ones copy the first attention, and are silent: the same velocity, to the bit of rounding."""
    one = filled()
    more = filled(variant=variants.load("benchmarks.variants.attn2_everywhere"), seed=1)
    told = how(upcycle(more, one.state_dict()))
    assert torch.allclose(evaluated(one), evaluated(more), atol=1e-5, rtol=1e-5)
    assert told["joint_blocks.1.x_block.adaLN_modulation.1.weight"] == "reshaped"
    assert told["joint_blocks.1.x_block.attn2.qkv.weight"] == "copied"
    state = more.state_dict()
    assert torch.equal(
        state["joint_blocks.1.x_block.attn2.qkv.weight"], state["joint_blocks.1.x_block.attn.qkv.weight"]
    )
    assert not state["joint_blocks.1.x_block.adaLN_modulation.1.bias"][6 * BASE.hidden_size :].any()


def test_new_blocks_copy_the_last_and_begin_silent() -> None:
    """The old last block's text ends at q, k and v: what it lacks is new, its modulation of two chunks is reshaped."""
    one = filled()
    deeper = filled(replace(BASE, depth=5), seed=1)
    told = how(upcycle(deeper, one.state_dict()))
    for block in (3, 4):
        assert told[f"joint_blocks.{block}.x_block.mlp.fc1.weight"] == "copied"
        bias = deeper.state_dict()[f"joint_blocks.{block}.x_block.adaLN_modulation.1.bias"].chunk(6)
        assert [bool(chunk.any()) for chunk in bias] == [True, True, False, True, True, False]
    assert told["joint_blocks.2.context_block.mlp.fc1.weight"] == "new"
    assert told["joint_blocks.2.context_block.adaLN_modulation.1.weight"] == "reshaped"
    # The image's way through the new blocks changes nothing.
    assert torch.allclose(evaluated(one), evaluated(deeper), atol=1e-5, rtol=1e-5)


def test_a_wider_table_and_fewer_channels_keep_the_corner() -> None:
    class Pair(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.full(shape, 7.0))

    one, wide, low = torch.arange(6.0).view(2, 3), Pair(3, 4), Pair(1, 2)
    for model in (wide, low):
        assert upcycle(model, {"table": one})[0].how == "reshaped"
    assert wide.table.tolist() == [[0, 1, 2, 7], [3, 4, 5, 7], [7, 7, 7, 7]]
    assert low.table.tolist() == [[0, 1]]
    assert upcycle(flat := Pair(6), {"table": one}) == [Taken("table", "new", "[2, 3] has no corner in [6]")]
    assert flat.table.tolist() == [7.0] * 6


@pytest.mark.parametrize(("name", "new", "dropped"), [
    ("registers", ["registers"], []),
    ("rope", [], ["pos_embed"]),
    ("rmsnorm", [], []),
    ("value_residual", ["joint_blocks.1.x_block.attn.mix", "joint_blocks.2.x_block.attn.mix"], []),
])  # fmt: skip
def test_a_variant_takes_what_it_shares(name: str, new: list[str], dropped: list[str]) -> None:
    one, other = filled(), filled(variant=variants.load(f"benchmarks.variants.{name}"), seed=1)
    told = upcycle(other, one.state_dict())
    assert [t.name for t in told if t.how == "new"] == new
    assert [t.name for t in told if t.how == "dropped"] == dropped
    for key, value in one.state_dict().items():
        assert key in dropped or torch.equal(other.state_dict()[key], value)


def test_the_summary_counts_and_names_what_is_not_just_taken() -> None:
    told = [Taken("a", "taken"), Taken("b", "taken"), Taken("c", "new"), Taken("d", "reshaped", "[2] to [3]")]
    assert summary(told).splitlines() == ["2 taken, 1 reshaped, 1 new", "new: c", "reshaped: d ([2] to [3])"]


def test_other_number_formats_are_converted() -> None:
    one: Any = filled()
    other = filled(seed=1)
    upcycle(other, {name: tensor.bfloat16() for name, tensor in one.state_dict().items()})
    assert {tensor.dtype for tensor in other.state_dict().values()} == {torch.float32}
    assert torch.allclose(evaluated(one), evaluated(other), atol=0.05)
