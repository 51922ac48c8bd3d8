"""Value residual (Zhou et al. 2024, arXiv 2410.17897): every joint attention mixes its values with the first one's."""

import torch
from torch import Tensor, nn

from mmdit.model import MMDiT, SelfAttention, Tokens
from mmdit.variants import variant


class First(list):
    """The first attention's values, kept for blocks that are computed again; a copy of the model has its own."""

    def __deepcopy__(self, memo: dict) -> "First":
        return First()


class MixedAttention(SelfAttention):
    first: First  # the same in all blocks
    index: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        if self.index == 0:
            self.first[:] = [v]
        else:
            v = torch.lerp(v, self.first[0], self.mix.to(v))
        return super().attend(q, k, v, tokens)


@variant("value_residual")
class ValueResidual(MMDiT):
    def __init__(self, config) -> None:
        super().__init__(config)
        first = First()
        for i, block in enumerate(self.joint_blocks):
            attn = block.x_block.attn
            attn.__class__, attn.index, attn.first = MixedAttention, i, first
            if i:
                attn.mix = nn.Parameter(torch.zeros(()))
