"""A single-stream tail, as in FLUX: in the last blocks text and image share the image's weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.model import Block, MMDiT, Modulation, Modulations, Tokens
from mmdit.variants import variant


@dataclass(frozen=True)
class Config(MMDiTConfig):
    single: int = 2  # blocks at the end


class SingleBlock(nn.Module):
    """One block for all tokens; it has no stream of its own for the text."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.x_block = Block(config)

    def modulation(self, c: Tensor) -> Modulations:
        return (self.x_block.modulation(c),)

    def forward(self, x: Tensor, context: Tensor, tokens: Tokens, modulation: Modulation) -> tuple[Tensor, Tensor]:
        every = torch.cat([context, x], dim=1)  # (B, M + N, D)
        gathered = self.x_block.attn.attend(*self.x_block.to_qkv(every, modulation), tokens)
        every = self.x_block(every, gathered, tokens, modulation)
        return every[:, tokens.text :], every[:, : tokens.text]


@variant("single_tail", Config)
class SingleTail(MMDiT):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for i in range(config.depth - config.single, config.depth):
            self.joint_blocks[i] = SingleBlock(config)
