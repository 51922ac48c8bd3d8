"""ControlNets: a folder or a file, and what they say of the picture that controls.

    open_control("sd3.5_large_controlnet_canny.safetensors").type   # "canny"

References: diffusers' models/controlnets/controlnet_sd3.py and scripts/convert_sd3_controlnet_to_diffusers.py;
Stability AI's sd3.5, dit_embedder.py, whose files have a number for what the picture is to show.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mmdit.common.jsons import read_json
from weights.checkpoint import component_of, folder_header
from weights.component import Component
from weights.errors import CheckpointError
from weights.files import open_file, read_file
from weights.header import TensorInfo
from weights.kinds import WHAT, described, networks, refuse_strangers, split
from weights.layouts import is_ignored

STEM = "diffusion_pytorch_model"
TYPES = ("blur", "canny", "depth")  # in the order of Stability AI's numbers
_TYPE = "control_type"  # the tensor with that number
# Width, whether it reads a text, query-key norm: whose ControlNet that is.
MODELS = {
    (1536, True, False): "SD3-Medium",
    (1536, True, True): "SD3.5-Medium",
    (2432, False, False): "SD3.5-Large",
}
_LATENT = 16  # channels of Stable Diffusion 3's latents


class ControlFile(NamedTuple):
    """A ControlNet's tensors, and which of TYPES it says that it is."""

    component: Component
    type: str | None


def open_control(path: str | os.PathLike[str]) -> ControlFile:
    """A ControlNet for Stable Diffusion 3, from a file or a diffusers folder of the net alone.

    Reads no tensor but that of its type. CheckpointError, naming what would be right, for anything else.
    """
    try:
        path = Path(path).expanduser()
        folder = path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    header = folder_header(path, STEM) if folder else read_file(path)
    tensors = {key: info for key, info in header.tensors.items() if not is_ignored(key)}
    refuse_strangers(path, tensors)
    found = networks(tensors)
    if "control" not in found:
        raise CheckpointError(f"{path}: {described(found, tensors)}; expected {WHAT['control']}")
    config = path / "config.json"
    values = read_json(config, CheckpointError) if folder and config.exists() else None
    own = split(tensors, found)[0]["control"]
    component = component_of(found["control"], "control", path, own, header.metadata, values)
    return ControlFile(component, _type(header.tensors))


def _type(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What the net is of; None where its file does not say it, or says what is not known."""
    info = next((info for key, info in tensors.items() if key.endswith(_TYPE)), None)
    if info is None or info.shape not in ((), (1,)):
        return None
    try:
        number = int(open_file(info.file).get_tensor(info.key))
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{info.file}: {info.key} cannot be read: {error}") from None
    return TYPES[number] if 0 <= number < len(TYPES) else None


def told_control(opened: ControlFile) -> tuple[str | None, str, str | None]:
    """Whose transformer a ControlNet is for, if it is published, the rest in words, and what is wrong with it."""
    shapes, key = opened.component.shapes, "pos_embed_input.proj.weight"
    if len(shapes.get(key, ())) != 4:
        return None, "damaged", f"{opened.component.spelled(key)} is not a convolution"
    width, channels = shapes[key][:2]
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("controlnet_blocks.")})
    text = "context_embedder.weight" in shapes
    norm = any(name.endswith("attn.ln_k.weight") for name in shapes)
    told = [f"{blocks} blocks", *([] if text else ["without a text"])]
    told += ["with a mask"] if channels == _LATENT + 1 else []
    told += [opened.type] if opened.type else []
    return MODELS.get((width, text, norm)), ", ".join(told), None
