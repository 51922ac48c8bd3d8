"""A ControlNet for the transformers of Stable Diffusion 3: what it adds to their image tokens, block by block.

It is the beginning of a transformer that sees one picture more, the control's latent, and has a projection behind each
of its blocks; these residuals are added behind the blocks of the transformer that draws (`mmdit.control.adding`).

- Those for SD3-Medium and SD3.5-Medium read the text and have positions of their own. One that fills in a picture has
  channels more for the control: a mask.
- Stability AI's for SD3.5-Large know no text: their blocks have one stream, and begin with the image tokens of the
  transformer itself, positions included.

References: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv 2302.05543);
diffusers models/controlnets/controlnet_sd3.py; Stability AI, sd3.5, dit_embedder.py. The parameters have the names that
those of the transformer have.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.model import Block, DualBlock, Embedder, JointBlock, MMDiT, Modulation, Modulations, PatchEmbed, Tokens

# What diffusers writes beside, and what follows from the rest.
_UNREAD = ("sample_size", "out_channels", "caption_projection_dim", "pos_embed_type")


@dataclass(frozen=True)
class ControlConfig(MMDiTConfig):
    """The shape of a ControlNet. The defaults are InstantX's for SD3-Medium.

    One that knows no text has 0 for `context_size` and `pos_embed_max_size`. Raises ValueError where the numbers do not
    go together.
    """

    depth: int = 6
    pos_embed_max_size: int = 192
    qk_norm: bool = False
    dual_attention_blocks: tuple[int, ...] = ()
    extra_channels: int = 0  # of the control, behind those of a latent
    pooled_zeros: bool = True  # whether zeros stand in the place of the pooled text

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.context_size) != bool(self.pos_embed_max_size):
            raise ValueError("a text without positions, or positions without a text: one or both are expected")
        if not self.context_size and (self.qk_norm or self.dual_attention_blocks):
            raise ValueError("qk_norm and dual_attention_layers are of blocks that read a text")

    @property
    def largest(self) -> int | None:
        return self.pos_embed_max_size or None

    @property
    def control_channels(self) -> int:
        """Channels of the control: a latent's, and those beside."""
        return self.in_channels + self.extra_channels

    @property
    def way(self) -> str:
        """How its residuals are spread over the transformer (`mmdit.control.adding`)."""
        return "diffusers" if self.context_size else "stability"

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it, under diffusers' names."""
        config = {name: value for name, value in super().to_json().items() if name not in self.own()}
        return config | {
            "joint_attention_dim": self.context_size or None,
            "pos_embed_max_size": self.pos_embed_max_size or None,
            "use_pos_embed": self.pos_embed_max_size > 0,
            "extra_conditioning_channels": self.extra_channels,
            "force_zeros_for_pooled_projection": self.pooled_zeros,
        }

    @classmethod
    def unknown(cls, names: Any) -> list[str]:
        known = {*cls().to_json(), *_UNREAD}
        return [name for name in names if name not in known and not name.startswith("_")]

    @classmethod
    def from_json(cls, config: dict) -> "ControlConfig":
        """From the config.json of a diffusers folder; what it leaves out has diffusers' default.

        Raises ValueError for what no published one has.
        """
        text = {name: 0 for name in ("joint_attention_dim", "pos_embed_max_size") if config.get(name, 1) is None}
        if not config.get("use_pos_embed", True):
            text["pos_embed_max_size"] = 0
        elif config.get("pos_embed_type", "sincos") is None and "pos_embed_max_size" not in text:
            raise ValueError('pos_embed_type is null: expected "sincos"')
        plain = MMDiTConfig.from_json({**config, **text})
        return cls(
            **vars(plain),
            extra_channels=config.get("extra_conditioning_channels") or 0,
            pooled_zeros=bool(config.get("force_zeros_for_pooled_projection", True)),
        )

    @classmethod
    def from_shapes(cls, shapes: dict[str, tuple[int, ...]]) -> "ControlConfig":
        """From the shapes of its tensors under the names here. Raises KeyError if a tensor it reads is not there.

        Whether the pooled text counts they do not tell: in Stability AI's it does, in others, as diffusers takes it
        where nothing is said, it does not.
        """
        width, channels, patch_size, _ = shapes["pos_embed_input.proj.weight"]
        depth = len({name.split(".")[1] for name in shapes if name.startswith("controlnet_blocks.")})
        if "context_embedder.weight" in shapes:
            plain = MMDiTConfig.from_shapes(shapes)
            return cls(**vars(replace(plain, depth=depth)), extra_channels=channels - plain.in_channels)
        return cls(
            patch_size=patch_size,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=max(1, width // 64),
            pos_embed_max_size=0,
            pooled_size=shapes["y_embedder.mlp.0.weight"][1],
            context_size=0,
            pooled_zeros=False,
        )


class ControlNet(MMDiT):
    """Residuals for the image tokens of a transformer, one for each block of its own."""

    config: ControlConfig

    def __init__(self, config: ControlConfig) -> None:
        nn.Module.__init__(self)  # of a transformer it has the methods, and not all of the parts
        self.config = config
        width, text = config.hidden_size, config.context_size > 0
        if text:
            self.x_embedder = PatchEmbed(config)
            self.register_buffer("pos_embed", torch.zeros(1, config.pos_embed_max_size**2, width))
            self.context_embedder = nn.Linear(config.context_size, width)
        self.t_embedder = Embedder(256, width)
        self.y_embedder = Embedder(config.pooled_size, width)
        self.pos_embed_input = PatchEmbed(replace(config, in_channels=config.control_channels))
        self.joint_blocks = nn.ModuleList(
            JointBlock((DualBlock if i in config.dual_attention_blocks else Block)(config), Block(config))
            if text
            else ImageBlock(config)
            for i in range(config.depth)
        )
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))

    def forward(
        self,
        latent: Tensor,
        sigma: Tensor,
        context: Tensor,
        pooled: Tensor,
        control: Tensor,
        x: Tensor | None = None,
    ) -> list[Tensor]:
        """What each block adds, `(B, N, D)`.

        latent, sigma, context, pooled: as the transformer is given them. control: `(B, C + extra_channels, h, w)`, the
        latent of the control's picture. x: of one that knows no text, the transformer's image tokens `(B, N, D)` before
        its first block.
        """
        rows, columns = self.grid(latent)
        context, modulations = self.embed_text(context), self.modulations(sigma, pooled)
        if x is None:
            x = self.x_embedder(latent) + self.positions(rows, columns).to(latent)
        x = x + self.pos_embed_input(control)
        tokens = Tokens(context.shape[1], rows, columns)

        residuals = []
        for block, project, modulation in zip(self.joint_blocks, self.controlnet_blocks, modulations):
            x, context = block(x, context, tokens, *modulation)
            residuals.append(project(x))
        return residuals

    def beside(self, latent: Tensor) -> tuple[Tensor, ...]:
        """Tensors, without values, as it is called with beside the rest for latents like these."""
        control = latent.new_empty(len(latent), self.config.control_channels, *latent.shape[2:])
        rows, columns = self.grid(latent)
        x = latent.new_empty(len(latent), rows * columns, self.config.hidden_size)
        return (control,) if self.config.context_size else (control, x)

    def embed_text(self, context: Tensor) -> Tensor:
        if not self.config.context_size:
            return context.new_empty(len(context), 0, self.config.hidden_size)
        return super().embed_text(context)

    def modulations(self, sigma: Tensor, pooled: Tensor) -> list[Modulations]:
        """The shifts, scales and gates of every block. sigma: `(B,)`. pooled: `(B, pooled_size)`."""
        c = self.vector(sigma, pooled)
        blocks: list[Any] = list(self.joint_blocks)
        return [block.modulation(c) for block in blocks]


class ImageBlock(nn.Module):
    """A block of the image tokens alone."""

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.x_block = Block(config)

    def modulation(self, c: Tensor) -> Modulations:
        return (self.x_block.modulation(c),)

    def forward(self, x: Tensor, context: Tensor, tokens: Tokens, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """The image tokens `(B, N, D)` after this block, and the context as it came."""
        gathered = self.x_block.attn.attend(*self.x_block.to_qkv(x, modulation), tokens)
        return self.x_block(x, gathered, tokens, modulation), context
