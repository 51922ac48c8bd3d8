"""Rotary positions of the image tokens (Su et al. 2021, arXiv 2104.09864) in place of the table: half a head by row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT, SelfAttention, Tokens
from mmdit.variants import variant


@dataclass(frozen=True)
class Config(MMDiTConfig):
    base: float = 100.0  # the slowest turn takes about 2 pi times so many tokens
    largest = None  # any number of rows and columns


class RotaryAttention(SelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        waves = self.base ** (-torch.arange(self.head_size // 4, device=q.device) * 4 / self.head_size)
        place = torch.cartesian_prod(*(torch.arange(n, device=q.device) for n in tokens[1:])).view(-1, 2, 1)
        angles = (place * waves).flatten(1)[:, None]  # (N, 1, D / 2H): by row, then by column
        return super().attend(turned(q, angles), turned(k, angles), v, tokens)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x `(B, M + N, H, D / H)`, of which the last N tokens, the image's, turn."""
    still, image = x.split([x.shape[1] - len(angles), len(angles)], dim=1)
    one, two = image.float().chunk(2, dim=-1)
    turn = torch.cat([one * angles.cos() - two * angles.sin(), one * angles.sin() + two * angles.cos()], dim=-1)
    return torch.cat([still, turn.to(x)], dim=1)


@variant("rope", Config)
class Rope(MMDiT):
    layout = MMDiT.layout._replace(tables=())

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        del self.pos_embed
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.__class__, module.base = RotaryAttention, config.base

    def positions(self, rows: int, columns: int) -> Tensor:  # noqa: ARG002
        return torch.zeros(1)
