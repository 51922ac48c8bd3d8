"""Opening checkpoints: which networks a diffusers folder or a single file holds, and under which names.

Opening reads JSON and, for a single file, its header. The files of a folder's component, and separate files, are first
touched when `Checkpoint.component` asks for them, so a 9 GB T5 that nobody uses costs nothing, and may even be broken.
"""

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmdit.common.errors import one_line
from mmdit.common.jsons import read_json
from weights.component import Component
from weights.errors import CheckpointError
from weights.files import read_file
from weights.header import Header, TensorInfo, read_safetensors
from weights.kinds import COMPONENTS, WHAT, Network, described, networks, refuse_strangers, split
from weights.layouts import is_ignored, native_entries
from weights.quantised import declared_layers, with_scales

# Component name: (folder of the diffusers layout, stem of its files).
PLACES = {
    "transformer": ("transformer", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "clip_l": ("text_encoder", "model"),
    "clip_g": ("text_encoder_2", "model"),
    "t5": ("text_encoder_3", "model"),
}
_VARIANTS = ("", ".fp16", ".bf16")


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
    _parts: Mapping[str, Path] = field(default_factory=dict)  # separate files
    _opened: dict[str, Component] = field(default_factory=dict, repr=False)

    def has(self, name: str) -> bool:
        """Whether the network is there; touches no file."""
        return name in self.components

    def component(self, name: str) -> Component:
        """The network of this name, its headers read and checked now if they were not before.

        CheckpointError if it is absent or its files cannot be used.
        """
        if name not in COMPONENTS:
            raise ValueError(f"no component {name!r}: one of {', '.join(COMPONENTS)}")
        if name not in self.components:
            raise CheckpointError(f"{self.path}: has no {name} (has {', '.join(self.components) or 'nothing'})")
        if name not in self._opened:
            part = self._parts.get(name)
            self._opened[name] = open_part(part, name) if part else self._open(name)
        return self._opened[name]

    def config(self, name: str) -> dict[str, Any] | None:
        """The component's config.json, or None (always None in single and separate files); reads no weights."""
        config = self.path / PLACES[name][0] / "config.json"
        own = self.has(name) and name not in self._parts and self.path.is_dir()
        return read_json(config, CheckpointError) if own and config.exists() else None


def open_checkpoint(path: str | os.PathLike[str], parts: Mapping[str, Path] | None = None) -> Checkpoint:
    """Open a diffusers folder or a single safetensors or GGUF file of Stable Diffusion 3 or 3.5.

    parts: {component: separate file}, each in the place of what the checkpoint itself brings; opened, and its content
    checked, when `Checkpoint.component` asks for it.

    Reads no tensor. CheckpointError, naming what would be right, for anything else.
    """
    try:
        path = Path(path).expanduser()
        parts = {name: Path(part).expanduser() for name, part in (parts or {}).items()}
        folder = path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    checkpoint = _open_folder(path) if folder else _open_single_file(path)
    there = tuple(name for name in COMPONENTS if name in checkpoint.components or name in parts)
    return replace(checkpoint, components=there, _parts=parts)


# ---- diffusers folder ----------------------------------------------------------------------------


def _open_folder(path: Path) -> Checkpoint:
    index_path = path / "model_index.json"
    if not index_path.exists():
        raise CheckpointError(f"{path}: no model_index.json; expected a diffusers folder (model_index.json, "
                              "transformer/, vae/, ...) or a single .safetensors file")  # fmt: skip
    index = read_json(index_path, CheckpointError)
    pipeline = str(index.get("_class_name", "?"))
    if not pipeline.startswith("StableDiffusion3"):
        raise CheckpointError(f"{index_path}: made for {pipeline}; this engine runs StableDiffusion3Pipeline folders")
    scheduler = path / "scheduler" / "scheduler_config.json"
    defaults = path / "mmdit.json"
    return Checkpoint(
        path=path,
        components=tuple(name for name in COMPONENTS if _listed(index, path, PLACES[name][0])),
        tokenizers=path if (path / "tokenizer").is_dir() else None,
        scheduler=read_json(scheduler, CheckpointError) if scheduler.exists() else None,
        defaults=read_json(defaults, CheckpointError) if defaults.exists() else {},
        _open=lambda name: _open_folder_component(path, name),
    )


def _listed(index: dict[str, Any], path: Path, folder: str) -> bool:
    """Whether the folder is there and the index has it; [null, null] is how diffusers writes "left out"."""
    entry = index.get(folder)
    return isinstance(entry, list) and any(e is not None for e in entry) and (path / folder).is_dir()


def _open_folder_component(path: Path, name: str) -> Component:
    folder, stem = path / PLACES[name][0], PLACES[name][1]
    header = folder_header(folder, stem)
    config = folder / "config.json"
    return component_of(
        Network(name, "diffusers", ""), name, folder, header.tensors, header.metadata,
        read_json(config, CheckpointError) if config.exists() else None,
    )  # fmt: skip


def weights_file(names: Collection[str], stem: str) -> str | None:
    """Which of a component folder's files to open: whole or index; plain, else fp16, else bf16. None: none is there.

    An index with a variant is spelled `stem.safetensors.index.fp16.json` or `stem.fp16.safetensors.index.json`.
    """
    for variant in _VARIANTS:
        whole, index = f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"
        for name in (whole, index, f"{whole}.index.json"):
            if name in names:
                return name
    return None


def folder_header(folder: Path, stem: str) -> Header:
    names = sorted(file.name for file in folder.iterdir())
    name = weights_file(names, stem)
    if name is None:
        pickles = [name for name in names if name.endswith(".bin")]
        only = f" (only {pickles[0]}: pickles are never opened)" if pickles else ""
        raise CheckpointError(f"{folder}: no {stem}.safetensors and no {stem}.safetensors.index.json{only}")
    return _sharded(folder / name) if name.endswith(".json") else read_safetensors(folder / name)


def _sharded(index: Path) -> Header:
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f'{index}: expected "weight_map": {{tensor name: shard file name}}')
    there = {file.name for file in index.parent.iterdir()}
    shards: dict[str, dict[str, TensorInfo]] = {}
    metadata: dict[str, Any] = {}
    for shard in dict.fromkeys(weight_map.values()):
        # A name that is a path could read any file of the machine; links stay allowed, download caches use
        # them.
        if shard in ("", ".", "..") or PurePosixPath(shard).name != shard or PureWindowsPath(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is not a plain file name beside the index")
        if shard not in there:
            raise CheckpointError(f"{index}: lists the shard {shard}, which is missing")
        shards[shard], more = read_safetensors(index.parent / shard)
        metadata |= more
    for key, shard in weight_map.items():
        if key not in shards[shard]:
            raise CheckpointError(f"{index}: {key} should be in {shard} and is not")
    return Header({key: shards[shard][key] for key, shard in weight_map.items()}, metadata)


# ---- single and separate files -------------------------------------------------------------------


def _open_single_file(path: Path) -> Checkpoint:
    header, found = _open_file(path)
    if "transformer" not in found:
        what = described(found, header.tensors)
        alone = f"{what} alone; give a file or folder with the transformer" if found else what
        raise CheckpointError(f"{path}: {alone}")
    groups, strangers = split(header.tensors, found)
    if strangers:
        told = f"{path}: ignoring {len(strangers)} unknown tensors, the first is {strangers[0]}"
        warnings.warn(one_line(told), stacklevel=3)
    return Checkpoint(
        path=path,
        components=tuple(name for name in COMPONENTS if name in found),
        _open=lambda name: component_of(found[name], name, path, groups[name], header.metadata, None),
    )


def open_part(path: Path, name: str) -> Component:
    """The component `name` out of a separate file, which may hold others too; refused where it is not in it."""
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder; expected a file with {WHAT[name]}")
    header, found = _open_file(path)
    # The number of its layers tells a published CLIP; one of another size is taken at the user's word.
    key = name if name in found or not name.startswith("clip") else "clip"
    if key not in found:
        raise CheckpointError(f"{path}: {described(found, header.tensors)}; expected {WHAT[name]}")
    tensors = split(header.tensors, found)[0][key]
    return component_of(found[key], name, path, tensors, header.metadata, None)


def _open_file(path: Path) -> tuple[Header, dict[str, Network]]:
    header = read_file(path)
    tensors = {key: info for key, info in header.tensors.items() if not is_ignored(key)}
    refuse_strangers(path, tensors)
    return Header(tensors, header.metadata), networks(tensors)


# ---- both ----------------------------------------------------------------------------------------


def component_of(
    network: Network,
    name: str,
    path: Path,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, Any],
    config: dict[str, Any] | None,
) -> Component:
    """A network of the tensors of a file or a folder, by their names behind the prefix."""
    tensors = {key: info for key, info in tensors.items() if not is_ignored(key)}
    weights = with_scales(tensors, declared_layers(path, metadata, network.prefix))
    entries = native_entries(name, network.layout, weights)
    return Component(name, path, weights, entries, config, network.layout, network.prefix)
