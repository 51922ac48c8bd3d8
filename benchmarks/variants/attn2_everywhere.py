"""A second attention among the image tokens in every block, not in the first half alone."""

from dataclasses import replace

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.variants import variant


@variant("attn2_everywhere")
class Attn2Everywhere(MMDiT):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(replace(config, dual_attention_blocks=tuple(range(config.depth))))
