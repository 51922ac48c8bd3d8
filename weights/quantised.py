"""fp8 weights: which tensors of a file are scales, what they belong to, and what the numbers come to.

Plain fp8 is a number format: a tensor's values are what its bytes stand for. Scaled fp8 keeps one float32 number per
linear layer beside the weight, and the weight is fp8 times scale; biases and norms have none. Two styles are in use,
both ComfyUI's:

    older: `LAYER.scale_weight`, and an empty tensor `scaled_fp8` that marks the file
    newer: `LAYER.weight_scale`, and the format as JSON in the bytes of `LAYER.comfy_quant`, or for all layers in the
           file's metadata under `_quantization_metadata`: {"layers": {LAYER: {"format": "float8_e4m3fn"}}}

Scales of activations (`scale_input`, `input_scale`) serve matrix products in fp8, which this engine does not make.
A scale that is not understood gives wrong pictures and no error, so every unknown one is refused.

References: ComfyUI's QUANTIZATION.md; "FP8 Formats for Deep Learning", 2022 (https://arxiv.org/abs/2209.05433).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.common.jsons import parse_json
from weights.errors import CheckpointError
from weights.files import open_file
from weights.header import DTYPES, TensorInfo

FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # a header's word and the newer style's

_SCALES = ("scale_weight", "weight_scale")
_NOT_NEEDED = ("scale_input", "input_scale")
_OPTIONS = {"format", "full_precision_matrix_mult"}  # the second is about products in fp8 too
_LONGEST_NOTE = 4096  # bytes of a `comfy_quant`; real ones have about 30

# Last parts of names that other ways of quantising leave: NVFP4, GPTQ, AWQ, SVDQuant, bitsandbytes and their kin.
_UNKNOWN = re.compile(r"scale|quant|absmax|zero_point|qzeros|qweight|g_idx|^SCB$|smooth|bitsandbytes|lut$|codebook")

_USE = "use an fp16, bf16, fp8 or GGUF file"


def with_scales(tensors: Mapping[str, TensorInfo], declared: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors that are weights, each scaled one with its scale.

    tensors: of one network, under the names of its file less the prefix; declared: what the file's metadata says of
    its layers. Reads only `comfy_quant` notes. CheckpointError for a format or a scale that is not known, for one
    that does not belong to an fp8 weight, and for a declared layer without its scale.
    """
    weights: dict[str, TensorInfo] = {}
    scales: dict[str, TensorInfo] = {}
    notes, readers = dict(declared), {}
    for key, info in tensors.items():
        layer, _, leaf = key.rpartition(".")
        if leaf in _SCALES:
            _check_scale(info, twice=layer in scales)
            scales[layer] = info
        elif leaf == "comfy_quant":
            notes[layer] = _read_note(info, readers)
        elif leaf not in _NOT_NEEDED:
            if _UNKNOWN.search(leaf):
                raise CheckpointError(f"{info.file}: {info.key}: weights quantised in a way that is not known: {_USE}")
            weights[key] = info
    for layer, note in notes.items():
        if f"{layer}.weight" in weights:
            weights[f"{layer}.weight"] = _declared(weights[f"{layer}.weight"], note, layer in scales)
    for layer, scale in scales.items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or weight.dtype not in FP8:
            what = "there is no such weight" if weight is None else f"{weight.key} is {weight.dtype}"
            raise CheckpointError(f"{scale.file}: {scale.key} should scale an fp8 weight; {what}")
        weights[f"{layer}.weight"] = weight._replace(scale=scale)
    return weights


def declared_layers(path: Path, metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """{layer: what the metadata of the file `path` declares}, without the prefix of the network.

    CheckpointError where the declaration cannot be read.
    """
    text = metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = parse_json(text)["layers"]
        # Written relative to the file or, where the file is one network with a prefix, to the network.
        return {layer.removeprefix(prefix): note for layer, note in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f'{path}: metadata: _quantization_metadata is not {{"layers": {{...}}}}') from None


def decoded_dtype(info: TensorInfo) -> torch.dtype:
    """Of what `decode` returns: float16 holds every fp8 number of either format, a product wants float32."""
    return torch.float16 if info.scale is None else torch.float32


def decode(info: TensorInfo, stored: Tensor, scale: Tensor | None) -> Tensor:
    """The values of an fp8 tensor: float16 as they are, or float32 times `scale`, a tensor of one number.

    stored: fp8, or uint8 with the same bytes. CheckpointError for a scale that is NaN or infinite.
    """
    codes = stored.view(DTYPES[info.dtype])
    if scale is None:
        return codes.to(torch.float16)
    factor = scale.to(torch.float32).reshape(())
    if not bool(factor.isfinite()):
        raise CheckpointError(f"{info.file}: the scale of {info.key} is {float(factor)}: expected a finite number")
    return codes.to(torch.float32).mul_(factor)


def _check_scale(info: TensorInfo, twice: bool) -> None:
    if twice:
        raise CheckpointError(f"{info.file}: {info.key}: its layer has two scales; expected one")
    if info.shape not in ((), (1,)):
        raise CheckpointError(f"{info.file}: {info.key} has the shape {list(info.shape)}: scales of rows or blocks "
                              f"are not known, only one number for each layer: {_USE}")  # fmt: skip
    if info.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{info.file}: {info.key} is {info.dtype}; a scale must be F32, F16 or BF16")


def _read_note(info: TensorInfo, readers: dict[Path, Any]) -> Any:
    """What a `comfy_quant` says; readers: files that are open already, as a model has hundreds of notes."""
    if info.dtype != "U8" or len(info.shape) != 1 or info.shape[0] > _LONGEST_NOTE:
        raise CheckpointError(f"{info.file}: {info.key} is {info.dtype} {list(info.shape)}: expected a few U8 bytes")
    try:
        if info.file not in readers:
            readers[info.file] = open_file(info.file)
        return parse_json(bytes(readers[info.file].get_tensor(info.key).tolist()))
    except Exception as error:  # safetensors' own error, OSError, and what JSON raises have no common class
        raise CheckpointError(f"{info.file}: {info.key}: not JSON: {error}") from None


def _declared(weight: TensorInfo, note: Any, scaled: bool) -> TensorInfo:
    """The weight of a layer that the file says is quantised, checked against what it says."""
    where = f"{weight.file}: {weight.key}"
    form = note.get("format") if isinstance(note, dict) else None
    word = next((word for word, known in FP8.items() if known == form), None)
    if word is None:
        raise CheckpointError(f"{where}: quantised as {form!r}; known are {', '.join(FP8.values())}: {_USE}")
    strange = sorted(set(note) - _OPTIONS)
    if strange:
        raise CheckpointError(f"{where}: quantised with the unknown option {strange[0]!r}: {_USE}")
    if weight.dtype not in (word, "U8"):
        raise CheckpointError(f"{where} is {weight.dtype} and declared as {form}: which is right cannot be told")
    if not scaled:
        raise CheckpointError(f"{where}: declared as {form}, and its weight_scale is missing")
    return weight._replace(dtype=word)
