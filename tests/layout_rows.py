"""Every row of the README's table of layouts: the files of a model in that layout, and what they are to be called."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forms import (
    E4M3,
    E5M2,
    WORDS,
    decoded,
    llama_cpp,
    mixed,
    mixture,
    open_clip,
    scaled,
    unscaled,
    write_gguf,
    write_gguf_holes,
)
from gguf import GGMLQuantizationType as Type
from layouts import PARTS, Tensors, joined, write
from torch import Tensor

from weights import published
from weights.keymap import TRANSFORMER, VAE, convert, revert, to_diffusers, to_native
from weights.published import FOLDERS, PREFIXES, STEMS

Parts = Mapping[str, Tensors]  # {component: {native name: tensor}}; on "meta" where files are only to be described
NO_PREFIX = dict.fromkeys(PARTS, "")


class Written(NamedTuple):
    """The files of a row: what is given to the command line, and what the weights in them come to."""

    path: Path
    values: Parts


@dataclass(frozen=True)
class Row:
    """One layout.

    name: in the README; make: writes the parts into a new folder; parts: those in what it wrote; layout, prefixes:
    whose names, and what stands before them, where it is not the published one; form, quantised, model: what
    `inspect` says.
    """

    name: str
    make: Callable[[Path, Parts], Written]
    parts: tuple[str, ...]
    layout: Mapping[str, str] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=lambda: NO_PREFIX)
    form: str = "safetensors"
    quantised: tuple[str, ...] = ()
    model: str = "SD3.5-Medium"


# ---- single files --------------------------------------------------------------------------------


def alone(prefix: str) -> Callable[[Path, Parts], Written]:
    def make(folder: Path, parts: Parts) -> Written:
        tensors = {prefix + name: tensor for name, tensor in parts["transformer"].items()}
        return Written(write(folder / "file", tensors), parts)

    return make


def diffusers_names(tensors: Tensors, name: str) -> Tensors:
    """A component under diffusers' names; text encoders have the same everywhere."""
    if name not in ("transformer", "vae"):
        return tensors
    entries = to_diffusers(tensors, TRANSFORMER if name == "transformer" else VAE)
    return {key: revert(entry, tensors[entry.sources[0]]) for key, entry in entries.items()}


def native_names(tensors: Tensors) -> Tensors:
    """A transformer of diffusers' names under Stability's."""
    entries = to_native(tensors, TRANSFORMER)
    return {key: convert(entry.op, [tensors[name] for name in entry.sources]) for key, entry in entries.items()}


def renamed(name: str, change: Callable[[Tensors], Tensors]) -> Callable[[Path, Parts], Written]:
    """One part in a file of its own, under other names."""

    def make(folder: Path, parts: Parts) -> Written:
        return Written(write(folder / "file", change(parts[name])), parts)

    return make


def single(*names: str, **dtypes: torch.dtype) -> Callable[[Path, Parts], Written]:
    """These parts in one file, some in other number formats."""

    def make(folder: Path, parts: Parts) -> Written:
        stored = {name: cast(parts[name], dtypes[name]) if name in dtypes else parts[name] for name in names}
        plain = {name: cast(tensors, torch.float32) for name, tensors in stored.items()}
        return Written(write(folder / "file", joined(stored)), {**parts, **plain})

    return make


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def comfyui(folder: Path, parts: Parts) -> Written:
    """As its checkpoint node saves: T5 in scaled fp8, CLIP-L with an identity, a scale of no use in every encoder."""
    t5, _ = scaled(parts["t5"], "older", prefix=PREFIXES["t5"])
    tensors = joined({name: tensors for name, tensors in parts.items() if name != "t5"}) | t5
    width = parts["clip_l"]["text_model.final_layer_norm.weight"].shape[0]
    tensors[PREFIXES["clip_l"] + "text_projection.weight"] = torch.eye(width)
    for encoder in ("clip_l", "clip_g", "t5xxl"):
        tensors[f"text_encoders.{encoder}.logit_scale"] = torch.ones(())
    return Written(write(folder / "file", tensors), {**parts, "t5": unscaled(t5, PREFIXES["t5"])})


def fp8(name: str, style: str, dtype: torch.dtype = E4M3, prefix: str = "") -> Callable[[Path, Parts], Written]:
    """One part in fp8 with a scale for every linear layer, in one of ComfyUI's styles; or plain."""

    def make(folder: Path, parts: Parts) -> Written:
        stored, metadata = scaled(parts[name], style, dtype, prefix) if style else (cast(parts[name], dtype), {})
        return Written(write(folder / "file", stored, metadata or None), {**parts, name: unscaled(stored, prefix)})

    return make


def both_embeddings(t5: Tensors) -> Tensors:
    return {**t5, "encoder.embed_tokens.weight": t5["shared.weight"]}


def only_alias(t5: Tensors) -> Tensors:
    return {"encoder.embed_tokens.weight" if name == "shared.weight" else name: t for name, t in t5.items()}


def bare_clip(clip: Tensors) -> Tensors:
    """As transformers 5.6 and ComfyUI write it: without `text_model.`, the projection as it is multiplied."""
    names = {name: name.removeprefix("text_model.") for name in clip if name != "text_projection.weight"}
    projection = clip.get("text_projection.weight")
    return {new: clip[name] for name, new in names.items()} | (
        {} if projection is None else {"text_projection": projection.T}
    )


def old_vae(vae: Tensors) -> Tensors:
    """Names of diffusers before 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in diffusers_names(vae, "vae").items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        tensors[name] = tensor
    return tensors


# ---- folders -------------------------------------------------------------------------------------


def folder(
    variant: str = "", index: str = "", absent: str = "", null: str = "", dtype: torch.dtype | None = None,
    scaled_fp8: bool = False,
) -> Callable[[Path, Parts], Written]:  # fmt: skip
    """A diffusers folder.

    index: name of the index, with its stem in the place of {0}, where every part is cut in three; absent: a part whose
    folder is not there; null: one that model_index.json says was left out; scaled_fp8: the transformer is.
    """

    def make(root: Path, parts: Parts) -> Written:
        parts = {name: cast(tensors, dtype) if dtype else tensors for name, tensors in parts.items()}
        there = [name for name in parts if name not in (absent, null)]
        for name in there:
            place, stem = root / FOLDERS[name], STEMS[name]
            place.mkdir()
            tensors = dict(parts[name])
            if name == "clip_l":
                like = tensors["text_model.final_layer_norm.weight"]
                width = like.shape[0]
                identity = torch.eye(width, dtype=like.dtype)
                tensors["text_projection.weight"] = identity.to("meta") if like.is_meta else identity
            published.write_json(place / "config.json", config(name, tensors))
            stored = diffusers_names(tensors, name)
            if name == "transformer" and scaled_fp8:
                stored, _ = scaled(stored, "older")
                parts[name] = native_names(unscaled(stored))
            if index:
                shard(place, stem, variant, index, stored)
            else:
                write(place / f"{stem}{variant}.safetensors", stored)
        published.write_pipeline_files(root, [name for name in parts if name != null], None, None)
        return Written(root, {name: cast(tensors, torch.float32) for name, tensors in parts.items()})

    return make


def config(name: str, tensors: Tensors) -> dict[str, Any]:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    kinds = {"transformer": published.transformer_config, "vae": published.vae_config, "t5": published.t5_config}
    return kinds.get(name, published.clip_config)(shapes)


def shard(folder: Path, stem: str, variant: str, index: str, tensors: Tensors, count: int = 3) -> None:
    """These tensors in shards with an index of this name."""
    weight_map = {}
    for i in range(count):
        name = f"{stem}{variant}-{i + 1:05d}-of-{count:05d}.safetensors"
        own = dict(list(tensors.items())[i::count])
        write(folder / name, own)
        weight_map |= dict.fromkeys(own, name)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / index.format(stem, variant)).write_text(text)


# ---- GGUF ----------------------------------------------------------------------------------------


def ggml(
    *names: str, kind: Type = Type.Q8_0, rest: Type = Type.F16, prefixes: Mapping[str, str] = NO_PREFIX,
    change: Callable[[Tensors], Tensors] = dict, arch: str = "sd3",
) -> Callable[[Path, Parts], Written]:  # fmt: skip
    """These parts in one GGUF file, under other names where `change` gives them."""

    def make(folder: Path, parts: Parts) -> Written:
        tensors = change(joined({name: parts[name] for name in names}, prefixes))
        if any(tensor.is_meta for tensor in tensors.values()):
            kinds = mixture(tensors, kind, rest)
            stored = {name: (tuple(tensor.shape), kinds[name]) for name, tensor in tensors.items()}
            return Written(write_gguf_holes(folder / "file", stored, arch), parts)
        codes = mixed(tensors, kind, rest)
        keys = iter(decoded(codes).values())  # in the order of the native names
        values = {name: {native: next(keys) for native in parts[name]} for name in names}
        return Written(write_gguf(folder / "file", codes, arch), {**parts, **values})

    return make


# ---- other models of the family ------------------------------------------------------------------


def without_dual(tensors: Tensors, norm: bool) -> Tensors:
    """A Medium's transformer made one without dual attention, as SD3.5-Large's, or without query-key norm too."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn2." in name or (not norm and (".ln_q." in name or ".ln_k." in name)):
            continue
        dual = f"{name.split('x_block')[0]}x_block.attn2.qkv.weight" in tensors
        if "x_block.adaLN_modulation" in name and dual:
            tensor = tensor[: len(tensor) // 9 * 6]
        kept[name] = tensor
    return kept


# ---- the table -----------------------------------------------------------------------------------

CLIPS = ("transformer", "vae", "clip_l", "clip_g")
PUBLISHED = {name: PREFIXES[name] for name in PARTS}
OLDER, NOTES, METADATA = (
    "scaled, the older style (scale_weight)",
    "scaled, the newer style (weight_scale, comfy_quant)",
    "scaled, the newer style (weight_scale, metadata)",
)
NATIVE = "Stability's names"
ROWS = (
    *(
        Row(f"single file: transformer alone, {NATIVE}, any prefix or none", alone(prefix), ("transformer",),
            prefixes={"transformer": prefix})
        for prefix in ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
    ),
    Row("single file: transformer alone, diffusers' names",
        renamed("transformer", lambda t: diffusers_names(t, "transformer")), ("transformer",),
        {"transformer": "diffusers"}),
    Row("single file: with autoencoder", single(*PARTS[:2]), PARTS[:2], prefixes=PUBLISHED),
    Row("single file: with autoencoder and CLIPs", single(*CLIPS), CLIPS, prefixes=PUBLISHED),
    Row("single file: with T5 in float16 too", single(*PARTS, t5=torch.float16), PARTS, prefixes=PUBLISHED),
    *(Row("single file: with T5 in plain fp8", single(*PARTS, t5=dtype), PARTS, prefixes=PUBLISHED,
          quantised=(f"{WORDS[dtype]}, plain",)) for dtype in (E4M3, E5M2)),
    Row("single file: ComfyUI's all-in-one, T5 in scaled fp8", comfyui, PARTS, prefixes=PUBLISHED,
        quantised=(f"float8_e4m3fn, {OLDER}",)),
    *(Row("single file: transformer in plain fp8, e4m3fn or e5m2", fp8("transformer", "", dtype), ("transformer",),
          quantised=(f"{WORDS[dtype]}, plain",)) for dtype in (E4M3, E5M2)),
    *(Row("single file: transformer in scaled fp8, ComfyUI's older style", fp8("transformer", "older", dtype, prefix),
          ("transformer",), quantised=(f"{WORDS[dtype]}, {OLDER}",), prefixes={"transformer": prefix})
      for dtype, prefix in ((E4M3, "model.diffusion_model."), (E5M2, ""))),
    *(Row("single file: transformer in scaled fp8, ComfyUI's newer style, noted in tensors or metadata",
          fp8("transformer", style, dtype), ("transformer",), quantised=(f"{WORDS[dtype]}, {told}",))
      for style, told in (("notes", NOTES), ("metadata", METADATA)) for dtype in (E4M3, E5M2)),
    *(Row("separate CLIP-L, CLIP-G: Hugging Face's names, with `text_model.` or without", renamed(name, change),
          (name,), {name: "transformers"})
      for name in ("clip_l", "clip_g") for change in (dict, bare_clip)),
    *(Row("separate CLIP-L, CLIP-G: OpenCLIP's names", renamed(name, open_clip), (name,), {name: "openclip"})
      for name in ("clip_l", "clip_g")),
    *(Row("separate T5: one embedding, its alias, or both", renamed("t5", change), ("t5",), {"t5": "transformers"})
      for change in (dict, only_alias, both_embeddings)),
    *(Row("separate T5 in plain or scaled fp8", fp8("t5", style), ("t5",), {"t5": "transformers"},
          quantised=(f"float8_e4m3fn, {told}",))
      for style, told in (("", "plain"), ("older", OLDER), ("notes", NOTES), ("metadata", METADATA))),
    Row(f"separate autoencoder: {NATIVE}", renamed("vae", dict), ("vae",)),
    *(Row("separate autoencoder: diffusers' names, today's or of old", renamed("vae", change), ("vae",),
          {"vae": "diffusers"}) for change in (lambda t: diffusers_names(t, "vae"), old_vae)),
    Row("diffusers folder", folder(), PARTS, form="diffusers folder"),
    Row("diffusers folder: sharded", folder(index="{0}.safetensors.index.json"), PARTS, form="diffusers folder"),
    *(Row("diffusers folder: fp16 or bf16 variant", folder(f".{word}", dtype=dtype), PARTS, form="diffusers folder")
      for word, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))),
    *(Row("diffusers folder: variant in shards, either spelling of the index", folder(f".{word}", index, dtype=dtype),
          PARTS, form="diffusers folder")
      for word, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))
      for index in ("{0}.safetensors.index{1}.json", "{0}{1}.safetensors.index.json")),
    Row("diffusers folder: `text_encoder_3` [null, null]", folder(null="t5"), CLIPS, form="diffusers folder"),
    *(Row("diffusers folder: without an encoder or the autoencoder", folder(absent=name),
          tuple(p for p in PARTS if p != name), form="diffusers folder") for name in PARTS[1:]),
    Row("diffusers folder: transformer in scaled fp8", folder(scaled_fp8=True), PARTS, form="diffusers folder",
        quantised=(f"float8_e4m3fn, {OLDER}",)),
    *(Row("GGUF: transformer, city96's names", ggml("transformer", kind=kind, rest=rest), ("transformer",), form="gguf",
          quantised=() if kind == Type.BF16 else (f"GGUF {kind.name}",))
      for kind, rest in ((Type.Q8_0, Type.F16), (Type.Q4_0, Type.F32), (Type.Q5_1, Type.BF16), (Type.BF16, Type.F32))),
    Row("GGUF: transformer, stable-diffusion.cpp's names", ggml("transformer", kind=Type.Q5_0, prefixes=PUBLISHED),
        ("transformer",), prefixes=PUBLISHED, form="gguf", quantised=("GGUF Q5_0",)),
    Row("GGUF: all in one, stable-diffusion.cpp's names", ggml(*PARTS, prefixes=PUBLISHED), PARTS, prefixes=PUBLISHED,
        form="gguf", quantised=("GGUF Q8_0",)),
    Row("GGUF: T5, llama.cpp's names", ggml("t5", change=llama_cpp, arch="t5encoder"), ("t5",), {"t5": "llama.cpp"},
        form="gguf", quantised=("GGUF Q8_0",)),
    Row("GGUF: T5, Hugging Face's names", ggml("t5", kind=Type.Q4_1), ("t5",), {"t5": "transformers"}, form="gguf",
        quantised=("GGUF Q4_1",)),
    *(Row(f"{model}: single file, diffusers folder, GGUF", make, parts, prefixes=prefixes, form=form, model=model,
          quantised=quantised)
      for model in ("SD3-Medium", "SD3.5-Large")
      for make, parts, prefixes, form, quantised in (
          (single(*PARTS), PARTS, PUBLISHED, "safetensors", ()),
          (folder(), PARTS, NO_PREFIX, "diffusers folder", ()),
          (ggml("transformer"), ("transformer",), NO_PREFIX, "gguf", ("GGUF Q8_0",)),
      )),
)  # fmt: skip
