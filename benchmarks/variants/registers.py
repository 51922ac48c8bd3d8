"""Registers (Darcet et al. 2023, arXiv 2309.16588): learned tokens beside the text, to keep what they like."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.variants import variant


@dataclass(frozen=True)
class Config(MMDiTConfig):
    registers: int = 4


@variant("registers", Config)
class Registers(MMDiT):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.registers = nn.Parameter(torch.randn(1, config.registers, config.hidden_size) * 0.02)

    def embed_text(self, context: Tensor) -> Tensor:
        text = super().embed_text(context)
        return torch.cat([self.registers.to(text).expand(len(text), -1, -1), text], dim=1)  # (B, registers + M, D)
