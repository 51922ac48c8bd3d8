"""The transformer or the T5 of a checkpoint as a GGUF file: blocks quantised, names as people publish them.

    python -m benchmarks.quantise FILE.safetensors OUT.gguf --part transformer --type Q8_0

city96's names for the transformer (Stability's, without a prefix), llama.cpp's for T5. Matrices of the blocks whose
rows divide into the type's blocks are quantised by the package `gguf`; of the rest vectors are F32, everything else is
BF16, as city96's converter makes of a BF16 checkpoint. Tensors go one by one, so that any size needs little memory.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from weights import Component, open_checkpoint

ARCHITECTURES = {"transformer": "sd3", "t5": "t5encoder"}
TYPES = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # of those published, what the package can make

# Part of a T5 tensor's name in transformers: the same in llama.cpp.
_LLAMA_CPP = {
    "encoder.block.": "enc.blk.",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.SelfAttention.": "attn_",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
}


def llama_cpp(name: str) -> str:
    """A T5 tensor's name in llama.cpp, from that in transformers."""
    for ours, theirs in _LLAMA_CPP.items():
        name = name.replace(ours, theirs)
    return name


def kind_of(name: str, shape: tuple[int, ...], kind: Type) -> Type:
    """The type of a tensor, native name, in a file of this type."""
    inside = name.startswith(("joint_blocks.", "encoder.block.")) and "relative_attention_bias" not in name
    if inside and len(shape) == 2 and shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    return Type.F32 if len(shape) == 1 else Type.BF16


def coded(tensor: Tensor, kind: Type) -> np.ndarray:
    """The tensor's numbers in this type."""
    return gguf.quants.quantize(tensor.float().numpy(), kind)


def quantise(component: Component, out: Path, kind: Type) -> None:
    """Write the component, "transformer" or "t5", to `out`."""
    kinds = {name: kind_of(name, shape, kind) for name, shape in component.shapes.items()}
    names = {name: llama_cpp(name) if component.name == "t5" else name for name in kinds}
    writer = gguf.GGUFWriter(out, ARCHITECTURES[component.name])
    for name, own in kinds.items():
        stored, size = _stored(component.shapes, name, own)
        writer.add_tensor_info(names[name], stored, size, int(np.prod(stored)) * size.itemsize, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, own in kinds.items():
        writer.write_tensor_data(coded(component.read(name), own))
    writer.close()


def _stored(shapes: Mapping[str, tuple[int, ...]], name: str, kind: Type) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of what `coded` gives: bytes for all types but two."""
    shape = shapes[name]
    if kind in (Type.F32, Type.F16):
        return shape, np.dtype(np.float32 if kind == Type.F32 else np.float16)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // block * size), np.dtype(np.uint8)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that has the part")
    parser.add_argument("out", type=Path, help="GGUF file to write")
    parser.add_argument("--part", choices=ARCHITECTURES, required=True)
    parser.add_argument("--type", choices=TYPES, default="Q8_0")
    args = parser.parse_args()
    quantise(open_checkpoint(args.checkpoint).component(args.part), args.out, Type[args.type])


if __name__ == "__main__":
    main()
