"""One adaLN for all blocks, with an offset of each (Chen et al. 2023, PixArt-alpha, arXiv 2310.00426, section 2.3)."""

import torch
from torch import Tensor, nn

from mmdit.model import MMDiT, Modulations
from mmdit.variants import variant


class Offset(nn.Module):
    """In the place of a block's adaLN: what the shared one gives, moved by numbers of its own."""

    def __init__(self, chunks: int, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(chunks * width))

    def forward(self, shared: Tensor) -> Tensor:
        return shared[:, : len(self.offset)] + self.offset


@variant("shared_adaln")
class SharedAdaLN(MMDiT):
    layout = MMDiT.layout._replace(before="shared")

    def __init__(self, config) -> None:
        super().__init__(config)
        width, streams = config.hidden_size, [s for block in self.joint_blocks for s in block.children()]
        sizes = [stream.adaLN_modulation[1].out_features // width for stream in streams]
        self.shared = nn.Sequential(nn.SiLU(), nn.Linear(width, max(sizes) * width))
        for stream, chunks in zip(streams, sizes):
            stream.adaLN_modulation = Offset(chunks, width)

    def modulations(self, sigma: Tensor, pooled: Tensor) -> list[Modulations]:
        c = self.vector(sigma, pooled)
        shared = self.shared(c)
        return [*(block.modulation(shared) for block in self.joint_blocks), self.final_layer.modulation(c)]
