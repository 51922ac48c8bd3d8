"""Which weight of the model a module's name in an adapter means: a table made from the model's own names.

Every dialect writes a prefix and a name, the model's native one or diffusers', with its dots or with underscores in
their place. All combinations are written out and looked up; nothing is guessed back from underscores.

    kohya, OneTrainer            lora_unet_joint_blocks_0_x_block_attn_qkv
    ComfyUI, OneTrainer          diffusion_model.joint_blocks.0.x_block.attn.qkv
    diffusers, ai-toolkit        transformer.transformer_blocks.0.attn.to_q
    PEFT                         base_model.model.transformer_blocks.0.attn.to_q
    SimpleTuner (LyCORIS)        lycoris_transformer_blocks_0_attn_to_q
    OneTrainer (older)           lora_transformer_transformer_blocks_0_attn_to_q

References: kohya networks/lora_sd3.py, ComfyUI comfy/lora.py, OneTrainer modules/util/convert_lora_util.py, diffusers
loaders/lora_pipeline.py, SimpleTuner helpers/models/sd3.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from weights.keymap import TRANSFORMER, to_diffusers

Shapes = Mapping[str, tuple[int, ...]]


class Target(NamedTuple):
    """A weight `<module>.weight` with its `<module>.bias`, or some rows of both.

    shape: of the weight or of these rows; rows: [first, last) or None for all; swap: the two halves of the rows change
    places between the adapter and the model.
    """

    component: str
    module: str
    shape: tuple[int, ...]
    bias: bool
    rows: tuple[int, int] | None = None
    swap: bool = False


class Prefixes(NamedTuple):
    """What stands before a name with dots, and before one with underscores."""

    dotted: tuple[str, ...]
    flat: tuple[str, ...]


_TRANSFORMER = Prefixes(
    ("", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model."),
    ("lora_unet_", "lora_transformer_", "lycoris_"),
)
_TEXT = {
    "clip_l": Prefixes(
        ("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer."), ("lora_te1_", "lora_te_")
    ),
    "clip_g": Prefixes(("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.transformer."), ("lora_te2_",)),
    "t5": Prefixes(("text_encoder_3.", "text_encoders.t5xxl.transformer.", "t5xxl.transformer."), ("lora_te3_",)),
}
_WRAPPERS = ("lora.", "unet.")  # stand before everything else in some files

# diffusers' transformer with fused projections (SimpleTuner --fuse_qkv_projections): its name from that of q.
_FUSED = {"to_q": "to_qkv", "add_q_proj": "to_added_qkv"}
# diffusers' attention processors of old gave CLIP's projections the names of the UNet's.
_OLD_CLIP = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

_FLUX = ("double_blocks", "single_blocks", "single_transformer_blocks")
_UNET = ("down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block")
_UNETS = {768: "SD1", 1024: "SD2", 2048: "SDXL"}  # by the width of the text that their cross-attention reads
LARGE = 2432  # width of SD3.5-Large, which no matrix of another model has


class Lookup:
    """Names in adapters to targets in the networks given, {component: {tensor name: shape}}."""

    def __init__(self, components: Mapping[str, Shapes]) -> None:
        self._aliases: dict[str, Target] = {}
        for component, shapes in components.items():
            if component == "transformer":
                self._aliases.update(_transformer(shapes))
            else:
                self._aliases.update(_text_encoder(component, shapes))
        patches = components.get("transformer", {}).get("x_embedder.proj.weight")
        self.width = patches[0] if patches else None  # of the transformer

    def find(self, alias: str) -> Target | None:
        """What a module's name means, None if the networks have no such module."""
        return self._aliases.get(unwrapped(alias))


def owner(alias: str) -> str:
    """The component that a name is for, by its prefix alone: "clip_l", "clip_g", "t5", or "transformer"."""
    name = unwrapped(alias)
    return next((part for part, (dotted, flat) in _TEXT.items() if name.startswith((*dotted, *flat))), "transformer")


def unwrapped(alias: str) -> str:
    for wrapper in _WRAPPERS:
        alias = alias.removeprefix(wrapper)
    return alias


def is_idle(alias: str) -> bool:
    """Whether a name is CLIP-L's projection, which Stability's layout does not have: its adapter changes nothing."""
    return owner(alias) == "clip_l" and alias.endswith("text_projection")


def other_model(shapes: Mapping[str, tuple[int, ...]], width: int | None) -> str | None:
    """The model that an adapter is for, where it is another one than Stable Diffusion 3 or 3.5 of this width.

    shapes: {module as spelled: shape of the delta, or () where unknown}.
    """
    images = {alias: shape for alias, shape in shapes.items() if owner(alias) == "transformer"}
    if any(part in alias for alias in images for part in _FLUX):
        return "FLUX"
    if any(part in alias for alias in images for part in _UNET):
        cross = {shape[1] for a, shape in images.items() if a.endswith(("attn2_to_k", "attn2.to_k")) and shape[1:]}
        return _UNETS.get(min(cross, default=0), "SD1, SD2 or SDXL")
    if width != LARGE and any(LARGE in shape for shape in images.values()):
        return f"SD3.5-Large (width {LARGE})"
    return None


def _modules(component: str, shapes: Shapes) -> dict[str, Target]:
    names = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    return {name: Target(component, name, shapes[f"{name}.weight"], f"{name}.bias" in shapes) for name in names}


def _transformer(shapes: Shapes) -> Iterator[tuple[str, Target]]:
    native = _modules("transformer", shapes)
    names = dict(native)
    for weight, entry in to_diffusers([f"{name}.weight" for name in native], TRANSFORMER).items():
        name, whole = weight.removesuffix(".weight"), native[entry.sources[0].removesuffix(".weight")]
        if entry.op == "split3":
            third = whole.shape[0] // 3
            first = entry.part * third
            names[name] = whole._replace(shape=(third, *whole.shape[1:]), rows=(first, first + third))
            parent, _, leaf = name.rpartition(".")
            if leaf in _FUSED:
                names[f"{parent}.{_FUSED[leaf]}"] = whole
        else:
            names[name] = whole._replace(swap=entry.op == "swap_halves")
    return _spelled(names, _TRANSFORMER)


def _text_encoder(component: str, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    names = _modules(component, shapes)
    for name, target in list(names.items()):
        parent, _, leaf = name.rpartition(".")
        if leaf in _OLD_CLIP:
            names[f"{parent}.{_OLD_CLIP[leaf]}"] = target
    # transformers 5.6 dropped the `text_model.` of a CLIPTextModel, so that newer files have no such part.
    names = {name.removeprefix("text_model."): target for name, target in names.items()} | names
    return _spelled(names, _TEXT[component])


def _spelled(names: Mapping[str, Target], prefixes: Prefixes) -> Iterator[tuple[str, Target]]:
    for name, target in names.items():
        for prefix in prefixes.dotted:
            yield prefix + name, target
        for prefix in prefixes.flat:
            yield prefix + name.replace(".", "_"), target
