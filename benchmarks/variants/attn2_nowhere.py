"""No second attention among the image tokens: SD3-Medium's blocks, with SD3.5's query-key norm."""

from dataclasses import replace

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.variants import variant


@variant("attn2_nowhere")
class Attn2Nowhere(MMDiT):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(replace(config, dual_attention_blocks=()))
