"""Weights: from published safetensors files straight into modules.

    checkpoint = open_checkpoint("stable-diffusion-3.5-medium")   # folder or single file, headers only
    with torch.device("meta"):
        model = MMDiT(config)
    fill(model, checkpoint.component("transformer"), dtype=torch.bfloat16)

`header` checks a file before it is trusted, `keymap` holds the names of the two published layouts as a table,
`checkpoint` finds the networks in a folder or file, `component` reads their tensors, `fill` puts them into a
module. The package knows names and shapes only: it imports none of the networks.
"""

from weights.checkpoint import Checkpoint, open_checkpoint
from weights.component import Component
from weights.errors import CheckpointError
from weights.fill import fill

__all__ = ["Checkpoint", "CheckpointError", "Component", "fill", "open_checkpoint"]
