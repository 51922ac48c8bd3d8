"""Opening checkpoints: which networks a diffusers folder or a single file holds, and under which names.

Opening reads JSON and, for a single file, its header. The files of a folder's component are first touched
when `Checkpoint.component` asks for it, so a 9 GB T5 that nobody uses costs nothing, and may even be broken.
"""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from weights.component import Component
from weights.errors import CheckpointError
from weights.header import TensorInfo, read_header, read_json
from weights.keymap import TRANSFORMER, VAE, Entry, Table, to_native

# Component name: (folder of the diffusers layout, stem of its files, prefix inside a single file).
# The transformer's prefix in a single file varies and is found by content.
_PLACES = {
    "transformer": ("transformer", "diffusion_pytorch_model", None),
    "vae": ("vae", "diffusion_pytorch_model", "first_stage_model."),
    "clip_l": ("text_encoder", "model", "text_encoders.clip_l.transformer."),
    "clip_g": ("text_encoder_2", "model", "text_encoders.clip_g.transformer."),
    "t5": ("text_encoder_3", "model", "text_encoders.t5xxl.transformer."),
}
_TABLES: dict[str, Table] = {"transformer": TRANSFORMER, "vae": VAE}
_VARIANTS = ("", ".fp16", ".bf16")

_NATIVE_MARK = "joint_blocks.0.context_block.attn.qkv.weight"

# Attention weights of the VAE, which some tools store without the trailing ones of a 1x1 convolution.
_MID_CONV = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")

# What trainers and other tools leave in files and no SD3 network reads (see ComfyUI's and
# stable-diffusion.cpp's loaders, which skip the same names).
_IGNORED_STARTS = ("model_ema.", "denoiser.sigmas", "loss.")
_IGNORED_ENDS = ("logit_scale", "scaled_fp8", "embeddings.position_ids", "spiece_model")

_OTHER_MODEL = "this engine runs Stable Diffusion 3 and 3.5 only"
_ADAPTER = "an adapter (LoRA), not a checkpoint; give the model it was trained on, and this with --lora"
_ALONE = "alone; give a file or folder with the transformer"

# What a file without an SD3 transformer turns out to be: (part of a key, what to tell the user).
_STRANGERS = (
    ("double_blocks.0.", f"a FLUX model; {_OTHER_MODEL}"),
    ("single_transformer_blocks.0.", f"a FLUX model; {_OTHER_MODEL}"),
    ("model.diffusion_model.input_blocks.", f"an SD1, SD2 or SDXL model; {_OTHER_MODEL}"),
    ("controlnet_blocks.", "a ControlNet, not a checkpoint; give the model it belongs to"),
    ("lora_A.", _ADAPTER),
    ("lora_down.", _ADAPTER),
    (
        "transformer_blocks.0.attn.add_q_proj.weight",
        "a diffusers transformer alone; give the whole folder, the one with model_index.json",
    ),
    ("encoder.layers.0.self_attn.", f"a CLIP text encoder {_ALONE}"),
    ("encoder.block.0.layer.0.SelfAttention.", f"a T5 text encoder {_ALONE}"),
    ("decoder.conv_in.", f"a VAE {_ALONE}"),
)


@dataclass(kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    path: the folder or file; components: names of the networks it holds, of "transformer", "vae", "clip_l",
    "clip_g", "t5"; tokenizers: the folder with tokenizer/, tokenizer_2/ and tokenizer_3/, or None; scheduler:
    scheduler_config.json or None; defaults: the model's own settings from an optional mmdit.json, else {}.
    """

    path: Path
    components: tuple[str, ...]
    tokenizers: Path | None = None
    scheduler: dict[str, Any] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    _open: Callable[[str], Component] = field(repr=False)
    _opened: dict[str, Component] = field(default_factory=dict, repr=False)

    def has(self, name: str) -> bool:
        """Whether the network is there; touches no file."""
        return name in self.components

    def component(self, name: str) -> Component:
        """The network of this name, its headers read and checked now if they were not before.

        CheckpointError if it is absent or its files cannot be used.
        """
        if name not in _PLACES:
            raise ValueError(f"no component {name!r}: one of {', '.join(_PLACES)}")
        if name not in self.components:
            raise CheckpointError(f"{self.path}: has no {name} (has {', '.join(self.components) or 'nothing'})")
        if name not in self._opened:
            self._opened[name] = self._open(name)
        return self._opened[name]

    def config(self, name: str) -> dict[str, Any] | None:
        """The component's config.json, or None (always None in a single file); reads no weights."""
        config = self.path / _PLACES[name][0] / "config.json"
        return read_json(config) if self.has(name) and self.path.is_dir() and config.exists() else None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a diffusers folder or a single safetensors file of Stable Diffusion 3 or 3.5.

    Reads no tensor. CheckpointError, naming what would be right, for anything else.
    """
    try:
        path = Path(path).expanduser()
        folder = path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return _open_folder(path) if folder else _open_single_file(path)


# ---- diffusers folder ----------------------------------------------------------------------------


def _open_folder(path: Path) -> Checkpoint:
    index_path = path / "model_index.json"
    if not index_path.exists():
        raise CheckpointError(f"{path}: no model_index.json; expected a diffusers folder (model_index.json, "
                              "transformer/, vae/, ...) or a single .safetensors file")  # fmt: skip
    index = read_json(index_path)
    pipeline = str(index.get("_class_name", "?"))
    if not pipeline.startswith("StableDiffusion3"):
        raise CheckpointError(f"{index_path}: made for {pipeline}; this engine runs StableDiffusion3Pipeline folders")
    scheduler = path / "scheduler" / "scheduler_config.json"
    defaults = path / "mmdit.json"
    return Checkpoint(
        path=path,
        components=tuple(name for name in _PLACES if _listed(index, path, _PLACES[name][0])),
        tokenizers=path if (path / "tokenizer").is_dir() else None,
        scheduler=read_json(scheduler) if scheduler.exists() else None,
        defaults=read_json(defaults) if defaults.exists() else {},
        _open=lambda name: _open_folder_component(path, name),
    )


def _listed(index: dict[str, Any], path: Path, folder: str) -> bool:
    """Whether the folder is there and the index has it; [null, null] is how diffusers writes "left out"."""
    entry = index.get(folder)
    return isinstance(entry, list) and any(e is not None for e in entry) and (path / folder).is_dir()


def _open_folder_component(path: Path, name: str) -> Component:
    folder, stem, _ = _PLACES[name]
    folder = path / folder
    tensors = _folder_tensors(folder, stem)
    config = folder / "config.json"
    return _component(name, folder, tensors, read_json(config) if config.exists() else None, diffusers=True)


def _folder_tensors(folder: Path, stem: str) -> dict[str, TensorInfo]:
    """Headers of a component folder: `stem.safetensors`, else its index's shards; then fp16, bf16."""
    for variant in _VARIANTS:
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.exists():
            return read_header(whole)
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.exists():
            return _sharded(index)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    only = f" (only {pickles[0]}: pickles are never opened)" if pickles else ""
    raise CheckpointError(f"{folder}: no {stem}.safetensors and no {stem}.safetensors.index.json{only}")


def _sharded(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f'{index}: expected "weight_map": {{tensor name: shard file name}}')
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        # A name that is a path could read any file of the machine; links stay allowed, download caches use
        # them.
        if shard in ("", ".", "..") or PurePosixPath(shard).name != shard or PureWindowsPath(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is not a plain file name beside the index")
        if not (index.parent / shard).exists():
            raise CheckpointError(f"{index}: lists the shard {shard}, which is missing")
        shards[shard] = read_header(index.parent / shard)
    for key, shard in weight_map.items():
        if key not in shards[shard]:
            raise CheckpointError(f"{index}: {key} should be in {shard} and is not")
    return {key: shards[shard][key] for key, shard in weight_map.items()}


# ---- single file ---------------------------------------------------------------------------------


def _open_single_file(path: Path) -> Checkpoint:
    tensors = {key: info for key, info in read_header(path).items() if not _is_ignored(key)}
    prefixes = {name: place[2] for name, place in _PLACES.items()} | {"transformer": _prefix(path, tensors)}
    groups: dict[str, dict[str, TensorInfo]] = {}
    strangers = []
    # Longest prefix first: the transformer's may be empty and would take every key.
    order = sorted(prefixes, key=lambda name: -len(prefixes[name] or ""))
    for key, info in tensors.items():
        owner = next((name for name in order if key.startswith(prefixes[name] or "")), None)
        if owner is None:
            strangers.append(key)
        else:
            groups.setdefault(owner, {})[key[len(prefixes[owner] or "") :]] = info
    if strangers:
        warnings.warn(f"{path}: ignoring {len(strangers)} unknown tensors, the first is {strangers[0]}", stacklevel=3)
    return Checkpoint(
        path=path,
        components=tuple(name for name in _PLACES if name in groups),
        _open=lambda name: _component(name, path, groups[name], None, diffusers=False),
    )


def _prefix(path: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """What stands before the transformer's native names; CheckpointError naming what the file is if none."""
    found = [key.removesuffix(_NATIVE_MARK) for key in tensors if key.endswith(_NATIVE_MARK)]
    if found:
        return min(found, key=len)
    what = next((text for mark, text in _STRANGERS if any(mark in key for key in tensors)), None)
    raise CheckpointError(f"{path}: {what}" if what else f"{path}: no SD3 transformer: no key ends in {_NATIVE_MARK}")


# ---- both ----------------------------------------------------------------------------------------


def _is_ignored(key: str) -> bool:
    return key.startswith(_IGNORED_STARTS) or key.endswith(_IGNORED_ENDS)


def _component(
    name: str, path: Path, tensors: Mapping[str, TensorInfo], config: dict[str, Any] | None, diffusers: bool
) -> Component:
    keys = [key for key in tensors if not _is_ignored(key)]
    if name in _TABLES and diffusers:
        entries = to_native(keys, _TABLES[name])
    elif name in _TABLES:
        entries = {key: Entry((key,), "conv1x1" if _MID_CONV.fullmatch(key) else "copy") for key in keys}
    elif name == "t5":
        entries = _t5_entries(keys)
    else:
        entries = {_clip_name(key): Entry((key,), "copy") for key in keys}
        if name == "clip_l" and not diffusers:
            # Stability's code never applies CLIP-L's projection; files that have one come from other tools.
            entries.pop("text_projection.weight", None)
    return Component(name, path, tensors, entries, config)


def _clip_name(key: str) -> str:
    """transformers 5.6 dropped the `text_model.` of a CLIPTextModel; published files have it."""
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def _t5_entries(keys: list[str]) -> dict[str, Entry]:
    """The encoder's half of a T5; its embedding is stored as `shared`, `encoder.embed_tokens`, or both."""
    shared, alias = "shared.weight", "encoder.embed_tokens.weight"
    entries = {key: Entry((key,), "copy") for key in keys if not key.startswith(("decoder.", "lm_head."))}
    if alias in entries:
        entries.setdefault(shared, entries.pop(alias))
    return entries
