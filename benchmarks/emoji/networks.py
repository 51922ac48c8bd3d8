"""The demo model's transformer and text encoders: their sizes, and all of them as one module to train."""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.emoji.run_state import exported
from benchmarks.emoji.tokenizers import CLIP_LENGTH
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from text_encoders.clip import CLIPConfig, CLIPTextEncoder
from text_encoders.t5 import T5Config, T5Encoder

MMDIT = MMDiTConfig(
    hidden_size=256,
    depth=5,
    num_heads=4,
    pos_embed_max_size=12,  # pictures of up to 192 by 192 pixels
    pooled_size=192,
    context_size=192,
    dual_attention_blocks=(0, 1, 2),
)
T5 = T5Config(vocab_size=256, d_model=192, d_kv=32, d_ff=384, num_layers=2, num_heads=4)
VOCABULARY = 776  # rows of both CLIPs' token embeddings; their tokenizers use 770
ENCODERS = ("clip_l", "clip_g", "t5")


def clip_config(width: int, activation: str) -> CLIPConfig:
    return CLIPConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=2,
        num_heads=width // 32,
        max_length=CLIP_LENGTH,
        projection_dim=width,
        activation=activation,
    )


CLIP_L, CLIP_G = clip_config(64, "quick_gelu"), clip_config(128, "gelu")


class Trained(nn.Module):
    """All that is trained together, so that averaging and checkpoints see one module."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_l = CLIPTextEncoder(CLIP_L)
        self.clip_g = CLIPTextEncoder(CLIP_G)
        self.t5 = T5Encoder(T5)
        self.transformer = MMDiT(MMDIT)

    def forward(self, x: Tensor, sigma: Tensor, tokens: dict[str, Tensor], keep: dict[str, Tensor]) -> Tensor:
        """Velocity for noisy latents x `(B, C, h, w)`; `keep[encoder]` `(B,)` is 0 where an encoder is dropped."""
        l_hidden, l_pooled = self.clip_l(tokens["clip_l"])
        g_hidden, g_pooled = self.clip_g(tokens["clip_g"])
        keep_l, keep_g, keep_t5 = (keep[name][:, None] for name in ENCODERS)
        pooled = torch.cat([l_pooled * keep_l, g_pooled * keep_g], dim=-1)
        clip = torch.cat([l_hidden * keep_l[..., None], g_hidden * keep_g[..., None]], dim=-1)
        t5 = self.t5(tokens["t5"]) * keep_t5[..., None]
        context = torch.cat([nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
        return self.transformer(x, sigma, context, pooled)


@torch.no_grad()
def initialise(model: Trained) -> None:
    """Xavier weights, zero biases, zero gates (adaLN-Zero), embeddings of a unit's size, sines for positions."""
    for name, p in model.named_parameters():
        if "embedding" in name or "relative_attention_bias" in name or name.endswith("shared.weight"):
            nn.init.normal_(p, std=0.02 if "position" in name or "bias" in name else 0.5)
        elif p.ndim > 1 and "adaLN" not in name and "final_layer" not in name:
            nn.init.xavier_uniform_(p.flatten(1))
        elif p.ndim > 1 or name.endswith("bias"):
            nn.init.zeros_(p)
    model.transformer.pos_embed.copy_(position_table(MMDIT.pos_embed_max_size, MMDIT.hidden_size))


@torch.no_grad()
def begin_with(model: Trained, folder: Path) -> None:
    """Take over an exported demo model's weights; of tables with other numbers of rows, the rows that both have."""
    for part in (*ENCODERS, "transformer"):
        own = model.get_submodule(part).state_dict()
        for name, tensor in exported(folder, part).items():
            if name != "pos_embed":  # a function of its size alone
                rows = min(len(tensor), len(own[name]))
                own[name][:rows].copy_(tensor[:rows])


def position_table(side: int, width: int) -> Tensor:
    """Sines and cosines of column, then row, `(1, side², width)`; each half is [sin | cos] over width / 4 waves."""
    waves = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = (torch.arange(side, dtype=torch.float64) - side / 2)[:, None] * waves  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width).float()
