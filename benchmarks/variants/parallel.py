"""Attention and MLP side by side on the same norm (Wang & Komatsuzaki 2021, GPT-J), in every block.

The MLP's norm, its shift and scale go; the second attention stays where it was.
"""

import torch
from torch import Tensor

from mmdit.model import Block, DualBlock, MMDiT, Modulation, Tokens
from mmdit.variants import variant


class ParallelBlock(Block):
    def forward(self, x: Tensor, gathered: Tensor, tokens: Tokens, modulation: Modulation) -> Tensor:  # noqa: ARG002
        shift, scale, gate, _, _, gate_mlp = modulation
        mlp = self.mlp(self.norm1(x, shift, scale))
        return torch.addcmul(torch.addcmul(x, gate, self.attn(gathered)), gate_mlp, mlp)


class ParallelDualBlock(DualBlock):
    def forward(self, x: Tensor, gathered: Tensor, tokens: Tokens, modulation: Modulation) -> Tensor:
        shift, scale, gate, _, _, gate_mlp, shift2, scale2, gate2 = modulation
        mlp = self.mlp(self.norm1(x, shift, scale))
        gathered2 = self.attn2.attend(*self.attn2.to_qkv(self.norm1(x, shift2, scale2)), tokens._replace(text=0))
        x = torch.addcmul(torch.addcmul(x, gate, self.attn(gathered)), gate2, self.attn2(gathered2))
        return torch.addcmul(x, gate_mlp, mlp)


@variant("parallel")
def parallel(model: MMDiT) -> None:
    for module in model.modules():
        if type(module) in (Block, DualBlock):
            module.__class__ = ParallelDualBlock if isinstance(module, DualBlock) else ParallelBlock
