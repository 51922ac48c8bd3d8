"""CLIP's text transformer, as Stable Diffusion 3 uses it twice (ViT-L/14 and OpenCLIP ViT-bigG/14).

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
(https://arxiv.org/abs/2103.00020). Parameter names are those of the published files, which are the
names of `transformers.CLIPTextModelWithProjection`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.common.layout import Layout

HEAD_DIM = 64  # of every CLIP text model that Stable Diffusion uses; a weights file does not record it

LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP text encoder. Presets: `CLIP_L`, `CLIP_G`."""

    vocab_size: int  # rows of the token embedding
    hidden_size: int  # D, width of the residual stream
    intermediate_size: int  # width of the MLP's hidden layer
    num_layers: int  # transformer blocks
    num_heads: int  # attention heads, each hidden_size / num_heads wide
    max_length: int  # learned positions, start and end token included
    projection_dim: int | None  # P, outputs of text_projection; None: pooled goes out as it is (P = D)
    activation: str  # of the MLP: "quick_gelu", x * sigmoid(1.702 x), or "gelu", the exact one
    eps: float = 1e-5  # of every LayerNorm

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"CLIP activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"CLIP width {self.hidden_size} does not divide into {self.num_heads} heads")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> CLIPConfig:
        """Read a transformers `config.json` (of `CLIPTextModelWithProjection` or `CLIPTextModel`).

        Raises ValueError where a size is absent or the activation is unknown.
        """
        projects = config.get("architectures") != ["CLIPTextModel"]
        try:
            return cls(
                vocab_size=config.get("vocab_size", 49408),
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                max_length=config.get("max_position_embeddings", 77),
                projection_dim=config["projection_dim"] if projects else None,
                activation=config.get("hidden_act", "quick_gelu"),
                eps=config.get("layer_norm_eps", 1e-5),
            )
        except KeyError as error:
            raise ValueError(f"config.json of a CLIP text encoder lacks {error}") from None

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> CLIPConfig:
        """Infer the sizes from the tensor shapes of a weights file that comes without a config.

        The shapes do not record two things, for which the published models give a rule: heads are 64
        wide, and a model up to 768 wide (OpenAI's) has quick_gelu, a wider one (OpenCLIP's) gelu.
        `projection_dim` is set exactly where `text_projection.weight` is among the shapes.

        Raises KeyError where a needed tensor is absent.
        """
        vocab_size, hidden_size = shapes["text_model.embeddings.token_embedding.weight"]
        max_length = shapes["text_model.embeddings.position_embedding.weight"][0]
        intermediate_size = shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]
        numbers = (LAYER.match(name) for name in shapes)
        projection = shapes.get("text_projection.weight")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=1 + max(int(number[1]) for number in numbers if number),
            num_heads=max(1, hidden_size // HEAD_DIM),
            max_length=max_length,
            projection_dim=projection[0] if projection else None,
            activation="quick_gelu" if hidden_size <= 768 else "gelu",
        )


class CLIPTextEncoder(nn.Module):
    """Token ids to per-token features and one pooled vector per text."""

    layout = Layout(
        tables=("text_model.embeddings.token_embedding.weight",), blocks="text_model.encoder.layers"
    )  # fmt: skip

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection_dim is None:
            self.text_projection = nn.Identity()
        else:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, tokens: Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode texts as Stable Diffusion 3 does.

        tokens: integer ids (B, n), n up to `max_length`, padded; every row holds an end token, which
        must have the largest id of the row (as 49407 has in CLIP's vocabulary). vectors: (N, D), where
        ids may be negative: -1 - k has row k in place of a token's embedding.

        Returns the output of the last but one block without the final LayerNorm (B, n, D), and the
        final LayerNorm's output at the first end token through `text_projection` (B, P). Padding is
        attended to by what follows it, as in the reference. Raises ValueError for too long a text.
        """
        penultimate, last = self.text_model(tokens, vectors)  # (B, n, D) each
        end = tokens.argmax(dim=-1).to(last.device)  # the first of equals: padding with the end token does no harm
        pooled = last[torch.arange(len(tokens), device=last.device), end]  # (B, D)
        return penultimate, self.text_projection(pooled)  # (B, n, D), (B, P)


class TextModel(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.eps)

    def forward(self, tokens: Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last but one block's output, and the last one's after the final LayerNorm: (B, n, D) each."""
        x = penultimate = self.embeddings(tokens, vectors)
        for block in self.encoder.layers:
            penultimate = x
            x = block(x)
        return penultimate, self.final_layer_norm(x)


class Embeddings(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)

    def forward(self, tokens: Tensor, vectors: Tensor | None = None) -> Tensor:
        n, limit = tokens.shape[1], self.position_embedding.num_embeddings
        if n > limit:
            raise ValueError(f"CLIP takes at most {limit} tokens, not {n}")
        tokens = tokens.to(self.token_embedding.weight.device)
        positions = torch.arange(n, device=self.position_embedding.weight.device)
        if vectors is None:
            return self.token_embedding(tokens) + self.position_embedding(positions)  # (B, n, D)
        x = self.token_embedding(tokens.clamp(min=0))  # (B, n, D)
        own = tokens.to(x.device) < 0
        rows = (-1 - tokens).to(vectors.device).clamp(min=0)
        x = torch.where(own[..., None], vectors[rows].to(x), x)
        return x + self.position_embedding(positions)


class Blocks(nn.Module):
    """Only a name: the published files have their blocks under `encoder.layers`."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))


class Block(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.self_attn = CausalAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CausalAttention(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, n, D/H)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, n, D/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, n, D)


class MLP(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}

CLIP_L = CLIPConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_heads=12,
    max_length=77,
    projection_dim=None,
    activation="quick_gelu",
)
CLIP_G = CLIPConfig(
    vocab_size=49408,
    hidden_size=1280,
    intermediate_size=5120,
    num_layers=32,
    num_heads=20,
    max_length=77,
    projection_dim=1280,
    activation="gelu",
)
