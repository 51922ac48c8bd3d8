"""RMS norm (Zhang & Sennrich 2019, arXiv 1910.07467) in place of every LayerNorm, modulated as before."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.model import LayerNorm, MMDiT
from mmdit.variants import variant


class ModulatedRMSNorm(LayerNorm):
    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, F.rms_norm(x, (self.width,), eps=1e-6), 1 + scale)


@variant("rmsnorm")
def rmsnorm(model: MMDiT) -> None:
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.__class__ = ModulatedRMSNorm
