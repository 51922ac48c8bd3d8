"""The reference models with our random weights: diffusers' transformer and autoencoder, and how far we are off."""

import copy
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.memory.empty import Undrawn
from mmdit.model import MMDiT
from vae.autoencoder import Autoencoder, VAEConfig
from weights.keymap import TRANSFORMER, VAE, Table, revert, to_diffusers

Module = TypeVar("Module", bound=nn.Module)


class TransformerPair(NamedTuple):
    """Two transformers with the same weights."""

    ours: MMDiT
    theirs: SD3Transformer2DModel


class VAEPair(NamedTuple):
    """Two autoencoders with the same weights."""

    ours: Autoencoder
    theirs: AutoencoderKL


class Inputs(NamedTuple):
    """What a transformer is called with."""

    latent: Tensor
    sigma: Tensor
    context: Tensor
    pooled: Tensor


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, Euclidean norms over all numbers, in float64."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} against {tuple(reference.shape)}"
    difference = ours.double() - reference.double()
    return float(difference.norm() / reference.double().norm())


@lru_cache(maxsize=8)
def transformers(config: MMDiTConfig, seed: int = 0) -> TransformerPair:
    """Ours and diffusers' with the same random weights; shared between tests, not to be written to."""
    with Undrawn():  # all values are given here
        ours, theirs = MMDiT(config), SD3Transformer2DModel(**transformer_json(config))
    return TransformerPair(ours, _give(theirs, randomize(ours, seed), TRANSFORMER))


@lru_cache(maxsize=8)
def autoencoders(config: VAEConfig, seed: int = 0) -> VAEPair:
    """Ours and diffusers' with the same random weights; shared between tests, not to be written to."""
    with Undrawn():
        ours, theirs = Autoencoder(config), AutoencoderKL(**vae_json(config))
    return VAEPair(ours, _give(theirs, randomize(ours, seed), VAE))


def rounded(pair: NamedTuple, dtype: torch.dtype) -> tuple[nn.Module, ...]:
    """(ours, theirs, the exact one): two copies in `dtype` and theirs in float64, with the very same weights."""
    ours, theirs = (copy.deepcopy(module).to(dtype) for module in pair)
    return ours, theirs, copy.deepcopy(theirs).double()


def transformer_json(config: MMDiTConfig) -> dict:
    """The arguments of diffusers' transformer, which are the keys of its config.json."""
    return {
        "sample_size": 128,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_size,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_size,
        "caption_projection_dim": config.hidden_size,
        "pooled_projection_dim": config.pooled_size,
        "pos_embed_max_size": config.pos_embed_max_size,
        "dual_attention_layers": config.dual_attention_blocks,
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def vae_json(config: VAEConfig) -> dict:
    """The arguments of diffusers' autoencoder, which are the keys of its config.json."""
    levels = len(config.block_out_channels)
    return {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def randomize(module: Module, seed: int) -> Module:
    """Fill in place: matrices keep sizes, norm weights lie around 1, biases and positions are far from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        values = tensor.normal_(generator=generator)
        if name == "pos_embed":
            continue
        if tensor.ndim > 1:
            values.mul_(tensor[0].numel() ** -0.5)
        elif name.endswith(".weight"):
            values.mul_(0.3).add_(1.0)
        else:
            values.mul_(0.3)
    return module.requires_grad_(False).eval()


def draw(config: MMDiTConfig, rows: int, columns: int, tokens: int, sigmas: tuple[float, ...]) -> Inputs:
    """Random inputs, one sample per sigma, all different."""
    generator = torch.Generator().manual_seed(1000 * rows + columns)
    batch = len(sigmas)
    return Inputs(
        latent=torch.randn(batch, config.in_channels, rows, columns, generator=generator),
        sigma=torch.tensor(sigmas),
        context=torch.randn(batch, tokens, config.context_size, generator=generator),
        pooled=torch.randn(batch, config.pooled_size, generator=generator),
    )


def diffusers_velocity(model: nn.Module, inputs: Inputs) -> Tensor:
    """diffusers' velocity; its timestep is 1000 times sigma, float32 whatever the model's dtype."""
    latent, sigma, context, pooled = inputs
    return model(latent, context, pooled, 1000.0 * sigma, return_dict=False)[0]


def _give(theirs: Module, ours: nn.Module, table: Table) -> Module:
    """Give diffusers' module the weights of ours."""
    native = ours.state_dict()
    state = {name: revert(entry, native[entry.sources[0]]) for name, entry in to_diffusers(native, table).items()}
    theirs.load_state_dict(state)
    return theirs.requires_grad_(False).eval()
