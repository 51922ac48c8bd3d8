"""Maps of attention and their gradients, against the formula with its whole table, without checkpoints."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import randomize
from test_attention import products
from torch import Tensor

from mmdit import variants
from mmdit.attention import attention, attention_by
from mmdit.common.errors import SettingsError
from mmdit.config import TOY, MMDiTConfig
from mmdit.inside import ablate
from mmdit.kernels.compiled import compile_blocks
from mmdit.maps import Chosen, Look, Seen, seen, shares
from mmdit.model import MMDiT
from mmdit.prepared import Prepared, Row, look
from mmdit.recompute import recomputed

SMALL = replace(TOY, depth=3, dual_attention_blocks=(0, 1))


def model_of(config: MMDiTConfig = SMALL, seed: int = 0) -> MMDiT:
    return randomize(MMDiT(config), seed).requires_grad_(False).eval()


def given(rows: int, height: int = 6, width: int = 10, text: int = 7, seed: int = 1) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 16, height, width, generator=draw)
    sigma = torch.linspace(0.9, 0.3, rows)
    context = torch.randn(rows, text, SMALL.context_size, generator=draw)
    return latents, sigma, context, torch.randn(rows, SMALL.pooled_size, generator=draw)


def uneven(maps: Tensor) -> Tensor:
    """A cost in which every block, token and place has a part of its own."""
    weights = torch.arange(1, maps.numel() + 1, dtype=maps.dtype, device=maps.device).reshape(maps.shape).sqrt()
    return (weights * maps).sin().sum() + (maps + 1e-3).log().mean()


def by_formula(
    model: MMDiT, inputs: Sequence[Tensor], tokens: Sequence[Sequence[int]], cost: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Velocity, each row's maps and the gradient of all costs, with the table of every attention kept."""
    latents, *rest = inputs
    latents = latents.clone().requires_grad_()
    rows, columns = model.grid(latents)
    tables: list[Tensor] = []

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is None
        table = (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
        tables.append(table)
        return torch.einsum("bhnm,bmhd->bnhd", table, v)

    for block in model.joint_blocks:
        attn: Any = block.x_block.attn
        attn.backend = dense
    velocity = model(latents, *rest)
    for block in model.joint_blocks:
        attn = block.x_block.attn
        del attn.backend
    maps = []
    for r, own in enumerate(tokens):
        each = [table[r, :, -rows * columns :, list(own)].mean(dim=0) for table in tables]  # (N, tokens)
        maps.append(torch.stack([one.T.reshape(len(own), rows, columns) for one in each]))
    (gradient,) = torch.autograd.grad(sum(cost(one) for one in maps), latents)
    return velocity.detach(), [one.detach() for one in maps], gradient


def near(a: Tensor, b: Tensor, most: float = 1e-5) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= most * float(b.norm())


def looked(model: MMDiT, inputs: Sequence[Tensor], looks: Sequence[Look | None]) -> tuple[Tensor, list[Seen | None]]:
    latents, *rest = inputs
    with torch.no_grad():
        return seen(model, latents, looks, lambda x: model(x, *rest))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("size", [(6, 10), (2, 2), (8, 4)])
def test_maps_and_gradients_are_those_of_the_whole_table(size: tuple[int, int], qk_norm: bool) -> None:
    """Of a batch whose rows look at other tokens, at noise levels of their own."""
    model, inputs = model_of(replace(SMALL, qk_norm=qk_norm)), given(3, *size)
    tokens = [(0, 3), (5,), (1, 2, 6)]
    velocity, maps, gradient = by_formula(model, inputs, tokens, uneven)
    found, each = looked(model, inputs, [Look(own, uneven) for own in tokens])
    assert near(found, velocity)
    for r, one in enumerate(each):
        assert one is not None and one.cost is not None and one.gradient is not None
        assert near(one.maps, maps[r]) and abs(float(one.cost - uneven(maps[r]))) <= 1e-5
        assert near(one.gradient, gradient[r : r + 1])
    assert not found.requires_grad


def test_maps_alone_need_no_gradients() -> None:
    """Rows that look at nothing are told nothing; the velocity is the plain one, bit by bit."""
    model, inputs = model_of(), given(3)
    _, maps, _ = by_formula(model, inputs, [(0, 3), (), (4,)], uneven)
    found, (first, none, last) = looked(model, inputs, [Look((0, 3)), None, Look((4,))])
    with torch.no_grad():
        assert torch.equal(found, model(*inputs))
    assert none is None and first is not None and last is not None
    assert near(first.maps, maps[0]) and near(last.maps, maps[2])
    assert first.cost is None and first.gradient is None


def test_nothing_is_left_behind() -> None:
    """Neither after a pass nor after a cost that raises."""
    model, inputs = model_of(), given(1)
    before = [*model.joint_blocks]
    attention_by(model, "sdpa")

    def wrong(_: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        looked(model, inputs, [Look((0,), wrong)])
    looked(model, inputs, [Look((0,), uneven)])
    assert [*model.joint_blocks] == before
    assert [block.x_block.attn.backend for block in before] == ["sdpa"] * 3


@pytest.mark.parametrize("backend", ["sdpa", "math", pytest.param("cores", marks=products)])
def test_every_backend(backend: str) -> None:
    """One that computes no gradients gives way."""
    model, inputs = model_of(), given(2)
    velocity, maps, gradient = by_formula(model, inputs, [(2, 5)] * 2, uneven)
    attention_by(model, backend)
    most, dtype = (0.08, torch.bfloat16) if backend == "cores" else (1e-5, torch.float32)
    inputs = [t.to(dtype) if i != 1 else t for i, t in enumerate(inputs)]
    found, each = looked(model.to(dtype), inputs, [Look((2, 5), uneven)] * 2)
    assert near(found, velocity, most)
    for r, one in enumerate(each):
        assert one is not None and one.gradient is not None
        assert near(one.maps, maps[r], most) and near(one.gradient, gradient[r : r + 1], most)


def test_compiled_blocks() -> None:
    """They compute by their own code meanwhile, edits included, and are compiled again after it."""
    from torch._dynamo.testing import CompileCounter

    model, inputs = model_of(replace(SMALL, depth=1, dual_attention_blocks=())), given(2)
    velocity, maps, gradient = by_formula(model, inputs, [(2, 5)] * 2, uneven)
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    found, each = looked(model, inputs, [Look((2, 5), uneven)] * 2)
    assert near(found, velocity)
    for r, one in enumerate(each):
        assert one is not None and one.gradient is not None
        assert near(one.maps, maps[r]) and near(one.gradient, gradient[r : r + 1])
    assert counter.frame_count == 0
    with torch.no_grad():
        assert near(model(*inputs), velocity)
    assert counter.frame_count > 0


def test_half_precision() -> None:
    """Small gradients are not lost in float16, nor is bfloat16 far off."""
    model, inputs = model_of(), given(1)
    small: Any = lambda maps: 1e-6 * uneven(maps)  # noqa: E731
    _, _, gradient = by_formula(model, inputs, [(2, 5)], small)
    for dtype, most in ((torch.bfloat16, 0.08), (torch.float16, 0.01)):
        half = [t.to(dtype) if i != 1 else t for i, t in enumerate(inputs)]
        _, (one,) = looked(model_of().to(dtype), half, [Look((2, 5), small)])
        assert one is not None and one.gradient is not None
        assert one.gradient.dtype == one.maps.dtype == torch.float32
        assert near(one.gradient, gradient, most)


def test_a_mask_and_more_tokens_than_a_head_is_wide() -> None:
    draw = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 5, 2, 4, generator=draw), torch.randn(2, 9, 2, 4, generator=draw)
    bias = torch.randn(2, 1, 5, 9, generator=draw)
    masked = bias > -0.5
    chosen = [tuple(range(9)), (8, 1)]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 2
    for given_bias, added in ((None, scores), (bias, scores + bias), (masked, scores.masked_fill(~masked, -torch.inf))):
        table = added.softmax(dim=-1).permute(0, 2, 1, 3)  # (R, N, H, M)
        found = shares(q, k, Chosen(chosen), "auto", given_bias)
        assert near(found[0], table[0]) and near(found[1, ..., :2], table[1][..., [8, 1]])
        assert not found[1, ..., 2:].any()


def test_a_text_with_tokens_of_the_models_own_is_told() -> None:
    """The numbers of its tokens would be those of others."""
    model, (latents, _, context, pooled) = model_of(), given(1)
    plain = model.embed_text
    model.embed_text = lambda context: torch.cat([plain(context)[:, :1], plain(context)], dim=1)
    with pytest.raises(SettingsError, match="tokens of its own beside the text's"), torch.no_grad():
        look(latents, [Row(Prepared(model, context, pooled), 0.5, 0, None, Look((0,)))])


def test_what_is_in_a_block_is_computed_again() -> None:
    """But in the last, where the way back begins."""
    model, inputs, calls = model_of(), given(1), [0, 0, 0]
    for i, block in enumerate(model.joint_blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    looked(model, inputs, [Look((0,), uneven)])
    assert calls == [2, 2, 1]
    looked(model, inputs, [Look((0,))])
    assert calls == [3, 3, 2]


def test_what_blocks_give_each_other_beside_the_tokens_has_its_gradient() -> None:
    """As in value residuals: the values of the first block's attention reach all others by a list."""
    model, inputs = variants.load("benchmarks.variants.value_residual").build(SMALL), given(2)
    randomize(model, 0).requires_grad_(False)
    velocity, maps, gradient = by_formula(model, inputs, [(2, 5)] * 2, uneven)
    found, each = looked(model, inputs, [Look((2, 5), uneven)] * 2)
    assert near(found, velocity)
    for r, one in enumerate(each):
        assert one is not None and one.gradient is not None
        assert near(one.maps, maps[r]) and near(one.gradient, gradient[r : r + 1])


def nothing(_: int, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(stream) for stream in streams)


def text_alone(_: int, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return streams[1], streams[1]


@pytest.mark.parametrize("by", ["zero", "mean", nothing, text_alone])
def test_what_stands_in_a_blocks_place_has_its_gradient(by: Any) -> None:
    """The tokens as they came, tokens of no gradient, one stream in the place of both."""
    model, (latents, *rest) = model_of(), given(1, 6, 10, text=15)  # as many words as places
    leaf, found = latents.clone().requires_grad_(), list[Tensor]()
    with ablate(model, "joint_blocks.1", by=by):
        for again in (nullcontext(), recomputed(model, {})):
            with again:
                cost = model(leaf, *rest).square().sum() + 0 * leaf.sum()
                found += torch.autograd.grad(cost, leaf)
    plain, ours = found
    assert near(ours, plain) and bool(plain.any()) == (by is not nothing)


def test_a_mask_holds_for_maps_too() -> None:
    """Of an attention that leaves out some of the text: what is left out has no share, with gradients and without."""
    model, inputs = model_of(), given(1)
    for block in model.joint_blocks:
        attn: Any = block.x_block.attn

        def attend(q: Tensor, k: Tensor, v: Tensor, _: Any, attn: Any = attn) -> Tensor:
            asks = torch.arange(q.shape[1])[:, None] % 2 == 0
            bias = (torch.arange(k.shape[1]) != 3) | asks  # every other token does not gather from the third word
            return attention(q, k, v, attn.backend, bias[None, None])

        attn.attend = attend
    _, (plain,) = looked(model, inputs, [Look((2, 3))])
    _, (steep,) = looked(model, inputs, [Look((2, 3), lambda maps: maps.sum())])
    assert plain is not None and steep is not None
    assert near(plain.maps, steep.maps)
    third = plain.maps[:, 1].flatten(1)
    # Of 15 places the odd ones: 7, and 8 where an odd number of words stands before them, in all blocks but the last.
    assert (third == 0).sum(1).tolist() == [8, 8, 7] and (plain.maps[:, 0] > 0).all()


def test_an_attention_without_shares_is_told() -> None:
    model, inputs = model_of(), given(1)
    block: Any = model.joint_blocks[1]
    block.x_block.attn = torch.nn.Identity()
    with pytest.raises(SettingsError, match="block 1 of this variant has no attention with shares"):
        looked(model, inputs, [Look((0,))])


def test_pytorchs_compiler_is_not_imported() -> None:
    """It takes a second or more, and compiles nothing here."""
    script = """
import sys, torch
from mmdit.maps import Look, seen
from mmdit.config import TOY
from mmdit.model import MMDiT
model = MMDiT(TOY).requires_grad_(False)
given = torch.ones(1), torch.zeros(1, 3, TOY.context_size), torch.zeros(1, TOY.pooled_size)
looks = [Look((0, 2), lambda maps: maps.square().sum())]
_, (found,) = seen(model, torch.zeros(1, TOY.in_channels, 4, 4), looks, lambda x: model(x, *given))
assert found.gradient is not None
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
