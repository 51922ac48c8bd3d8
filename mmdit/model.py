"""MMDiT-X, the transformer of Stable Diffusion 3.5 Medium: the algorithm and nothing else.

References: Esser et al. 2024, "Scaling Rectified Flow Transformers" (arXiv 2403.03206, section 4 and figure 2);
Peebles & Xie 2023 for adaLN and the sinusoidal timestep (arXiv 2212.09748); Stability AI, sd3.5, mmditx.py, for the
names of the parameters, which are those of the published checkpoint: a key in a file is found here by searching it.

- Two streams of tokens, image (`x`) and text (`context`), have weights of their own and meet in one attention.
- Every block modulates its streams by shifts, scales and gates computed from timestep and pooled text (adaLN-Zero).
- The first blocks of SD3.5-Medium have a second attention among the image tokens alone (the X of MMDiT-X).
- The last block reads the text once more but writes none: its `context_block` ends at the projection to q, k, v.

`forward` is made of a few methods: `positions`, `embed_text`, `modulations`, `flow`. A sampler calls it as a training
does, and only remembers what the first three return (`mmdit.prepared`): what is changed in one is changed for both.
Every module is called as a module, so that hooks see it. Memory plans, compilation, adapters and quantisation are
functions applied to a built model, in files of their own.

Shapes: B batch, C latent channels, h w rows and columns of the latent, N image tokens (h / patch * w / patch),
M context tokens, D hidden size, H heads.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.attention import Backend, attention
from mmdit.common.layout import Layout
from mmdit.config import MMDiTConfig

Modulation = tuple[Tensor, ...]  # shifts, scales and gates of one stream in one block, each (B, 1, D)
Modulations = tuple[Modulation, ...]  # of the streams of a block


class Tokens(NamedTuple):
    """How the tokens of an attention lie: first those of the text, then the image's, row by row."""

    text: int
    rows: int
    columns: int


class MMDiT(nn.Module):
    """Predicts the velocity of the flow, d latent / d sigma, from a noisy latent and its text."""

    layout = Layout(  # what plans, streams and quantisation treat apart; nothing of the algorithm
        tables=("pos_embed",),
        before=r"joint_blocks\.\d+\.\w+\.adaLN_modulation",
        blocks="joint_blocks",
        loop=True,
    )
    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.register_buffer("pos_embed", torch.zeros(1, config.pos_embed_max_size**2, width))
        self.t_embedder = Embedder(256, width)
        self.y_embedder = Embedder(config.pooled_size, width)
        self.context_embedder = nn.Linear(config.context_size, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                x_block=(DualBlock if i in config.dual_attention_blocks else Block)(config),
                context_block=(LastContextBlock if i == config.depth - 1 else Block)(config),
            )
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(config)

    def forward(self, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """One evaluation of the velocity.

        latent: `(B, C, h, w)`, h and w multiples of the patch size and within the position table.
        sigma: `(B,)`, the share of noise, 1 to 0. context: `(B, M, context_size)`. pooled: `(B, pooled_size)`.
        Returns `(B, C, h, w)`.

        All that `flow` is given but the latent is known before the first step of a sampler is taken.
        """
        positions = self.positions(*self.grid(latent))
        return self.flow(latent, positions, self.embed_text(context), self.modulations(sigma, pooled))

    def grid(self, latent: Tensor) -> tuple[int, int]:
        """Rows and columns of image tokens that a latent `(B, C, h, w)` becomes."""
        patch = self.config.patch_size
        rows, columns = latent.shape[2] // patch, latent.shape[3] // patch
        assert latent.shape[2:] == (rows * patch, columns * patch), f"{latent.shape} is not made of whole patches"
        return rows, columns

    def positions(self, rows: int, columns: int) -> Tensor:
        """Where each image token is, `(1, N, D)`."""
        return crop_positions(self.pos_embed, rows, columns)

    def embed_text(self, context: Tensor) -> Tensor:
        """Text `(B, M, context_size)`, as the encoders give it, to tokens `(B, M, D)`."""
        return self.context_embedder(context)

    def modulations(self, sigma: Tensor, pooled: Tensor) -> list[Modulations]:
        """What every block is told: when (the timestep) and, roughly, what (the pooled text).

        sigma: `(B,)`. pooled: `(B, pooled_size)`. Returns for every block its shifts, scales and gates, and last those
        of the final layer.
        """
        c = self.vector(sigma, pooled)
        parts: list[Any] = [*self.joint_blocks, self.final_layer]
        return [part.modulation(c) for part in parts]

    def vector(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        """Timestep and pooled text as one vector `(B, D)`."""
        waves = timestep_waves(1000.0 * sigma.float()).to(pooled.dtype)  # (B, 256)
        return self.t_embedder(waves) + self.y_embedder(pooled)

    def flow(self, latent: Tensor, positions: Tensor, context: Tensor, modulations: Sequence[Modulations]) -> Tensor:
        """The velocity `(B, C, h, w)` of a latent of that shape.

        positions: `(1, N, D)`, of its tokens. context: `(B, M, D)`, embedded. modulations: as `modulations` gives them.
        """
        rows, columns = self.grid(latent)
        tokens = Tokens(context.shape[1], rows, columns)
        x = self.x_embedder(latent)  # (B, N, D)
        x = x + positions.to(x)

        for block, modulation in zip(self.joint_blocks, modulations):
            x, context = block(x, context, tokens, *modulation)

        return self.unpatch(self.final_layer(x, *modulations[-1]), rows, columns)

    def unpatch(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Image tokens of patches `(B, N, patch² C)` to a latent `(B, C, h, w)`."""
        patch = self.config.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)


class JointBlock(nn.Module):
    """One block of both streams; each stream is a block of its own, they meet in the attention."""

    def __init__(self, x_block: "Block", context_block: "Block | LastContextBlock") -> None:
        super().__init__()
        self.x_block = x_block
        self.context_block = context_block

    def modulation(self, c: Tensor) -> Modulations:
        """Those of `x_block`, then of `context_block`."""
        return self.x_block.modulation(c), self.context_block.modulation(c)

    def forward(
        self, x: Tensor, context: Tensor, tokens: Tokens, x_modulation: Modulation, context_modulation: Modulation
    ) -> tuple[Tensor, Tensor]:
        """The image tokens `(B, N, D)` and text tokens `(B, M, D)` after this block; the last leaves the text alone."""
        context_gathered, x_gathered = self.gather(x, context, tokens, x_modulation, context_modulation)
        context = self.context_block(context, context_gathered, tokens, context_modulation)
        x = self.x_block(x, x_gathered, tokens, x_modulation)
        return x, context

    def gather(
        self, x: Tensor, context: Tensor, tokens: Tokens, x_modulation: Modulation, context_modulation: Modulation
    ) -> tuple[Tensor, Tensor]:
        """What text and image tokens gather from all of both. Queries, keys and values end here: the MLPs need room."""
        x_qkv = self.x_block.to_qkv(x, x_modulation)  # 3 x (B, N, H, D / H)
        context_qkv = self.context_block.to_qkv(context, context_modulation)  # 3 x (B, M, H, D / H)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(context_qkv, x_qkv))
        gathered = self.x_block.attn.attend(q, k, v, tokens)  # (B, M + N, D); the last text asks nothing: (B, N, D)
        context_gathered, x_gathered = gathered.split([q.shape[1] - x.shape[1], x.shape[1]], dim=1)
        return context_gathered, x_gathered


class Block(nn.Module):
    """One stream's half of a joint block: before the attention `to_qkv`, after it the rest."""

    chunks = 6  # shift, scale and gate for the attention, the same for the MLP

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = LayerNorm(width)
        self.attn = SelfAttention(config)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def modulation(self, c: Tensor) -> Modulation:
        """Shifts, scales and gates, each `(B, 1, D)`."""
        return self.adaLN_modulation(c)[:, None].chunk(self.chunks, dim=-1)

    def to_qkv(self, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale, *_ = modulation
        return self.attn.to_qkv(self.norm1(x, shift, scale))

    def forward(self, x: Tensor, gathered: Tensor, tokens: Tokens, modulation: Modulation) -> Tensor:  # noqa: ARG002
        """This stream's tokens `(B, N, D)` after the block. gathered: what they did in the attention, `(B, N, D)`."""
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        x = torch.addcmul(x, gate, self.attn(gathered))
        return torch.addcmul(x, gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class DualBlock(Block):
    """The image stream's half with a second attention, among the image tokens alone, that reads what the first reads.

    Both norms are `norm1`, shifted and scaled differently; both results are added before the MLP.
    """

    chunks = 9  # those of Block, then shift, scale and gate for the second attention

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.attn2 = SelfAttention(config)

    def forward(self, x: Tensor, gathered: Tensor, tokens: Tokens, modulation: Modulation) -> Tensor:
        _, _, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = modulation
        gathered2 = self.attn2.attend(*self.attn2.to_qkv(self.norm1(x, shift2, scale2)), tokens._replace(text=0))
        x = torch.addcmul(torch.addcmul(x, gate, self.attn(gathered)), gate2, self.attn2(gathered2))
        return torch.addcmul(x, gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class LastContextBlock(nn.Module):
    """The text stream's half of the last block: it is read and ends there."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = LayerNorm(width)
        self.attn = SelfAttention(config, output=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, c: Tensor) -> Modulation:
        """Shift and scale, each `(B, 1, D)`."""
        return self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)

    def to_qkv(self, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale = modulation
        q, k, v = self.attn.to_qkv(self.norm1(x, shift, scale))
        return q[:, :0], k, v  # nobody reads what the text would gather here

    def forward(self, x: Tensor, gathered: Tensor, tokens: Tokens, modulation: Modulation) -> Tensor:  # noqa: ARG002
        return x


class SelfAttention(nn.Module):
    """Into the attention `to_qkv`, through it `attend`, and out of it the module itself, called with what was gathered.

    In the joint attention each stream goes in and out by its own, and both through the image's.
    """

    backend: Backend = "auto"  # who computes the attention; `mmdit.attention.attention_by` sets it for a whole model

    def __init__(self, config: MMDiTConfig, output: bool = True) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_size
        self.head_size = head
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q = nn.RMSNorm(head, eps=1e-6) if config.qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(head, eps=1e-6) if config.qk_norm else nn.Identity()
        if output:
            self.proj = nn.Linear(width, width)

    def to_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `(B, N, D)` to queries, keys and values, each `(B, N, H, D / H)`."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, d=self.head_size)
        return self.ln_q(q), self.ln_k(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:  # noqa: ARG002
        """What tokens that ask gather from those that answer, `(B, N, D)`.

        q: `(B, N, H, D / H)`, of those that ask. k, v: `(B, M, H, D / H)`, of those that answer.
        tokens: how those that answer lie; of those that ask, the text is left out in the last block.
        """
        return attention(q, k, v, self.backend)

    def forward(self, gathered: Tensor) -> Tensor:
        return self.proj(gathered)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Image tokens back to patches of the latent."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = LayerNorm(width)
        self.linear = nn.Linear(width, config.patch_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, c: Tensor) -> Modulations:
        """Shift and scale, each `(B, 1, D)`."""
        return (self.adaLN_modulation(c)[:, None].chunk(2, dim=-1),)

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        shift, scale = modulation
        return self.linear(self.norm_final(x, shift, scale))


class PatchEmbed(nn.Module):
    """Squares of latent cells to image tokens, row by row."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, patch, stride=patch)

    def forward(self, latent: Tensor) -> Tensor:
        tokens = rearrange(self.proj(latent), "b d h w -> b (h w) d")
        return tokens.contiguous()  # sums keep their operands' strides: all blocks would work on transposed tokens


class Embedder(nn.Module):
    """A vector into the transformer's width."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class LayerNorm(nn.Module):
    """Without weights of its own; scale and shift come from the modulation, each `(B, 1, D)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, F.layer_norm(x, (self.width,), eps=1e-6), 1 + scale)


def timestep_waves(timestep: Tensor) -> Tensor:
    """Timesteps `(B,)`, 0 to 1000, as 128 cosines and 128 sines `(B, 256)`, all in float32.

    A shorter type would not do for the timestep itself: bfloat16 rounds 987.38 to 988.
    """
    exponents = torch.arange(128, dtype=torch.float32, device=timestep.device) / 128
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def crop_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """The middle `rows` by `columns` of a square table of positions `(1, side², D)`; returns `(1, N, D)`."""
    side = math.isqrt(table.shape[1])
    assert max(rows, columns) <= side, f"{rows}x{columns} tokens are more than the table's {side}x{side}"
    top, left = (side - rows) // 2, (side - columns) // 2
    square = rearrange(table, "b (h w) d -> b h w d", h=side)
    return rearrange(square[:, top : top + rows, left : left + columns], "b h w d -> b (h w) d")
