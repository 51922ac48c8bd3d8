"""The second attention within windows of the picture (Liu et al. 2021, arXiv 2103.14030), every other one shifted."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from mmdit.attention import attention
from mmdit.config import MMDiTConfig
from mmdit.model import DualBlock, MMDiT, SelfAttention, Tokens
from mmdit.variants import variant


@dataclass(frozen=True)
class Config(MMDiTConfig):
    attn2_window: int = 4  # side of a window, in tokens


class WindowedAttention(SelfAttention):
    window: int
    shift: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        """Which tokens share a window, as a bias: any number of rows and columns will do."""
        rows, columns = (torch.arange(n, device=q.device) + self.shift for n in (tokens.rows, tokens.columns))
        window = (rows // self.window)[:, None] * (tokens.columns + 1) + columns // self.window
        window = rearrange(window, "h w -> (h w)")
        return attention(q, k, v, self.backend, bias=window[:, None] == window)


@variant("attn2_windowed", Config)
class Windowed(MMDiT):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for i, module in enumerate(m for m in self.modules() if isinstance(m, DualBlock)):
            module.attn2.__class__ = WindowedAttention
            module.attn2.window, module.attn2.shift = config.attn2_window, i % 2 * (config.attn2_window // 2)
