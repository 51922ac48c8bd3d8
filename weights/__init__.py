"""Weights: from published files straight into modules.

    checkpoint = open_checkpoint("stable-diffusion-3.5-medium")   # folder or single file, headers only
    with torch.device("meta"):
        model = MMDiT(config)
    fill(model, checkpoint.component("transformer"), dtype=torch.bfloat16)

`header` and `gguf` check a file before it is trusted, `kinds` tells what it is, `keymap` and `layouts` hold the names
of the same tensors in different places as tables, `quantised` knows the scales of fp8. `checkpoint` puts these
together, `component` reads the tensors, `fill` puts them into a module; `hub` fetches models. `inspect` tells what a
file is, `convert` writes another form of it: `python -m weights`. The package knows names and shapes only: it imports
none of the networks.
"""

from weights.checkpoint import Checkpoint, open_checkpoint
from weights.component import Component
from weights.errors import CheckpointError
from weights.fill import Source, fill

__all__ = ["Checkpoint", "CheckpointError", "Component", "Source", "fill", "open_checkpoint"]
