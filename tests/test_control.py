"""ControlNets live against diffusers', and their residuals in the transformer against diffusers' and by hand."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from controls import INSTANTX, KINDS, LARGE, MEDIUM3, STABILITY, TENSORART, TRANSFORMERS, control_for, nets
from reference import Inputs, draw, relative_error, transformers
from torch import Tensor

from mmdit.altered import Change
from mmdit.config import SD35_LARGE
from mmdit.control.adding import Added, adding, residual_of
from mmdit.control.network import ControlConfig, ControlNet
from mmdit.control.options import MAPS, TYPES
from mmdit.control.rows import Control, added, residuals
from mmdit.memory.empty import on_meta
from mmdit.model import MMDiT, Tokens
from mmdit.prepared import Prepared, Row, predict
from weights.control import TYPES as FILE_TYPES

SIGMAS = (0.98738, 0.11, 0.00893)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def control_of(config: ControlConfig, latent: Tensor) -> Tensor:
    shape = (len(latent), config.control_channels, *latent.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def diffusers_residuals(kind: str, inputs: Inputs, control: Tensor, scale: float = 1.0) -> list[Tensor]:
    """As diffusers' pipeline asks for them."""
    config, theirs = KINDS[kind], nets(KINDS[kind])[1]
    latent = inputs.latent
    if not config.context_size:  # the pipeline gives it the transformer's embedding
        latent = transformers(TRANSFORMERS[kind]).theirs.pos_embed(latent)
    return theirs(
        latent,
        control,
        scale,
        inputs.context if config.context_size else None,
        inputs.pooled,
        1000.0 * inputs.sigma,
        return_dict=False,
    )[0]


def velocity_of_diffusers(kind: str, inputs: Inputs, samples: list[Tensor]) -> Tensor:
    model = transformers(TRANSFORMERS[kind]).theirs
    return model(inputs.latent, inputs.context, inputs.pooled, 1000.0 * inputs.sigma, samples, return_dict=False)[0]


def own_residuals(kind: str, inputs: Inputs, control: Tensor) -> list[Tensor]:
    """By what is prepared, as a drawing asks for them."""
    net, model = nets(KINDS[kind])[0], transformers(TRANSFORMERS[kind]).ours
    prepared = Prepared(net, inputs.context, inputs.pooled, SIGMAS[:1])
    rows = [Row(prepared, float(sigma), i) for i, sigma in enumerate(inputs.sigma)]
    return residuals(model, inputs.latent, rows, control)


# ---- the net -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(18, 26, 77), (2, 6, 1)])
def test_residuals_are_those_of_diffusers(kind: str, rows: int, columns: int, tokens: int) -> None:
    inputs = draw(TRANSFORMERS[kind], rows, columns, tokens, SIGMAS)
    control = control_of(KINDS[kind], inputs.latent)
    found, expected = own_residuals(kind, inputs, control), diffusers_residuals(kind, inputs, control)
    assert len(found) == len(expected) == KINDS[kind].depth
    for ours, theirs in zip(found, expected):
        assert ours.std() > 0.1
        assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_matters_in_these_comparisons(kind: str) -> None:
    inputs = draw(TRANSFORMERS[kind], 6, 10, 7, SIGMAS[:2])
    control, net = control_of(KINDS[kind], inputs.latent), copy.deepcopy(nets(KINDS[kind])[0])
    x = None if KINDS[kind].context_size else torch.randn(2, 15, net.config.hidden_size)
    plain, idle = torch.stack(net(*inputs, control, x)), []
    for name, tensor in net.state_dict().items():
        kept = tensor.clone()
        tensor.fill_(1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0)
        if relative_error(torch.stack(net(*inputs, control, x)), plain) < 1e-4:
            idle.append(name)
        tensor.copy_(kept)
    last = f"joint_blocks.{net.config.depth - 1}.context_block."  # its text goes nowhere but into the attention
    ends = ("attn.proj.weight", "attn.proj.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "ln_q.weight")
    unused = {
        last + ("attn." if end.startswith("ln") else "mlp." if end.startswith("fc") else "") + end for end in ends
    }
    assert set(idle) <= unused


# ---- in the transformer --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_controlled_velocity_is_that_of_diffusers(kind: str) -> None:
    inputs = draw(TRANSFORMERS[kind], 10, 6, 77, SIGMAS)
    control = control_of(KINDS[kind], inputs.latent)
    model = transformers(TRANSFORMERS[kind]).ours
    part = Added(own_residuals(kind, inputs, control), scale=0.7)
    with adding(model, [part]):
        found = model(*inputs)
    expected = velocity_of_diffusers(kind, inputs, diffusers_residuals(kind, inputs, control, 0.7))
    plain = model(*inputs)
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(found, plain) > 0.05
    assert torch.equal(plain, model(*inputs)), "hooks are left behind"


def test_rows_have_controls_of_their_own_or_none() -> None:
    """A batch of four: both nets, the first alone, none, the second alone; each is as it is alone."""
    model = transformers(MEDIUM3).ours
    inputs = draw(MEDIUM3, 10, 6, 7, (0.9, 0.5, 0.5, 0.1))
    latent, _, context, pooled = inputs
    prepared = {kind: Prepared(nets(KINDS[kind])[0], context, pooled) for kind in ("sd3", "inpainting")}
    prepared["model"] = Prepared(model, context, pooled)
    rows = [Row(prepared["model"], float(sigma), i) for i, sigma in enumerate(inputs.sigma)]

    def control(kind: str, i: int, scale: float) -> Control:
        return Control(prepared[kind], control_of(KINDS[kind], latent)[i : i + 1], scale, "diffusers")

    controls = [[control("sd3", 0, 0.5), control("inpainting", 0, 1.0)], [control("sd3", 1, 0.5)], [],
                [control("inpainting", 3, 0.25)]]  # fmt: skip

    def velocity(which: list[int], controls: list[list[Control]]) -> Tensor:
        some = [rows[i] for i in which]
        return predict(latent[which], some, added(model, latent[which], some, controls))

    together = velocity([0, 1, 2, 3], controls)
    for i in range(4):
        assert relative_error(together[i : i + 1], velocity([i], [controls[i]])) <= 1e-5
    assert relative_error(velocity([2], [[]]), model(*(t[2:3] for t in inputs))) <= 1e-6
    assert relative_error(velocity([0], [controls[0][:1]]), together[:1]) > 1e-3
    weaker = [control("inpainting", 3, 0.5)]
    assert relative_error(velocity([3], [weaker]), together[3:]) > 1e-3


def test_a_skipped_block_has_it_added_all_the_same() -> None:
    """As in diffusers, whose `skip_layers` leaves out the block alone."""
    pair = transformers(MEDIUM3)
    inputs = draw(MEDIUM3, 6, 4, 5, (0.5, 0.9))
    samples = [torch.randn(2, 6, MEDIUM3.hidden_size, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = pair.theirs(
        inputs.latent, inputs.context, inputs.pooled, 1000.0 * inputs.sigma, samples, return_dict=False, skip_layers=[1]
    )[0]
    prepared = Prepared(pair.ours, inputs.context, inputs.pooled)
    rows = [Row(prepared, float(sigma), i, Change("skip", (1,))) for i, sigma in enumerate(inputs.sigma)]
    assert relative_error(predict(inputs.latent, rows, [Added(samples)]), expected) <= 1e-5


@pytest.mark.parametrize(("blocks", "count"), [(24, 12), (24, 6), (24, 23), (38, 19), (5, 2), (4, 3), (4, 4), (1, 1)])
def test_maps_are_those_of_their_programs(blocks: int, count: int) -> None:
    """diffusers': what its transformer adds behind each block, found by residuals that are each block's number."""
    spread = residual_of(blocks, count, "diffusers")
    interval = blocks / count
    assert spread == [int(i / interval) if i + 1 < blocks else None for i in range(blocks)]
    repeated = [i for i in range(count) for _ in range(-(-blocks // count))][:blocks]  # ComfyUI's tuple times a number
    assert residual_of(blocks, count, "stability") == repeated


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_diffusers_transformer_spreads_residuals_so(count: int) -> None:
    model, theirs = transformers(LARGE)
    inputs = draw(LARGE, 2, 6, 3, (0.5,))
    samples = [torch.randn(1, 3, LARGE.hidden_size, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    expected = theirs(*inputs[:1], *inputs[2:], 1000.0 * inputs.sigma, samples, return_dict=False)[0]
    with adding(model, [Added(samples)]):
        assert relative_error(model(*inputs), expected) <= 1e-5


def test_stability_adds_to_the_last_block_too() -> None:
    """By the formula written out: every block's tokens, and what is added, one after another."""
    model = transformers(LARGE).ours
    inputs = draw(LARGE, 6, 4, 5, (0.5, 0.9))
    added = own_residuals("sd3.5-large", inputs, control_of(STABILITY, inputs.latent))
    x = model.x_embedder(inputs.latent) + model.positions(3, 2)
    context, told = model.embed_text(inputs.context), model.modulations(inputs.sigma, inputs.pooled)
    for i, block in enumerate(model.joint_blocks):
        x, context = block(x, context, Tokens(5, 3, 2), *told[i])
        x = x + added[i // 2]
    expected = model.unpatch(model.final_layer(x, *told[-1]), 3, 2)
    net = nets(STABILITY)[0]
    with adding(model, [Added(added, way=net.config.way)]):
        assert relative_error(model(*inputs), expected) <= 1e-6
    assert INSTANTX.way == TENSORART.way == "diffusers"


# ---- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_shapes_and_json_give_the_config_back(config: ControlConfig) -> None:
    net = on_meta(ControlNet, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    told = replace(config, pooled_zeros=config.context_size > 0)  # which shapes do not tell
    assert ControlConfig.from_shapes(shapes) == told
    assert ControlConfig.from_json(config.to_json()) == config
    assert ControlConfig.from_json(dict(nets(config)[1].config)) == config


def test_the_published_net_for_large_has_these_sizes() -> None:
    """As diffusers' script for it gives them (convert_sd3_controlnet_to_diffusers.py)."""
    told = {
        "num_layers": 19, "attention_head_dim": 64, "num_attention_heads": 38, "joint_attention_dim": None,
        "caption_projection_dim": 2048, "pooled_projection_dim": 2048, "pos_embed_max_size": None,
        "pos_embed_type": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False,
    }  # fmt: skip
    config = ControlConfig.from_json(told)
    assert config == control_for(
        SD35_LARGE, depth=19, context_size=0, pos_embed_max_size=0, qk_norm=False, pooled_zeros=False
    )
    assert isinstance(on_meta(ControlNet, config), MMDiT)


def test_options_name_what_there_is() -> None:
    assert TYPES == FILE_TYPES
    assert {config.way for config in KINDS.values()} == set(MAPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joint_attention_dim": None}, "text without positions, or positions"),
        ({"use_pos_embed": False}, "text without positions"),
        ({"pos_embed_type": None}, "pos_embed_type is null"),
        ({"joint_attention_dim": None, "use_pos_embed": False, "qk_norm": "rms_norm"}, "blocks that read a text"),
    ],
)
def test_what_no_published_net_is_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlConfig.from_json(change)
