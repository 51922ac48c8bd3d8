"""What an MMDiT-X is made of, in numbers: one dataclass, one named constant per published model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

# What diffusers writes beside, and what follows from the rest.
_UNREAD = ("sample_size", "out_channels", "caption_projection_dim", "variant")


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of a transformer. The defaults are SD3.5-Medium's.

    A variant's config is a dataclass that extends it; its fields stand in config.json under their own names.

    Raises ValueError where the numbers do not go together.
    """

    patch_size: int = 2  # side of the square of latent cells that becomes one image token
    in_channels: int = 16  # channels of a latent
    hidden_size: int = 1536  # width of a token, image and text alike
    depth: int = 24  # joint blocks
    num_heads: int = 24  # attention heads; each is hidden_size / num_heads = 64 wide
    pos_embed_max_size: int = 384  # side of the table of positions, in image tokens
    pooled_size: int = 2048  # length of the pooled text vector (CLIP-L 768 + CLIP-G 1280)
    context_size: int = 4096  # width of a context token as the text encoders give it
    qk_norm: bool = True  # RMS norm on queries and keys, per head
    dual_attention_blocks: tuple[int, ...] = tuple(range(13))  # blocks with a second, image-only attention

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4")
        outside = [i for i in self.dual_attention_blocks if not 0 <= i < self.depth]
        if outside:
            raise ValueError(f"dual_attention_blocks {outside} lie outside the {self.depth} blocks")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_channels(self) -> int:
        """Numbers in one patch of a latent."""
        return self.in_channels * self.patch_size**2

    @property
    def largest(self) -> int | None:
        """Rows, or columns, of image tokens at most; None: any number."""
        return self.pos_embed_max_size

    @classmethod
    def own(cls) -> list[str]:
        """The fields that the published model does not have."""
        return [f.name for f in fields(cls) if f.name not in {g.name for g in fields(MMDiTConfig)}]

    @classmethod
    def unknown(cls, names: Iterable[str]) -> list[str]:
        """Those of these names of a config.json that say what this config has no place for."""
        known = {*cls().to_json(), *_UNREAD}
        return [name for name in names if name not in known and not name.startswith("_")]

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it, under diffusers' names."""
        return {
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
            "attention_head_dim": self.head_size,
            "num_layers": self.depth,
            "num_attention_heads": self.num_heads,
            "pos_embed_max_size": self.pos_embed_max_size,
            "pooled_projection_dim": self.pooled_size,
            "joint_attention_dim": self.context_size,
            "qk_norm": "rms_norm" if self.qk_norm else None,
            "dual_attention_layers": list(self.dual_attention_blocks),
            **{name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in self.own()},
        }

    @classmethod
    def from_json(cls, config: dict) -> "MMDiTConfig":
        """From the `transformer/config.json` of a diffusers folder; what it leaves out has diffusers' default.

        Raises ValueError for a query-key norm other than RMS norm.
        """
        if config.get("qk_norm") not in (None, "rms_norm"):
            raise ValueError(f'qk_norm {config["qk_norm"]!r} is unknown: expected "rms_norm" or nothing')
        heads = config.get("num_attention_heads", 18)
        return cls(
            patch_size=config.get("patch_size", 2),
            in_channels=config.get("in_channels", 16),
            hidden_size=heads * config.get("attention_head_dim", 64),
            depth=config.get("num_layers", 18),
            num_heads=heads,
            pos_embed_max_size=config.get("pos_embed_max_size", 96),
            pooled_size=config.get("pooled_projection_dim", 2048),
            context_size=config.get("joint_attention_dim", 4096),
            qk_norm=config.get("qk_norm") is not None,
            dual_attention_blocks=tuple(config.get("dual_attention_layers") or ()),
            **{n: tuple(v) if isinstance(v := config[n], list) else v for n in cls.own() if n in config},
        )

    @classmethod
    def from_shapes(cls, shapes: dict[str, tuple[int, ...]]) -> "MMDiTConfig":
        """From the shapes of a checkpoint's tensors under their published names (no prefix).

        Every model of the family has heads 64 wide, so all else follows (Stability sd3_impls.py reads the same
        shapes). Raises KeyError if a tensor it reads is not there.
        """
        hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("joint_blocks.")}
        return cls(
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=len(blocks),
            num_heads=max(1, hidden_size // 64),
            pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
            pooled_size=shapes["y_embedder.mlp.0.weight"][1],
            context_size=shapes["context_embedder.weight"][1],
            qk_norm="joint_blocks.0.context_block.attn.ln_k.weight" in shapes,
            dual_attention_blocks=tuple(
                i for i in sorted(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes
            ),
        )


SD35_MEDIUM = MMDiTConfig()
SD3_MEDIUM = MMDiTConfig(pos_embed_max_size=192, qk_norm=False, dual_attention_blocks=())
SD35_LARGE = MMDiTConfig(hidden_size=2432, depth=38, num_heads=38, pos_embed_max_size=192, dual_attention_blocks=())
TOY = MMDiTConfig(
    hidden_size=128,
    depth=2,
    num_heads=2,
    pos_embed_max_size=32,
    pooled_size=192,
    context_size=256,
    dual_attention_blocks=(0,),
)
