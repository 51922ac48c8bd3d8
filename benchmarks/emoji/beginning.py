"""How a variant in training begins: its numbers, its random weights, or those of another model."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.check_variant import pooled_size
from benchmarks.emoji.networks import MMDIT, position_table
from mmdit.model import MMDiT
from mmdit.variants import Variant
from weights import open_checkpoint, published


def config_of(variant: Variant, width: int, depth: int) -> Any:
    """The demo's numbers, narrower."""
    dual = tuple(range((depth + 1) // 2))
    return variant.config(
        patch_size=MMDIT.patch_size,
        in_channels=MMDIT.in_channels,
        hidden_size=width,
        depth=depth,
        num_heads=max(1, width // 64),
        pos_embed_max_size=MMDIT.pos_embed_max_size,
        pooled_size=pooled_size(variant),
        context_size=MMDIT.context_size,
        dual_attention_blocks=dual,
    )


def generator_of(*what: object) -> torch.Generator:
    """Random numbers that depend on this alone; of a seed PyTorch's generator reads 32 bits."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big"))


@torch.no_grad()
def initialise(model: MMDiT, seed: int) -> None:
    """Xavier weights, zero biases and gates; each parameter's numbers depend on its name, its shape and the seed.

    What a variant adds of one dimension or none, and what it sets itself in tables, stays as its code made it.
    """
    for name, p in model.named_parameters():
        generator = generator_of(seed, name, list(p.shape))
        if p.ndim > 1 and p[0].numel() > 1 and not ("adaLN" in name or "final_layer" in name or p.shape[0] == 1):
            nn.init.xavier_uniform_(p.flatten(1), generator=generator)
        elif p.ndim > 1 and p.shape[0] == 1:
            nn.init.normal_(p, std=0.02, generator=generator)
        elif p.ndim > 1 or name.endswith("bias"):
            nn.init.zeros_(p)
    if hasattr(model, "pos_embed"):
        model.pos_embed.copy_(position_table(model.config.pos_embed_max_size, model.config.hidden_size))


def weights_of(path: Path) -> dict[str, Tensor]:
    """The transformer's tensors of a run's folder, or of any model's folder or file; CheckpointError."""
    own = path / "transformer" / f"{published.STEMS['transformer']}.safetensors"
    if (path / "run.json").exists():  # whatever variant it is
        return load_file(own)
    component = open_checkpoint(path).component("transformer")
    return {name: component.read(name) for name in component.shapes}
