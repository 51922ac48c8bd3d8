"""What a file is, by the names of its tensors alone: which networks it holds, in which layout, or what else it is.

Names of files tell nothing: people rename them. The tables below are the whole knowledge; the functions only look up.

References: ComfyUI's model_detection.py and sd.py, stable-diffusion.cpp's model_loader.cpp, diffusers'
loaders/single_file_utils.py.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from weights.errors import CheckpointError

COMPONENTS = ("transformer", "vae", "clip_l", "clip_g", "t5")

WHAT = {
    "transformer": "a Stable Diffusion 3 transformer",
    "vae": "a VAE",
    "clip": "a CLIP text encoder",
    "clip_l": "a CLIP-L text encoder",
    "clip_g": "a CLIP-G text encoder",
    "clip_h": "a CLIP-H text encoder (of Stable Diffusion 2)",
    "t5": "a T5 text encoder",
    "control": "a ControlNet for Stable Diffusion 3",
}


class Network(NamedTuple):
    """A network inside a file.

    name: one of COMPONENTS, "control", "clip_h", or "clip" where the file does not tell which CLIP; layout: whose names
    its tensors have (see `layouts`); prefix: what stands before these names.
    """

    name: str
    layout: str
    prefix: str


class _Mark(NamedTuple):
    """A tensor that a network has and nothing else."""

    key: str
    name: str
    layout: str


_CONTROL = "pos_embed_input.proj.weight"  # Stable Diffusion 3's alone has it

_MARKS = (
    _Mark("joint_blocks.0.context_block.attn.qkv.weight", "transformer", "native"),
    _Mark("transformer_blocks.0.attn.add_q_proj.weight", "transformer", "diffusers"),
    _Mark(_CONTROL, "control", "diffusers"),
    _Mark("decoder.mid.block_1.conv1.weight", "vae", "native"),
    _Mark("decoder.mid_block.resnets.0.conv1.weight", "vae", "diffusers"),
    _Mark("text_model.encoder.layers.0.self_attn.q_proj.weight", "clip", "transformers"),
    # transformers 5.6 dropped the `text_model.` of a CLIPTextModel.
    _Mark("encoder.layers.0.self_attn.q_proj.weight", "clip", "transformers"),
    _Mark("transformer.resblocks.0.attn.in_proj_weight", "clip", "openclip"),
    _Mark("encoder.block.0.layer.0.SelfAttention.q.weight", "t5", "transformers"),
    _Mark("enc.blk.0.attn_q.weight", "t5", "llama.cpp"),
)

# The picture's half of a whole CLIP, which has the same names inside.
_PICTURE_HALF = ("visual.", "vision_model.")

_CLIP_LAYER = re.compile(r"(?:text_model\.encoder\.layers|encoder\.layers|transformer\.resblocks)\.(\d+)\.")
_CLIP_DEPTHS = {12: "clip_l", 24: "clip_h", 32: "clip_g"}

_OTHER_MODEL = "this engine runs Stable Diffusion 3 and 3.5 only"
_ADAPTER = "an adapter (LoRA), not a checkpoint; give the model it was trained on, and this with --lora"
_CONTROLNET = f"a ControlNet, not a checkpoint; {_OTHER_MODEL}"
_UNET = f"an SD1, SD2 or SDXL model; {_OTHER_MODEL}"
_SDXL = f"an SDXL model; {_OTHER_MODEL}"
_T5 = "Stable Diffusion 3 reads T5 1.1 XXL"

# What nothing here can use, though it may share marks with what can: (part of a key, what to tell the user).
_STRANGERS = (
    # First, as it has blocks of the model that it belongs to.
    ("controlnet_blocks.", _CONTROLNET),
    ("control_model.", _CONTROLNET),
    ("double_blocks.0.", f"a FLUX model; {_OTHER_MODEL}"),
    ("single_transformer_blocks.0.", f"a FLUX model; {_OTHER_MODEL}"),
    # Only SDXL has two transformers in the second level of its U-Net.
    ("input_blocks.4.1.transformer_blocks.1.", _SDXL),
    ("down_blocks.1.attentions.0.transformer_blocks.1.", _SDXL),
    ("input_blocks.0.0.", _UNET),
    ("add_embedding.linear_1.", _UNET),
    ("mid_block.attentions.0.transformer_blocks.0.", _UNET),
    ("lora_A.", _ADAPTER),
    ("lora_down.", _ADAPTER),
    ("hada_w1_a", _ADAPTER),
    ("lokr_w1", _ADAPTER),
    ("encoder.block.0.layer.1.DenseReluDense.wi.weight", f"a T5 1.0; {_T5}"),
    ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.", f"a UMT5; {_T5}"),
    ("enc.blk.1.attn_rel_b.", f"a UMT5; {_T5}"),
)


def networks(keys: Collection[str]) -> dict[str, Network]:
    """{name: Network} of what the file with these tensor names holds; the shortest prefix wins where one is twice."""
    found: dict[str, Network] = {}
    for mark in _MARKS:
        for key in keys:
            prefix = key.removesuffix(mark.key)
            if prefix == key or prefix.endswith(("text_model.", *_PICTURE_HALF)):
                continue
            name = _which_clip(prefix, keys) if mark.name == "clip" else mark.name
            if name not in found or len(prefix) < len(found[name].prefix):
                found[name] = Network(name, mark.layout, prefix)
    control, transformer = found.get("control"), found.get("transformer")
    if control and transformer and control.prefix == transformer.prefix:  # its blocks are a transformer's
        found["control"] = control._replace(layout=found.pop("transformer").layout)
    return found


def refuse_strangers(path: object, keys: Collection[str]) -> None:
    """Raise CheckpointError where the file is known not to be for this engine, saying what it is."""
    text = stranger(keys)
    if text is not None:
        raise CheckpointError(f"{path}: {text}")


def stranger(keys: Collection[str]) -> str | None:
    """What a file is that is known not to be for this engine, a semicolon, and what would be right; else None."""
    own = any(key.endswith(_CONTROL) for key in keys)
    told = (text for mark, text in _STRANGERS if any(mark in key for key in keys))
    return next((text for text in told if not (own and text is _CONTROLNET)), None)


def described(names: Iterable[str], keys: Collection[str]) -> str:
    """In words what the file with these networks is."""
    if names:
        return " and ".join(WHAT[name] for name in names)
    return f"no model that is known (its first tensor is {next(iter(keys))})" if keys else "empty"


def split(keys: Mapping[str, Any], found: Mapping[str, Network]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """{network: {name without prefix: value}}, and the keys of no network."""
    groups: dict[str, dict[str, Any]] = {name: {} for name in found}
    strangers = []
    # Longest prefix first: one may be empty and would take every key.
    order = sorted(found.values(), key=lambda network: -len(network.prefix))
    for key, value in keys.items():
        owner = next((network for network in order if key.startswith(network.prefix)), None)
        if owner is None:
            strangers.append(key)
        else:
            groups[owner.name][key[len(owner.prefix) :]] = value
    return groups, strangers


def _which_clip(prefix: str, keys: Iterable[str]) -> str:
    """By the prefix, as in a file with several, else by the number of layers; "clip" where neither tells."""
    told = next((name for name in ("clip_l", "clip_g") if name in prefix), None)
    if told:
        return told
    layers = {match[1] for key in keys if key.startswith(prefix) and (match := _CLIP_LAYER.match(key, len(prefix)))}
    return _CLIP_DEPTHS.get(len(layers), "clip")
