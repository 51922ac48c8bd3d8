"""Every row of the README's tables of adapters: one adapter in every dialect, and a module of every kind."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from layouts import Tensors, write
from torch import Tensor

RANK, ALPHA = 4, 2.0
SCALE = ALPHA / RANK
QKV, FC1, FINAL = "joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.mlp.fc1", "final_layer.adaLN_modulation.1"
CLIP, T5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.1.DenseReluDense.wo"

# Diffusers' name of each native module; q, k and v come in its place.
DIFFUSERS = {FC1: "transformer_blocks.0.ff.net.0.proj", FINAL: "norm_out.linear"}
ATTENTION = "transformer_blocks.0.attn."
FOLDERS = {"clip_l": "text_encoder.", "clip_g": "text_encoder_2.", "t5": "text_encoder_3."}
COMFYUI = {"clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer.",
           "t5": "text_encoders.t5xxl.transformer."}  # fmt: skip
KOHYA = {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"}


class Pair:
    """down [r, in] and up [out, r] of one module."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self.down, self.up = down, up

    def rows(self, *places: slice) -> "Pair":
        """An adapter of these rows of the weight, one under the other."""
        return Pair(self.down, torch.cat([self.up[place] for place in places]))


Content = Mapping[tuple[str, str], Pair]  # {(component, native module): Pair}


def content(sizes: Mapping[str, int], draw: Callable[..., Tensor]) -> Content:
    """One adapter for a model of these sizes: its transformer, and a module of each text encoder."""
    width = sizes["transformer"]
    shapes = {
        ("transformer", QKV): (3 * width, width),
        ("transformer", FC1): (4 * width, width),
        ("transformer", FINAL): (2 * width, width),
        ("clip_l", CLIP): (4 * sizes["clip_l"], sizes["clip_l"]),
        ("clip_g", CLIP): (4 * sizes["clip_g"], sizes["clip_g"]),
        ("t5", T5): (sizes["t5"], sizes["t5 inside"]),
    }
    return {place: Pair(draw(RANK, n, seed=f"down{place}"), draw(m, RANK, seed=f"up{place}"))
            for place, (m, n) in shapes.items()}  # fmt: skip


def split(pairs: Content) -> dict[tuple[str, str], Pair]:
    """The same adapter under diffusers' names: q, k and v apart, the last modulation's halves the other way round."""
    result = {}
    for (part, module), pair in pairs.items():
        if module == QKV:
            third = pair.up.shape[0] // 3
            for i, letter in enumerate("qkv"):
                result[part, f"{ATTENTION}to_{letter}"] = pair.rows(slice(i * third, (i + 1) * third))
        elif module == FINAL:
            half = pair.up.shape[0] // 2
            result[part, DIFFUSERS[module]] = pair.rows(slice(half, None), slice(half))
        else:
            result[part, DIFFUSERS.get(module, module)] = pair
    return result


@dataclass(frozen=True)
class Dialect:
    """How one writer spells the adapter.

    name: in the README; told: what `inspect` calls it; prefix: before the transformer's modules; encoders: before those
    of the text encoders that it has; native: Stability's module names, not diffusers'; flat: underscores in place of
    dots; ends: of down and up; alpha: where it stands, "beside" the tensors, "folded" into up, in the "metadata" or the
    "config".
    """

    name: str
    told: str
    prefix: str
    encoders: Mapping[str, str] = field(default_factory=dict)
    native: bool = False
    flat: bool = False
    ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
    alpha: str = "folded"
    config: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[dict[tuple[str, str], Pair]], dict[tuple[str, str], Pair]] = dict

    @property
    def parts(self) -> tuple[str, ...]:
        return ("transformer", *self.encoders)

    def write(self, folder: Path, pairs: Content) -> Path:
        """The file, or the folder where its configuration lies beside it."""
        mine = {place: pair for place, pair in pairs.items() if place[0] in self.parts}
        tensors: Tensors = {}
        for (part, module), pair in self.change(dict(mine) if self.native else split(mine)).items():
            name = module.replace(".", "_") if self.flat else module
            prefix = self.prefix if part == "transformer" else self.encoders[part]
            down, up = self.ends
            tensors[f"{prefix}{name}{down}"] = pair.down
            tensors[f"{prefix}{name}{up}"] = pair.up * SCALE if self.alpha == "folded" else pair.up
            if self.alpha == "beside":
                tensors[f"{prefix}{name}.alpha"] = torch.tensor(ALPHA)
        if self.alpha == "config":
            write(folder / "adapter_model.safetensors", tensors)
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **self.config}))
            return folder
        told = None
        if self.alpha == "metadata":
            flat = {f"{name.removesuffix('.')}.{key}": value for name in (self.prefix, *self.encoders.values())
                    for key, value in (("r", RANK), ("lora_alpha", ALPHA))}  # fmt: skip
            told = {"lora_adapter_metadata": json.dumps(flat)}
        return write(folder / "file.safetensors", tensors, told)


def block_diagonal(pairs: dict[tuple[str, str], Pair]) -> dict[tuple[str, str], Pair]:
    """kohya's split_qkv: q, k and v trained apart and saved as one of three times the rank, alpha as it was."""
    result = {}
    for (part, module), pair in pairs.items():
        if module == QKV:
            ups = [3 * up for up in pair.up.chunk(3)]
            up = torch.block_diag(*ups) if not pair.up.is_meta else pair.up.repeat(1, 3)
            pair = Pair(pair.down.repeat(3, 1), up)
        result[part, module] = pair
    return result


def fused(pairs: dict[tuple[str, str], Pair]) -> dict[tuple[str, str], Pair]:
    """SimpleTuner's fused projections: diffusers' names, q, k and v in one module."""
    letters = [("transformer", f"{ATTENTION}to_{letter}") for letter in "qkv"]
    whole = Pair(pairs[letters[0]].down, torch.cat([pairs[place].up for place in letters]))
    rest = {place: pair for place, pair in pairs.items() if place not in letters}
    return {("transformer", f"{ATTENTION}to_qkv"): whole, **rest}


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
BESIDE = {"ends": DOWN_UP, "alpha": "beside"}
_KOHYA = {"prefix": "lora_unet_", "encoders": KOHYA, "native": True, "flat": True, **BESIDE}
_FOLDER = {"prefix": "base_model.model.", "alpha": "config"}
_TWO = {part: FOLDERS[part] for part in ("clip_l", "clip_g")}
PATTERNS = {"lora_alpha": 16, "alpha_pattern": {r"transformer_blocks\.0\..*": ALPHA, "norm_out.linear": ALPHA}}
DIALECTS = (
    Dialect("kohya", "kohya", **_KOHYA),
    Dialect("kohya with `split_qkv`", "kohya", **_KOHYA, change=block_diagonal),
    Dialect("diffusers, without alpha", "diffusers", "transformer.", _TWO),
    Dialect("diffusers, alpha in metadata", "diffusers", "transformer.", _TWO, alpha="metadata"),
    Dialect("PEFT file", "PEFT", "base_model.model.", ends=(".lora_A.default.weight", ".lora_B.default.weight"),
            alpha="beside"),
    Dialect("PEFT folder", "PEFT", **_FOLDER, config={"lora_alpha": ALPHA}),
    Dialect("PEFT folder: rank and alpha patterns", "PEFT", **_FOLDER, config=PATTERNS),
    Dialect("PEFT folder: rsLoRA", "PEFT", **_FOLDER, config={"lora_alpha": 1.0, "use_rslora": True}),
    Dialect("SimpleTuner: PEFT", "diffusers", "transformer.", _TWO, alpha="metadata"),
    Dialect("SimpleTuner: PEFT, its ComfyUI format", "diffusers", "transformer.", alpha="beside"),
    Dialect("SimpleTuner: PEFT, files of old", "diffusers", "transformer.",
            ends=(".lora.down.weight", ".lora.up.weight")),
    Dialect("SimpleTuner: LyCORIS", "LyCORIS (SimpleTuner)", "lycoris_", flat=True, **BESIDE),
    Dialect("SimpleTuner: LyCORIS, fused projections", "LyCORIS (SimpleTuner)", "lycoris_", flat=True, **BESIDE,
            change=fused),
    Dialect("ComfyUI", "ComfyUI", "diffusion_model.", COMFYUI, native=True, **BESIDE),
    Dialect("OneTrainer: older", "OneTrainer", "lora_transformer_", KOHYA, flat=True, **BESIDE),
    Dialect("OneTrainer: kohya", "kohya", **_KOHYA),
    Dialect("OneTrainer: ComfyUI", "ComfyUI", "diffusion_model.", COMFYUI, native=True, alpha="beside"),
    Dialect("OneTrainer: original", "Stability's names, without a prefix", "", native=True, alpha="beside"),
    Dialect("OneTrainer: diffusers", "diffusers", "transformer.", FOLDERS),
    Dialect("OneTrainer: internal", "diffusers, without a prefix", "", **BESIDE),
    Dialect("ai-toolkit", "diffusers", "transformer."),
    Dialect("ai-toolkit: LyCORIS", "LyCORIS (SimpleTuner)", "lycoris_", flat=True, **BESIDE),
)  # fmt: skip


# ---- kinds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KindRow:
    """A module of one kind.

    name: in the README; told: what `inspect` counts; module: its native name; roles: the shapes of its tensors, for a
    transformer of this width; biased: whether the module's bias changes too.
    """

    name: str
    told: Mapping[str, int]
    module: str
    roles: Callable[[int], Mapping[str, tuple[int, ...]]]
    biased: bool = False


CONV = "x_embedder.proj"  # [w, 16, 2, 2]
_CHOICES: dict[str, Callable[[int], Mapping[str, tuple[int, ...]]]] = {
    "LoRA": lambda w: {"lora_down.weight": (4, w), "lora_up.weight": (4 * w, 4)},
    "LoHa": lambda w: {"hada_w1_a": (4 * w, 2), "hada_w1_b": (2, w), "hada_w2_a": (4 * w, 2), "hada_w2_b": (2, w)},
    "LoKr": lambda w: {"lokr_w1": (8, 4), "lokr_w2": (w // 2, w // 4)},
}


def _row(name: str, told: str | Mapping[str, int], roles: Callable[[int], Mapping[str, tuple[int, ...]]],
         module: str = FC1, biased: bool = False) -> KindRow:  # fmt: skip
    return KindRow(name, {told: 1} if isinstance(told, str) else told, module, roles, biased)


def _with(
    kind: str, role: str, shape: Callable[[int], tuple[int, ...]]
) -> Callable[[int], Mapping[str, tuple[int, ...]]]:
    return lambda w: {**_CHOICES[kind](w), role: shape(w)}


KINDS = (
    _row("LoRA", "LoRA", _CHOICES["LoRA"]),
    _row("LoRA with a bias", "LoRA", _with("LoRA", "lora_B.bias", lambda w: (4 * w,)), biased=True),
    _row("LoRA on the convolution", "LoRA",
         lambda w: {"lora_down.weight": (4, 16, 2, 2), "lora_up.weight": (w, 4, 1, 1)}, CONV),
    _row("LoRA on the convolution with a core (Tucker)", "LoRA",
         lambda w: {"lora_down.weight": (4, 16, 1, 1), "lora_mid.weight": (4, 4, 2, 2), "lora_up.weight": (w, 4, 1, 1)},
         CONV),
    _row("LoHa", "LoHa", _CHOICES["LoHa"]),
    _row("LoHa on the convolution", "LoHa",
         lambda w: {"hada_w1_a": (w, 2), "hada_w1_b": (2, 64), "hada_w2_a": (w, 2), "hada_w2_b": (2, 64)}, CONV),
    _row("LoHa on the convolution with cores (Tucker)", "LoHa",
         lambda w: {f"hada_{name}": shape for i in (1, 2) for name, shape in (
             (f"w{i}_a", (2, w)), (f"w{i}_b", (2, 16)), (f"t{i}", (2, 2, 2, 2)))}, CONV),
    _row("LoKr", "LoKr", _CHOICES["LoKr"]),
    _row("LoKr in factors", "LoKr", lambda w: {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (w // 2, 2),
                                               "lokr_w2_b": (2, w // 4)}),
    _row("LoKr of fused projections", "LoKr", lambda w: {"lokr_w1": (6, 8), "lokr_w2": (w // 2, w // 8)}, QKV),
    _row("LoKr on the convolution", "LoKr", lambda w: {"lokr_w1": (8, 4), "lokr_w2": (w // 8, 4, 2, 2)}, CONV),
    _row("LoKr on the convolution with a core (Tucker)", "LoKr",
         lambda w: {"lokr_w1": (8, 4), "lokr_w2_a": (2, w // 8), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 2, 2)}, CONV),
    *(_row("DoRA per output, over LoRA, LoHa or LoKr", {kind: 1, "DoRA": 1}, _with(kind, role, shape))
      for kind in _CHOICES
      for role, shape in (("dora_scale", lambda w: (4 * w, 1)), ("lora_magnitude_vector", lambda w: (4 * w,)),
                          ("magnitude", lambda w: (4 * w,)))),
    *(_row("DoRA per input, over LoRA, LoHa or LoKr", {kind: 1, "DoRA": 1}, _with(kind, "dora_scale", lambda w: (1, w)))
      for kind in _CHOICES),
    _row("`.diff`, `.diff_b`", "diff", lambda w: {"diff": (4 * w, w), "diff_b": (4 * w,)}, biased=True),
    _row("`.w_norm`, `.b_norm`", "diff", lambda _: {"w_norm": (64,)}, "joint_blocks.0.x_block.attn.ln_q"),
    _row("`.set_weight`", "set", lambda w: {"set_weight": (4 * w, w)}),
)  # fmt: skip
