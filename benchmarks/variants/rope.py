"""Rotary positions of the image tokens (Su et al. 2021, arXiv 2104.09864) in place of the table: half a head by row."""

import torch

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT, SelfAttention, Tokens
from mmdit.variants import variant


class Config(MMDiTConfig):
    largest = None  # any number of rows and columns


class RotaryAttention(SelfAttention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        place = torch.cartesian_prod(*(torch.arange(n, device=q.device) for n in tokens[1:])).view(-1, 2, 1)
        waves = 0.01 ** (4 * torch.arange(self.head_size // 4, device=q.device) / self.head_size)
        angles = (place * waves).flatten(1)[:, None]  # (N, 1, D / 2H): by row, then by column
        return super().attend(turned(q, angles), turned(k, angles), v, tokens)


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    still, image = x.split([x.shape[1] - len(angles), len(angles)], dim=1)  # text, (B, N, H, D / H)
    one, two = image.float().chunk(2, dim=-1)
    turn = torch.cat([one * angles.cos() - two * angles.sin(), one * angles.sin() + two * angles.cos()], dim=-1)
    return torch.cat([still, turn.to(x)], dim=1)


@variant("rope", Config)
class Rope(MMDiT):
    layout = MMDiT.layout._replace(tables=())

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        del self.pos_embed
        for module in (m for m in self.modules() if isinstance(m, SelfAttention)):
            module.__class__ = RotaryAttention

    def positions(self, *_: int) -> torch.Tensor:
        return torch.zeros(1)
