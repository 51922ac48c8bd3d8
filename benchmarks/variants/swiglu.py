"""SwiGLU (Shazeer 2020, arXiv 2002.05202) in place of the MLP, with as many weights."""

import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.model import MLP, MMDiT
from mmdit.variants import variant


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3
        self.fc1 = nn.Linear(width, 2 * inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


@variant("swiglu")
def swiglu(model: MMDiT) -> None:
    for block in model.modules():
        if isinstance(getattr(block, "mlp", None), MLP):
            block.mlp = SwiGLU(model.config.hidden_size)
