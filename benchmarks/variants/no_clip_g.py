"""Without CLIP-G: prompts are read by CLIP-L and T5 alone."""

from mmdit.model import MMDiT
from mmdit.variants import variant


@variant("no_clip_g", encoders=("clip_l", "t5"))
class NoCLIPG(MMDiT):
    """The same transformer; its pooled vector is CLIP-L's, as long as `pooled_size` says."""
