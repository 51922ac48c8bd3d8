"""Small ControlNets in the published layouts, with random weights, and diffusers' with the same."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import SD3ControlNetModel
from layouts import write
from reference import randomize
from torch import Tensor

from mmdit.config import TOY, MMDiTConfig
from mmdit.control.network import ControlConfig, ControlNet
from weights.keymap import CONTROL, revert, to_diffusers
from weights.published import control_config, write_json

# The transformers that they are for.
MEDIUM3 = replace(TOY, depth=5, qk_norm=False, dual_attention_blocks=())
MEDIUM35 = replace(TOY, depth=4, dual_attention_blocks=(0, 1))
LARGE = replace(TOY, depth=4, dual_attention_blocks=())


def control_for(transformer: MMDiTConfig, **more: object) -> ControlConfig:
    return ControlConfig(**{**vars(transformer), "depth": 2, **more})


INSTANTX = control_for(MEDIUM3)
INPAINTING = control_for(MEDIUM3, extra_channels=1)
TENSORART = control_for(MEDIUM35, depth=3, pooled_zeros=False)  # a block less than the transformer
STABILITY = control_for(LARGE, context_size=0, pos_embed_max_size=0, qk_norm=False, pooled_zeros=False)
KINDS = {"sd3": INSTANTX, "inpainting": INPAINTING, "sd3.5-medium": TENSORART, "sd3.5-large": STABILITY}
TRANSFORMERS = {"sd3": MEDIUM3, "inpainting": MEDIUM3, "sd3.5-medium": MEDIUM35, "sd3.5-large": LARGE}


@lru_cache(maxsize=8)
def nets(config: ControlConfig, seed: int = 0) -> tuple[ControlNet, SD3ControlNetModel]:
    """Ours and diffusers' with the same random weights; shared between tests, not to be written to."""
    ours = randomize(ControlNet(config), seed)
    theirs = SD3ControlNetModel(**{k: v for k, v in json_of(ours).items() if not k.startswith("_")})
    theirs.load_state_dict(diffusers_tensors(ours))
    return ours, theirs.requires_grad_(False).eval()


def json_of(net: ControlNet) -> dict:
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    return control_config(shapes, net.config.pooled_zeros)


def diffusers_tensors(net: ControlNet) -> dict[str, Tensor]:
    native = net.state_dict()
    return {name: revert(entry, native[entry.sources[0]]) for name, entry in to_diffusers(native, CONTROL).items()}


def stability_tensors(net: ControlNet, number: int) -> dict[str, Tensor]:
    """As Stability AI's files for SD3.5-Large have them, with their number for blur, canny or depth."""
    found = {"control_type": torch.tensor([number], dtype=torch.int32)}
    for name, tensor in net.state_dict().items():
        name = name.replace("joint_blocks.", "transformer_blocks.").replace(".x_block.", ".")
        for old, new in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
            for layer, place in ((1, 0), (2, 2)):
                name = name.replace(f"{old}.mlp.{place}.", f"time_text_embed.{new}.linear_{layer}.")
        found[name] = tensor
    return found


def control_folder(path: Path, net: ControlNet) -> Path:
    """A diffusers folder of the net alone."""
    path.mkdir(parents=True)
    write(path / "diffusion_pytorch_model.safetensors", diffusers_tensors(net))
    write_json(path / "config.json", json_of(net))
    return path
