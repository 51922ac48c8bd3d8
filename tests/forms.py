"""Weights in the forms that tools write them in: fp8 with scales, GGUF, OpenCLIP's and llama.cpp's names."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from layouts import Tensors
from torch import Tensor

from benchmarks import quantise
from benchmarks.quantise import coded

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WORDS = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2"}

Stored = Mapping[str, tuple[np.ndarray, Type]]


# ---- fp8 -----------------------------------------------------------------------------------------


def scaled(tensors: Tensors, style: str, dtype: torch.dtype = E4M3, prefix: str = "") -> tuple[Tensors, dict[str, str]]:
    """Every linear layer in fp8 with a scale of its own, biases in fp8 without, in one of three styles; metadata."""
    stored, layers = {}, {}
    for i, (name, tensor) in enumerate(tensors.items()):
        layer, _, leaf = name.rpartition(".")
        stored[prefix + name] = tensor.to(dtype) if leaf == "bias" else tensor.half()
        if leaf == "weight" and tensor.ndim == 2:
            scale = torch.tensor(0.01 * (i + 1))
            stored[prefix + name] = (tensor / scale).to(dtype)
            note = {"format": WORDS[dtype]}
            stored[prefix + layer + (".scale_weight" if style == "older" else ".weight_scale")] = scale
            stored[prefix + layer + (".scale_input" if style == "older" else ".input_scale")] = torch.tensor(3.0)
            if style == "notes":
                text = json.dumps(note | {"full_precision_matrix_mult": True}).encode()
                stored[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
            layers[prefix + layer] = note
    if style == "older":
        stored[prefix + "scaled_fp8"] = torch.empty(0, dtype=dtype)
    text = json.dumps({"format_version": "1.0", "layers": layers})
    return stored, {"_quantization_metadata": text} if style == "metadata" else {}


def unscaled(stored: Tensors, prefix: str = "") -> Tensors:
    """What the weights come to: a product where there is a scale."""
    result = {}
    for key, tensor in stored.items():
        layer, _, leaf = key.rpartition(".")
        if leaf in ("weight", "bias", "pos_embed") or key == prefix + "pos_embed":
            scale = stored.get(layer + ".scale_weight", stored.get(layer + ".weight_scale"))
            result[key.removeprefix(prefix)] = tensor.float() * (scale if leaf == "weight" and scale is not None else 1)
    return result


# ---- GGUF ----------------------------------------------------------------------------------------


def write_gguf(
    path: Path, tensors: Stored, arch: str = "sd3", shapes: Mapping[str, list[int]] = {}, alignment: int | None = None
) -> Path:
    """A GGUF file by the package's writer; shapes: for `comfy.gguf.orig_shape`; alignment: another than usual."""
    writer = gguf.GGUFWriter(path, arch)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_array("tokenizer.ggml.tokens", ["a", "of", "the"])
    writer.add_array("numbers", [1.5, 2.5])
    for name, shape in shapes.items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (codes, kind) in tensors.items():
        writer.add_tensor(name, codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mixture(tensors: Tensors, kind: Type = Type.Q8_0, rest: Type = Type.F16) -> dict[str, Type]:
    """As published: matrices of the blocks in `kind`, all else in `rest`."""
    block = gguf.GGML_QUANT_SIZES[kind][0]

    def of(name: str, tensor: Tensor) -> Type:
        inside = "joint_blocks." in name or "blk." in name or ".block." in name
        return kind if inside and tensor.ndim == 2 and tensor.shape[1] % block == 0 else rest

    return {name: of(name, tensor) for name, tensor in tensors.items()}


def mixed(tensors: Tensors, kind: Type = Type.Q8_0, rest: Type = Type.F16) -> dict[str, tuple[np.ndarray, Type]]:
    """The codes of these tensors in such a mixture."""
    return {name: (coded(tensors[name], own), own) for name, own in mixture(tensors, kind, rest).items()}


def decoded(stored: Stored) -> Tensors:
    return {name: torch.from_numpy(gguf.quants.dequantize(codes, kind)) for name, (codes, kind) in stored.items()}


def write_gguf_holes(path: Path, stored: Mapping[str, tuple[tuple[int, ...], Type]], arch: str = "sd3") -> Path:
    """A GGUF file of {name: (shape, type)} whose tensors are holes."""
    writer = gguf.GGUFWriter(path, arch)
    size = 0
    for name, (shape, kind) in stored.items():
        block, width = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(shape) // block * width
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, kind)
        size += -(-count // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        file.truncate(-(-file.tell() // 32) * 32 + size)
    return path


# ---- names ---------------------------------------------------------------------------------------


def llama_cpp(native: Tensors) -> Tensors:
    """T5 under llama.cpp's names."""
    return {quantise.llama_cpp(name): tensor for name, tensor in native.items()}


def open_clip(native: Tensors) -> Tensors:
    """A CLIP in OpenCLIP's layout: q, k, v as one, the projection transposed. Written out, layer by layer."""
    text = "text_model."
    result = {
        "positional_embedding": native[text + "embeddings.position_embedding.weight"],
        "token_embedding.weight": native[text + "embeddings.token_embedding.weight"],
        "ln_final.weight": native[text + "final_layer_norm.weight"],
        "ln_final.bias": native[text + "final_layer_norm.bias"],
        "logit_scale": torch.ones(()),
        "attn_mask": torch.zeros(77, 77),
        "visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(3, 1),
    }
    if "text_projection.weight" in native:
        result["text_projection"] = native["text_projection.weight"].T
    layers = {name.split(".")[3] for name in native if ".layers." in name}
    pairs = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for layer in layers:
        ours, theirs = f"{text}encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for end in ("weight", "bias"):
            for one, other in pairs.items():
                result[f"{theirs}{other}.{end}"] = native[f"{ours}{one}.{end}"]
            thirds = [native[f"{ours}self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            result[f"{theirs}attn.in_proj_{end}"] = torch.cat(thirds)
    return result
