"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) in the second attention, as SANA's with ReLU."""

import torch
from torch import Tensor

from mmdit.model import DualBlock, MMDiT
from mmdit.variants import variant


def linear(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """As every backend of `mmdit.attention`; costs grow with the number of tokens, not with its square."""
    assert bias is None
    q, k, wide = q.float().relu(), k.float().relu(), v.float()
    memory = torch.einsum("bmhd,bmhe->bhde", k, wide)
    weight = torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
    return (torch.einsum("bnhd,bhde->bnhe", q, memory) / (weight[..., None] + 1e-6)).to(v)


@variant("linear_attention")
def linear_attention(model: MMDiT) -> None:
    for module in model.modules():
        if isinstance(module, DualBlock):
            module.attn2.backend = linear
