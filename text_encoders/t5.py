"""The encoder of T5 v1.1, Stable Diffusion 3's third and largest text encoder.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
2020 (https://arxiv.org/abs/1910.10683); the gated MLP of version 1.1 is Shazeer, "GLU Variants Improve
Transformer" (https://arxiv.org/abs/2002.05202). Parameter names are those of the published files,
which are the names of `transformers.T5EncoderModel`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.common.layout import Layout

BLOCK = re.compile(r"encoder\.block\.(\d+)\.")


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder. Preset: `T5_XXL`."""

    vocab_size: int  # rows of the token embedding
    d_model: int  # D, width of the residual stream
    d_kv: int  # width of one attention head; num_heads * d_kv need not be d_model
    d_ff: int  # width of the MLP's gate and of its hidden layer
    num_layers: int  # transformer blocks
    num_heads: int  # attention heads
    num_buckets: int = 32  # relative distances told apart, half of them for each direction
    max_distance: int = 128  # from this distance on all positions share a bucket
    eps: float = 1e-6  # of every RMS norm

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> T5Config:
        """Read a transformers `config.json` (of `T5EncoderModel`).

        Raises ValueError where a size is absent, or for a T5 whose MLP is not v1.1's gated GELU.
        """
        mlp = config.get("feed_forward_proj", "relu")
        if mlp != "gated-gelu":
            raise ValueError(f"T5 with feed_forward_proj {mlp!r}: only v1.1's 'gated-gelu' is known")
        try:
            return cls(
                vocab_size=config["vocab_size"],
                d_model=config["d_model"],
                d_kv=config["d_kv"],
                d_ff=config["d_ff"],
                num_layers=config["num_layers"],
                num_heads=config["num_heads"],
                num_buckets=config.get("relative_attention_num_buckets", 32),
                max_distance=config.get("relative_attention_max_distance", 128),
                eps=config.get("layer_norm_epsilon", 1e-6),
            )
        except KeyError as error:
            raise ValueError(f"config.json of a T5 text encoder lacks {error}") from None

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
        """Infer the sizes from the tensor shapes of a weights file that comes without a config.

        `max_distance` and `eps` leave no trace in the shapes and are T5's only published values.
        Raises KeyError where a needed tensor is absent.
        """
        vocab_size, d_model = shapes["shared.weight"]
        inner = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0]
        buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        d_ff = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
        numbers = (BLOCK.match(name) for name in shapes)
        return cls(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=inner // heads,
            d_ff=d_ff,
            num_layers=1 + max(int(number[1]) for number in numbers if number),
            num_heads=heads,
            num_buckets=buckets,
        )


class T5Encoder(nn.Module):
    """Token ids to per-token features."""

    layout = Layout(tables=("shared.weight",), blocks="encoder.block")

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode token ids (B, n), of any n, to features (B, n, d_model).

        Padding is attended to like text: Stable Diffusion 3 was trained without a mask. Computes in the
        weights' dtype; raises ValueError for float16, whose range the XXL model leaves (at 65504).
        """
        x = self.shared(tokens.to(self.shared.weight.device))  # (B, n, D)
        if x.dtype == torch.float16:
            raise ValueError("T5 overflows in float16; give it bfloat16 or float32 weights")
        return self.encoder(x)


class Stack(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config, has_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.eps)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        buckets = relative_buckets(x.shape[1], self.config.num_buckets, self.config.max_distance, x.device)
        table = self.block[0].get_submodule("layer.0.SelfAttention.relative_attention_bias")
        bias = table(buckets).permute(2, 0, 1)[None].contiguous()  # (1, H, n, n); CUDA's fused kernels refuse strides
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)  # (B, n, D)


class Block(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, has_bias), MLPLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, mlp = self.layer
        return mlp(attention(x, bias))


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, has_bias)
        self.layer_norm = RMSNorm(config.d_model, config.eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class MLPLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedMLP(config)
        self.layer_norm = RMSNorm(config.d_model, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class SelfAttention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:  # only the first block stores the table; all blocks use it
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, n, d_kv)
            for projection in (self.q, self.k, self.v)
        )
        # T5 has no 1/sqrt(d_kv): its initialisation folds the scale into the weights of q.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, n, d_kv)
        return self.o(x.transpose(1, 2).flatten(2))  # (B, n, D)


class GatedMLP(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * inverse).to(self.weight.dtype)


def relative_buckets(n: int, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Bucket of every (query, key) pair of n positions: integers (n, n) from 0 to num_buckets - 1.

    The first half of the buckets is for keys at or before the query, the second for keys after it. In
    a half, small distances have a bucket each, and the rest shares buckets whose width grows with the
    logarithm of the distance until `max_distance` (Raffel et al. 2020, section 2.1; the reference is
    `_relative_position_bucket` of Mesh TensorFlow).
    """
    half = num_buckets // 2
    exact = half // 2
    steps = half - exact
    position = torch.arange(n, device=device)
    offset = position[None, :] - position[:, None]  # (n, n), key minus query
    distance = offset.abs()
    bucket = distance.clamp(max=exact)
    # Integer thresholds in place of a logarithm on the device, whose last bit would decide at 16, 32, 64.
    for step in range(1, steps):
        threshold = math.ceil(exact * (max_distance / exact) ** (step / steps) - 1e-6)
        bucket = bucket + (distance >= threshold)
    return bucket + half * (offset > 0)


T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
