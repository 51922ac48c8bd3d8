"""The transformer live against diffusers' on the same random weights, as a whole and part by part."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from manifests import manifest, meta, shapes
from reference import (
    Inputs,
    diffusers_velocity,
    draw,
    relative_error,
    rounded,
    transformer_json,
    transformers,
)
from sweeps import sampled
from torch import Tensor, nn

from mmdit.config import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, TOY, MMDiTConfig
from mmdit.model import JointBlock, MMDiT, Tokens, crop_positions, timestep_waves

SIGMAS = (1.0, 0.98738, 0.11, 0.00893)
PLAIN = replace(TOY, qk_norm=False, dual_attention_blocks=())
DEEP = replace(TOY, hidden_size=192, num_heads=3, depth=4, dual_attention_blocks=(0, 1))
# Block 0 is of the dual kind, block 1 of the plain kind, block 2 plain and last; in ALL_DUAL the last is dual.
KINDS = replace(TOY, depth=3)
ALL_DUAL = replace(TOY, hidden_size=256, num_heads=4, depth=3, dual_attention_blocks=(0, 1, 2))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rows", "columns", "tokens", "sigmas"),
    [
        (TOY, 2, 14, 77, (1.0,)),
        (TOY, 18, 26, 333, (0.98738, 0.11, 0.00893)),
        (TOY, 2, 2, 1, (0.11,)),
        (TOY, 64, 64, 77, (0.98738,)),
        (PLAIN, 10, 6, 154, (1.0, 0.11, 0.00893)),
        (replace(PLAIN, hidden_size=192, num_heads=3, depth=3), 18, 26, 589, (0.98738,)),
        (replace(TOY, qk_norm=False, dual_attention_blocks=(1,)), 26, 18, 77, (0.98738, 0.98738, 0.5)),
        (replace(TOY, depth=1, dual_attention_blocks=()), 10, 6, 77, (0.00893,)),
        (replace(TOY, depth=1, dual_attention_blocks=(0,)), 6, 10, 154, (1.0, 0.98738, 0.0)),
        (replace(TOY, depth=3, dual_attention_blocks=()), 14, 2, 333, (0.11, 1.0, 0.5)),
        (replace(TOY, depth=3, dual_attention_blocks=(2,)), 2, 14, 154, (0.98738,)),
        (ALL_DUAL, 10, 6, 77, (0.98738, 0.11, 1.0)),
        (replace(DEEP, pos_embed_max_size=33), 18, 26, 154, (0.98738, 0.00893, 0.11)),
        (replace(DEEP, dual_attention_blocks=(1, 3), num_heads=6), 2, 14, 589, (0.11,)),
        (replace(TOY, patch_size=4, in_channels=4), 12, 20, 77, (0.98738, 0.11)),
        (replace(TOY, patch_size=1, in_channels=3), 5, 7, 77, (0.98738, 0.11)),
    ],
)
def test_velocity_is_that_of_diffusers(
    config: MMDiTConfig, rows: int, columns: int, tokens: int, sigmas: tuple[float, ...]
) -> None:
    ours, theirs = transformers(config)
    inputs = draw(config, rows, columns, tokens, sigmas)
    velocity = ours(*inputs)
    assert velocity.std() > 0.1
    assert relative_error(velocity, diffusers_velocity(theirs, inputs)) <= 1e-5


@pytest.mark.parametrize("config", sampled([TOY, PLAIN, replace(TOY, depth=4, dual_attention_blocks=(0, 1))], 3))
def test_bfloat16_is_as_near_to_the_exact_velocity_as_diffusers_is(config: MMDiTConfig) -> None:
    """Errors of both in bfloat16 against float64 with the same rounded weights, mean over seeds."""
    ours_off, theirs_off = [], []
    for seed in range(6):
        ours, theirs, exact = rounded(transformers(config, seed), torch.bfloat16)
        latent, sigma, context, pooled = draw(config, 10 + 2 * seed, 16, 77, (0.98738, 0.11))
        inputs = Inputs(latent.bfloat16(), sigma, context.bfloat16(), pooled.bfloat16())
        doubles = Inputs(*(t.double() for t in inputs))._replace(sigma=sigma)
        velocity = diffusers_velocity(exact, doubles)
        assert ours(*inputs).dtype == torch.bfloat16
        ours_off.append(relative_error(ours(*inputs), velocity))
        theirs_off.append(relative_error(diffusers_velocity(theirs, inputs), velocity))
    assert sum(ours_off) <= 1.05 * sum(theirs_off), f"{ours_off} against {theirs_off}"
    assert max(ours_off) <= 0.02


def test_gradient_of_the_latent_is_that_of_diffusers() -> None:
    """d (velocity . direction) / d latent of both, as guidance by gradients needs it."""
    ours, theirs = transformers(DEEP)
    inputs = draw(DEEP, 10, 6, 77, (0.98738, 0.11))
    direction = torch.randn(inputs.latent.shape, generator=torch.Generator().manual_seed(1))

    def gradient(latent: Tensor, velocity: Tensor) -> Tensor:
        return torch.autograd.grad((velocity * direction).sum(), latent)[0]

    with torch.enable_grad():
        mine = inputs._replace(latent=inputs.latent.clone().requires_grad_())
        other = inputs._replace(latent=inputs.latent.clone().requires_grad_())
        found = gradient(mine.latent, ours(*mine))
        expected = gradient(other.latent, diffusers_velocity(theirs, other))
    assert relative_error(found, expected) <= 1e-4


def test_batch_is_its_samples_one_by_one() -> None:
    ours, _ = transformers(DEEP)
    inputs = draw(DEEP, 18, 26, 154, (0.98738, 0.11, 0.00893))
    singles = torch.cat([ours(*(t[i : i + 1] for t in inputs)) for i in range(3)])
    assert relative_error(ours(*inputs), singles) <= 1e-6


@pytest.mark.parametrize(
    "config", sampled([KINDS, replace(KINDS, dual_attention_blocks=(1, 2)), replace(PLAIN, depth=3)], 3)
)
def test_every_weight_matters_in_these_comparisons(config: MMDiTConfig) -> None:
    """Without any one matrix, bias, norm or third of a modulation, diffusers' velocity is another."""
    _, theirs = transformers(config)
    inputs = draw(config, 10, 6, 77, (0.98738, 0.11))
    velocity = diffusers_velocity(theirs, inputs)
    model = copy.deepcopy(theirs)
    idle = []
    for name, tensor in model.state_dict().items():
        # The last block reads no attention of the context tokens, so their queries go nowhere.
        if name.startswith(f"transformer_blocks.{config.depth - 1}.attn.") and "add" in name and "_q" in name:
            continue
        modulation = name.startswith("norm_out") or ".norm1" in name
        parts = len(tensor) // config.hidden_size if modulation else 1
        for i, part in enumerate(tensor.chunk(parts)):
            kept = part.clone()
            part.fill_(1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0)
            if relative_error(diffusers_velocity(model, inputs), velocity) < 1e-3:
                idle.append(f"{name} {i}")
            part.copy_(kept)
    assert not idle


# ---- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TOY, DEEP, ALL_DUAL])
def test_timestep_and_pooled_text_embed_as_in_diffusers(config: MMDiTConfig) -> None:
    ours, theirs = transformers(config)
    _, sigma, _, pooled = draw(config, 2, 2, 1, SIGMAS)
    found = ours.t_embedder(timestep_waves(1000.0 * sigma)) + ours.y_embedder(pooled)
    expected = theirs.time_text_embed(1000.0 * sigma, pooled)
    for i in range(len(SIGMAS)):
        assert relative_error(found[i], expected[i]) <= 1e-6


@pytest.mark.parametrize("side", [32, 33])
@pytest.mark.parametrize(("rows", "columns"), [(2, 14), (10, 6), (18, 26), (2, 2), (64, 64), (62, 4)])
def test_patches_and_positions_embed_as_in_diffusers(side: int, rows: int, columns: int) -> None:
    config = replace(TOY, depth=1, pos_embed_max_size=side)
    ours, theirs = transformers(config)
    latent = draw(config, rows, columns, 1, (1.0, 1.0)).latent
    found = ours.x_embedder(latent) + crop_positions(ours.pos_embed, rows // 2, columns // 2)
    assert relative_error(found, theirs.pos_embed(latent)) <= 1e-6


@pytest.mark.parametrize("strength", [1.0, 1e-3], ids=["usual", "faint"])
@pytest.mark.parametrize(
    ("config", "index"),
    [(KINDS, 0), (KINDS, 1), (KINDS, 2), (ALL_DUAL, 2), (replace(PLAIN, depth=2), 0), (PLAIN, 1)],
    ids=["dual", "plain", "last", "last-dual", "plain-without-qk-norm", "last-without-qk-norm"],
)
def test_one_block_is_that_of_diffusers(config: MMDiTConfig, index: int, strength: float) -> None:
    """Both streams, each against its own. Faint tokens and queries make the epsilons of the norms count."""
    ours, theirs = transformers(config)
    block, other = copy.deepcopy(ours.joint_blocks[index]), copy.deepcopy(theirs.transformer_blocks[index])
    assert isinstance(block, JointBlock)
    assert isinstance(other, JointTransformerBlock)
    for module in (block, other):
        _weaken_queries(module, strength)
    generator = torch.Generator().manual_seed(index)
    x = strength * torch.randn(3, 35, config.hidden_size, generator=generator)
    context = strength * torch.randn(3, 77, config.hidden_size, generator=generator)
    c = torch.randn(3, config.hidden_size, generator=generator)
    found_x, found_context = block(x, context, Tokens(77, 5, 7), *block.modulation(c))
    expected_context, expected_x = other(x, context, c)
    assert relative_error(found_x, expected_x) <= 1e-6
    if index < config.depth - 1:
        assert relative_error(found_context, expected_context) <= 1e-6
    else:
        assert expected_context is None
        assert torch.equal(found_context, context)


def _weaken_queries(block: nn.Module, strength: float) -> None:
    """Scale all that makes queries and keys in a block of either kind."""
    for name, tensor in block.state_dict().items():
        if ".qkv." in name:
            tensor[: 2 * len(tensor) // 3].mul_(strength)
        elif any(part in name for part in (".to_q.", ".to_k.", ".add_q_proj.", ".add_k_proj.")):
            tensor.mul_(strength)


@pytest.mark.parametrize("strength", [1.0, 1e-3], ids=["usual", "faint"])
@pytest.mark.parametrize("config", [TOY, DEEP])
def test_final_layer_is_that_of_diffusers(config: MMDiTConfig, strength: float) -> None:
    ours, theirs = transformers(config)
    generator = torch.Generator().manual_seed(0)
    x = strength * torch.randn(3, 35, config.hidden_size, generator=generator)
    c = torch.randn(3, config.hidden_size, generator=generator)
    found = ours.final_layer(x, *ours.final_layer.modulation(c))
    assert relative_error(found, theirs.proj_out(theirs.norm_out(x, c))) <= 1e-6


@pytest.mark.parametrize(("side", "rows", "columns"), [(5, 2, 3), (5, 5, 5), (6, 1, 4), (6, 3, 6), (7, 7, 2)])
def test_position_crop_is_the_middle_of_the_table(side: int, rows: int, columns: int) -> None:
    """Against indices by hand: half of the spare rows, rounded down, above; columns likewise."""
    table = torch.arange(side * side)[None, :, None]
    top, left = math.floor((side - rows) / 2), math.floor((side - columns) / 2)
    expected = [(top + row) * side + left + column for row in range(rows) for column in range(columns)]
    assert crop_positions(table, rows, columns)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("rows", "columns"), [(66, 4), (4, 66), (68, 68)])
def test_latent_beyond_the_position_table_is_refused(rows: int, columns: int) -> None:
    ours, _ = transformers(TOY)
    with pytest.raises(AssertionError, match="more than the table"):
        ours(*draw(TOY, rows, columns, 1, (1.0,)))


# ---- names and configs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [(SD35_MEDIUM, "sd35_medium"), (SD3_MEDIUM, "sd3_medium"), (SD35_LARGE, "sd35_large")],
)
def test_names_and_shapes_are_the_published_ones(config: MMDiTConfig, name: str) -> None:
    found = _shapes(config)
    assert found == shapes(f"{name}.stability.mmdit")
    assert MMDiTConfig.from_shapes(found) == config


@pytest.mark.parametrize(
    ("config", "name"),
    [(SD35_MEDIUM, "sd3.5-medium"), (SD3_MEDIUM, "sd3-medium"), (SD35_LARGE, "sd3.5-large")],
)
def test_published_json_gives_the_named_config(config: MMDiTConfig, name: str) -> None:
    assert MMDiTConfig.from_json(manifest("configs")[f"transformer/config.json@{name}"]) == config


@pytest.mark.parametrize(
    "config",
    [TOY, PLAIN, DEEP, ALL_DUAL, SD35_MEDIUM, SD3_MEDIUM, SD35_LARGE, replace(TOY, patch_size=4, in_channels=4)],
)
def test_shapes_and_json_give_the_config_back(config: MMDiTConfig) -> None:
    assert MMDiTConfig.from_shapes(_shapes(config)) == config
    assert MMDiTConfig.from_json(transformer_json(config)) == config


def test_json_defaults_are_those_of_diffusers() -> None:
    _, theirs = transformers(PLAIN)
    defaults = {
        name: parameter.default
        for name, parameter in _signature(type(theirs)).items()
        if parameter.default is not parameter.empty
    }
    assert MMDiTConfig.from_json({}) == MMDiTConfig.from_json(defaults)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads 5"),
        ({"hidden_size": 126, "num_heads": 1}, "multiple of 4"),
        ({"dual_attention_blocks": (0, 2)}, r"\[2\] lie outside the 2 blocks"),
        ({"dual_attention_blocks": (-1,)}, r"\[-1\] lie outside"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TOY, **change)


def test_unknown_norms_and_missing_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="'layer_norm' is unknown"):
        MMDiTConfig.from_json({"qk_norm": "layer_norm"})
    with pytest.raises(KeyError):
        MMDiTConfig.from_shapes({})


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOY.depth = 3  # type: ignore[misc]


def _shapes(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in meta(MMDiT, config).state_dict().items()}


def _signature(kind: type) -> dict:
    return dict(inspect.signature(kind.__init__).parameters)
